"""What DynamoDB and MongoDB share: one document per call, replaced only if it is still as it was read.

    first claim     insert if absent         granted, or the document that is there comes back
    settle, renew   replace if unchanged     as this process left it, so nothing is read before
    all the rest    read, then replace       and again if somebody else came first

Each line is one round trip more than the one above at most.  There is no lock and no script: what may
happen is decided by the operations of `ledger` themselves, from the whole state of the call, and what
they decided is written only on the state that they saw.

    A   claim: insert ─── granted ─── tool ─────── settle: replace(v1) ── v1 is gone: read, late end
    B          claim: insert ─ there ─ lapsed: replace(v1) ─ granted, v2

Every write gives the document a version that never was before, late ends and resets too, so that no
decision on an older state can be written.  Only counts lie beside the version: they decide nothing.

Each process that counts has a number of its own in the document, which it repeats until that is confirmed;
it takes a new name each hour, and names of a day ago are added up once there are fifty.  A process that was
cut off for a day between a count and its answer may count it twice; ten thousand processes that one call
blocks within a day fill its document on DynamoDB, and further counts are refused with a warning.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple, cast

import ledger
from ledger import Claim, Now, Op, Record, Run, StoreError, Verdict
from ledger_stores.base import Brief, ServerStore
from ledger_stores.move import SEALED, SHUT, Mark, Side

SCHEMA_VERSION = 1
#: how many documents are read at once
PAGE = 100
#: how many events a document keeps, and how much of what each says
LOG, DETAIL = 100, 200
#: how many documents of open runs a process keeps, and how many numbers it counts on
_OWN = 10_000
#: how often an operation is decided anew because somebody else came first
_TRIES = 1000
#: what the owner of a run that is open may do although the ledger was sealed
_GOES_ON = (ledger.Settle, ledger.Renew)
#: what is counted of an unlimited tool
TALLIED = ("ran", "raised")
#: how long a writer of counts keeps its name, and how long after that a batch of it may be repeated
_NAME_MICROS, _REPEATED_MICROS = 3_600_000_000, 86_400_000_000
#: of how many writers a document has the numbers before old ones are added up, and how many are at once
_WRITERS, _AT_ONCE = 50, 200
#: fields of a run that may grow large, and how long one may be in the document of its call
_TEXTS, _SMALL = ("args", "key", "result", "error", "trace"), 4096

Fields = dict[str, Any]  # of text and whole numbers


def boot_micros() -> int:
    """Microseconds of a clock that nobody steps, and that goes on while the machine sleeps where it can."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
    return time.monotonic_ns() // 1000


class ServerClock:
    """What the server's clock says now, from times that its answers carried.

    An answer that carries T, asked for at a and here at b by our own clock, was made in between: the
    server is ahead of us by T - b at least, and by T + resolution - a at most.  The estimate is the
    least that all answers allow, so it is behind the server's clock, by the resolution and one way of
    an answer at most, and by less with each that comes.
    """

    #: two clocks run apart by no more than this, per microsecond
    _DRIFT = 5e-4

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution
        self._least = self._most = 0.0
        self._learned = 0
        self._lock = threading.Lock()

    def learn(self, told: int, asked: int, received: int) -> None:
        """An answer said that it was then; both other times are `boot_micros`."""
        with self._lock:
            aged = self._DRIFT * (received - self._learned)
            least, most = float(told - received), float(told + self._resolution - asked)
            if self._learned and least <= self._most + aged and most >= self._least - aged:
                least, most = max(least, self._least - aged), min(most, self._most + aged)
            self._least, self._most, self._learned = least, most, received

    def at(self, micros: int) -> int:
        """UTC microseconds of the server, when our clock says that."""
        return int(micros + self._least)

    def now(self) -> int:
        """UTC microseconds of the server."""
        return self.at(boot_micros())


