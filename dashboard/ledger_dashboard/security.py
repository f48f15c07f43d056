"""Who may ask: the Host that was bound, the same origin, a token, and a CSRF token for what changes state.

A loopback bind is no login: any site in the user's browser can send requests to it, and by DNS
rebinding read the answers. So each request is judged here before anything looks at the ledger.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ledger import UsageError
from ledger_dashboard.render import base_of, refusal

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
#: as an entry of the allowed hosts: any address in figures, which no rebinding can bring here
ANY_ADDRESS = "*"
#: what one binds to be reached at every address of the machine
EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound
#: tells our script that a page of now has another CSRF token
STALE = "X-Ledger-Stale"
#: where the form of the token goes
ENTRANCE = "/enter"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_YEAR_SECONDS = 365 * 86_400
_MOST_FORM_BYTES = 65_536


def add_headers(headers: MutableHeaders) -> None:
    """What every answer carries; an answer that says nothing of caching is not cached."""
    for name, value in _HEADERS.items():
        headers[name] = value
    headers.setdefault("Cache-Control", "no-store")


def checked_token(token: str) -> str:
    """A token that a header and a form can carry; raises `UsageError`."""
    token = token.strip()
    if not token:
        raise UsageError("the token is empty, so anybody would know it; give a long random one")
    if not all("!" <= char <= "~" for char in token):
        raise UsageError(
            "the token has characters that no header can carry; give letters, digits and marks of ASCII"
        )
    return token


class Keys:
    """The secrets of one app: its token, and what CSRF tokens are made of."""

    def __init__(self, token: str | None) -> None:
        self.token = token
        self._csrf_key = secrets.token_bytes(32)

    def knows(self, token: str) -> bool:
        """Whether that is the token, in constant time."""
        return self.token is not None and _same(token, self.token)

    @property
    def badge(self) -> str:
        """What the cookie holds once the token was shown: it follows from the token and does not tell it."""
        return _mac((self.token or "").encode(), "ledger-dashboard badge")

    def admits(self, badge: str) -> bool:
        """Whether a cookie was given by an app with this token."""
        return self.token is not None and _same(badge, self.badge)

    def csrf(self, visitor: str) -> str:
        """The token that a page of this visitor sends along with what changes state."""
        return _mac(self._csrf_key, visitor)

    def is_csrf(self, visitor: str, token: str) -> bool:
        """Whether a page of this visitor sent it."""
        return bool(visitor) and _same(token, self.csrf(visitor))


def _mac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode(errors="surrogatepass"))


def cookie_name(request: Request, what: str) -> str:
    """Cookies know no ports: two dashboards on one machine must not overwrite each other's."""
    server = request.scope.get("server") or ("", None)
    return f"ledger_{what}_{server[1] or 0}"


def visitor_of(request: Request) -> str:
    """The random name of this browser, "" before it has one."""
    return request.cookies.get(cookie_name(request, "visitor"), "")


