"""Scans the adapter folder, which has one sub-folder for each adapter, by name.

A thread scans the folder every ``INTERVAL`` seconds. It compares the signatures of a sub-folder's files and
reads it only when the signature was the same in two scans. So half-written files are never read. Renaming a
complete folder into place is the safest way to deploy, and just as fast. Folders are independent: an invalid
or slow one does not affect the others.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

from adapters.artifact.recognise import recognise
from adapters.artifact.regex import BudgetExceeded
from adapters.errors import AdapterError, AdapterExists, AdapterNotFound
from adapters.events import event_fields
from adapters.paths import check_name, folder_name, name_of_folder
from adapters.printable import printable, shown_name
from adapters.registry import Registry
from adapters.watcher.folder import WatchedFolder, ignores_case, list_folders
from adapters.watcher.readers import Readers
from adapters.watcher.signature import (
    FILES,
    Signature,
    is_settled,
    signature_of,
    size_of,
    was_renamed,
    why_not_finished,
)
from adapters.watcher.suppressed import SuppressedFolders

logger = logging.getLogger("manylora.adapters")

INTERVAL = 0.4
SLEEP_FACTOR = 4
"""The thread sleeps at least this many times as long as listing the folder took."""
SCAN_BUDGET = 0.8
"""Seconds after which a scan starts no further folder, so that the next scan sees removals soon."""
MAX_CHECKS = 3
"""How often ``scan_folder`` checks files that may still be written to, every ``INTERVAL`` seconds."""
IDLE_SCANS = 2
"""Idle folders are checked in this many scans, so that thousands cost little. A renamed folder is not
idle."""


class Watcher:
    """Watches ``registry.root``. Call ``scan_once`` only before ``start``."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._root = registry.root
        self._folders: dict[str, WatchedFolder] = {}
        self._suppressed = SuppressedFolders()
        self._readers = Readers()
        self._read: deque[WatchedFolder] = deque()
        self._scans = 0
        self._unreadable = False
        self._pause = INTERVAL
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-watcher", daemon=True)

    def start(self) -> None:
        """Starts scanning in a daemon thread."""
        self._thread.start()

    def stop(self) -> None:
        """Starts no further folder, and waits for those that are being read."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._readers.join()

    def suppress(self, name: str) -> None:
        """Leaves the adapter's folder unregistered until its files change; call it before ``unregister``.

        Raises AdapterNameInvalid.
        """
        folder = folder_name(check_name(name))
        signature = signature_of(f"{self._root}/{folder}")
        if any(signature):
            self._suppressed.add(folder, signature)

    def scan_folder(self, name: str) -> None:
        """Registers the folder of that name now if it is complete, so a request for it need not wait for a
        scan.

        It blocks, for about a second if the files may still be written to. Any thread may call it. Raises
        AdapterNameInvalid.
        """
        folder = folder_name(check_name(name))
        path = self._root / folder
        signature, finished = self._wait_until_settled(str(path))
        if self._registry.serves(name) or ignores_case(path):
            return
        if not finished:
            self._list_waiting(name, path, signature)
            return
        self._suppressed.remove_if_changed(folder, signature)
        if self._is_suppressed(name) or self._was_read(folder, signature):
            return
        with suppress(AdapterExists):  # it was loaded through the API meanwhile
            self._register(name, path, replace=False)
            self._read.append(
                WatchedFolder(name, path, -1, signature, time.monotonic(), stable=True, done=True)
            )

    def scan_once(self, progress: bool = False, budget: float = math.inf) -> None:
        """One scan: registers, replaces and unregisters what has changed.

        ``progress`` shows a bar on a terminal. After ``budget`` seconds it starts no further folder and does
        not wait for those in progress. It never waits for slow folders.
        """
        began = time.monotonic()
        self._collect_read()  # before listing, so a name that is not listed was removed
        inodes = self._list()
        if inodes is None:
            return
        self._drop_removed(inodes.keys())
        folders = [self._check(name, inode) for name, inode in inodes.items()]
        now = time.monotonic()
        self._pause = max(INTERVAL, SLEEP_FACTOR * (now - began))
        due = [folder for folder in folders if folder.is_due(now)]
        self._scans += 1
        if due:
            self._read_all(due, progress, budget)

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self.scan_once(budget=SCAN_BUDGET)
            except Exception:
                logger.exception("scanning the adapter folder failed; it is tried again")

    def _wait_until_settled(self, path: str) -> tuple[Signature, bool]:
        """The folder's signature, and whether its files are finished. Waits for files that are written to."""
        before = None
        for _ in range(MAX_CHECKS):
            signature = signature_of(path)
            if None in signature[: len(FILES)]:
                return signature, False
            if signature == before or is_settled(signature) or was_renamed(path, signature):
                return signature, True
            before = signature
            if self._stop.wait(INTERVAL):
                break
        return signature, False

    def _list_waiting(self, name: str, path: Path, signature: Signature) -> None:
        """List an unfinished folder, so that a request for it gets 503 and not 404."""
        known = self._folders.get(path.name)
        if known is not None and known.signature == signature:
            return  # the watcher has listed it
        if path.is_dir() and not path.is_symlink() and not self._is_suppressed(name):
            self._registry.wait(name, path, why_not_finished(path, signature))
            self._read.append(WatchedFolder(name, path, -1, signature, time.monotonic(), stable=False))

    def _was_read(self, folder: str, signature: Signature) -> bool:
        known = self._folders.get(folder)
        return known is not None and known.done and known.signature == signature

    def _collect_read(self) -> None:
        """Adds the folders that were read since the last scan. They are not read again until they change."""
        while self._read:
            folder = self._read.popleft()
            self._folders[folder.path.name] = folder

    def _list(self) -> dict[str, int] | None:
        """The candidates' names and inodes.

        None while the folder cannot be listed; then nothing is removed.
        """
        try:
            inodes = list_folders(self._root)
        except OSError as error:
            if not self._unreadable:
                logger.warning(
                    "the adapter folder cannot be listed (%s); adapters stay served", error.strerror
                )
            self._unreadable = True
            return None
        self._unreadable = False
        return inodes

    def _drop_removed(self, names: Set[str]) -> None:
        removed = self._folders.keys() - names
        if not removed:
            return
        served = self._registry.names_by_path()
        for folder in removed:
            for name in served.get(self._folders.pop(folder).path, ()):
                self._unregister(name)
            self._suppressed.remove(folder)

    def _check(self, name: str, inode: int) -> WatchedFolder:
        """The current state of the folder. A changed signature resets it."""
        known = self._folders.get(name)
        if (
            known is not None
            and known.done
            and known.inode == inode
            and (hash(name) + self._scans) % IDLE_SCANS
        ):
            return known
        signature = signature_of(f"{self._root}/{name}")
        if known is not None and known.signature == signature and not known.refused:
            known.stable, known.inode = True, inode
            self._recognise(known)
            return known
        self._suppressed.remove_if_changed(name, signature)
        self._folders[name] = self._first_seen(name, inode, signature)
        return self._folders[name]

    def _first_seen(self, folder: str, inode: int, signature: Signature) -> WatchedFolder:
        """Lists a folder with a new signature as waiting, or as failed if nothing in it can be served."""
        path, refusal = self._root / folder, None
        try:
            name = name_of_folder(folder)
            self._registry.check(name, folder)
        except AdapterError as error:
            name, refusal = shown_name(folder), str(error)
        stable = self._scans == 0 and is_settled(signature)
        seen = WatchedFolder(name, path, inode, signature, time.monotonic(), stable)
        if refusal is not None:
            seen.done = seen.refused = True
            self._registry.fail(name, path, refusal)
        elif not seen.is_due(seen.since) and not self._is_suppressed(name):
            self._registry.wait(name, path, why_not_finished(path, signature))
        return seen

    def _recognise(self, folder: WatchedFolder) -> None:
        """Lists a folder that lacks a file as failed at once if it is clearly something else."""
        if folder.done or None not in folder.signature or self._is_suppressed(folder.name):
            return
        something_else = recognise(folder.path)
        if something_else is not None:
            folder.done = True
            self._registry.fail(folder.name, folder.path, str(something_else))

    def _read_all(self, due: list[WatchedFolder], progress: bool, budget: float) -> None:
        served = self._registry.names_by_path()
        taken = {name: path for path, names in served.items() for name in names}

        def read(folder: WatchedFolder) -> None:
            if not self._stop.is_set():
                self._load(folder, served.get(folder.path, set()), taken)

        due.sort(key=lambda folder: size_of(folder.signature))
        self._readers.read([folder for folder in due if not folder.slow], read, budget, progress)
        slow = [folder for folder in due if folder.slow]
        if slow:
            self._readers.read_behind(slow[0], read)

    def _load(self, folder: WatchedFolder, served: set[str], taken: dict[str, Path]) -> None:
        """Reads the folder for each of its names, and records that for the next scan."""
        folder.done = True
        if taken.get(folder.name, folder.path) != folder.path:
            reason = f"The name is served from {taken[folder.name]}."
            logger.warning("adapter folder not served", extra=event_fields(folder.name, reason=reason))
        try:
            for name in served | ({folder.name} - taken.keys()):
                self._register(name, folder.path)
        except BudgetExceeded:
            folder.slow, folder.done = True, False
            return
        self._read.append(folder)

    def _register(self, name: str, path: Path, replace: bool = True) -> None:
        """Assigns the folder to the name, or lists the reason why not. A bad folder does not affect others.

        Raises AdapterExists if the name means another folder, unless ``replace``; and BudgetExceeded.
        """
        if self._is_suppressed(name):
            return
        try:
            self._registry.register(name, path, replace)
        except AdapterError as error:
            if isinstance(error, AdapterExists) and not replace:
                raise
            self._registry.fail(name, path, str(error))
        except BudgetExceeded:
            self._registry.wait(
                name,
                path,
                "It is slow to read (its patterns or its chat template), so other folders are read first.",
            )
            raise
        except Exception as error:
            logger.exception("adapter not read", extra=event_fields(name))
            self._registry.fail(name, path, printable(f"Reading it failed: {type(error).__name__}: {error}."))
        if self._is_suppressed(name):  # unloaded while it was read
            self._unregister(name)

    def _unregister(self, name: str) -> None:
        with suppress(AdapterNotFound):
            self._registry.unregister(name)

    def _is_suppressed(self, name: str) -> bool:
        return folder_name(name) in self._suppressed
