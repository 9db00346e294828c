"""Makes names and texts from outside safe to print and log."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with unprintable characters escaped: line ends, escape codes, lone surrogates, ….

    The result is one line, has no control codes, and can be written in any Unicode encoding. A byte that is
    not UTF-8 (``os.fsdecode``) is written as ``\\xe9``.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _spelt(letter) for letter in text)


def shown_name(name: str) -> str:
    """A file's name as ``printable``, but unique: backslashes are doubled."""
    return printable(name.replace("\\", "\\\\"))


def _spelt(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return letter.encode("unicode_escape").decode()
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
