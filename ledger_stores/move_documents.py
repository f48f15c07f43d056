"""A namespace of DynamoDB or MongoDB as one side of a move.

There is no transaction over several documents, so a step writes its calls first and then swaps the mark,
and all that it writes can be written again.  A mover that was paused in a step, and given up, overwrites
no call: each is swapped on the version that it read, and whoever took over has written that step anew.
What it can still bring is a call that was reset at the source meanwhile, which is then blocked as done,
and an older count of an unlimited tool.

A process looks at the mark every ten seconds, so a step that closes the ledger ends when the last look
that found it open no longer holds.  A claim that is written later than its look allows is given back
before its tool is entered (`DocumentStore._pass_late`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import ledger
from ledger_stores.documents import (
    DETAIL,
    LOG,
    PAGE,
    TALLIED,
    Document,
    DocumentStore,
    Fields,
    place_of,
    scope_of,
    tally_from,
)
from ledger_stores.move import SEALED, SHUT, Entry, Mark, Side, Tally, Whole, must_step, refuse_full

#: requests that are under way at once
_THREADS = 16
#: events that a document keeps; the rest are only counted
_KEPT = frozenset(("claimed", *ledger._NEXT, "late", "released", "resolved", "reset"))


class DocumentSide(Side):
    """One namespace. As a source it has no log of all events, so what changes during a copy shows only in the calls."""

    has_log = False

    def __init__(self, store: DocumentStore) -> None:
        self.store: DocumentStore = store
        self._known: set[str] = set()
        self._open: list[str] | None = None

    # -- looking --

    def exists(self) -> bool:
        """Whether there is a ledger; never makes one."""
        return self.store._is_there()

    def is_empty(self) -> bool:
        """Whether it holds neither a call nor a tally."""
        return not any(doc.rows for doc in self._docs()) and next(self.store.calls(), None) is None

    def _docs(self) -> Iterator[Document]:
        """The documents of all calls, also of those that a list lacks."""
        names = (name for _, name in self._names("", None) if name.startswith("call:"))
        while page := list(islice(names, PAGE)):
            found = self.store._find(list(dict.fromkeys(page)))
            yield from (Document.read(name, fields) for name, fields in found.items())

    def mark(self) -> Mark | None:
        """How it stands in a move; None where it is in none."""
        return Mark.read(self.store.about().get("move"))

    def names(self, after: str, limit: int, wf: str | None = None) -> list[tuple[str, str]]:
        """(place, call) of calls after that place, oldest first; those with tallies, and what a list lacked, last."""
        return [(place, name.partition(":")[2]) for place, name in islice(self._names(after, wf), limit)]

    def _names(self, after: str, wf: str | None) -> Iterator[tuple[str, str]]:
        scope = None if wf is None else scope_of(wf)
        part, place = after[:1] or "c", after[1:]
        for letter, kind in (("c", "call"), ("t", "tally")):
            if part <= letter:
                listed = self.store._listed(kind, scope, place if part == letter else "")
                yield from ((f"{letter}{first}", name) for first, name in listed)
        if wf is None:
            yield from ((f"u{name}", name) for name in self.store._unlisted(place if part == "u" else ""))

    def fetch(self, calls: Sequence[str]) -> list[Whole]:
        """Each of these calls as it is now."""
        found = self.store.found("call", calls)
        tallies = self.store.found("tally", calls)
        return [self._whole(call, found.get(f"call:{call}"), tallies.get(f"tally:{call}")) for call in calls]

    def _whole(self, call: str, fields: Fields | None, counted: Fields | None) -> Whole:
        rows = [self.store._whole(run) for run in Document.read(f"call:{call}", fields).runs()]
        record = counted and tally_from(call, counted)
        tally: Tally | None = None
        if record and record.attempts:
            raised = record.attempts - record.runs
            tally = (
                call, record.tool, record.wf, record.caller, record.args_json, record.runs, raised,
                record.error, record.created, record.touched,
            )  # fmt: skip
        owners = sorted({run.owner.partition(".")[0] for run in rows})
        found = self.store.found("process", owners)
        processes = [
            (name, about["host"], about["pid"], "", "", "")  # it is not known how long such a process lives
            for name in owners
            if (about := found.get(f"process:{name}"))
        ]
        return Whole(call, rows, tally, processes)

    def open_calls(self) -> list[str]:
        """The calls that have a RUNNING row; once the ledger is closed they can only become fewer."""
        mark = self.mark()
        if self._open is None:
            docs = self._docs()
        else:
            docs = (
                Document.read(name, fields) for name, fields in self.store.found("call", self._open).items()
            )
        found = [doc.rows[-1].call for doc in docs if doc.rows and doc.rows[-1].status == "running"]
        if mark is not None and mark.refusal:
            self._open = found
        return [*found]

    def entries(self, after: int, limit: int) -> list[Entry]:
        """None: each call keeps its own."""
        return []

    def last_certain(self) -> int:
        """0: there is no log of all events."""
        return 0

    # -- writing --

    def step(
        self, was: Mark | None, now: Mark, calls: Sequence[Whole] = (), entries: Sequence[Entry] = ()
    ) -> None:
        """Make these calls what they are there, tell their events, then set the mark; all can be repeated."""
        self._hold(was)
        if must_step(self.mark(), was, now, self.address):
            self._put_all(calls, was)
            self._tell(entries, was)
            self._set_mark(was, now)
        self._hold(now)

    def _hold(self, mark: Mark | None) -> None:
        """Wait until what a mark closes is closed for all, once for each move, whoever set it."""
        if mark is None or not _closes(mark):
            return
        held = f"{_closes(mark)} {mark.id}"
        while (about := self.store.about()).get("closed") != held:
            time.sleep(self.store.gate_micros * 1.1 / 1e6)  # until nobody goes by an older look
            if mark.role == "receiving" and not self.is_empty():  # nothing is copied before this holds
                self.unmark(mark)
                raise refuse_full(self.address)
            self.store._swap("ledger", about["v"], {"v": ledger.new_token(), "closed": held})

    def unmark(self, was: Mark) -> None:
        """Take the mark away, and with it all that it closes."""
        self._set_mark(was, None)

    def erase(self, was: Mark, now: Mark) -> None:
        """Forget all calls and tallies, then set the mark; the documents stay, so that no mover finds them absent."""
        names = (name.partition(":")[2] for _, name in list(self._names("", None)))
        while page := list(islice(names, PAGE)):
            self._put_all([Whole(call, (), None) for call in dict.fromkeys(page)], was)
        self._set_mark(was, now)

    def _set_mark(self, was: Mark | None, now: Mark | None) -> None:
        while True:
            about = self.store.about()
            if not must_step(Mark.read(about.get("move")), was, now, self.address):
                return
            fields = {"v": ledger.new_token(), "move": now.text if now else ""}
            stands = self.store._swap("ledger", about["v"], fields)
            if stands and stands["v"] == fields["v"]:
                return

    def _put_all(self, wholes: Sequence[Whole], mark: Mark | None) -> None:
        """Make calls here what they are there, unless another mover has come; several at once."""
        names = [whole.call for whole in wholes]
        docs, tallies = self.store.found("call", names), self.store.found("tally", names)

        def put(whole: Whole) -> None:
            call, tally = f"call:{whole.call}", f"tally:{whole.call}"
            if whole.rows or call in docs or whole.tally is None:
                self._put_rows(whole, Document.read(call, docs.get(call)), mark)
            if whole.tally is not None or tally in tallies:
                self._put_tally(whole, is_there=tally in tallies)

        self._at_once(put, wholes)
        processes = {told[0]: told for whole in wholes for told in whole.processes}
        self._at_once(self._put_process, [processes[name] for name in processes.keys() - self._known])
        self._known |= processes.keys()

    def _at_once(self, work: Callable[[Any], object], items: Sequence[Any]) -> None:
        """Do it for each: one request after the other would make a move as slow as the way to the server."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(work, items):
                pass

    def _put_process(self, told: tuple[Any, ...]) -> None:
        name, host, pid, *_ = told
        self.store._insert(f"process:{name}", {"host": host, "pid": pid})

    def _put_rows(self, whole: Whole, doc: Document, mark: Mark | None) -> None:
        nowhere = place_of(0, doc.name)  # of a call that has no run here or there
        rows = [run._replace(mono=0, blocked=0) for run in whole.rows]
        more: Fields = {"blocked_moved": sum(run.blocked for run in whole.rows)}
        # whoever made it absent did not know its workflow
        more |= self.store._listing(doc.name, scope_of(rows[0].wf)) if rows else {"told": 0}
        while True:
            first = doc.first
            if first in ("", nowhere):
                first = place_of(rows[0].started, doc.name) if rows else nowhere
            log = doc.log if rows else ()
            after = doc._replace(version=ledger.new_token(), rows=rows, first=first, forgotten=0, log=log)
            is_written, doc = self.store.write(doc, after, more)
            if is_written:
                return
            must_step(self.mark(), mark, mark, self.address)

    def _put_tally(self, whole: Whole, *, is_there: bool) -> None:
        name = f"tally:{whole.call}"
        if whole.tally is None:
            self.store._set(name, {f"{kind}_moved": 0 for kind in TALLIED})
            return
        _, tool, wf, caller, args, ran, raised, error, created, touched = whole.tally
        fields: Fields = {
            "about": json.dumps([tool, wf, caller, args]),
            "error": json.dumps(error),
            "created": created,
            "touched": touched,
            "ran_moved": ran,
            "raised_moved": raised,
        }
        if not is_there:
            self.store._insert(name, {**fields, "first": place_of(created, name)}, scope_of(wf))
        self.store._set(name, fields)

    def _tell(self, entries: Sequence[Entry], mark: Mark | None) -> None:
        """Add events to the logs of their calls, each once: a document knows the last that it was told."""
        told: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.call and entry.kind in _KEPT:
                told.setdefault(entry.call, []).append(entry)
        found = self.store.found("call", list(told))

        def tell(name: str) -> None:
            self._tell_one(name, found[name], told[name.partition(":")[2]], mark)

        self._at_once(tell, list(found))

    def _tell_one(
        self, name: str, fields: Fields | None, entries: Sequence[Entry], mark: Mark | None
    ) -> None:
        while fields is not None:
            doc, last = Document.read(name, fields), fields.get("told", 0)
            new = [
                [e.kind, e.run, e.at, e.caller or "", e.n, e.detail and e.detail[:DETAIL]]
                for e in entries
                if e.seq > last
            ]
            if not new:
                return
            after = doc._replace(version=ledger.new_token(), log=[*doc.log, *new][-LOG:])
            if self.store.write(doc, after, {"told": entries[-1].seq})[0]:
                return
            must_step(self.mark(), mark, mark, self.address)
            fields = self.store._find([name]).get(name)


def _closes(mark: Mark | None) -> str:
    """What a mark closes."""
    if mark is None:
        return ""
    return "new" if mark.role in SEALED else "all" if mark.role in SHUT else ""
