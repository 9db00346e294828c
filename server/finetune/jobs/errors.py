"""Why files and jobs are refused; ``server/http/errors.py`` maps these to HTTP.

::

    ManyloraError (adapters/errors.py)
    ├── StateUnusable           the database cannot be opened, or is of a newer manylora
    └── RequestError (server/errors.py)
        ├── FileNotKnown        no file has that id
        ├── FileInUse           an unfinished job needs the file
        ├── JobNotKnown         no job has that id
        ├── JobConflict         the job's state does not allow it
        ├── StorageFull         the disk has no room for it
        └── StateBusy           another process has held the database for too long
"""

from __future__ import annotations

from adapters.errors import ManyloraError
from server.errors import RequestError


class StateUnusable(ManyloraError):
    """The database cannot be opened, or a newer manylora has written it."""


class FileNotKnown(RequestError):
    """No file has that id."""


class FileInUse(RequestError):
    """A job that is not finished needs the file."""


class JobNotKnown(RequestError):
    """No fine-tuning job has that id."""


class JobConflict(RequestError):
    """The job is in a state that does not allow what is asked for."""


class StorageFull(RequestError):
    """The disk has no room."""


class StateBusy(RequestError):
    """Another process holds the database; later it may not."""


DISK_FULL = "The server's disk is full; delete files that nobody needs."
