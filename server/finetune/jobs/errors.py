"""Errors of files and jobs. ``server/http/errors.py`` maps them to HTTP.

::

    ManyloraError (adapters/errors.py)
    ├── StateUnusable           the database cannot be opened, or a newer manylora wrote it
    └── RequestError (server/errors.py)
        ├── FileNotKnown        no file has that id
        ├── FileInUse           an unfinished job needs the file
        ├── JobNotKnown         no job has that id
        ├── JobConflict         the job's state does not allow it
        ├── StorageFull         the disk has no room
        └── StateBusy           another process has held the database for too long
"""

from __future__ import annotations

from adapters.errors import ManyloraError
from server.errors import RequestError


class StateUnusable(ManyloraError):
    """The database cannot be opened, or a newer manylora wrote it."""


class FileNotKnown(RequestError):
    """No file has that id."""


class FileInUse(RequestError):
    """An unfinished job needs the file."""


class JobNotKnown(RequestError):
    """No fine-tuning job has that id."""


class JobConflict(RequestError):
    """The state of the job does not allow the request."""


class StorageFull(RequestError):
    """The disk has no room."""


class StateBusy(RequestError):
    """Another process holds the database. A later request may succeed."""


DISK_FULL = "The server's disk is full; delete files that are not needed."
