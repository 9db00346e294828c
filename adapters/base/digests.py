"""SHA-256 of files, cached by (path, size, mtime), so that a second start does not read gigabytes again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

_CHUNK = 1 << 22


def sha256_of(path: Path, progress: bool = False) -> str:
    """The file's sha256 in hex. ``progress`` shows a bar on stderr while a large file is read."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    bar = tqdm(
        total=size, desc=f"Hashing {path.name}", unit="B", unit_scale=True, disable=not progress, delay=1
    )
    with path.open("rb") as file, bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


class DigestMemo:
    """Caches file digests in one JSON file.

    An entry is valid while the file's size and mtime (ns) do not change. If the cache cannot be read, files
    are hashed again.
    """

    def __init__(self, memo: Path, progress: bool = False) -> None:
        self._memo = memo
        self._progress = progress

    def of_files(self, paths: Sequence[Path]) -> str:
        """One sha256 over the names and contents of ``paths``. Their order does not matter."""
        lines = sorted(f"{path.name} {self.of_file(path)}\n" for path in paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def of_file(self, path: Path) -> str:
        """The sha256 of one file, from the cache if the file looks unchanged."""
        stat = path.stat()
        key, stamp = str(path.absolute()), [stat.st_size, stat.st_mtime_ns]
        entries = self._read()
        known = entries.get(key)
        if known is not None and known[:2] == stamp:
            return str(known[2])
        digest = sha256_of(path, self._progress)
        self._write({**entries, key: [*stamp, digest]})
        return digest

    def _read(self) -> dict[str, list[int | str]]:
        try:
            entries = json.loads(self._memo.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def _write(self, entries: dict[str, list[int | str]]) -> None:
        self._memo.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._memo.parent, delete=False) as file:
            json.dump(entries, file)
        os.replace(file.name, self._memo)
