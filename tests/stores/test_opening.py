"""Opening a store whose server hangs: one tries, and the others are told what became of it."""

from __future__ import annotations

import socket
from urllib.parse import quote

import pytest

import ledger_stores
from ledger import StoreError
from ledger_stores.testing import claim, in_parallel

URLS = {
    "postgres": "postgresql://me@127.0.0.1:{}/db",
    "redis": "redis://127.0.0.1:{}",
    "dynamodb": "dynamodb://orders?region=eu-central-1&endpoint_url="
    + quote("http://127.0.0.1:", safe="")
    + "{}",
}


@pytest.mark.parametrize("kind", URLS)
def test_threads_that_wait_for_an_opening_share_its_failure(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen threads at a server that takes connections and says nothing: all fail, few knock."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as door:
        store = ledger_stores.open_store(URLS[kind].format(door.getsockname()[1]), lock_seconds=1.0)

        def knock(_: int) -> str:
            try:
                return store.transact(claim()).kind
            except StoreError:
                return "refused"

        assert ["refused"] * 16 == in_parallel(16, knock)
        assert knocks_at(door) <= 8  # one opening tries a few times


def knocks_at(door: socket.socket) -> int:
    """How many connections were made."""
    door.settimeout(0.2)
    count = 0
    while True:
        try:
            door.accept()[0].close()
        except TimeoutError:
            return count
        count += 1
