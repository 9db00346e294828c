"""The status of adapters: the registry's entries, with the tier that holds their weights."""

from __future__ import annotations

from adapters.printable import printable
from adapters.registry import Entry, Registry
from adapters.residency import Residency
from server.engine.interface import AdapterStatus


class AdapterListing:
    """Read-only. Text that comes from adapter files is reduced to printable characters."""

    def __init__(self, registry: Registry, residency: Residency) -> None:
        self._registry = registry
        self._residency = residency

    def all(self) -> list[AdapterStatus]:
        return [self._status(entry) for entry in self._registry.entries()]

    def has(self, name: str) -> bool:
        return self._registry.serves(name)

    def names(self) -> list[str]:
        return self._registry.names()

    def one(self, name: str) -> AdapterStatus | None:
        entry = self._registry.entry(name)
        return self._status(entry) if entry is not None else None

    def _status(self, entry: Entry) -> AdapterStatus:
        version = entry.version
        info = version.info if version else None
        return AdapterStatus(
            name=entry.name,
            state=entry.state,
            digest=version.digest if version else None,
            rank=info.rank if info else None,
            nbytes=info.nbytes if info else None,
            tier=self._residency.tier(version.digest) if version else None,
            in_flight=entry.in_flight,
            last_used=entry.last_used,
            created=entry.created,
            path=printable(str(entry.path)),
            base_model=printable(info.base_model) if info and info.base_model is not None else None,
            warnings=tuple(map(printable, info.warnings)) if info else (),
            reason=printable(entry.reason) if entry.reason is not None else None,
        )
