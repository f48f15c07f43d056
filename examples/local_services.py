"""The world outside the agent, on loopback: a payment service, a mail server and a model.

The demo and the OpenAI example talk to these instead of the real ones, so that both run without an
account. Standard library only, and nothing in here knows Ledger.
"""

import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]
#: What a service does with a request: its JSON body and headers in, status and JSON reply out.
Answer = Callable[[Json, Message], tuple[int, Json]]


# ── serving and asking ────────────────────────────────────────────────────────────────────────────


class _Server(ThreadingHTTPServer):
    # A reply that is still held back must not hold up the end of the program.
    block_on_close = False


@contextmanager
def serve(answer: Answer) -> Iterator[str]:
    """Answer POST requests on a free loopback port, and give the URL of it.

    The port listens before the URL is given, so nobody has to wait or to try again.
    """
    server = _Server(("127.0.0.1", 0), _handler(answer))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(answer: Answer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30
        disable_nagle_algorithm = True

        def handle(self) -> None:
            # The other side has given up or was killed: for a server that is an ordinary day.
            with suppress(ConnectionError):
                super().handle()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = answer(body, self.headers)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def post(url: str, body: Json, *, seconds: float, headers: Mapping[str, str] | None = None) -> Json:
    """Send JSON and give back the JSON reply; TimeoutError when there is none within `seconds`."""
    parts = urlsplit(url)
    # Not urllib: it would send even loopback requests to a proxy named in the environment.
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
    try:
        connection.request("POST", parts.path or "/", json.dumps(body), headers or {})
        reply: Json = json.loads(connection.getresponse().read())
    except TimeoutError:
        raise TimeoutError(f"no reply within {seconds:g} s") from None
    finally:
        connection.close()
    return reply


# ── the services ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class PaymentService:
    """Takes money; a request with an `Idempotency-Key` seen before gets the first receipt again."""

    #: Called with the order when its money was taken and no reply is sent: the moment of accidents.
    after_taking: Callable[[str], object] | None = None
    #: (order, amount) each time that money was taken.
    taken: list[tuple[str, float]] = field(default_factory=list)
    #: (order, key) of each request, whether it took money or not.
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    _receipts: dict[str, Json] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: Json, headers: Message) -> tuple[int, Json]:
        """Take the money of an order, unless the key says that this was done before."""
        key = headers.get("Idempotency-Key")
        with self._lock:
            self.requests.append((body["order_id"], key))
            known = self._receipts.get(key) if key else None
            receipt = known or self._take(body, key)
        if not known and self.after_taking:
            self.after_taking(body["order_id"])
        return 200, receipt

    def _take(self, body: Json, key: str | None) -> Json:
        self.taken.append((body["order_id"], body["amount"]))
        receipt = {"receipt": f"r-{len(self.taken)}", **body}
        if key:
            self._receipts[key] = receipt
        return receipt


@dataclass
class MailServer:
    """Sends whatever it is given. Like most mail servers it knows no idempotency key."""

    sent: list[Json] = field(default_factory=list)

    def answer(self, body: Json, _headers: Message) -> tuple[int, Json]:
        """Send the mail."""
        self.sent.append(body)
        return 200, {"sent": True}


#: A tool and its arguments, as a model asks for them.
Ask = tuple[str, Json]


@dataclass
class ScriptedModel:
    """Speaks OpenAI's chat completions: asks for the tools of each step, then says `goodbye`.

    A step whose tools did not all succeed is asked for again with new tool-call ids, which is what
    models do after a timeout. Like a real one it remembers only the messages that it is sent.
    """

    steps: Sequence[Sequence[Ask]]
    goodbye: str
    #: Requests that get "503 overloaded" instead of an answer; the first request is number 1.
    overloaded_at: frozenset[int] = frozenset()
    requests: int = 0

    def answer(self, body: Json, _headers: Message) -> tuple[int, Json]:
        """Say what comes next in the conversation that was sent."""
        self.requests += 1
        if self.requests in self.overloaded_at:
            return 503, {"error": {"message": "overloaded, try again", "type": "server_error"}}
        step = steps_done(body["messages"])
        message = _asking(self.steps[step]) if step < len(self.steps) else _saying(self.goodbye)
        return 200, _completion(body["model"], message)


def steps_done(messages: Sequence[Json]) -> int:
    """How many of the turns that asked for tools had no error among the answers."""
    turns: list[bool] = []
    for message in messages:
        if message.get("tool_calls"):
            turns.append(True)
        elif message["role"] == "tool" and message["content"].startswith("error"):
            turns[-1] = False
    return sum(turns)


def _asking(asks: Sequence[Ask]) -> Json:
    calls = [
        {
            "id": f"call_{uuid.uuid4().hex[:12]}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for name, arguments in asks
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _saying(text: str) -> Json:
    return {"role": "assistant", "content": text}


def _completion(model: str, message: Json) -> Json:
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex[:12]}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
