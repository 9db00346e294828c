"""Recognises training data that is not JSON by its first bytes, and says how to convert it."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

HEAD_BYTES = 4096
"""Bytes of the file that are read."""
EXAMPLE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'
_ROWS = f"give one JSON object on each line, such as {EXAMPLE}"

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "compressed with gzip; unpack it first (gunzip)"),
    (b"BZh", "compressed with bzip2; unpack it first (bunzip2)"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first (unzstd)"),
    (b"PK\x03\x04", f"a ZIP archive or an Excel file; {_ROWS}"),
    (b"PAR1", f"a Parquet file; write it as JSON lines: pandas.read_parquet(…).to_json(…, "
              f'orient="records", lines=True); {_ROWS}'),
    (b"ARROW1", f'an Arrow file; write it as JSON lines (datasets: to_json); {_ROWS}'),
    (b"SQLite format 3", f"an SQLite database; {_ROWS}"),
    (b"%PDF", f"a PDF; {_ROWS}"),
    (b"GGUF", f"a GGUF model, not data; {_ROWS}"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
    (codecs.BOM_UTF32_LE, "UTF-32 text; save it as UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32 text; save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
)  # fmt: skip
_COLUMNS = frozenset(
    {"messages", "conversations", "prompt", "completion", "instruction", "input", "output", "question"}
    | {"answer", "text", "role", "content", "system", "user", "assistant", "human", "response", "label"}
)
"""Column names that identify a table of training data."""


def not_json(head: bytes) -> str | None:
    """Completes "train.csv is …" for a file with these first bytes. None if it may be JSON or is unknown."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if b"\0" in head:
        half = head[1::2].count(0) > len(head) // 4 or head[::2].count(0) > len(head) // 4
        return "UTF-16 text; save it as UTF-8" if half and head.strip(b"\0") else f"binary data; {_ROWS}"
    line, line_ends, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    first = line.decode("utf-8", "replace").strip()
    if first.startswith("<"):
        return f"HTML or XML; {_ROWS}"
    if line_ends and first.startswith("{") and first.endswith(("{", "[", ",")):
        return f"JSON that is spread over several lines; {_ROWS} (convert it with: jq -c . FILE)"
    return f"CSV; {_ROWS}" if _is_table(first) else None


def unreadable(error: OSError, path: Path) -> str:
    """Completes "train.jsonl …"."""
    if isinstance(error, FileNotFoundError):
        return f"does not exist ({path}); check the path."
    if isinstance(error, IsADirectoryError):
        return f"is a folder; give a file. In it, {_ROWS}."
    return f"cannot be read ({error.strerror}); check the file."


def _is_table(line: str) -> bool:
    if line.startswith(("{", "[")):
        return False
    names = {name.strip(" \"'").lower() for name in re.split(r"[,;\t|]", line)}
    return len(names) > 1 and bool(names & _COLUMNS)
