"""Keeps the registry equal to the adapter folder: one sub-folder an adapter, named after it.

A thread looks every ``INTERVAL`` seconds. It sees a folder as the signature of its files, and reads it
only when that signature stood still for two looks, so that half-written files are never read. Renaming a
finished folder into place is the safest way to deploy, and as quick. Each folder is judged on its own: what
is wrong with one, or slow, is no other's business.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.artifact.recognise import recognise
from adapters.artifact.regex import OutOfPatience
from adapters.errors import AdapterError, AdapterExists, AdapterNotFound
from adapters.paths import UNFINISHED_SUFFIXES, check_name, folder_name, name_of_folder
from adapters.printable import printable, shown_name
from adapters.readers import Readers
from adapters.registry import Registry
from adapters.signature import (
    FILES,
    Signature,
    is_settled,
    signature_of,
    size_of,
    was_renamed,
    why_not_finished,
)

logger = logging.getLogger("manylora.adapters")

INTERVAL = 0.4
REST = 4
"""The thread rests at least so many times as long as it took to list the folder."""
SCAN_BUDGET = 0.8
"""Seconds after which the thread begins no further folder before it looks again (at removals above all)."""
INCOMPLETE_AFTER = 30.0
"""Seconds that a folder without both files is waited for before it is listed as failed."""
MOST_LOOKS = 3
"""How often ``look_at`` looks, ``INTERVAL`` apart, at files that may still be written to."""
ROUNDS = 2
"""Idle folders are spread over so many looks, so that thousands cost little; a renamed one is not idle."""


@dataclass(slots=True)
class _Folder:
    """One folder as last seen.

    Attributes:
        name: of its adapter.
        since: when this signature was first seen (monotonic seconds).
        still: whether it was seen twice, or was old already at the first look.
        done: whether this signature has been read, well or badly, or need not be.
        slow: whether reading it took longer than a look has time for.
        refused: whether nothing there could be served, whatever the files are.
    """

    name: str
    path: Path
    inode: int
    signature: Signature
    since: float
    still: bool
    done: bool = False
    slow: bool = False
    refused: bool = False

    def is_due(self, now: float) -> bool:
        """Whether to read it now; one without both files is read late, to find the reason to list."""
        complete = None not in self.signature
        return self.still and not self.done and (complete or now - self.since >= INCOMPLETE_AFTER)


class Watcher:
    """Watches ``registry.root``. ``scan_once`` is for before ``start``; the two never run at once."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._root = registry.root
        self._folders: dict[str, _Folder] = {}
        self._suppressed: dict[str, Signature] = {}
        self._suppressing = threading.Lock()
        self._readers = Readers()
        self._read: deque[_Folder] = deque()
        self._looks = 0
        self._unreadable = False
        self._pause = INTERVAL
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-watcher", daemon=True)

    def start(self) -> None:
        """Begins to look, in a daemon thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begins no further folder, and waits for those that are being read."""
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
            with self._suppressing:
                self._suppressed[folder] = signature

    def look_at(self, name: str) -> None:
        """Registers the folder of that name now if it is finished; a request that names it need not wait.

        Blocks, for about a second if its files may still be written to. From any thread. Raises
        AdapterNameInvalid.
        """
        folder = folder_name(check_name(name))
        path = self._root / folder
        signature, finished = self._settled(str(path))
        if self._registry.serves(name) or _has_other_case(path):
            return
        if not finished:
            self._list_waiting(name, path, signature)
            return
        self._heed_changes(folder, signature)
        if self._is_suppressed(name) or self._was_read(folder, signature):
            return
        with suppress(AdapterExists):  # it was loaded by hand meanwhile
            self._register(name, path, replace=False)
            self._read.append(_Folder(name, path, -1, signature, time.monotonic(), still=True, done=True))

    def scan_once(self, progress: bool = False, budget: float = math.inf) -> None:
        """One look: registers, replaces and unregisters what has changed.

        ``progress`` shows a bar on a terminal. After ``budget`` seconds no further folder is begun, and those
        under way are not waited for; nor are ever those that are slow to read.
        """
        began = time.monotonic()
        self._take_over_read()  # before listing: then what is not listed was removed since
        inodes = self._list()
        if inodes is None:
            return
        self._drop_removed(inodes.keys())
        folders = [self._look(name, inode) for name, inode in inodes.items()]
        now = time.monotonic()
        self._pause = max(INTERVAL, REST * (now - began))
        due = [folder for folder in folders if folder.is_due(now)]
        self._looks += 1
        if due:
            self._read_all(due, progress, budget)

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self.scan_once(budget=SCAN_BUDGET)
            except Exception:
                logger.exception("Looking at the adapter folder failed; trying again.")

    def _settled(self, path: str) -> tuple[Signature, bool]:
        """The folder's signature, and whether its files are finished. Waits for files that are written to."""
        before = None
        for _ in range(MOST_LOOKS):
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
        """A folder that is not finished: whoever names it is told to come again, not that it is unknown."""
        known = self._folders.get(path.name)
        if known is not None and known.signature == signature:
            return  # the watcher has listed it
        if path.is_dir() and not path.is_symlink() and not self._is_suppressed(name):
            self._registry.wait(name, path, why_not_finished(path, signature))
            self._read.append(_Folder(name, path, -1, signature, time.monotonic(), still=False))

    def _was_read(self, folder: str, signature: Signature) -> bool:
        known = self._folders.get(folder)
        return known is not None and known.done and known.signature == signature

    def _heed_changes(self, folder: str, signature: Signature) -> None:
        """An unloaded folder whose files have changed since is read again."""
        with self._suppressing:
            if self._suppressed.get(folder, signature) != signature:
                del self._suppressed[folder]

    def _take_over_read(self) -> None:
        """What was read since the last look: it is not read again, and is seen to change and to go."""
        while self._read:
            folder = self._read.popleft()
            self._folders[folder.path.name] = folder

    def _list(self) -> dict[str, int] | None:
        """The candidates' names and inodes; None while the folder cannot be listed, which removes nobody."""
        try:
            with os.scandir(self._root) as entries:
                inodes = {entry.name: entry.inode() for entry in entries if _is_candidate(entry)}
        except OSError as error:
            if not self._unreadable:
                logger.warning("The adapter folder cannot be listed (%s); adapters stay.", error.strerror)
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
            with self._suppressing:
                self._suppressed.pop(folder, None)

    def _look(self, name: str, inode: int) -> _Folder:
        """The folder as it is now; one whose signature has changed begins anew."""
        known = self._folders.get(name)
        if known is not None and known.done and known.inode == inode and (hash(name) + self._looks) % ROUNDS:
            return known
        signature = signature_of(f"{self._root}/{name}")
        if known is not None and known.signature == signature and not known.refused:
            known.still, known.inode = True, inode
            self._recognise(known)
            return known
        self._heed_changes(name, signature)
        self._folders[name] = self._first_seen(name, inode, signature)
        return self._folders[name]

    def _first_seen(self, folder: str, inode: int, signature: Signature) -> _Folder:
        """A folder with a new signature: listed as waiting, or as failed if nothing can be served there."""
        path, refusal = self._root / folder, None
        try:
            name = name_of_folder(folder)
            self._registry.check(name, folder)
        except AdapterError as error:
            name, refusal = shown_name(folder), str(error)
        still = self._looks == 0 and is_settled(signature)
        seen = _Folder(name, path, inode, signature, time.monotonic(), still)
        if refusal is not None:
            seen.done = seen.refused = True
            self._registry.fail(name, path, refusal)
        elif not seen.is_due(seen.since) and not self._is_suppressed(name):
            self._registry.wait(name, path, why_not_finished(path, signature))
        return seen

    def _recognise(self, folder: _Folder) -> None:
        """One that lacks a file since it plainly is something else is listed so, and not waited for."""
        if folder.done or None not in folder.signature or self._is_suppressed(folder.name):
            return
        something_else = recognise(folder.path)
        if something_else is not None:
            folder.done = True
            self._registry.fail(folder.name, folder.path, str(something_else))

    def _read_all(self, due: list[_Folder], progress: bool, budget: float) -> None:
        served = self._registry.names_by_path()
        taken = {name: path for path, names in served.items() for name in names}

        def read(folder: _Folder) -> None:
            if not self._stop.is_set():
                self._load(folder, served.get(folder.path, set()), taken)

        due.sort(key=lambda folder: size_of(folder.signature))
        self._readers.read([folder for folder in due if not folder.slow], read, budget, progress)
        slow = [folder for folder in due if folder.slow]
        if slow:
            self._readers.read_behind(slow[0], read)

    def _load(self, folder: _Folder, served: set[str], taken: dict[str, Path]) -> None:
        """Reads the folder for every name it has, and says so to the next look."""
        folder.done = True
        if taken.get(folder.name, folder.path) != folder.path:
            logger.warning("Folder %s is not served: %s goes by its name.", folder.name, taken[folder.name])
        try:
            for name in served | ({folder.name} - taken.keys()):
                self._register(name, folder.path)
        except OutOfPatience:
            folder.slow, folder.done = True, False
            return
        self._read.append(folder)

    def _register(self, name: str, path: Path, replace: bool = True) -> None:
        """Points the name at the folder, or lists why not: a bad folder fails alone.

        Raises AdapterExists if the name means another folder, unless ``replace``; and OutOfPatience.
        """
        if self._is_suppressed(name):
            return
        try:
            self._registry.register(name, path, replace)
        except AdapterError as error:
            if isinstance(error, AdapterExists) and not replace:
                raise
            self._registry.fail(name, path, str(error))
        except OutOfPatience:
            self._registry.wait(
                name, path, "It is slow to read (its patterns, its chat template), so others are first."
            )
            raise
        except Exception as error:
            logger.exception("Reading adapter %s failed.", name)
            self._registry.fail(name, path, printable(f"Reading it failed: {type(error).__name__}: {error}."))
        if self._is_suppressed(name):  # unloaded while it was read
            self._unregister(name)

    def _unregister(self, name: str) -> None:
        with suppress(AdapterNotFound):
            self._registry.unregister(name)

    def _is_suppressed(self, name: str) -> bool:
        with self._suppressing:
            return folder_name(name) in self._suppressed


def _is_candidate(entry: os.DirEntry[str]) -> bool:
    """Whatever may be meant as an adapter. If it cannot be one people learn why; skipping would puzzle them.

    So a link to a folder is one, and so is a link that leads nowhere, or round.
    """
    if entry.name.startswith(".") or entry.name.endswith(UNFINISHED_SUFFIXES):
        return False
    try:
        return entry.is_dir() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _has_other_case(path: Path) -> bool:
    """Whether case does not count there: then only a listing tells how the folder is really spelt."""
    try:
        return path.name != path.name.swapcase() and path.with_name(path.name.swapcase()).samefile(path)
    except OSError:
        return False
