"""Secrets: they count for identity and are never in the file, whichever way they might get there."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import pytest

from ledger import Guard, MemoryStore

SECRET = "hunter22-\u00e9\"'s"
MARK = b"hunter22"


class Field(StrEnum):
    PASSWORD = "password"


@dataclass
class Login:
    user: str
    password: Any


class Pair(NamedTuple):
    user: str
    api_key: str


class Card(pydantic.BaseModel):
    holder: str
    pan: pydantic.SecretStr


class Client:
    """A connection whose text form shows what it should not."""

    def __str__(self) -> str:
        return f"Client({SECRET})"


def stored(folder: Path, act: Callable[[Guard], object]) -> bytes:
    """Every byte that is in the folder while and after a guard did something."""
    guard = Guard(folder / "ledger.db", quiet=True)
    act(guard)
    guard.flush()
    open_bytes = b"".join(p.read_bytes() for p in sorted(folder.iterdir()))
    json.dumps(guard.history())
    guard.close()
    return open_bytes + b"".join(p.read_bytes() for p in sorted(folder.iterdir()))


def show(**values: Any) -> dict[str, Any]:
    """The arguments of a call as they are listed."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def tool(**kwargs: Any) -> None: ...

    guard(tool, ledger_key="k", **values)
    [entry] = guard.history()
    return dict(entry["args"]["kwargs"])


@pytest.mark.parametrize(
    "name",
    [
        "password", "user_password", "dbPassword", "token", "accessToken", "API_KEY", "apiKey", "APIKey",
        "x-api-key", "Authorization", "client_secret", "card_number", "cardNumber", "cvv", "private_key",
    ],
)  # fmt: skip
def test_names_that_say_secret(name: str) -> None:
    """A secret word as a whole word, in any spelling, masks the value."""
    assert show(**{name: SECRET}) == {name: "****"}


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "keyboard", "pinned", "monkey", "key_id"])
def test_names_that_do_not(name: str) -> None:
    """A word that only contains one is shown."""
    assert show(**{name: "shown"}) == {name: "shown"}


@pytest.mark.parametrize(
    "value",
    [
        {"headers": {"Authorization": SECRET}},
        {"deep": [{"list": ({"token": SECRET},)}]},
        {"field": {Field.PASSWORD: SECRET}},
        {"login": Login("ann", SECRET)},
        {"password": Login("ann", [SECRET, {SECRET}, SECRET.encode(), {"x": SECRET}])},
        {"pair": Pair("ann", SECRET)},
        {"card": Card(holder="ann", pan=pydantic.SecretStr(SECRET))},
        {"bare": pydantic.SecretStr(SECRET)},
        {"client": Client()},
        {"password": SECRET, "url": f"https://example.org/?t={SECRET}", "same": [SECRET]},
    ],
    ids="-".join,
)
def test_no_secret_of_an_argument_is_in_the_file(tmp_path: Path, value: dict[str, Any]) -> None:
    """Parameters, nested keys, fields, secret types and their repetition elsewhere are masked."""

    def tool(**kwargs: Any) -> None: ...

    assert MARK not in stored(tmp_path, lambda guard: guard(tool, key="k", **value))


@pytest.mark.parametrize("form", [str, repr, json.dumps])
def test_no_secret_is_in_a_stored_error(tmp_path: Path, form: Callable[[str], str]) -> None:
    """An error that repeats a secret, plain or quoted, is masked with its trace."""

    def tool(password: str) -> None:
        raise ValueError(f"refused {form(password)}")

    def act(guard: Guard) -> None:
        with pytest.raises(ValueError, match="hunter22"):
            guard(tool, SECRET)

    assert MARK not in stored(tmp_path, act)


@pytest.mark.parametrize(
    "echo",
    [lambda p: p, lambda p: {"a": [p]}, lambda p: f"logged in with {p}", lambda p: p.encode()],
    ids=["plain", "nested", "inside", "bytes"],
)
def test_a_result_that_repeats_a_secret_is_not_kept(tmp_path: Path, echo: Callable[[str], Any]) -> None:
    """The tool's answer goes to its caller and not into the file, and the call stays done."""

    def tool(password: str) -> Any:
        return echo(password)

    def act(guard: Guard) -> None:
        assert guard(tool, SECRET) == echo(SECRET)
        assert guard(tool, SECRET) is None

    found = stored(tmp_path, act)

    assert MARK not in found
    assert MARK.hex().encode() not in found


