"""What stores of six methods and the built-in ones do beside the suite that all stores pass."""

import json
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Store
from ledger_stores.testing import FakeClock, claim, granted, renew, settle
from tests.stores.kit import SixMethodStore, open_store


@pytest.fixture
def clock() -> FakeClock:
    """The only thing that is not real."""
    return FakeClock()


def test_the_six_methods_of_a_users_store_do_what_they_say() -> None:
    """Claim inserts once, get finds, put overwrites, all lists, delete and clear remove."""
    store = SixMethodStore()
    record = ledger._record([claim().first_row(store.clock.wall(), 0)], 0)
    other = record._replace(id="d", call="d", wf="other")

    assert (None, True, False) == (store.get("c"), store.claim(record), store.claim(record))
    assert store.claim(other)
    assert {"c", "d"} == {r.id for r in store.all()}
    assert ["d"] == [r.id for r in store.all("other")]
    store.put(record._replace(status=ledger.Status.FAILED))
    assert (found := store.get("c")) is not None
    assert "failed" == found.status
    store.delete("c")
    assert store.get("c") is None
    store.clear("other")
    assert [] == list(store.all())


@pytest.mark.parametrize("kind", ["sqlite", "memory"])
def test_the_built_in_stores_show_and_forget_calls(kind: str, tmp_path: Path, clock: FakeClock) -> None:
    """They have get, all and clear; what the other three would write goes through transactions."""
    store = open_store(kind, tmp_path, clock)
    store.transact(settle(granted(store)))
    found = store.get("c")

    assert found is not None
    assert ("success", [found]) == (found.status, list(store.all("w")))
    assert [] == list(store.all("other"))
    store.clear("w")
    assert store.get("c") is None
    with pytest.raises(NotImplementedError, match="has no put"):
        store.put(found)
    store.close()


def grown_elsewhere(versions: int) -> tuple[SixMethodStore, SixMethodStore]:
    """A store with that many versions of a call, and another one on the same records that saw none."""
    made, other = SixMethodStore(clock=FakeClock()), SixMethodStore(clock=FakeClock())
    other.records = made.records
    run = granted(made)
    for _ in range(versions - 1):
        made.transact(renew(run))
    return made, other


@pytest.mark.parametrize("versions", range(1, 18))
def test_the_newest_version_is_found_from_nothing(versions: int) -> None:
    """However long the list of versions has grown elsewhere, galloping and bisecting find its end."""
    made, other = grown_elsewhere(versions)

    assert made.rows("c") == other.rows("c")
    assert versions == len(made.records)
    assert "settled" == other.transact(settle(other.rows("c")[0])).kind
    assert "done" == made.transact(claim()).kind


def test_a_store_whose_claim_never_succeeds_is_named() -> None:
    """A claim() that refuses everything ends in an error that asks for atomicity, not in a loop."""

    class Refusing(SixMethodStore):
        def claim(self, record: ledger.Record) -> bool:  # noqa: ARG002 - it refuses whatever comes
            return False

    with pytest.raises(ledger.StoreError, match=r"is claim\(\) atomic"):
        Refusing().transact(claim())


@pytest.mark.parametrize("method", ["get", "claim", "put", "delete", "all", "clear"])
def test_a_store_without_a_method_says_which(method: str) -> None:
    """Each of the six is asked for by name."""
    argument: Any = ledger._record([claim().first_row(0, 0)], 0)

    with pytest.raises(NotImplementedError, match=rf"Store has no {method}\("):
        getattr(Store(), method)(argument)


@pytest.mark.parametrize("old", list(ledger._NEXT))
@pytest.mark.parametrize("new", list(ledger.Status))
def test_only_the_table_moves_a_run(old: str, new: str) -> None:
    """A move that the table of transitions does not have is refused and changes nothing."""
    row = claim().first_row(0, 0)._replace(status=old)
    change = ledger.Change("test", row)

    if new in ledger._NEXT[old]:
        assert (old, new) == (row.status, change.move(row, new).status)
        return
    with pytest.raises(ledger.LedgerError, match=f"cannot go from {old} to {new}"):
        change.move(row, new)
    assert ([], []) == (change.updates, change.notes)


def test_a_record_survives_a_dict() -> None:
    """What to_dict gives is JSON-safe, and from_dict is the way back."""
    record = ledger._record([claim(args='{"a":1}').first_row(5, 5)], 2)

    assert record == ledger.Record.from_dict(json.loads(json.dumps(record.to_dict())))
