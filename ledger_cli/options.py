"""What commands have in common: how they are declared, their filters, and how they open the ledger."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import click

from ledger import SqliteStore, UsageError
from ledger_ops.reader import AnyStore, Reader, open_ledger, open_store
from ledger_ops.reader import reader_of as looking_at
from ledger_ops.values import STATES, Filter, parse_span, parse_time

Function = TypeVar("Function", bound=Callable[..., Any])
_ALIASES = {"doubt": "in_doubt", "in-doubt": "in_doubt"}


class Explained(click.Command):
    """A command whose help has examples and, where they are special, exit codes and the form of its JSON."""

    examples: Sequence[str] = ()
    json_form = ""
    codes = ""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What comes after the options."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Examples"):
            formatter.write("".join(f"{' ' * formatter.current_indent}{line}\n" for line in self.examples))
        for title, text in (("JSON", self.json_form), ("Exit codes", self.codes)):
            if text:
                with formatter.section(title):
                    formatter.write_text(text)


class Command(Explained):
    """One that says so where it is declared."""

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), json_form: str = "", codes: str = "", **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.examples, self.json_form, self.codes = tuple(examples), json_form, codes


def command(
    name: str, *, examples: Sequence[str], json_form: str = "", codes: str = "", **settings: Any
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command; `examples` are whole command lines."""

    def made(function: Callable[..., Any]) -> Command:
        decorate = click.command(
            name, cls=Command, examples=examples, json_form=json_form, codes=codes, **settings
        )
        return decorate(function)

    return made


def _applied(function: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    for option in reversed(options):
        function = option(function)
    return function


# -- values --


#: of a list at one time; who wants more wants --all
MOST = 1_000_000_000
#: microseconds from 1970 to the end of the calendar, and about as far back as it goes
_AFTER, _BEFORE = 253_402_214_400_000_000, 60_000_000_000_000_000


def _reads(read: Callable[[str], int], most: int) -> Callable[[Any], int]:
    """A type of option that a function of ours reads; what it refuses is a usage error."""

    def convert(value: Any) -> int:
        try:
            found = value if isinstance(value, int) else read(value)
        except (UsageError, OverflowError, OSError) as error:
            raise click.BadParameter(str(error)) from None
        if not -_BEFORE <= found <= most:
            raise click.BadParameter(f"{value!r} is too far away for a ledger to hold")
        return found

    return convert


def _seconds(text: str) -> int:
    return _positive_span(f"{text}s" if text.replace(".", "", 1).isdigit() else text)


def _positive_span(text: str) -> int:
    if (found := parse_span(text)) <= 0:
        raise UsageError(f"{text!r} is no time at all; write it like 90s, 15m, 2h, 30d or 1h30m")
    return found


class _Status(click.Choice[str]):
    """A status by the name that lists show, or as people type it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The status by the name that lists show."""
        lowered = str(value).lower()
        return super().convert(_ALIASES.get(lowered, lowered), param, ctx)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def json_of(text: str, option: str = "--result") -> Any:
    """The value of a JSON text; anything else is a usage error."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(
            f"{text!r} is no JSON ({error}); a text needs its quotes: {option} '\"sent\"'"
        ) from None


SPAN = _reads(_positive_span, _BEFORE)
#: a span too, where a bare number is one of seconds
SECONDS = _reads(_seconds, _BEFORE)
TIME = _reads(parse_time, _AFTER)


# -- which ledger --

_DB_OPTION = click.option(
    "--db", "db_option", metavar="DB", help="The ledger: a path or sqlite:///path. [LEDGER_DB, ./ledger.db]"
)


def database(function: Function) -> Function:
    """Give a command `db` from --db, for one whose arguments are something else."""

    @functools.wraps(function)
    def with_db(*args: Any, db_option: str | None, **values: Any) -> Any:
        return function(*args, db=db_option, **values)

    return _applied(with_db, [_DB_OPTION])  # type: ignore[no-any-return]


def database_argument(function: Function) -> Function:
    """Give a command `db` from its argument, or from --db."""

    @functools.wraps(function)
    def with_db(*args: Any, db_argument: str | None, db_option: str | None, **values: Any) -> Any:
        if db_argument is not None and db_option is not None:
            raise click.UsageError("the ledger is named twice; give it as DB or with --db")
        return function(*args, db=db_option if db_argument is None else db_argument, **values)

    argument = click.argument("db_argument", metavar="[DB]", required=False)
    return _applied(with_db, [argument, _DB_OPTION])  # type: ignore[no-any-return]


def opened(db: str | None) -> AnyStore:
    """The ledger, which must exist; it is closed when the command ends."""
    store = open_ledger(db)
    click.get_current_context().call_on_close(store.close)
    return store


def opened_file(db: str | None) -> SqliteStore:
    """The ledger, which must be a file; a server has tools of its own for what is done then."""
    store = open_store(db)
    click.get_current_context().call_on_close(store.close)
    return store


def reader_of(db: str | None) -> Reader:
    """Something to look at the ledger with."""
    return looking_at(opened(db))


# -- which calls --


def filters(function: Function) -> Function:
    """Give a command `wanted`: the filter of calls that its options make."""
    options = _filter_options("calls that stand so", "started", "arguments, key, result or error")
    return _with_filter(function, options)


def event_filters(function: Function) -> Function:
    """Give a command `wanted`: the filter of events that its options make."""
    options = _filter_options(
        "events that made a call stand so", "happened", "the name of the tool, an error or a note"
    )
    return _with_filter(function, options)


def _filter_options(standing: str, happened: str, searched: str) -> list[Callable[[Any], Any]]:
    return [
        click.option("--tool", help="Only this tool: its full name, or the short one that lists show."),
        click.option("--status", type=_Status(STATES), help=f"Only {standing}."),
        click.option("--wf", help="Only this workflow."),
        click.option("--caller", help="Only calls by this caller."),
        click.option(
            "--since",
            type=TIME,
            metavar="TIME",
            help=f"Only what {happened} since: 2h (ago), 2026-05-01T14:30.",
        ),
        click.option("--until", type=TIME, metavar="TIME", help=f"Only what {happened} before."),
        click.option("--search", metavar="TEXT", help=f"Only with this text in {searched}."),
    ]


def _with_filter(function: Function, options: Sequence[Callable[[Any], Any]]) -> Function:
    @functools.wraps(function)
    def with_filter(*args: Any, **values: Any) -> Any:
        fields = {name: values.pop(name) for name in Filter.__slots__}
        try:
            wanted = Filter(**fields)
        except UsageError as error:
            raise click.UsageError(str(error)) from None
        return function(*args, wanted=wanted, **values)

    return _applied(with_filter, options)  # type: ignore[no-any-return]


def as_json(function: Function) -> Function:
    """Give a command `json`: whether its values are printed as JSON."""
    option = click.option("--json", is_flag=True, help="Print JSON, in the form that is told below.")
    return _applied(function, [option])  # type: ignore[no-any-return]


def yes(function: Function) -> Function:
    """Give a command `yes`: whether the answer to its question is given already."""
    option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
    return _applied(function, [option])  # type: ignore[no-any-return]