def test_a_short_secret_number_is_not_kept_as_a_result() -> None:
    """A cvv that comes back as a value of the result keeps the result out of the file."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def tool(cvv: int) -> dict[str, int]:
        return {"checked": cvv}

    guard(tool, 737)

    assert [e["result"] for e in guard.history()] == [None]


def test_a_result_told_by_hand_is_looked_through_too(tmp_path: Path) -> None:
    """`resolve` keeps no result that repeats a secret argument."""

    def tool(password: str) -> None:
        raise KeyboardInterrupt

    def act(guard: Guard) -> None:
        with pytest.raises(KeyboardInterrupt):
            guard(tool, SECRET)
        guard.resolve(tool, SECRET, result=f"done with {SECRET}")

    assert MARK not in stored(tmp_path, act)


@pytest.mark.parametrize("value", [SECRET, 4111111111111111])
def test_a_key_made_of_a_secret_is_masked(tmp_path: Path, value: Any) -> None:
    """A key that names a secret parameter tells calls apart and shows nothing."""

    def tool(card_number: Any) -> None: ...

    def act(guard: Guard) -> None:
        guard.policy(tool, key=["card_number"])
        guard(tool, value)
        guard(tool, value)
        [entry] = guard.history()
        assert (entry["key"], entry["blocked"]) == (["****"], 1)

    found = stored(tmp_path, act)

    assert MARK not in found
    assert b"4111111111111111" not in found


def test_secrets_count_for_identity() -> None:
    """Two passwords are two calls."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def tool(password: str) -> str:
        return "ran"

    assert [guard(tool, p) for p in ("one", "two", "one")] == ["ran", "ran", None]


def test_redact_names_more_secrets(tmp_path: Path) -> None:
    """Parameters and nested keys listed in `redact=` are masked like the known ones."""

    def tool(iban: str, order: dict[str, str]) -> None: ...

    def act(guard: Guard) -> None:
        guard.policy(tool, redact=["iban", "holder"])
        guard(tool, SECRET, {"holder": SECRET, "id": "A-17"})
        [entry] = guard.history()
        assert entry["args"] == {"iban": "****", "order": {"holder": "****", "id": "A-17"}}

    assert MARK not in stored(tmp_path, act)


@pytest.mark.parametrize(
    ("record", "args", "result"),
    [
        ("all", {"order": "A-17"}, "receipt"),
        ("no-result", {"order": "A-17"}, None),
        ("no-args", {}, "receipt"),
        ("nothing", {}, None),
    ],
)
def test_record_says_what_is_kept(
    record: Literal["all", "no-result", "no-args", "nothing"], args: dict[str, str], result: str | None
) -> None:
    """`record=` keeps arguments and result apart, and the call is done in each case."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def tool(order: str) -> str:
        return "receipt"

    guard.policy(tool, record=record)
    guard(tool, "A-17")
    guard(tool, "A-17")
    [entry] = guard.history()

    assert (entry["args"], entry["result"], entry["blocked"]) == (args, result, 1)


def test_arguments_are_shown_as_json() -> None:
    """Values of any kind have a short form in listings, and none of them is an error."""
    long = "x" * 10_001
    shown = show(a=b"xyz", b=long, c={1: 2.5}, d=float("inf"), f=Field.PASSWORD, g=None)

    assert (shown["a"], shown["c"], shown["d"], shown["f"]) == ("<3 bytes>", {"1": 2.5}, "inf", "password")
    assert shown["b"].endswith("… (10001 characters)")


@pytest.mark.parametrize("pair", [tuple, list])
def test_headers_given_as_pairs_are_masked(pair: Callable[[Any], Any]) -> None:
    """A list of pairs names its values as a dict does."""
    headers = [pair(("Authorization", SECRET)), pair(("Accept", "text/plain"))]

    assert {"headers": [["Authorization", "****"], ["Accept", "text/plain"]]} == show(headers=headers)


def test_what_is_too_small_to_be_a_secret_masks_nothing_else() -> None:
    """Yes, no, nothing and two letters under a secret name are masked, and are no secrets elsewhere."""
    shown = show(login={"password": None, "token": True, "pin": "12"}, floor="12", ready=True)

    assert {
        "login": {"password": "****", "token": "****", "pin": "****"},
        "floor": "12",
        "ready": True,
    } == shown


def test_a_text_of_a_class_of_its_own_is_shown_as_text() -> None:
    """A subclass of str that is no enum is text."""

    class Name(str):
        __slots__ = ()

    assert {"name": "ada"} == show(name=Name("ada"))
