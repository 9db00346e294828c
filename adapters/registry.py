"""Names → versions of adapters: the version that each name serves, and the requests on older versions.

This is bookkeeping under one lock, without torch. The caller gives ``inspect``, which reads a folder and runs
outside the lock. The pool keeps track of what is resident on the device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterNotReady,
)
from adapters.events import Tier, event_fields
from adapters.paths import check_name, resolve_under
from adapters.suggest import did_you_mean, near_names

if TYPE_CHECKING:
    from adapters.artifact import AdapterInfo

logger = logging.getLogger("manylora.adapters")

State = Literal["ready", "draining", "waiting", "failed"]


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """One content under one name. Two versions are the same only if they are the same object.

    Attributes:
        digest: of the content; versions that share it share rows and cached KV.
        path: the folder to load it from.
        created: when it was registered, in seconds of Unix time.
    """

    name: str
    digest: str
    path: Path
    info: AdapterInfo
    created: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list of adapters.

    A ``ready`` entry with a ``reason`` is still served, but the newest content of its folder was refused. A
    ``waiting`` one will be read when its files are finished.
    ``last_used`` and ``created`` are seconds of Unix time.
    """

    name: str
    state: State
    version: Version | None
    in_flight: int
    last_used: float | None
    path: Path
    reason: str | None
    created: float


@dataclass(slots=True)
class _Use:
    in_flight: int = 0
    last_used: float | None = None


@dataclass(frozen=True, slots=True)
class _Unserved:
    state: Literal["waiting", "failed"]
    path: Path
    reason: str
    created: float = field(default_factory=time.time, compare=False)


