"""Who made an adapter's folder: a fine-tuning job leaves a mark in it; any other folder is the operator's.

The mark names the job, the state folder whose job that is, the adapter, and the digests of its files. So a
folder that was edited, renamed, or copied from another server is the operator's again. Clients may replace
and delete what jobs have made, and nothing else.
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
    """Of one state folder: ``home``. Every method blocks."""

    home: Path

    def mark(self, folder: Path, name: str, job: str) -> None:
        """Write down that ``job`` has made ``folder``, which will be the adapter ``name``'s."""
        mark = {"job": job, "state": self._id(), "name": name, "sha256": _digests(folder)}
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n")

    def job_of(self, folder: Path, name: str) -> str | None:
        """The job of this state folder that has made the adapter ``name`` in ``folder``; None = nobody's."""
        mark = _read_mark(folder)
        job = mark.get("job")
        wanted = {"state": self._id(), "name": name, "sha256": _digests(folder)}
        is_ours = isinstance(job, str) and all(mark.get(key) == value for key, value in wanted.items())
        return str(job) if is_ours else None

    def _id(self) -> str:
        """The state folder's own, made when it is first asked for."""
        path = self.home / _ID
        with suppress(FileNotFoundError):
            return path.read_text()
        fresh = path.with_name(f".{_ID}-{secrets.token_hex(8)}")
        fresh.write_text(secrets.token_hex(16))
        try:
            with suppress(FileExistsError):  # another process was quicker
                os.link(fresh, path)
        finally:
            fresh.unlink()
        return path.read_text()


@dataclass(frozen=True, slots=True)
class Producer:
    """The job that makes a folder."""

    provenance: Provenance
    job: str

    def mark(self, folder: Path, name: str) -> None:
        """Write it down in ``folder``, which will be the adapter ``name``'s."""
        self.provenance.mark(folder, name, self.job)


def _digests(folder: Path) -> dict[str, str]:
    """Of the adapter's files, as far as they are there."""
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
    """A regular file; raises OSError for anything else, at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return open(descriptor, "rb")
