"""Folders that a client has unloaded. They stay unregistered until their files change."""

from __future__ import annotations

import threading

from adapters.watcher.signature import Signature


class SuppressedFolders:
    """The suppressed folders by name, with the signature of that time. Thread-safe."""

    def __init__(self) -> None:
        self._signatures: dict[str, Signature] = {}
        self._lock = threading.Lock()

    def __contains__(self, folder: str) -> bool:
        with self._lock:
            return folder in self._signatures

    def add(self, folder: str, signature: Signature) -> None:
        with self._lock:
            self._signatures[folder] = signature

    def remove(self, folder: str) -> None:
        with self._lock:
            self._signatures.pop(folder, None)

    def remove_if_changed(self, folder: str, signature: Signature) -> None:
        """Allows the folder to be read again if ``signature`` differs from the one of that time."""
        with self._lock:
            if self._signatures.get(folder, signature) != signature:
                del self._signatures[folder]
