"""A DynamoDB for the tests: moto's server over real boto3, and a clock that obeys."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
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
        from moto.moto_server.werkzeug_app import (
            DomainDispatcherApplication,
            MotoRequestHandler,
            create_backend_app,
        )
        from werkzeug.serving import make_server
    except ImportError as error:
        missing("DynamoDB", str(error))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "tests")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "tests")
    app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_by_one(environ: Any, start_response: Any) -> Any:
        """The server checks a condition and writes in two steps, where DynamoDB does it in one."""
        with turn:
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, one_by_one, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    atexit.register(server.shutdown)
    USED.add(f"DynamoDB as moto {version('moto')} plays it, over boto3 {version('boto3')}")
    there = quote(f"http://127.0.0.1:{server.server_port}", safe="")
    return f"dynamodb://ledger-tests?region=eu-central-1&endpoint_url={there}"


class ClockedDynamo(DynamoStore):
    """The store with a server that takes the time from the test's clock."""

    def _server_time(self) -> int:
        self._look_up()
        return self.clock.wall()


def open_dynamo(clock: Clock | None) -> DynamoStore:
    """An empty store; with a clock, its server's time is that clock's."""
    kind: Any = DynamoStore if clock is None else ClockedDynamo
    store: DynamoStore = kind(dynamo_url(), namespace=fresh_namespace(), clock=clock)
    return store
