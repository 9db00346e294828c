"""Names and texts from outside, as people and logs may see them."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with everything spelt out that does not print: line ends, escape codes, lone surrogates, ….

    It is one line, can be written in any encoding of Unicode, and moves nobody's cursor. A byte that is no
    UTF-8 (``os.fsdecode``) is spelt ``\\xe9``.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _spelt(letter) for letter in text)


def shown_name(name: str) -> str:
    """A file's name as ``printable``, and no two alike: backslashes are doubled."""
    return printable(name.replace("\\", "\\\\"))


def _spelt(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return letter.encode("unicode_escape").decode()
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
