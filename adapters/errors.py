"""Every error that the adapters floor raises, as one tree.

::

    ManyloraError
    ├── BaseModelError              the 4-bit base cannot be had or used
    │   ├── BaseNotFound            nothing at that path, or the hub has no such id
    │   └── BaseCorrupt             a digest differs, or a file is not what it claims
    └── AdapterError                one adapter; the server and the others go on
        ├── AdapterNotFound         no adapter has that name
        ├── AdapterNameInvalid      the name or its path is not allowed
        ├── AdapterExists           the name is taken, and replacing was not asked for
        ├── AdapterInvalid          the folder is broken (shapes, NaN, missing tensors, …)
        ├── AdapterUnsupported      a kind of adapter that cannot be served exactly yet
        ├── AdapterTooLarge         rank or bytes over a cap
        └── AdapterChanged          the content on disk is not the registered version's

Messages are whole sentences for users: they name the field or tensor and the remedy.
"""

from __future__ import annotations


class ManyloraError(Exception):
    """Anything that manylora says about itself; never a bug's traceback."""


class BaseModelError(ManyloraError):
    """The base model cannot be had or used."""


class BaseNotFound(BaseModelError):
    """Nothing usable at the path, or no such id on the hub."""


class BaseCorrupt(BaseModelError):
    """A digest differs, or a file is not what it claims to be."""


class AdapterError(ManyloraError):
    """One adapter cannot be served; the server and all other adapters go on."""


class AdapterNotFound(AdapterError):
    """No adapter has that name."""


class AdapterNameInvalid(AdapterError):
    """The name is not ``[A-Za-z0-9][A-Za-z0-9._-]*``, or its path leaves the adapter folder."""


class AdapterExists(AdapterError):
    """The name is taken, and replacing it was not asked for."""


class AdapterInvalid(AdapterError):
    """The folder is broken: shapes, NaN, missing or unknown tensors, unreadable files."""


class AdapterUnsupported(AdapterError):
    """A kind of adapter that cannot be served exactly yet."""


class AdapterTooLarge(AdapterError):
    """Rank or bytes over a cap (known from the header, before memory is taken)."""


class AdapterChanged(AdapterError):
    """The content on disk is no longer that of the registered version."""
