"""The guard on DynamoDB, with boto3.

What was answered has been written to disk in more than one place of the region before: a killed caller,
a lost machine or a lost zone of Amazon's loses nothing, and there is no setting that weakens it (`sync`
changes nothing here).  A global table is another matter: its regions agree a second later, so two of
them can claim one call.  Let all callers use one region.

Each operation is one conditional write of one item; who loses gets the item that stands there in the
same answer (`ReturnValuesOnConditionCheckFailure`).  Reads are consistent.  Lists go by two indexes that
are written once for each call, and that may be a moment behind what another process made.

*There is no server clock in a condition.*  The time is taken from the `Date` of the answers, which are
Amazon's and whole seconds, and counted on from there: a lease may be judged up to a second too late, and
is a second longer, so that it is never too short.  The caller's own time of day changes nothing (but Amazon refuses
requests that are signed more than five minutes off).

*Costs*: an executed call is two writes, and a third for the indexes; a duplicate is one write that is
refused, and is paid for as a write.  Texts that do not fit into the 400 KB of an item lie in items of
their own, written before the item that names them.  The table is made on first use, with on-demand
capacity; one that is there must have the same keys and indexes.  No log of all events is kept, as it
would double the writes: each call keeps the newest events of its own.
"""

from __future__ import annotations

import heapq
import re
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import boto3
from botocore import exceptions
from botocore.config import Config

from ledger import StoreError, UsageError
from ledger_stores.documents import DocumentStore, Fields, boot_micros

#: over so many parts the list of all calls is spread, because one part takes a thousand writes a second
_SHARDS = 8
#: bytes of a long text in one item, and how many items go into one request
_PART, _BATCH = 350_000, 25
_CONNECT_SECONDS, _TABLE_SECONDS = 5.0, 60.0
#: how far an index may be behind what this process wrote itself
_BEHIND_MICROS = 5_000_000
_KEYS = [{"AttributeName": "id", "KeyType": "HASH"}]
_INDEXES = {"in_order": "shard", "by_workflow": "scope"}
#: code of an error → what to do
_ADVICE = {
    "AccessDeniedException": "let this account read, write, describe and (once) create the table",
    "UnrecognizedClientException": "see that the credentials are those of an account of this region",
    "InvalidSignatureException": "see that the secret key is right and this machine's time of day is",
    "ResourceNotFoundException": "the table was removed; restore it, or close the store to begin anew",
    "ProvisionedThroughputExceededException": "it is throttled; raise its capacity or make it on-demand",
    "ThrottlingException": "it is throttled; raise its capacity or make it on-demand",
    "RequestLimitExceeded": "the account's limit is reached; ask for more, or call less often",
}


