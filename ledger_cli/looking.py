"""Commands that look: show, tail, stats, inspect, doubts, brief. None of them writes or makes a file."""

from __future__ import annotations

import itertools
import json as json_module
import time
from collections.abc import Iterator

import click

from ledger import Record, StoreError, UsageError
from ledger_cli import grids
from ledger_cli.app import NOTHING_MATCHED, complain
from ledger_cli.options import (
    MOST,
    as_json,
    command,
    database,
    database_argument,
    event_filters,
    filters,
    reader_of,
)
from ledger_cli.screen import Screen, note
from ledger_ops.reader import AnyStore, NoLedger, Reader, open_ledger
from ledger_ops.reader import reader_of as looking_at
from ledger_ops.values import Event, Filter, record_dict

NEWEST = 100
_POLL_SECONDS = 0.25
_PAGE = 500

_CALL_JSON = (
    "{call, tool, name, wf, caller, status, run, key, args, result, error, attempts, executed, blocked, "
    "created, started, ended, touched, lease, released, late, holder}; times are ISO 8601 in UTC, status is "
    "running, success, failed, suspended or in_doubt."
)


@command(
    "show",
    examples=(
        "ledger show",
        "ledger show orders.db --wf nightly --status failed --since 2h",
        "ledger show --search A-1001 --json | jq '.[].result'",
        "ledger show --all | cut -f 4 | sort | uniq -c",
    ),
    json_form=f"An array of calls, the newest first, each {_CALL_JSON}",
    codes="3: a filter was given and no call matches it.",
)
@database_argument
@filters
@click.option(
    "--limit", "-n", type=click.IntRange(1, MOST), default=NEWEST, show_default=True, help="How many at most."
)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@as_json
def show_command(*, db: str | None, wanted: Filter, limit: int, everything: bool, json: bool) -> int:
    """List calls, the newest first.

    On a terminal as a table; in a pipe as tab-separated lines under a line of titles, nothing cut.
    """
    reader = reader_of(db)
    records = reader.stream(wanted) if everything else _newest(reader, wanted, limit + 1)
    first = list(itertools.islice(records, 1))
    shown = itertools.islice(itertools.chain(first, records), None if everything else limit)
    screen = Screen()
    if json:
        screen.json_array(map(record_dict, shown))
    elif first:
        screen.grid(grids.calls(shown, grids.Names(reader.tools()), full=not screen.is_terminal))
    elif not wanted.narrows:
        note("no calls yet")
    if next(records, None) is not None:
        screen.file.flush()
        note(f"{_how_many_more(reader, wanted, limit)}; --limit N shows N, --all shows them all")
    return _matched(wanted, found=bool(first))


def _newest(reader: Reader, wanted: Filter, limit: int) -> Iterator[Record]:
    """So many calls, the newest first, in constant memory."""
    page = reader.calls(wanted, limit=min(limit, _PAGE))
    yield from page.records
    while page.cursor is not None and (limit := limit - len(page.records)):
        page = reader.calls(wanted, limit=min(limit, _PAGE), cursor=page.cursor)
        yield from page.records


def _how_many_more(reader: Reader, wanted: Filter, shown: int) -> str:
    """The number only where it is had without reading every call."""
    if wanted != Filter(tool=wanted.tool, wf=wanted.wf):
        return "there are more"
    more = reader.count(wanted) - shown
    return f"{more:,} more" if more > 0 else "there are more"


def _matched(wanted: Filter, *, found: bool) -> int:
    if found or not wanted.narrows:
        return 0
    note("nothing matches; see what there is with fewer filters, or with `ledger stats`")
    return NOTHING_MATCHED


@command(
    "stats",
    examples=("ledger stats", "ledger stats orders.db --wf nightly", "ledger stats --since 1d --json"),
    json_form=(
        "{actions (calls), attempts, executed, blocked, failed, in_doubt, suspended, running, "
        "duplicate_rate, tools: {full name: the same}}; duplicate_rate is blocked ÷ attempts, 0 to 1."
    ),
    codes="3: a filter was given and no call matches it.",
)
@database_argument
@filters
@as_json
def stats_command(*, db: str | None, wanted: Filter, json: bool) -> int:
    """Add up calls by tool, with the share of duplicates.

    Of the attempts, so many ran nothing because they were duplicates.

    With --since, --until or --status the sums are of the runs that match, else of all.
    """
    stats = reader_of(db).stats(wanted)
    screen = Screen()
    if json:
        screen.json(stats.to_dict())
    elif stats.tools or not wanted.narrows:
        from ledger_cli.render import duplicates

        screen.grid(grids.sums(stats, full=not screen.is_terminal))
        screen.text(duplicates(stats.total))
    return _matched(wanted, found=bool(stats.tools))


@command(
    "inspect",
    examples=("ledger inspect 3fa9", "ledger inspect 3fa94c0d --db orders.db --json"),
    json_form=(
        "A call as in `ledger show`, with history: [{run, status, caller, owner, started, ended, seconds, "
        "args, result, error, trace, released, forced, late, late_at, blocked}], events: [{seq, call, run, "
        "kind, at, tool, wf, caller, n, detail}] and verdict: what the next identical call gets."
    ),
)
@click.argument("call")
@database
@as_json
def inspect_command(*, call: str, db: str | None, json: bool) -> None:
    """Tell all about one call, and what the next one would get.

    That is its arguments, its runs, and every attempt on a timeline.
    CALL is its fingerprint, or as much of the beginning as tells it from others.
    """
    reader = reader_of(db)
    found = reader.call(call)
    screen = Screen()
    if json:
        screen.json(found.to_dict())
        return
    from ledger_cli.render import detail

    holders = {run.run: reader.store.holder(run) for run in found.runs}
    screen.text(*detail(found, holders))


