"""A way to a server on which a message or its answer is held up or lost, so that steps can be told apart."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

PATIENCE = 20.0  # how long a server may take to start, to end or to be asked; no speed is judged


@dataclass
class _Order:
    """Stop the next message with that mark, or the answer to it."""

    mark: bytes
    what: Literal["message", "answer"]
    is_held: bool
    #: the connection that the message went along, when its answer is waited for
    line: object = None


class Way:
    """Connections to a server through a door of our own; one order at a time, given before the message."""

    def __init__(self, dial: Callable[[], socket.socket], url_at: Callable[[int], str]) -> None:
        #: what was ordered has happened
        self.caught = threading.Event()
        self._dial = dial
        self._order: _Order | None = None
        self._lock = threading.Lock()
        self._decided = threading.Event()
        self._goes_on = False
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = url_at(self._door.getsockname()[1])
        self._threads = [threading.Thread(target=self._listen)]
        self._threads[0].start()

    def hold(self, mark: bytes, what: Literal["message", "answer"]) -> None:
        """Hold the next such message, or the answer to it, until `go_on` or `give_up`."""
        self._give(_Order(mark, what, is_held=True))

    def lose(self, mark: bytes, what: Literal["message", "answer"] = "answer") -> None:
        """Lose the next such message, or the answer to it, connection and all."""
        self._give(_Order(mark, what, is_held=False))

    def go_on(self) -> None:
        """What is held arrives now."""
        self._goes_on = True
        self._decided.set()

    def give_up(self) -> None:
        """What is held is lost, connection and all."""
        self._decided.set()

    def _give(self, order: _Order) -> None:
        self.caught.clear()
        self._decided.clear()
        self._goes_on = False
        self._order = order

    def _listen(self) -> None:
        with suppress(OSError):  # the door was closed
            while True:
                caller = self._door.accept()[0]
                caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    server = self._dial()
                except OSError:  # there is no server behind it now
                    caller.close()
                    continue
                line = object()
                for ends in ((caller, server, line, False), (server, caller, line, True)):
                    self._threads.append(threading.Thread(target=self._carry, args=ends))
                    self._threads[-1].start()

    def _carry(self, source: socket.socket, target: socket.socket, line: object, answers: bool) -> None:
        with suppress(OSError):
            while words := source.recv(65536):
                order = self._stops(words, line, answers)
                if order is not None:
                    self.caught.set()
                    if not (order.is_held and self._decided.wait(3 * PATIENCE) and self._goes_on):
                        break
                target.sendall(words)
        _shut(source)
        _shut(target)
        source.close()

    def _stops(self, words: bytes, line: object, answers: bool) -> _Order | None:
        with self._lock:
            order = self._order
            if order is None or (answers and order.line is not line):
                return None
            if not answers and (order.line is not None or order.mark not in words):
                return None
            if not answers and order.what == "answer":
                order.line = line
                return None
            self._order = None
            return order

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()
        _shut(self._door)
        self._door.close()
        for thread in self._threads:
            thread.join(PATIENCE)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
