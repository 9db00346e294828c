"""Checks names and paths that users give, and resolves them. Opens nothing."""

from __future__ import annotations

import re
from pathlib import Path

from adapters.errors import AdapterNameInvalid

MAX_NAME_LENGTH = 128
UNFINISHED_SUFFIXES = (".tmp", ".partial")
"""Folders with these endings are still being written. They are ignored, so adapters cannot have such
names."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FINE_TUNED = re.compile(r"ft:[A-Za-z0-9._/:-]+")


def check_name(name: str) -> str:
    """Returns the name if an adapter may have it. Every entry point calls this. Raises AdapterNameInvalid."""
    folder = folder_name(name)
    if len(folder) > MAX_NAME_LENGTH or not _NAME.fullmatch(folder):
        raise AdapterNameInvalid(
            f"{name!r:.140} cannot name an adapter; use letters, digits, '.', '_' and '-', beginning with a "
            f"letter or digit, at most {MAX_NAME_LENGTH} characters."
        )
    if folder.endswith(UNFINISHED_SUFFIXES):
        raise AdapterNameInvalid(
            f"{name!r:.140} cannot name an adapter: folders that end in '.tmp' or '.partial' are unfinished "
            "and are never served."
        )
    if served_name(name) != name:
        raise AdapterNameInvalid(f"{name!r} is the folder of adapter {served_name(name)!r}; use that name.")
    return name


def folder_name(name: str) -> str:
    """The sub-folder of the adapter with this name. It equals the name, except for fine-tuned models.

    ``ft:base:suffix:id`` has characters that folder names should not have. Each is written as ``_`` and its
    two hex digits (``ft_3abase_3asuffix_3aid``). ``served_name`` is the inverse.
    """
    if not _FINE_TUNED.fullmatch(name):
        return name
    return re.sub(r"[^A-Za-z0-9.-]", lambda odd: f"_{ord(odd[0]):02x}", name)


def served_name(folder: str) -> str:
    """The name of the adapter in the sub-folder ``folder``: see ``folder_name``."""
    name = re.sub(r"_([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), folder)
    return name if folder_name(name) == folder else folder


def name_of_folder(folder: str) -> str:
    """The name of the adapter in the sub-folder ``folder``.

    Raises AdapterNameInvalid if it cannot hold one.
    """
    name = check_name(served_name(folder))
    if folder_name(name) != folder:
        raise AdapterNameInvalid(f"The folder of adapter {name!r} must be called {folder_name(name)!r}.")
    return name


def resolve_under(root: Path, path_or_name: str | Path) -> Path:
    """The absolute path below ``root``. A relative path is resolved from ``root``.

    Raises AdapterNameInvalid if it is not below ``root``, or if a component below ``root`` is ``..`` or a
    link. ``root`` itself may be a link, because the operator chose it. The path need not exist.
    """
    root = root.absolute()
    wanted = Path(path_or_name)
    refused = f"{str(path_or_name)!r:.300} is not a path below the adapter folder"  # clients see it
    if ".." in wanted.parts:
        raise AdapterNameInvalid(f"{refused}: '..' is not allowed.")
    try:
        relative = (root / wanted).relative_to(root)
    except ValueError:
        raise AdapterNameInvalid(f"{refused}.") from None
    if not relative.parts:
        raise AdapterNameInvalid(f"{refused}: it is that folder itself.")
    steps = [*relative.parents[-2::-1], relative]
    if any(_is_link(root / step, refused) for step in steps):
        raise AdapterNameInvalid(f"{refused}: links are not followed.")
    return root / relative


def _is_link(path: Path, refused: str) -> bool:
    if "\0" in str(path):
        raise AdapterNameInvalid(f"{refused}: it has a NUL character.")
    try:
        return path.is_symlink()
    except OSError as error:
        raise AdapterNameInvalid(f"{refused}: {error.strerror}.") from error