class Registry:
    """Thread-safe. Every method except ``register`` and ``register_outside`` returns at once.

    Subscribers are called outside the lock, in the thread that caused the event:

    Attributes:
        on_idle: called with a replaced or unregistered version when its last request has ended.
        on_retired: called with a version when neither a name nor a request uses its digest any more, so its
            memory can be freed. The same content may be registered again at any moment.
        tier: where the weights with a digest are, for log events.
    """

    def __init__(
        self, root: Path, inspect: Callable[[Path], AdapterInfo], reserved: frozenset[str] = frozenset()
    ) -> None:
        """
        Args:
            root: the folder of all adapters' folders.
            inspect: reads and checks a folder, which may be outside ``root``. It is also an attribute, for
                versions without a name.
            reserved: the names of the base.
        """
        self.root = root.absolute()
        self.on_idle: list[Callable[[Version], None]] = []
        self.on_retired: list[Callable[[Version], None]] = []
        self.inspect = inspect
        self.tier: Callable[[str], Tier] = lambda _: "disk"
        self._reserved = reserved
        self._lock = threading.Lock()
        self._current: dict[str, Version] = {}
        self._uses: dict[Version, _Use] = {}
        self._unserved: dict[str, _Unserved] = {}

    def check(self, name: str, path: str | Path) -> Path:
        """The absolute path of the folder, if it may be served under the name. It does not read the folder.

        Raises AdapterNameInvalid, or AdapterExists if the name is the base's.
        """
        self._check_name(name)
        return resolve_under(self.root, path)

    def register(self, name: str, path: str | Path, replace: bool) -> Version:
        """Reads the folder and points the name at it. Registering the same content again changes nothing.

        Raises:
            AdapterNameInvalid: the name or the path is not allowed.
            AdapterExists: the name is the base's, or it serves another content and ``replace`` is false.
            AdapterError: raised by ``inspect``. A version that the name already serves is still served.
        """
        return self._read(name, self.check(name, path), replace)

    def register_outside(self, name: str, folder: Path, replace: bool) -> Version:
        """Like ``register``, for a folder anywhere. Never call it with a client's path."""
        self._check_name(name)
        return self._read(name, folder.resolve(), replace)

    def _read(self, name: str, folder: Path, replace: bool) -> Version:
        try:
            info = self.inspect(folder)
        except AdapterError as error:
            if name in self._current:
                self.fail(name, folder, str(error))
            raise
        return self._point(Version(name, info.digest, folder, info, time.time()), replace)

    def unregister(self, name: str) -> None:
        """Forgets the name. Running requests end on their version. Raises AdapterNotFound."""
        with self._lock:
            old = self._current.pop(name, None)
            unserved = self._unserved.pop(name, None)
            gone = self._forget_if_idle(old)
        if old is None and unserved is None:
            raise self._not_found(name)
        if old is not None:
            logger.info("adapter unregistered", extra=self._event(name, old))
        self._tell(gone)

    def serves(self, name: str) -> bool:
        """Whether a new request may use the name now. Constant time in the number of adapters."""
        return name in self._current

    def resolve(self, name: str) -> Version:
        """The version that a new request for ``name`` gets now.

        Raises AdapterNotFound naming near matches, or AdapterInvalid with the reason why it is not served.
        """
        version = self._current.get(name)
        if version is None:
            raise self._why_not(name)
        return version

    def checkout(self, name: str) -> Version:
        """``resolve`` and ``acquire`` in one step, so no replacement happens in between.

        Raises like ``resolve``.
        """
        with self._lock:
            version = self._current.get(name)
            if version is not None:
                self._begin(version)
                return version
        raise self._why_not(name)

    def acquire(self, version: Version) -> None:
        """A request begins on the version, which stays at least until its ``release``.

        The version may have been replaced since ``resolve``. Then it is draining.
        """
        with self._lock:
            self._begin(version)

    def release(self, version: Version) -> None:
        """A request on the version has ended. Raises ValueError if none was running."""
        with self._lock:
            use = self._uses.get(version)
            if use is None or use.in_flight == 0:
                raise ValueError(f"No request is running on adapter {version.name!r} ({version.digest}).")
            use.in_flight -= 1
            use.last_used = time.time()
            gone = self._forget_if_idle(version)
        self._tell(gone)

    def fail(self, name: str, path: Path, reason: str) -> None:
        """Lists the folder as not served, with the reason, and logs that once.

        A version that the name already serves is still served.
        """
        if self._list_unserved(name, _Unserved("failed", path, reason)):
            current = self._current.get(name)
            event = "adapter not served" if current is None else "adapter not replaced"
            logger.warning(event, extra=self._event(name, current, reason=reason))

    def wait(self, name: str, path: Path, reason: str) -> None:
        """Lists the folder as one that will be read later, unless the name already serves a version."""
        self._list_unserved(name, _Unserved("waiting", path, reason))

    def entries(self) -> list[Entry]:
        """Every adapter by name: served, waiting, failed, and the versions that are draining."""
        with self._lock:
            served = [self._entry(version) for version in self._uses]
            unserved = [
                _unserved_entry(name, each)
                for name, each in self._unserved.items()
                if name not in self._current
            ]
        return sorted(
            served + unserved, key=lambda entry: (entry.name, entry.state != "ready", entry.created)
        )

    def names(self) -> list[str]:
        """The names that are served. Much faster than ``entries`` for thousands of adapters."""
        return list(self._current)

    def entry(self, name: str) -> Entry | None:
        """The version that new requests for the name get, or the reason why they get none."""
        with self._lock:
            version, unserved = self._current.get(name), self._unserved.get(name)
            if version is None and unserved is None:
                version = next((each for each in self._uses if each.name == name), None)
            if version is not None:
                return self._entry(version)
            return _unserved_entry(name, unserved) if unserved is not None else None

    def names_by_path(self) -> dict[Path, set[str]]:
        """For each folder, the names that are served from it, wait for it, or failed because of it."""
        with self._lock:
            pairs = [(version.path, name) for name, version in self._current.items()]
            pairs += [(each.path, name) for name, each in self._unserved.items() if name not in self._current]
        names: dict[Path, set[str]] = {}
        for path, name in pairs:
            names.setdefault(path, set()).add(name)
        return names

    def _check_name(self, name: str) -> None:
        check_name(name)
        if name in self._reserved:
            raise AdapterExists(f"{name!r} is the base's own name; choose another name for the adapter.")

    def _point(self, new: Version, replace: bool) -> Version:
        with self._lock:
            old = self._current.get(new.name)
            if old is not None and old.digest != new.digest and not replace:
                raise AdapterExists(f"{new.name!r} is already served; unload it first, or ask to replace it.")
            self._unserved.pop(new.name, None)
            if old is not None and (old.digest, old.path) == (new.digest, new.path):
                return old
            self._current[new.name] = new
            self._uses[new] = _Use()
            gone = self._forget_if_idle(old)
        logger.info("adapter served", extra=self._event(new.name, new, rank=new.info.rank))
        for warning in new.info.warnings:
            logger.warning("adapter warning", extra=self._event(new.name, new, reason=warning))
        self._tell(gone)
        return new

    def _list_unserved(self, name: str, new: _Unserved) -> bool:
        """Whether this changed the list."""
        with self._lock:
            if self._unserved.get(name) == new or (new.state == "waiting" and name in self._current):
                return False
            self._unserved[name] = new
            return True

    def _forget_if_idle(self, version: Version | None) -> tuple[Version, bool] | None:
        """The version and whether its digest is retired, if it is gone now. The caller holds the lock."""
        if version is None or self._is_current(version) or self._uses[version].in_flight:
            return None
        del self._uses[version]
        return version, all(other.digest != version.digest for other in self._uses)

    def _tell(self, gone: tuple[Version, bool] | None) -> None:
        if gone is None:
            return
        version, retired = gone
        for subscriber in [*self.on_idle, *(self.on_retired if retired else ())]:
            subscriber(version)

    def _is_current(self, version: Version) -> bool:
        return self._current.get(version.name) is version

    def _entry(self, version: Version) -> Entry:
        use, current = self._uses[version], self._is_current(version)
        newest = self._unserved.get(version.name) if current else None
        return Entry(
            name=version.name,
            state="ready" if current else "draining",
            version=version,
            in_flight=use.in_flight,
            last_used=use.last_used,
            path=version.path,
            reason=newest.reason if newest else None,
            created=version.created,
        )

    def _begin(self, version: Version) -> None:
        use = self._uses.setdefault(version, _Use())
        use.in_flight += 1
        use.last_used = time.time()

    def _event(self, name: str, version: Version | None, **more: object) -> dict[str, object]:
        tier = None if version is None else self.tier(version.digest)
        return event_fields(name, version, tier, **more)

    def _why_not(self, name: str) -> AdapterError:
        known = self._unserved.get(name)
        if known is not None and known.state == "waiting":
            return AdapterNotReady(f"Adapter {name!r} is not served yet: {known.reason}")
        if known is not None:
            return AdapterInvalid(f"Adapter {name!r} cannot be served: {known.reason}")
        return self._not_found(name)

    def _not_found(self, name: str) -> AdapterNotFound:
        with self._lock:
            names = list(self._current)
        return AdapterNotFound(f"There is no adapter {name!r:.140}{did_you_mean(near_names(name, names))}")


def _unserved_entry(name: str, each: _Unserved) -> Entry:
    return Entry(name, each.state, None, 0, None, each.path, each.reason, each.created)
