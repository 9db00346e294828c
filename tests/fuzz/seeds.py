"""The corpus of each target, in ``corpus/TARGET.txt``: one input in each line, in base64."""

from __future__ import annotations

import base64
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")


def read(target: str) -> list[bytes]:
    path = CORPUS / f"{target}.txt"
    return [base64.b64decode(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(target: str, inputs: list[bytes]) -> None:
    lines = sorted({base64.b64encode(each).decode() for each in inputs}, key=lambda line: (len(line), line))
    (CORPUS / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines))