@command(
    "doubts",
    examples=("ledger doubts", "ledger doubts orders.db --tool charge --json"),
    json_form=f"An array of calls, the oldest first, each {_CALL_JSON}",
    codes="0: nothing is in doubt. 3: something is.",
)
@database_argument
@filters
@click.option("--limit", "-n", type=click.IntRange(1, MOST), help="How many at most.")
@as_json
def doubts_command(*, db: str | None, wanted: Filter, limit: int | None, json: bool) -> int:
    """List what is in doubt, the oldest first.

    Nobody knows whether these calls took effect: their process was killed, or lost.
    """
    reader = reader_of(db)
    found = reader.doubts(wanted)
    screen = Screen()
    if json:
        screen.json_array(map(record_dict, found[:limit]))
    elif found:
        names = grids.Names(reader.tools())
        screen.grid(grids.calls(found[:limit], names, full=not screen.is_terminal))
        screen.file.flush()
        more = f"{len(found) - limit:,} more. " if limit is not None and len(found) > limit else ""
        note(f"{more}Find out what happened, then: ledger resolve CALL --done (or --not-done)")
    else:
        note("nothing is in doubt")
    return NOTHING_MATCHED if found else 0


@command("brief", examples=("ledger brief --wf order-17", "ledger brief --max-chars 800 >> context.md"))
@database_argument
@click.option("--wf", help="Only this workflow.")
@click.option(
    "--max-chars", type=click.IntRange(1, MOST), default=2000, show_default=True, help="How long it may get."
)
def brief_command(*, db: str | None, wf: str | None, max_chars: int) -> None:
    """Say in short what was done, what runs and what is in doubt.

    It is meant for a model's context, after a compaction or a resume.
    """
    from ledger_ops.brief import brief

    Screen().line(brief(reader_of(db), wf=wf, max_chars=max_chars))


# -- tail --


@command(
    "tail",
    examples=(
        "ledger tail",
        "ledger tail orders.db --wf nightly --lines 50",
        "ledger tail --status failed --json | jq .detail",
        "ledger tail --no-follow",
    ),
    json_form=(
        "A line for each event: {seq, call, run, kind, at, tool, wf, caller, n, detail}; n attempts that "
        "were blocked are told in one."
    ),
    codes="3: with --no-follow, a filter was given and no event matches it.",
)
@database_argument
@event_filters
@click.option(
    "--lines",
    "--limit",
    "-n",
    type=click.IntRange(0, MOST),
    default=10,
    show_default=True,
    help="How many earlier ones first.",
)
@click.option("--no-follow", is_flag=True, help="End after the earlier ones.")
@as_json
def tail_command(*, db: str | None, wanted: Filter, lines: int, no_follow: bool, json: bool) -> int:
    """Follow what happens: claims, outcomes, blocked attempts.

    Ctrl-C ends it.
    """
    screen = Screen()
    reader = reader_of(db)
    if not reader.has_log:
        raise UsageError(
            f"{reader.store.address} keeps no log of all events, so none can be followed; `ledger show` "
            "lists its calls, `ledger inspect CALL` what happened to one"
        )
    names = grids.Names(reader.tools())

    def say(events: list[Event]) -> None:
        if json:
            for event in events:
                screen.line(json_module.dumps(event.to_dict()))
        elif events:
            from ledger_cli.render import event_line

            screen.text(*(event_line(event, names) for event in events))
        screen.file.flush()

    try:
        seen = reader.last_seq()
        earlier = reader.last_events(lines, wanted)
        say(earlier)
        if no_follow:
            return _matched(wanted, found=bool(earlier))
        for events in _follow(reader, max([seen, *(event.seq for event in earlier)]), wanted):
            say(events)
    except KeyboardInterrupt:
        pass
    return 0


def _follow(reader: Reader, after: int, wanted: Filter) -> Iterator[list[Event]]:
    """New events, page by page; what does not match is passed over and never read again."""
    path = reader.store.address
    last, was_away = _event_at(reader, after), False
    while True:
        time.sleep(_POLL_SECONDS)
        try:
            if was_away and (last is None or _event_at(reader, last.seq) != last):
                after = 0  # another ledger has come in its place
            was_away = False
            newest = reader.last_seq()
            while events := reader.events(after, wanted, limit=_PAGE):
                yield events
                after = events[-1].seq
            after = max(after, newest)
            if last is None or last.seq != after:
                last = _event_at(reader, after)
        except StoreError as error:
            complain(f"{error}; waiting for a ledger at {path} (Ctrl-C ends)")
            reader.store.close()
            reader, was_away = looking_at(_return_of(path)), True


def _event_at(reader: Reader, seq: int) -> Event | None:
    return next((event for event in reader.events(seq - 1, limit=1) if event.seq == seq), None)


def _return_of(path: str) -> AnyStore:
    """The ledger at that path, as soon as there is one again."""
    while True:
        time.sleep(_POLL_SECONDS)
        try:
            return open_ledger(path)
        except NoLedger:
            pass