class Document(NamedTuple):
    """All that is known of one call."""

    name: str
    #: new with each write; "" where there is no document
    version: str = ""
    rows: Sequence[Run] = ()
    #: of each event: kind, run, at, caller, n, detail
    log: Sequence[Sequence[Any]] = ()
    #: place in the lists
    first: str = ""
    #: attempts that were blocked, and how many of these a reset forgot
    blocked: int = 0
    forgotten: int = 0

    @classmethod
    def read(cls, name: str, fields: Fields | None) -> Document:
        """What stands in these fields; None: there is no document."""
        if fields is None:
            return cls(name)
        call = name.partition(":")[2]
        return cls(
            name,
            fields["v"],
            [_unpacked(call, values) for values in json.loads(fields["rows"])],
            json.loads(fields["log"]),
            fields["first"],
            sum_of("blocked", fields),
            fields["forgotten"],
        )

    def runs(self) -> list[Run]:
        """The runs; the newest has what was counted of all."""
        blocked = self.blocked - self.forgotten
        return [*self.rows[:-1], *(run._replace(blocked=blocked) for run in self.rows[-1:])]

    def after(self, change: ledger.Change, at: int) -> Document:
        """The document after an operation at that time."""
        notes = [
            [kind, None if kind == "reset" else run.run, at, run.caller, n, detail and detail[:DETAIL]]
            for kind, run, n, detail in change.notes
        ]
        return self._replace(
            version=ledger.new_token(),
            rows=ledger._applied(list(self.rows), change),
            log=[*self.log, *notes][-LOG:],
            first=self.first or place_of(at, self.name),
            forgotten=self.blocked if change.forget else self.forgotten,
        )

    def fields(self) -> Fields:
        """As it is stored, without what is counted."""
        return {
            "v": self.version,
            "rows": json.dumps([_packed(row) for row in self.rows], separators=(",", ":")),
            "log": json.dumps(self.log, separators=(",", ":")),
            "first": self.first,
            "forgotten": self.forgotten,
            "status": self.rows[-1].status if self.rows else "forgotten",
        }


class _Elsewhere(str):
    """The name of a text that is too long for the document of its call."""

    __slots__ = ()


def place_of(at: int, name: str) -> str:
    """Where a document that was first heard of then stands in the lists."""
    return f"{at:020d}-{name}"