class DynamoStore(DocumentStore):
    """Calls in one table of DynamoDB; `namespace` is what all its keys begin with."""

    #: of 400 KB, because every write of an item is paid for by its whole length
    room: ClassVar[int] = 160_000
    resolution: ClassVar[int] = 1_000_000

    def _understand(self, url: str) -> None:
        self.table, self._options = _parts_of(url)

    def _begin(self) -> None:
        super()._begin()
        self._client: Any = None
        self._fresh: deque[tuple[int, str, str, str]] = deque(maxlen=1000)

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return f"dynamodb://{self.table}"

    # -- connection --

    def _opened(self) -> Any:
        if self._client is None:
            with self._opening:
                self._client = self._client or self._open()
        return self._client

    def _open(self) -> Any:
        """A client, with the table there and fit for use."""
        client = self._connected()
        try:
            self._prepare(client)
        except (exceptions.BotoCoreError, exceptions.ClientError) as error:
            raise self._translated(error) from error
        return client

    def _connected(self) -> Any:
        """A client; it connects when it is first asked."""
        seconds = self._patience
        config = Config(
            connect_timeout=min(_CONNECT_SECONDS, seconds),
            read_timeout=min(10.0, seconds),
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=64,
        )
        try:
            # a session of its own: the default one is not for several threads
            return boto3.session.Session().client(
                "dynamodb",
                region_name=self._options.get("region"),
                endpoint_url=self._options.get("endpoint_url"),
                config=config,
            )
        except exceptions.NoRegionError as error:
            raise UsageError(f"{self.address}: which region? Say ?region=…, or set AWS_REGION") from error
        except (ValueError, exceptions.BotoCoreError) as error:
            raise UsageError(
                f"{self.address}: endpoint_url= or region= cannot be used ({type(error).__name__})"
            ) from error

    def _prepare(self, client: Any) -> None:
        """Make the table if it is not there, and wait until it can be used; refuse another's."""
        limit = time.monotonic() + _TABLE_SECONDS
        while True:
            try:
                table = client.describe_table(TableName=self.table)["Table"]
            except client.exceptions.ResourceNotFoundException:
                self._create(client)
                continue
            if not _is_ours(table):
                raise StoreError(
                    f"{self.address}: the table {self.table} has other keys or indexes than a ledger; nothing was "
                    "written. Name another table; it is made on first use"
                )
            states = [table["TableStatus"], *(i["IndexStatus"] for i in table["GlobalSecondaryIndexes"])]
            if set(states) <= {"ACTIVE", "UPDATING"}:
                return
            if time.monotonic() > limit:
                raise StoreError(f"{self.address}: the table is {states[0]} and not ready; try again later")
            time.sleep(0.5)

    def _create(self, client: Any) -> None:
        names = ("id", "first", *_INDEXES.values())
        try:
            client.create_table(
                TableName=self.table,
                BillingMode="PAY_PER_REQUEST",
                KeySchema=_KEYS,
                AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in names],
                GlobalSecondaryIndexes=[
                    {
                        "IndexName": index,
                        "KeySchema": _key_of(part),
                        "Projection": {"ProjectionType": "KEYS_ONLY"},
                    }
                    for index, part in _INDEXES.items()
                ],
            )
        except client.exceptions.ResourceInUseException:
            return  # somebody else makes it

    def _translated(self, error: Exception) -> StoreError:
        advice, code = "see that the endpoint answers and can be reached", ""
        if isinstance(error, exceptions.ClientError):
            code = error.response["Error"]["Code"]
            advice = _ADVICE.get(code, "see the message")
        elif isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
            advice = "give credentials, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in a profile"
        told = re.sub(r"://[^/@\s\"]*@", "://****@", str(error))  # of an endpoint with a password in it
        found = StoreError(f"{self.address}: {told}; {advice}")
        found.refused = code == "ValidationException"
        return found

    def _do(self, operation: str, **values: Any) -> dict[str, Any]:
        """One request; every answer tells the time, also that a condition did not hold (`Failed`)."""
        client = self._opened()
        asked = boot_micros()
        try:
            answer: dict[str, Any] = getattr(client, operation)(TableName=self.table, **values)
        except client.exceptions.ConditionalCheckFailedException as error:
            answer = {**error.response, "Failed": True}
        except (exceptions.BotoCoreError, exceptions.ClientError) as error:
            raise self._translated(error) from error
        self._learn(answer, asked)
        return answer

    def _do_all(self, operation: str, requests: dict[str, Any], left: str) -> Iterator[dict[str, Any]]:
        """One batch, and again what the server left undone."""
        client, pause = self._opened(), 0.05
        while requests:
            asked = boot_micros()
            try:
                answer = getattr(client, operation)(RequestItems=requests)
            except (exceptions.BotoCoreError, exceptions.ClientError) as error:
                raise self._translated(error) from error
            self._learn(answer, asked)
            yield answer
            if requests := answer.get(left, {}):
                time.sleep(pause)
                pause = min(pause * 2, 2.0)

    def _learn(self, answer: dict[str, Any], asked: int) -> None:
        if date := answer["ResponseMetadata"]["HTTPHeaders"].get("date"):
            told = int(parsedate_to_datetime(date).timestamp()) * 1_000_000
            self._time.learn(told, asked, boot_micros())

    # -- documents --

    def _key(self, name: str) -> dict[str, Any]:
        return {"id": {"S": f"{self.namespace}:{name}"}}

    def _id(self, item: dict[str, Any]) -> str:
        return str(item["id"]["S"]).partition(":")[2]

    def _list(self, kind: str, part: str) -> str:
        return f"{self.namespace}:{kind}:{part}"

    def _about(self, fields: Fields) -> Fields:
        found = self._find(["ledger"])
        return found.get("ledger") or self._insert("ledger", fields)

    def _find(self, ids: Sequence[str]) -> dict[str, Fields]:
        if len(ids) == 1:
            found = self._do("get_item", Key=self._key(ids[0]), ConsistentRead=True).get("Item")
            return {ids[0]: _fields_of(found)} if found else {}
        request = {self.table: {"Keys": [self._key(name) for name in ids], "ConsistentRead": True}}
        answers = self._do_all("batch_get_item", request, "UnprocessedKeys")
        items = (item for answer in answers for item in answer["Responses"].get(self.table, ()))
        return {self._id(item): _fields_of(item) for item in items}

    def _insert(self, name: str, fields: Fields, scope: str = "") -> Fields:
        listing = self._listing(name, scope) if "first" in fields else {}
        item = {**self._key(name), **_item_of({**fields, **listing})}
        answer = self._do(
            "put_item",
            Item=item,
            # nobody made it: a first claim is granted, all others get what is there
            ConditionExpression="attribute_not_exists(id)",
            ReturnValuesOnConditionCheckFailure="ALL_OLD",
        )
        if "Failed" in answer:
            return _fields_of(answer["Item"])
        if "first" in fields:
            self._fresh.append((boot_micros(), name, fields["first"], scope))
        return fields

    def _listing(self, name: str, scope: str) -> Fields:
        kind = name.partition(":")[0]
        shard = zlib.crc32(name.encode()) % _SHARDS
        return {"shard": self._list(kind, str(shard)), "scope": self._list(kind, scope)}

    def _swap(self, name: str, version: str, fields: Fields) -> Fields | None:
        # it is as it was read: no other claim, end, release or reset was written since
        return self._update(name, fields, "#v = :seen", {":seen": {"S": version}}, names={"#v": "v"})

    def _set(self, name: str, fields: Fields) -> bool:
        # counts belong to a document that is there, whatever became of it since
        return self._update(name, fields, "attribute_exists(id)", {}) is not None

    def _put_counts(self, name: str, fields: Fields) -> Fields | None:
        return self._update(name, fields, "attribute_exists(id)", {})

    def _add_up(self, name: str, total: str, seen: int | None, n: int, gone: Sequence[str]) -> None:
        names = {f"#g{place}": field for place, field in enumerate(gone)}
        values = {":n": {"N": str(n)}, **({} if seen is None else {":seen": {"N": str(seen)}})}
        self._do(
            "update_item",
            Key=self._key(name),
            UpdateExpression=f"SET #total = :n REMOVE {', '.join(names)}",
            # nobody else added up meanwhile: what is removed here is in no total yet
            ConditionExpression="attribute_exists(id) AND "
            + ("attribute_not_exists(#total)" if seen is None else "#total = :seen"),
            ExpressionAttributeNames={"#total": total, **names},
            ExpressionAttributeValues=values,
        )

    def _update(
        self,
        name: str,
        fields: Fields,
        condition: str,
        values: dict[str, Any],
        *,
        names: dict[str, str] | None = None,
    ) -> Fields | None:
        """Set fields if a condition holds; the document then, None if there is none."""
        fresh = {f"#f{n}": name for n, name in enumerate(fields)}
        answer = self._do(
            "update_item",
            Key=self._key(name),
            UpdateExpression="SET " + ", ".join(f"#f{n} = :f{n}" for n in range(len(fields))),
            ConditionExpression=condition,
            ExpressionAttributeNames={**fresh, **(names or {})},
            ExpressionAttributeValues={
                **_item_of({f":f{n}": v for n, v in enumerate(fields.values())}),
                **values,
            },
            ReturnValuesOnConditionCheckFailure="ALL_OLD",
            ReturnValues="ALL_NEW",
        )
        found = answer.get("Item") if "Failed" in answer else answer["Attributes"]
        return _fields_of(found) if found else None

    def _drop(self, ids: Iterable[str]) -> None:
        requests = ({"DeleteRequest": {"Key": self._key(name)}} for name in ids)
        while batch := list(islice(requests, _BATCH)):
            for _ in self._do_all("batch_write_item", {self.table: batch}, "UnprocessedItems"):
                pass

    def _listed(self, kind: str, scope: str | None, after: str = "") -> Iterator[tuple[str, str]]:
        """By an index that may be a moment behind, then what this process made in that moment."""
        fresh = {
            name: first
            for at, name, first, within in [*self._fresh]
            if name.startswith(f"{kind}:") and scope in (None, within) and boot_micros() - at < _BEHIND_MICROS
        }
        for first, name in self._indexed(kind, scope, after):
            fresh.pop(name, None)
            yield first, name
        yield from ((first, name) for name, first in fresh.items() if first > after)

    def _indexed(self, kind: str, scope: str | None, after: str) -> Iterator[tuple[str, str]]:
        if scope is not None:
            return self._query("by_workflow", "scope", self._list(kind, scope), after)
        shards = (self._query("in_order", "shard", self._list(kind, str(n)), after) for n in range(_SHARDS))
        return heapq.merge(*shards)

    def _query(self, index: str, attribute: str, value: str, after: str) -> Iterator[tuple[str, str]]:
        """Place and name of all that one part of an index lists from a place on, in order."""
        asked = {
            "IndexName": index,
            "KeyConditionExpression": "#part = :part AND #first > :after",
            "ExpressionAttributeNames": {"#part": attribute, "#first": "first"},
            # a key is never empty, and every place is greater than this one
            "ExpressionAttributeValues": {":part": {"S": value}, ":after": {"S": after or " "}},
        }
        return ((item["first"]["S"], self._id(item)) for item in self._paged("query", **asked))

    def _paged(self, operation: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """All items of a question, a page at a time."""
        while True:
            found = self._do(operation, **asked)
            yield from found["Items"]
            if "LastEvaluatedKey" not in found:
                return
            asked["ExclusiveStartKey"] = found["LastEvaluatedKey"]

    def _unlisted(self, after: str) -> Iterator[str]:
        """All of them by a scan, which is never behind; none if an index has as many as there are."""
        if not after and self._listed_count() == self._scanned_count():
            return
        place = {"ExclusiveStartKey": self._key(after)} if after else {}
        for item in self._paged("scan", **self._scan_of_lists(), **place):
            yield self._id(item)

    def _listed_count(self) -> int:
        return sum(1 for kind in ("call", "tally") for _ in self._indexed(kind, None, ""))

    def _scanned_count(self) -> int:
        return sum(1 for _ in self._paged("scan", **self._scan_of_lists()))

    def _scan_of_lists(self) -> dict[str, Any]:
        return {
            "ConsistentRead": True,
            "FilterExpression": "begins_with(id, :mine) AND attribute_exists(#first)",
            "ProjectionExpression": "id",
            "ExpressionAttributeNames": {"#first": "first"},
            "ExpressionAttributeValues": {":mine": {"S": f"{self.namespace}:"}},
        }

    def _is_there(self) -> bool:
        client = self._connected()
        try:
            client.describe_table(TableName=self.table)
        except client.exceptions.ResourceNotFoundException:
            return False
        except (exceptions.BotoCoreError, exceptions.ClientError) as error:
            raise self._translated(error) from error
        finally:
            client.close()
        return bool(self._find(["ledger"]))

    # -- long texts --

    def _parts(self, name: str, count: int) -> list[str]:
        return [f"text:{name}:{n}" for n in range(count)]

    def _keep_text(self, name: str, text: bytes) -> None:
        pieces = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        for part, piece in zip(self._parts(name, len(pieces)), pieces, strict=True):
            item = {**self._key(part), "data": {"B": piece}, "parts": {"N": str(len(pieces))}}
            self._do("put_item", Item=item)

    def _text(self, name: str) -> bytes | None:
        first = self._find([f"text:{name}:0"]).get(f"text:{name}:0")
        if first is None:
            return None
        rest = self._parts(name, first["parts"])[1:]
        pieces = [first["data"], *(self._find([name]).get(name, {}).get("data") for name in rest)]
        return None if None in pieces else b"".join(pieces)

    def _drop_texts(self, names: Iterable[str]) -> None:
        for name in names:
            first = self._find([f"text:{name}:0"]).get(f"text:{name}:0")
            if first is not None:
                self._drop(reversed(self._parts(name, first["parts"])))

    # -- the end --

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _abandon(self) -> None:
        self._client = None


def _parts_of(url: str) -> tuple[str, dict[str, str]]:
    """The table that a URL names, and what else it says."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if unknown := sorted(options.keys() - {"region", "endpoint_url"}):
        raise UsageError(
            f"dynamodb://…: {', '.join(unknown)} is no option; there are region and endpoint_url"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", parts.netloc) or parts.path not in ("", "/"):
        raise UsageError(  # not shown: what is misplaced may be a key
            "dynamodb://…: the URL names no table; write dynamodb://TABLE?region=…, with three signs or more; "
            "keys come from the environment or a profile"
        )
    return parts.netloc, options


def _key_of(part: str) -> list[dict[str, str]]:
    return [{"AttributeName": part, "KeyType": "HASH"}, {"AttributeName": "first", "KeyType": "RANGE"}]


def _is_ours(table: dict[str, Any]) -> bool:
    indexes = {index["IndexName"]: index["KeySchema"] for index in table.get("GlobalSecondaryIndexes", ())}
    ours = {index: _key_of(part) for index, part in _INDEXES.items()}
    return bool(table["KeySchema"] == _KEYS and ours.items() <= indexes.items())


def _item_of(fields: Fields) -> dict[str, Any]:
    return {name: {"S": v} if isinstance(v, str) else {"N": str(v)} for name, v in fields.items()}


def _fields_of(item: dict[str, Any]) -> Fields:
    """Text, whole numbers and bytes of an item."""
    return {
        name: int(value["N"]) if "N" in value else next(iter(value.values())) for name, value in item.items()
    }
