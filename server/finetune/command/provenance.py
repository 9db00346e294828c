"""Records which adapter folders were made by fine-tuning jobs. All other folders are the operator's.

A job writes a mark into the folder. The mark names the job, its state folder, the adapter, and the digests of
the adapter's files. So a folder that was edited, renamed, or copied from another server counts as the
operator's. Clients may replace and delete only folders of jobs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "manylora_job.json"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MAX_MARK_BYTES = 4096
_ID = "id"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The marks of the jobs of the state folder ``home``. Every method blocks."""

    home: Path

    def mark(self, folder: Path, name: str, job: str) -> None:
        """Write the mark: ``job`` made ``folder`` for the adapter ``name``."""
        mark = {"job": job, "state": self._id(), "name": name, "sha256": _digests(folder)}
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n")

    def job_of(self, folder: Path, name: str) -> str | None:
        """The job of this state folder that made ``folder`` for the adapter ``name``; None if none did."""
        mark = _read_mark(folder)
        job = mark.get("job")
        wanted = {"state": self._id(), "name": name, "sha256": _digests(folder)}
        is_ours = isinstance(job, str) and all(mark.get(key) == value for key, value in wanted.items())
        return str(job) if is_ours else None

    def _id(self) -> str:
        """The id of the state folder, which the first call creates."""
        path = self.home / _ID
        with suppress(FileNotFoundError):
            return path.read_text()
        fresh = path.with_name(f".{_ID}-{secrets.token_hex(8)}")
        fresh.write_text(secrets.token_hex(16))
        try:
            with suppress(FileExistsError):  # another process created it first
                os.link(fresh, path)
        finally:
            fresh.unlink()
        return path.read_text()


@dataclass(frozen=True, slots=True)
class Producer:
    """The job that made a folder."""

    provenance: Provenance
    job: str

    def mark(self, folder: Path, name: str) -> None:
        """Write the job's mark into ``folder``, for the adapter ``name``."""
        self.provenance.mark(folder, name, self.job)


def _digests(folder: Path) -> dict[str, str]:
    """The digests of those files of the adapter that exist."""
    digests = {}
    for name in _FILES:
        with suppress(OSError), _open(folder / name) as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_mark(folder: Path) -> dict[str, object]:
    if folder.is_symlink():
        return {}
    with suppress(OSError, ValueError, RecursionError), _open(folder / MARK) as file:
        mark = json.loads(file.read(_MAX_MARK_BYTES))
        return mark if isinstance(mark, dict) else {}
    return {}


def _open(path: Path) -> io.BufferedReader:
    """Open a regular file. Raises OSError for anything else, without blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return open(descriptor, "rb")
