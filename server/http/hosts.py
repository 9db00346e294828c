"""Check ``Host`` and ``Origin`` against this server's names, if no key protects the routes.

A browser lets any web page send requests to loopback and private addresses. ``Origin`` and
``Sec-Fetch-Site`` show that a page belongs to another site. A page may also rebind its own name to our
address (DNS rebinding). ``Host`` then holds a name that is not ours. An address cannot be rebound.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import HttpConfig
from server.http.errors import (
    BadRequest,
    HostNotAllowed,
    HttpError,
    OriginNotAllowed,
    code_of,
    error_response,
)
from server.http.record import record_of

ANY: Final = "*"
_LOCALHOST = ("localhost", "*.localhost")
_HOST = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]+(?:%[\w.~-]+)?)\]|(?P<name>[\w.~-]+?)\.?)(?::\d{0,5})?", re.ASCII
)
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?P<host>[^/?#@]+)")


def host_of_absolute_target(url: bytes) -> bytes | None:
    """The authority of a request target in absolute form (``GET http://host/path``); None for other forms."""
    if url.startswith(b"/"):
        return None
    _, found, rest = url.partition(b"://")
    return re.split(rb"[/?#]", rest, maxsplit=1)[0] if found else None


def parse_host(value: str) -> str | None:
    """The name or address in a Host header, in lower case; None if the header is not valid.

    The result has no port, no brackets and no final dot.
    """
    match = _HOST.fullmatch(value)
    return (match["address"] or match["name"]).lower() if match else None


class Names:
    """The names and addresses of this server.

    Args:
        bind: the address it listens on (``--host``). A wildcard address allows every address and this
            machine's host name.
        more: further names (``--allowed-hosts``).
    """

    def __init__(self, bind: str, more: Iterable[str]) -> None:
        self._any_address = _is_wildcard(bind)
        own = socket.gethostname() if self._any_address else bind
        named = {*_LOCALHOST, own.lower(), *more}
        self._suffixes = tuple(each[1:] for each in named if each.startswith("*."))
        self._exact = frozenset(each for each in named if not each.startswith("*."))

    def has(self, host: str) -> bool:
        """Whether the Host header may be ``host``."""
        return self.trusts(host) or (self._any_address and _address(host) is not None)

    def trusts(self, host: str) -> bool:
        """Whether a web page of ``host`` may send requests: the host is listed, or it is this machine."""
        if ANY in self._exact or host in self._exact or host.endswith(self._suffixes):
            return True
        address = _address(host)
        return address is not None and (address.is_loopback or str(address) in self._exact)


class RequireKnownHost:
    """Middleware: require one valid Host header.

    If no key protects the routes, Host and Origin must also name this server or an allowed host.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self.app = app
        self.names = Names(config.host, config.allowed_hosts)
        self.checks_host = bool(config.allowed_hosts) or not config.api_keys
        self.checks_origin = not config.api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._fault(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
            return
        record_of(Request(scope)).error = code_of(error)
        await error_response(error)(scope, receive, send)

    def _fault(self, scope: Scope) -> HttpError | None:
        hosts = _values(scope, b"host")
        if len(hosts) > 1:
            return BadRequest("The request has more than one Host header.")
        if not hosts:
            # HTTP/1.0 allows that, and load balancers' checks do it. Browsers always send it.
            return None if scope["http_version"] == "1.0" else BadRequest("The request has no Host header.")
        host = parse_host(hosts[0])
        if host is None:
            return BadRequest(f"The Host header {hosts[0][:200]!r} is not a valid host name or address.")
        if self.checks_host and not self.names.has(host):
            return HostNotAllowed(
                f"The host {host[:200]!r} is not allowed. Without API keys, this server accepts only its own "
                "addresses and names. Use the server's address, or start it with --allowed-hosts NAME or "
                "--api-key."
            )
        return self._cross_site(scope, host) if self.checks_origin else None

    def _cross_site(self, scope: Scope, host: str) -> HttpError | None:
        origins = _values(scope, b"origin")
        for origin in origins:
            match = _ORIGIN.fullmatch(origin)
            page = parse_host(match["host"]) if match else None
            if page is None or (page != host and not self.names.trusts(page)):
                return _not_from(origin)
        if not origins and "cross-site" in _values(scope, b"sec-fetch-site"):
            return _not_from("another site")
        return None


def _not_from(page: str) -> OriginNotAllowed:
    return OriginNotAllowed(
        f"Without API keys, a web page of {page[:200]} may not use this server. Start it with "
        "--allowed-hosts NAME to allow that page's host, or with --api-key."
    )


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for each, value in scope["headers"] if each == name]


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_wildcard(bind: str) -> bool:
    address = _address(bind)
    return address is not None and address.is_unspecified