def scope_of(wf: str) -> str:
    """A workflow as a short name: what it is called may be long, empty or no text at all."""
    return hashlib.sha256(wf.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def sum_of(what: str, fields: Fields) -> int:
    """What all who counted that have counted."""
    return sum(n for name, n in fields.items() if name.startswith(f"{what}_"))


def _packed(run: Run) -> list[Any]:
    values = run._replace(mono=0, blocked=0)[1:]
    return [{"elsewhere": value} if isinstance(value, _Elsewhere) else value for value in values]


def _unpacked(call: str, values: Sequence[Any]) -> Run:
    found: list[Any] = [_Elsewhere(v["elsewhere"]) if isinstance(v, dict) else v for v in values]
    return Run(call, *found)


def _with(run: Run, texts: Mapping[str, str]) -> Run:
    changes: dict[str, Any] = dict(texts)
    return run._replace(**changes)


def _elsewhere_in(runs: Iterable[Run]) -> set[str]:
    """Names of the texts that these runs have elsewhere."""
    return {value for run in runs for value in run if isinstance(value, _Elsewhere)}


class _Forget(NamedTuple):
    """`Reset` that says why, and that may forget a live run."""

    call: str
    asked: int
    force: bool
    why: str

    def apply(self, rows: Sequence[Run], now: Now) -> ledger.Change:
        """Drop all rows unless one is alive or too young."""
        over = bool if self.force else now.over  # every run is true
        change = ledger.Reset(self.call, "", self.asked).apply(rows, now._replace(over=over))
        change.notes = [(kind, run, n, self.why or None) for kind, run, n, _ in change.notes]
        return change


class DocumentStore(ServerStore):
    """A store on a server that inserts a document if it is absent and replaces it if it is unchanged."""

    logs_by_call = True
    #: how long a look at the ledger's own document holds, the same in all processes that share the ledger
    gate_micros: ClassVar[int] = 10_000_000
    #: bytes that the runs of a call may take in its document
    room: ClassVar[int]
    #: microseconds between two times that an answer of the server can carry
    resolution: ClassVar[int]

    def _begin(self) -> None:
        super()._begin()
        self._looked_at = 0
        self._ledger_id = ""
        self._mark: Mark | None = None
        self._time = ServerClock(self.resolution)
        self._own: dict[str, Document] = {}
        self._sums: dict[tuple[str, str], int] = {}
        #: since when the writer of counts has its name, and the newest batch that it wrote or tried to
        self._named_at, self._named_batch = 0, 0

    # -- what each of these stores does in its own words --

    def _about(self, fields: Fields) -> Fields:
        """The ledger's own document, made of these fields if there is none; teaches the server's time."""
        raise NotImplementedError

    def _find(self, ids: Sequence[str]) -> dict[str, Fields]:
        """Those of up to a hundred documents that there are, as they are now."""
        raise NotImplementedError

    def _insert(self, name: str, fields: Fields, scope: str = "") -> Fields:
        """Put a document where none is, in the list of its scope; the one that stands there then."""
        raise NotImplementedError

    def _listing(self, name: str, scope: str) -> Fields:
        """The fields by which a document is in the lists."""
        raise NotImplementedError

    def _swap(self, name: str, version: str, fields: Fields) -> Fields | None:
        """Change the document that has that version; what stands there then, None if nothing does."""
        raise NotImplementedError

    def _set(self, name: str, fields: Fields) -> bool:
        """Set fields of a document that is there, whatever its version; whether it is."""
        raise NotImplementedError

    def _put_counts(self, name: str, fields: Fields) -> Fields | None:
        """`_set`, which tells the counts of all writers there; None if there is no such document."""
        raise NotImplementedError

    def _add_up(self, name: str, total: str, seen: int | None, n: int, gone: Sequence[str]) -> None:
        """Remove fields and set a total instead, if it still is what was seen."""
        raise NotImplementedError

    def _listed(self, kind: str, scope: str | None, after: str = "") -> Iterator[tuple[str, str]]:
        """`first` and name of all documents of a kind (of one scope) from a place on, in that order."""
        raise NotImplementedError

    def _unlisted(self, after: str) -> Iterator[str]:
        """Names after that one, in the server's order, if a list may lack some that are there."""
        return iter(())

    def _is_there(self) -> bool:
        """Whether there is a ledger; makes none."""
        raise NotImplementedError

    def _keep_text(self, name: str, text: bytes) -> None:
        """Keep a long text beside the documents."""
        raise NotImplementedError

    def _text(self, name: str) -> bytes | None:
        """That text."""
        raise NotImplementedError

    def _drop_texts(self, names: Iterable[str]) -> None:
        """Remove long texts."""
        raise NotImplementedError

    # -- the ledger's own document --

    def _look_up(self, *, after: int = 0) -> int:
        """When the ledger's own document was read: later than `after`, and ten seconds ago at most."""
        if looked_at := self._fresh_look(after):
            return looked_at
        with self._one_at_a_time():
            if looked_at := self._fresh_look(after):
                return looked_at
            now = boot_micros()
            is_new, self._looked_at = not self._looked_at, 0
            self._learn_about(self.about())
            if is_new:
                me = ledger._me()
                self._insert(f"process:{me.id}", {"host": me.host, "pid": me.pid})
            self._looked_at = now
            return now

    def _fresh_look(self, after: int) -> int:
        """When it was read, if that is still good; else 0."""
        looked_at = self._looked_at
        return looked_at if looked_at > after and boot_micros() - looked_at < self.gate_micros else 0

    def about(self) -> Fields:
        """The ledger's own document as it is now; made if there is none."""
        fresh = {"schema": SCHEMA_VERSION, "ledger": ledger.new_token(), "v": ledger.new_token()}
        return self._about(fresh)

    def _learn_about(self, about: Fields) -> None:
        where = f"{self.address}: namespace {self.namespace}"
        if about["schema"] > SCHEMA_VERSION:
            raise StoreError(
                f"{where} was written by a newer Ledger (version {about['schema']}, this one knows "
                f"{SCHEMA_VERSION}); nothing ran. Upgrade ledger-guard here"
            )
        if self._ledger_id not in ("", about["ledger"]):
            raise StoreError(
                f"{where} is not the ledger that was opened: it was emptied, or replaced; nothing ran. Restore "
                "the data, or close the store (or restart this program) to begin anew"
            )
        self._ledger_id = about["ledger"]
        self._mark = Mark.read(about.get("move"))

    def _is_refused(self, op: Op | _Forget | None) -> bool:
        """Whether the ledger's mark closes it to what this would write (None: counts)."""
        role = self._mark and self._mark.role
        return role in SHUT or (role in SEALED and op is not None and not isinstance(op, _GOES_ON))

    def _admit(self, op: Op | _Forget | None) -> None:
        """Raise if it is closed."""
        if self._is_refused(op):
            self._refuse(op)

    def _refuse(self, op: Op | _Forget | None) -> None:
        """Raise if it is closed; a look that said so may be of a while ago, so there is another."""
        self._look_up(after=boot_micros())
        if self._mark and self._is_refused(op):
            raise StoreError(f"{self.address}: {self._mark.refusal}")

    def _server_time(self) -> int:
        self._look_up()
        return self._time.now()

    def _exact_time(self) -> int:
        return self._server_time()

    # -- operations --

    def _apply(self, op: Op) -> Verdict:
        looked_at = self._look_up()
        if self._mark and self._mark.role in SHUT:
            self._refuse(op)
        verdict = self._decide(op)
        is_answer = isinstance(op, Claim) and verdict.kind in ("done", "live")  # which wrote nothing
        if not is_answer and not isinstance(op, _GOES_ON) and boot_micros() - looked_at > self.gate_micros:
            self._pass_late(op, verdict)
        return verdict

    def _pass_late(self, op: Op, verdict: Verdict) -> None:
        """It may have been written long after the look, when it was refused already: look again."""
        try:
            self._refuse(op)
        except StoreError:
            if isinstance(op, Claim) and verdict.kind == "granted":
                self.keeper.keep(ledger._not_entered(op, cast("Run", verdict.row).run))
            raise

    def _decide(self, op: Op | _Forget) -> Verdict:
        op = self._lengthened(op)
        name = f"call:{op.call}"
        # a guess saves the reading: nobody made this call, or nobody touched it since I did
        doc = Document(name) if isinstance(op, Claim) else None
        if isinstance(op, _GOES_ON):
            doc = self._own.get(op.call)
        if self._is_refused(op):
            doc = None
        is_guess = doc is not None
        for tries in range(_TRIES):
            if doc is None:
                doc = self._document(name)
            change = op.apply(doc.rows, self._now())
            if change.updates or change.insert or change.forget:
                if change.insert or not isinstance(op, Claim):
                    self._admit(op)
                is_written, stands = self.write(doc, doc.after(change, self._now().wall))
                if is_written:
                    self._keep(stands)
                    return change.verdict if change.forget else self._with_texts(change.verdict)
            elif not is_guess:
                return self._with_texts(change.verdict)
            else:
                stands = None
            doc, is_guess = stands, False
            time.sleep(random.uniform(0, min(tries, 50) / 1000))  # noqa: S311 - rivals part
        raise StoreError(f"call {op.call}: {_TRIES} other writers came first; nothing was written")

    def _lengthened(self, op: Op | _Forget) -> Op | _Forget:
        """A lease is counted from a time that may be behind by the resolution: so much is added to it."""
        if isinstance(op, Claim) and op.lease:
            return op._replace(lease=op.lease + self.resolution)
        if isinstance(op, ledger.Renew):
            return op._replace(claim=op.claim._replace(lease=op.claim.lease + self.resolution))
        return op

    def write(self, doc: Document, after: Document, more: Fields | None = None) -> tuple[bool, Document]:
        """Write a document if it is as it was seen, with fields beside it; whether it is, and what stands."""
        after, moved = self._fitted(after)
        fields = {**after.fields(), **(more or {})}
        if doc.version:
            found = self._swap(doc.name, doc.version, fields)
        else:
            found = self._insert(doc.name, fields, scope_of(after.rows[-1].wf) if after.rows else "")
        stands = Document.read(doc.name, found)
        is_written = stands.version == after.version
        gone = _elsewhere_in(doc.rows) - _elsewhere_in(after.rows) if is_written else moved
        # whoever came next may carry along what this wrote although its answer was lost
        gone -= _elsewhere_in(stands.rows)
        if gone:
            self._drop_texts(gone)
        return is_written, stands

    def _keep(self, doc: Document) -> None:
        """Keep a document whose run is open, because the next to change it is most often its owner here."""
        call = doc.name.partition(":")[2]
        if doc.rows and doc.rows[-1].status == "running":
            if len(self._own) > _OWN:
                self._own.clear()
            self._own[call] = doc
        else:
            self._own.pop(call, None)

    def _fitted(self, doc: Document) -> tuple[Document, set[str]]:
        """The document with its longest texts elsewhere if it has no room for them; names of the new ones."""
        moved: set[str] = set()
        rows = list(doc.rows)
        excess = len(doc.fields()["rows"]) - self.room
        if excess <= 0:
            return doc, moved
        texts = [
            (len(json.dumps(text)), place, field)
            for place, row in enumerate(rows)
            for field in _TEXTS
            if (text := getattr(row, field)) is not None and not isinstance(text, _Elsewhere)
        ]
        for size, place, field in sorted(texts, reverse=True):
            if excess <= 0 or size < _SMALL:
                break
            elsewhere = _Elsewhere(ledger.new_token())
            self._keep_text(elsewhere, json.dumps(getattr(rows[place], field)).encode())
            rows[place] = _with(rows[place], {field: elsewhere})
            moved.add(elsewhere)
            excess -= size - len(elsewhere) - 20
        if excess > 0:
            rows = ledger._worth_keeping(rows)
            if len(json.dumps([_packed(row) for row in rows])) > self.room:
                raise StoreError(
                    f"call {rows[-1].call}: its {len(rows)} runs are more than one document of this store holds; "
                    "nothing was written. Use another key or workflow for what is another action, or reset it"
                )
        return doc._replace(rows=rows), moved

    def reset(self, wf: str | None, asked: int, *, force: bool = False, why: str = "") -> None:
        """Forget every call of a workflow (None: of all), one after the other.

        Raises `InProgress` while one runs, and then none is forgotten; a run that begins meanwhile is
        spared.  `force` forgets what runs too, and it may then run beside itself.
        """
        asked = self._by_server(asked)
        everything = _Forget("", asked, force, why)
        self._admit(everything)
        self.flush()
        if not force:
            for doc in self._documents(wf):
                if doc.rows and doc.rows[-1].status == "running" and not self.is_over(doc.rows[-1]):
                    raise ledger._busy_reset(self.describe(doc.runs()))
        for doc in self._documents(wf):
            self._decide(_Forget(doc.name.partition(":")[2], asked, force, why))
        for name, fields in self._all("tally", wf):
            # not removed: each writer goes on from its own number, and would bring the old counts back
            sums = {f"forgotten_{kind}": sum_of(kind, fields) for kind in TALLIED}
            self._set(name, {**sums, "created": self._server_time()})
        self._refuse(everything)  # what was forgotten here after a seal is still known where it was moved to

    # -- counting --

    def _write_counts(self, sums: Sequence[ledger._Count]) -> None:
        """Each writer has a number of its own in a document, so that writing it twice counts once."""
        self._look_up()
        self._admit(None)
        writer = self._writers_name()
        numbers: dict[tuple[str, str], int] = {}
        told: dict[str, ledger._Count] = {}
        for item in sums:
            name = f"call:{item.call}" if item.kind == "blocked" else f"tally:{item.call}"
            key = name, f"{item.kind}_{writer}"
            numbers[key] = numbers.get(key, self._sums.get(key, 0)) + item.n
            told[name] = item
        for name, item in told.items():
            fields: Fields = {field: n for (of, field), n in numbers.items() if of == name}
            if name.startswith("tally:"):
                found = self._write_tally(name, fields, item)
            else:
                found = self._put_counts(name, fields)  # where there is none the call was reset meanwhile
            self._add_up_old(name, found or {})
        self._sums |= numbers
        if len(self._sums) > _OWN:
            self._named_at = 0

    def _writers_name(self) -> str:
        """A new name each hour, which tells the time, so that it can be seen who will never write again."""
        # else it may be written already, together with others or alone, and is repeated as it was
        if self._batch != self._named_batch and not self._alone:
            self._named_batch, now = self._batch, self._server_time()
            if now - self._named_at > _NAME_MICROS:
                self._named_at, self._writer = now, ledger.new_token()
                self._sums.clear()
        return f"at{self._named_at}-{self._writer.replace('.', '-')}"

    def _add_up_old(self, name: str, found: Fields) -> None:
        """One number for all writers that are over: a document has no room for all who ever counted on it."""
        since = self._server_time() - _NAME_MICROS - _REPEATED_MICROS
        for kind in ("blocked", *TALLIED):
            writers = [field for field in found if field.startswith(f"{kind}_at")]
            old = [field for field in writers if int(field.partition("_at")[2].partition("-")[0]) < since]
            if old and len(writers) > _WRITERS:
                gone, total = old[:_AT_ONCE], f"{kind}_over"
                seen = found.get(total)
                self._add_up(name, total, seen, (seen or 0) + sum(found[field] for field in gone), gone)

    def _write_tally(self, name: str, fields: Fields, item: ledger._Count) -> Fields | None:
        now = self._server_time()
        fields |= {"error": json.dumps(item.error), "touched": now}
        if found := self._put_counts(name, fields):
            return found
        made = {
            "about": json.dumps([item.tool, item.wf, item.caller, item.args]),
            "created": now,
            "first": place_of(now, name),
        }
        self._insert(name, {**made, **fields}, scope_of(item.wf))
        return self._put_counts(name, fields)  # somebody else may have made it

    # -- looking --

    def _document(self, name: str) -> Document:
        return Document.read(name, self._find([name]).get(name))

    def found(self, kind: str, calls: Iterable[str]) -> dict[str, Fields]:
        """Those documents of a kind that there are of any number of calls, by name."""
        names, found = iter(dict.fromkeys(f"{kind}:{call}" for call in calls)), dict[str, Fields]()
        while page := list(islice(names, PAGE)):
            found |= self._find(page)
        return found

    def _documents(self, wf: str | None) -> Iterator[Document]:
        for name, fields in self._all("call", wf):
            yield Document.read(name, fields)

    def _all(self, kind: str, wf: str | None) -> Iterator[tuple[str, Fields]]:
        """Every document of a kind (of one workflow), oldest first."""
        self._look_up()
        names = (name for _, name in self._listed(kind, None if wf is None else scope_of(wf)))
        while page := list(islice(names, PAGE)):
            found = self._find(page)
            yield from ((name, found[name]) for name in page if name in found)

    def _with_texts(self, verdict: Verdict) -> Verdict:
        if verdict.kind in ("settled", "renewed", "released", "resolved"):
            return verdict  # who asked knows them
        row, closed = (run and self._whole(run) for run in (verdict.row, verdict.closed))
        return verdict._replace(row=row, closed=closed)

    def _whole(self, run: Run) -> Run:
        """A run with the texts that it has elsewhere."""
        found = {field: text for field in _TEXTS if isinstance(text := getattr(run, field), _Elsewhere)}
        return _with(run, {field: self._fetched(run, text) for field, text in found.items()})

    def _fetched(self, run: Run, name: str) -> str:
        text = self._text(name)
        if text is None:
            raise StoreError(
                f"{self.address}: a text of run {run.run} of call {run.call} is gone ({name}); somebody removed "
                "it, or the call was reset a moment ago"
            )
        return str(json.loads(text))

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        self._look_up()
        return [self._whole(run) for run in self._document(f"call:{call}").runs()]

    def _reread(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        self._look_up()
        last = next(reversed(self._document(f"call:{call}").rows), None)
        if last is None or (last.run, last.owner) != (run, owner):
            return []
        return [(last.status, last.released, self._whole(last).result, run)]

    def changed(self, calls: Sequence[str], seconds: float) -> Iterable[str]:
        """Which of these calls have no live run any more; looks again after so many seconds."""
        if found := self._without_live_run(calls):
            return found
        self._doze(seconds)
        return self._without_live_run(calls)

    def _without_live_run(self, calls: Sequence[str]) -> list[str]:
        now = self._server_time()
        found = self.found("call", calls)
        docs = {call: Document.read(f"call:{call}", found.get(f"call:{call}")) for call in calls}
        return [
            call
            for call, doc in docs.items()
            if not doc.rows or doc.rows[-1].status != "running" or doc.rows[-1].lease <= now
        ]

    def _process(self, name: str) -> tuple[str, int] | None:
        found = self._find([f"process:{name}"]).get(f"process:{name}")
        return (found["host"], found["pid"]) if found else None

    def look(self, call: str) -> Record | None:
        """The record of a call; None if it was never made."""
        if rows := self.rows(call):
            return self.describe(rows)
        found = self._find([f"tally:{call}"]).get(f"tally:{call}")
        record = found and tally_from(call, found)
        return record if record and record.attempts else None

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first, a page at a time."""
        for doc in self._documents(wf):
            if doc.rows and ledger._is_named(doc.rows[-1].tool, tool):
                rows = [self._whole(run) for run in doc.runs()]
                yield self.describe(rows), rows
        for name, fields in self._all("tally", wf):
            record = tally_from(name.partition(":")[2], fields)
            if record.attempts and ledger._is_named(record.tool, tool):
                yield record, []

    def totals(self) -> ledger.Totals:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running; reads every call."""
        self.flush_for_reading()
        return super().totals()

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """None: each call keeps its own log, and nothing numbers them all (see `events_of`)."""
        return iter(())

    def last_seq(self) -> int:
        """0: there is no log of all events."""
        return 0

    def events_of(self, call: str) -> Iterator[dict[str, Any]]:
        """The newest events of one call, oldest first, numbered within it."""
        doc = self._document(f"call:{call}")
        last = doc.rows[-1] if doc.rows else None
        for seq, (kind, run, at, caller, n, detail) in enumerate(doc.log, 1):
            yield {
                "seq": seq, "call": call, "run": run, "kind": kind, "at": ledger._iso(at),
                "tool": last and last.tool, "wf": last and last.wf, "caller": caller, "n": n, "detail": detail,
            }  # fmt: skip

    def as_side(self) -> Side:
        """This store as one side of a move."""
        from ledger_stores.move_documents import DocumentSide

        return DocumentSide(self)

    def check(self) -> dict[str, Any]:
        """Prove that the store can be read and written; raises `StoreError`."""
        me = f"process:{ledger._me().id}"
        self._look_up(after=boot_micros())
        self._set(me, {"checked": self._server_time()})
        return {"store": self.address, "ok": True, "schema": SCHEMA_VERSION}

    def close(self) -> None:
        """Finish what is pending and close the connections; they open again when the store is used again."""
        super().close()
        with self._opening:
            self._looked_at, self._ledger_id = 0, ""
            # it may be another ledger that is opened next
            self._own.clear()
            self._succeeded.clear()
            if not self._in_flight:  # else it may be written already, and must be repeated as it is
                self._named_at = 0
            self._disconnect()

    def _disconnect(self) -> None:
        """Close the connections, if there are any."""
        raise NotImplementedError


def tally_from(call: str, fields: Fields) -> Record:
    """The record of an unlimited tool's call from its document, without what a reset forgot."""
    counts = (sum_of(kind, fields) - fields.get(f"forgotten_{kind}", 0) for kind in TALLIED)
    about, error = json.loads(fields["about"]), json.loads(fields["error"])
    return ledger._record_of_tally((call, *about, *counts, error, fields["created"], fields["touched"]))
