"""The command: where to listen, who may come, and the server."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress

import uvicorn

from ledger import LedgerError, UsageError
from ledger_dashboard.app import CHANGING, create_app
from ledger_dashboard.security import EVERYWHERE, checked_token, hosts_for, is_loopback
from ledger_ops.reader import open_ledger

_STOP_SECONDS = 2


def run(argv: Sequence[str] | None) -> int:
    """Serve until stopped; the exit code is 0, 1 (failure) or 2 (usage)."""
    parser = _parser()
    asked = parser.parse_args(argv)
    token = os.environ.get("LEDGER_DASHBOARD_TOKEN") or None if asked.token is None else asked.token
    try:
        token = None if token is None else checked_token(token)
    except UsageError as error:
        parser.error(f"--token: {error}")
    if token is None and not is_loopback(asked.host):
        parser.error(
            f"--host {asked.host} can be reached from other machines, and everybody there could read the "
            "ledger and change it; add --token TOKEN (a long random one), or leave --host out"
        )
    try:
        open_ledger(asked.db).close()
    except LedgerError as error:
        return _fail(str(error))
    try:
        listener = _bind(asked.host, asked.port)
    except OSError as error:
        return _fail(
            f"cannot listen on {asked.host} port {asked.port} ({error.strerror or error}); another dashboard "
            "may run there: stop it, or take another port with --port (0: any that is free)"
        )
    with listener:
        return _serve(listener, asked, token)


def _serve(listener: socket.socket, asked: argparse.Namespace, token: str | None) -> int:
    hosts = hosts_for(asked.host, asked.allowed_host)
    app = create_app(asked.db, read_only=asked.read_only, token=token, allowed_hosts=hosts)
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", server_header=False, lifespan="on", ws="none",
        timeout_graceful_shutdown=_STOP_SECONDS,
    )  # fmt: skip
    url = _url(asked.host, listener.getsockname()[1])
    _tell(url, asked, token)
    if asked.open:  # without the token: it would stay in the browser's history
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    with suppress(KeyboardInterrupt):  # Ctrl-C is how one ends it
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ledger-dashboard",
        description="Show a ledger in the browser.",
        epilog="example: ledger-dashboard ledger.db --open",
    )
    parser.add_argument(
        "db", nargs="?", help="path or URL of the ledger (default: LEDGER_DB, else ./ledger.db)"
    )
    parser.add_argument(
        "--port", type=_port, default=4242, help="where to listen (4242; 0: any that is free)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1: this machine alone)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument("--read-only", action="store_true", help="leave out what changes the ledger")
    parser.add_argument(
        "--token", help="ask for this token (or LEDGER_DASHBOARD_TOKEN, which `ps` does not show)"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a host name under which a proxy or another machine reaches it (may be repeated)",
    )  # fmt: skip
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return int(text)


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # a port that is taken shows itself here at the latest
    except BaseException:
        listener.close()
        raise
    return listener


def _url(host: str, port: int) -> str:
    name = "localhost" if host in ("127.0.0.1", *EVERYWHERE) else host
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def _tell(url: str, asked: argparse.Namespace, token: str | None) -> None:
    lines = [f"The ledger is shown at {url}"]
    if token is not None:
        lines.append("The first visit asks for the token; a cookie remembers it.")
    if asked.read_only:
        lines.append("Read-only: nothing here changes the ledger.")
    else:
        lines += ["These routes change the ledger (--read-only leaves them out):"]
        lines += [f"  POST {route}" for route in CHANGING]
    lines.append("Ctrl-C stops it.")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _fail(message: str) -> int:
    sys.stderr.write(f"ledger-dashboard: {message}\n")
    return 1
