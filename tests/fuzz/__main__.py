"""``python -m tests.fuzz TARGET``: fuzz a target, and add the inputs that reach new code to the corpus.

A fault ends it with a traceback, and leaves the input in the working directory. Add this input to the corpus
with the fix (``--add FILE``). It needs atheris (https://github.com/google/atheris).
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from peft import LoraConfig

from tests.fuzz import seeds

TARGETS = ("header", "config", "names", "multipart", "rows")
MAX_INPUT = 4096
INPUT_SECONDS = 5
MEMORY_MB = 2048
JSON_WORDS = """
{ } [ ] , : null true 1e400 NaN \\ud800
"dtype": "shape": "data_offsets": "BF16" lora_A lora_B .default modules_to_save
"messages": "conversations": "role": "content": "assistant" "weight": "tool_calls": (a+)+$ .* --boundary
"""
WORDS = (*JSON_WORDS.split(), *(f'"{field.name}":' for field in dataclasses.fields(LoraConfig)))
"""Words that random bytes rarely form."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--keep", action="store_true", help="add the inputs that reach new code to the corpus"
    )
    parser.add_argument("--add", type=Path, help="add this input to the corpus and exit")
    options = parser.parse_args()
    if options.add:
        seeds.write(options.target, [*seeds.read(options.target), options.add.read_bytes()])
        return 0
    with tempfile.TemporaryDirectory() as found:
        return fuzz(options.target, options.seconds, Path(found), options.keep)


def fuzz(target: str, seconds: int, found: Path, keep: bool = False) -> int:
    """Fuzz in a child process that writes new inputs to ``found``. Returns its exit code; 0 = no fault."""
    for number, each in enumerate(seeds.read(target)):
        (found / f"seed{number}").write_bytes(each)
    code = _libfuzzer(target, f"-max_total_time={seconds}", str(found))
    if keep and code == 0:
        with tempfile.TemporaryDirectory() as merged:
            code = _libfuzzer(target, "-merge=1", merged, str(found))
            kept = [path.read_bytes() for path in Path(merged).iterdir()]
            seeds.write(target, kept or seeds.read(target))
    return code


def _dictionary(folder: Path) -> str:
    path = folder / "words.dict"
    path.write_text("".join(f'"{_escaped(word)}"\n' for word in WORDS))
    return str(path)


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"')


def _libfuzzer(target: str, *arguments: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        program = _program(Path(folder), target)
        limits = [f"-max_len={MAX_INPUT}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}"]
        options = [*limits, f"-dict={_dictionary(Path(folder))}", "-verbosity=0"]
        return subprocess.run([program, *options, *arguments], check=False).returncode


def _program(folder: Path, target: str) -> str:
    """An executable file. libFuzzer runs it repeatedly when it merges."""
    path = folder / "fuzz"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fuzz.fuzzer "$0" {target} "$@"\n')
    path.chmod(0o700)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