class Shield:
    """ASGI middleware: refuses who may not ask, and gives every answer its headers."""

    def __init__(self, app: ASGIApp, *, keys: Keys, hosts: Iterable[str], read_only: bool) -> None:
        self.app = app
        self.keys = keys
        self.hosts = frozenset(host.lower() for host in hosts)
        self.read_only = read_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge a request; pass it on, or answer it here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(MutableHeaders(scope=message))
            await send(message)

        if scope["type"] != "http":  # there are no web sockets here
            await Response(status_code=404)(scope, receive, send)
            return
        scope["ledger_base"] = scope.get("root_path", "")  # inside of /static it is another
        scope["ledger_token"] = _take_token(scope)
        request = Request(scope)
        answer = self._refusal(request)
        await (answer or self.app)(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        if not is_allowed_host(request, self.hosts):
            return refusal(
                request, 400, "this host name is not served here",
                "Open the address that was printed at start, or start with --allowed-host NAME.",
            )  # fmt: skip
        if not _is_own(request):
            return refusal(
                request, 403, "the request came from another site",
                "Open the dashboard itself and do it there.",
            )  # fmt: skip
        scope_path = request.scope["path"].removeprefix(base_of(request))
        if self.keys.token is not None and not scope_path.startswith("/static/"):
            bearer = _bearer(request)
            request.scope["ledger_bearer"] = bearer is not None and self.keys.knows(bearer)
            if not request.scope["ledger_bearer"] and (answer := self._ask_token(request, scope_path)):
                return answer
        if request.method not in SAFE_METHODS and scope_path != ENTRANCE:
            return self._refuse_change(request)
        return None

    def _ask_token(self, request: Request, path: str) -> Response | None:
        given = request.scope["ledger_token"]
        if given is not None and request.method in SAFE_METHODS and self.keys.knows(given):
            return welcome(request, self.keys, whereabouts(request))
        if path == ENTRANCE and request.method == "POST":  # it compares the token itself
            return None
        if self.keys.admits(request.cookies.get(cookie_name(request, "badge"), "")):
            return None
        if path == "/health":  # says up or down to whoever asks, and why to those who may know
            request.scope["ledger_stranger"] = True
            return None
        answer = ask_token(request, whereabouts(request) if path != ENTRANCE else base_of(request) + "/")
        if request.headers.get("sec-fetch-site") == "cross-site":
            # a strict cookie stays at home when another site links here; asked again by ourselves, it comes
            answer.headers["Refresh"] = "0"
        return answer

    def _refuse_change(self, request: Request) -> Response | None:
        if self.read_only:
            return refusal(
                request, 403, "this dashboard is read-only",
                "Start it without --read-only, or use `ledger retry` and `ledger resolve`.",
            )  # fmt: skip
        if request.scope.get("ledger_bearer"):  # no browser sends that header by itself
            return None
        if not self.keys.is_csrf(visitor_of(request), request.headers.get("x-csrf-token", "")):
            answer = refusal(
                request, 403, "the CSRF token is missing or old",
                "Reload the page and do it again; the dashboard may have been restarted.",
            )  # fmt: skip
            answer.headers[STALE] = "csrf"
            return answer
        return None


def _take_token(scope: Scope) -> str | None:
    """The token of the query, which is taken out of it: a server around us writes the query into its log."""
    asked = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    given = [value for name, value in asked if name == "token"]
    if given:
        scope["query_string"] = urlencode([pair for pair in asked if pair[0] != "token"]).encode()
    return given[0] if given else None


def whereabouts(request: Request) -> str:
    """Path and query alone: a full URL would be built from a header."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def ask_token(request: Request, target: str, what: str = "a token is needed") -> Response:
    """401 with a form that leads to `target`."""
    answer = refusal(
        request, 401, what,
        "Enter the one with which the dashboard was started (--token or LEDGER_DASHBOARD_TOKEN); a program "
        "sends it as Authorization: Bearer.",
        target=target,
    )  # fmt: skip
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def welcome(request: Request, keys: Keys, target: str) -> Response:
    """Put the token into a cookie and out of the address bar."""
    # "//evil" would be another host
    answer = RedirectResponse("/" + target.lstrip("/\\"), status_code=303)
    set_cookie(request, answer, "badge", keys.badge, seconds=_YEAR_SECONDS, strict=True)
    return answer


async def enter(request: Request) -> Response:
    """The form of the token: changes it for a cookie, and leads on to the page that was asked for."""
    keys: Keys = request.app.state.desk.keys
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MOST_FORM_BYTES:
            return refusal(request, 413, "the form is too large", "Send the token alone.")
    fields = dict(parse_qsl(content.decode(errors="replace")))
    target = fields.get("target", base_of(request) + "/")
    if keys.token is not None and not keys.knows(fields.get("token", "").strip()):
        return ask_token(request, target, "that is not the token")
    return welcome(request, keys, target)


def set_cookie(
    request: Request, answer: Response, what: str, value: str, *, seconds: int | None, strict: bool
) -> None:
    """A cookie that no script reads. A strict one stays at home when another site links here."""
    answer.set_cookie(
        cookie_name(request, what), value, max_age=seconds, path=base_of(request) or "/",
        secure=request.url.scheme == "https", httponly=True, samesite="strict" if strict else "lax",
    )  # fmt: skip


def is_allowed_host(request: Request, hosts: frozenset[str]) -> bool:
    """Whether the Host header names what was bound, with its port."""
    host = request.headers.get("host", "").lower()
    if host in hosts - {*LOOPBACK, ANY_ADDRESS}:  # named as it is, such as that of a proxy
        return True
    name, port = _split(host)
    server = request.scope.get("server") or ("", None)
    bound = str(server[1] or "")
    if port != bound and not (port == "" and bound in ("80", "443")):
        return False
    return name in hosts or (ANY_ADDRESS in hosts and _is_address(name))


def _split(host: str) -> tuple[str, str]:
    """The name and the port of a Host header."""
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    return (name, port) if name else (host, "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _is_own(request: Request) -> bool:
    """Whether our own page, a person or a program asks; browsers tell where a request comes from."""
    site = request.headers.get("sec-fetch-site", "none")
    origin = request.headers.get("origin")
    if origin == "null" and request.scope["path"].removeprefix(base_of(request)) == ENTRANCE:
        origin = None  # so a browser calls any form of a page that gives no referrer
    if origin is not None and _host_of(origin) != request.headers.get("host", "").lower():
        return False
    if request.method not in SAFE_METHODS:
        return site in ("same-origin", "none") if origin is None else site != "cross-site"
    # following a link to a page is fine, fetching from another page is not
    return site in ("same-origin", "none") or request.headers.get("sec-fetch-mode") == "navigate"


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # such as an address that does not end
        return None


def _bearer(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Whether a bind to that host can be reached from this machine alone."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(a).partition("%")[0]).is_loopback for a in found)


def hosts_for(host: str, more: Iterable[str] = ()) -> tuple[str, ...]:
    """The host names by which a bind may be reached."""
    name = f"[{host}]" if ":" in host else host
    if host in EVERYWHERE:
        return (*LOOPBACK, ANY_ADDRESS, socket.gethostname(), socket.getfqdn(), *more)
    return (*LOOPBACK, name, *more)
