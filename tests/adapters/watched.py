"""A real adapter directory with its registry and watcher. The tests call each look."""

from __future__ import annotations

from pathlib import Path

from adapters.artifact import AdapterInfo, inspect_adapter
from adapters.registry import Registry
from adapters.watcher import Watcher
from tests.adapters.artifact.folders import LAYOUT, LIMITS, tensors, write_folder


class Room:
    """An adapter directory with its registry and watcher, after the first look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reads: list[str] = []
        self.registry = Registry(root, self._inspect, frozenset({"base"}))
        self.watcher = Watcher(self.registry)

    def _inspect(self, folder: Path) -> AdapterInfo:
        self.reads.append(folder.name)
        return inspect_adapter(folder, LAYOUT, LIMITS)

    def write(self, name: str, seed: int = 0) -> Path:
        return write_folder(self.root / name, weights=tensors(seed=seed))

    def look(self, times: int = 4) -> None:
        """Make enough looks to see any change and to confirm it."""
        for _ in range(times):
            self.watcher.scan_once()

    def states(self) -> dict[str, str]:
        return {entry.name: entry.state for entry in self.registry.entries()}

    def digest(self, name: str) -> str:
        return self.registry.resolve(name).digest

    def reason(self, name: str) -> str | None:
        return next(entry.reason for entry in self.registry.entries() if entry.name == name)
