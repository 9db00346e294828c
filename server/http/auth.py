"""Access control: bearer keys, stored as hashes only. Admin routes need the admin key or a loopback peer."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.errors import NotAllowed, NotAuthenticated


class Keyring:
    """A set of keys. It can only tell whether it contains a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holds(self, key: str) -> bool:
        """Whether ``key`` is one of the keys. The time that this takes does not reveal which one."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, each) for each in self._digests) > 0


class RequireKey:
    """Middleware: require one of the keys, if there are any."""

    def __init__(self, app: ASGIApp, keys: Keyring) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.keys:
            _check(scope, self.keys)
        await self.app(scope, receive, send)


class RequireLoopback:
    """Middleware: require a loopback peer. It ignores headers, because any client can send them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_loopback(scope.get("client")):
            raise NotAllowed(
                "Admin routes are open to this machine only. To use them from another one, start the server "
                "with --admin-key and send that key as 'Authorization: Bearer KEY'."
            )
        await self.app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _check(scope: Scope, keys: Keyring) -> None:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    if not key or scheme.lower() != "bearer":
        raise NotAuthenticated("This route needs a key; send it as 'Authorization: Bearer KEY'.")
    if not keys.holds(key.strip()):
        raise NotAuthenticated("This key is not valid for this route; send another one.")


def _is_loopback(client: tuple[str, int] | None) -> bool:
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
