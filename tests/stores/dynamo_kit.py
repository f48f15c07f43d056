"""A DynamoDB for the tests: moto's server over real boto3, and a clock that obeys."""

from __future__ import annotations

import atexit
import functools
import logging
import os
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from ledger import Clock
from ledger_stores.dynamodb import DynamoStore
from tests.stores.servers import USED, fresh_namespace, missing


@functools.cache
def dynamo_url() -> str:
    """The URL of a table: LEDGER_TEST_DYNAMODB, or one on a server started here."""
    if named := os.environ.get("LEDGER_TEST_DYNAMODB"):
        USED.add(f"DynamoDB at {named}")
        return named
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        missing("DynamoDB", str(error))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "tests")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "tests")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    USED.add(f"DynamoDB as moto {version('moto')} plays it, over boto3 {version('boto3')}")
    host, port = server.get_host_and_port()
    return (
        f"dynamodb://ledger-tests?region=eu-central-1&endpoint_url={quote(f'http://{host}:{port}', safe='')}"
    )


class ClockedDynamo(DynamoStore):
    """The store with a server that takes the time from the test's clock."""

    def _server_time(self) -> int:
        self._pass_gate()
        return self.clock.wall()


def open_dynamo(clock: Clock | None) -> DynamoStore:
    """An empty store; with a clock, its server's time is that clock's."""
    kind: Any = DynamoStore if clock is None else ClockedDynamo
    store: DynamoStore = kind(dynamo_url(), namespace=fresh_namespace(), clock=clock)
    return store
