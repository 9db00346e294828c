"""Uploaded files: their bytes are in ``files/`` of the state folder, and each has a row in the database.

The bytes are on the disk before the row is written, and are removed after the row. So a crash leaves at most
bytes without a row, which ``sweep`` removes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from adapters.fsync import sync_path
from server.errors import InvalidRequest
from server.finetune.jobs.check import Checked, check
from server.finetune.jobs.database import UNFINISHED, Database, Job, StoredFile
from server.finetune.jobs.errors import DISK_FULL, FileInUse, FileNotKnown, StorageFull
from server.finetune.jobs.paging import Page, page_of

logger = logging.getLogger("manylora.jobs")

TRAINING, RESULTS = "fine-tune", "fine-tune-results"
ABANDONED_AFTER = 3600.0
"""Seconds since the last write after which bytes without a row are abandoned."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Upload:
    """A file that is being uploaded.

    Attributes:
        size: bytes received so far.
    """

    def __init__(self, path: Path, is_full: Callable[[], bool] = lambda: False) -> None:
        """``is_full``: whether to stop although the disk still has room."""
        self.path = path
        self.size = 0
        self._is_full = is_full
        self._sha256 = hashlib.sha256()
        self._file = path.open("xb")

    def write(self, data: bytes) -> None:
        """Raises StorageFull."""
        if self._is_full():
            raise StorageFull(DISK_FULL)
        with _full_disk_named():
            self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def finish(self) -> str:
        """Write all bytes to the disk. Returns their sha256 in hex. Raises StorageFull."""
        with _full_disk_named():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Remove the bytes. Does nothing if the file was kept."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class Files:
    """All files of one state folder. Every method blocks."""

    def __init__(
        self, database: Database, folder: Path, check: Callable[[Path, str], Checked] = check
    ) -> None:
        """``check`` reads the rows of a training file, or raises DatasetInvalid."""
        self._database = database
        self._folder = folder
        self._check = check
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, file_id: str) -> Path:
        """The path of a file's bytes."""
        return self._folder / file_id

    def begin(self) -> Upload:
        """Start an upload. End it with ``keep`` or ``discard``. Raises StorageFull."""
        with _full_disk_named():
            return Upload(
                self._folder / f".upload-{secrets.token_hex(8)}", self._database.reserve.disk_is_low
            )

    def keep(self, upload: Upload, filename: str, purpose: str) -> StoredFile:
        """Finish the upload and store it as a file. The rows of a training file are checked first.

        Raises:
            DatasetInvalid: there are rows that cannot be used.
            DatasetUnreadable: the file is not a data set.
            StorageFull: the disk has no room.
        """
        digest = upload.finish()
        checked = self._check(upload.path, filename) if purpose == TRAINING else None
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            bytes=upload.size,
            created_at=time.time(),
            filename=filename,
            purpose=purpose,
            sha256=digest,
            format=checked.format if checked else None,
            rows=checked.rows if checked else None,
            unused_fields=checked.unused_fields if checked else {},
        )
        upload.path.rename(self.path(file.id))
        sync_path(self._folder)
        with self._database.write() as session:
            session.add(file)
        for name, count in file.unused_fields.items():
            logger.warning("unused field", extra={"fields": {"file": file.id, "field": name, "rows": count}})
        return file

    def add_results(self, filename: str, text: str) -> StoredFile:
        """Store a result of a job as a file. Raises StorageFull."""
        upload = self.begin()
        try:
            upload.write(text.encode())
            return self.keep(upload, filename, RESULTS)
        finally:
            upload.discard()

    def get(self, file_id: str) -> StoredFile:
        """Raises FileNotKnown."""
        with self._database.read() as session:
            return find_file(session, file_id)

    def content(self, file_id: str) -> tuple[StoredFile, Path]:
        """The file and the path of its bytes. Raises FileNotKnown, also if the bytes are missing."""
        file, path = self.get(file_id), self.path(file_id)
        if not path.is_file():
            raise FileNotKnown(
                f"The bytes of {file_id} are no longer on the server's disk; delete it and upload it again."
            )
        return file, path

    def list(self, after: str | None, limit: int, ascending: bool, purpose: str | None) -> Page[StoredFile]:
        """A page of files, the newest first, unless ``ascending``. Raises InvalidRequest for ``after``."""
        wanted = select(StoredFile)
        if purpose is not None:
            wanted = wanted.where(StoredFile.purpose == purpose)
        with self._database.read() as session:
            return page_of(session, wanted, StoredFile, after, limit, ascending)

    def delete(self, file_id: str) -> None:
        """Delete a file, also on a full disk.

        Raises:
            FileNotKnown: there is no such file.
            FileInUse: an unfinished job needs it.
        """
        self._database.write_with_reserve(lambda session: _forget(session, file_id))
        self.path(file_id).unlink(missing_ok=True)
        self._database.reserve.ensure()

    def sweep(self) -> None:
        """Remove abandoned bytes without a row, which a crash has left."""
        with self._database.read() as session:
            known = set(session.scalars(select(StoredFile.id)))
        for path in self._folder.iterdir():
            with suppress(OSError):  # it was removed in the meantime, or is not a file
                if path.name not in known and time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()
                    logger.info("removed an abandoned upload", extra={"fields": {"file": path.name}})


def find_file(session: Session, file_id: str) -> StoredFile:
    """Raises FileNotKnown."""
    file = session.scalars(select(StoredFile).where(StoredFile.id == file_id)).one_or_none()
    if file is None:
        raise FileNotKnown(f"There is no file {file_id!r:.100}; GET /v1/files lists them.")
    return file


def _forget(session: Session, file_id: str) -> None:
    file = find_file(session, file_id)
    needs = or_(Job.training_file == file_id, Job.validation_file == file_id)
    user = session.execute(select(Job.id, Job.status).where(needs, Job.status.in_(UNFINISHED))).first()
    if user is not None:
        raise FileInUse(f"Job {user.id} is {user.status} and needs {file_id}; cancel it first.")
    session.delete(file)


def training_file(session: Session, file_id: str, param: str) -> StoredFile:
    """A file with training rows. Raises InvalidRequest, which names the field ``param``."""
    try:
        file = find_file(session, file_id)
    except FileNotKnown as error:
        raise InvalidRequest(str(error), param, "invalid_file_id") from None
    if file.purpose != TRAINING:
        raise InvalidRequest(f"{file_id} has purpose {file.purpose!r}; it must be {TRAINING!r}.", param)
    return file


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(DISK_FULL) from error
        raise
