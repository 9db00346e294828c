"""Runs llama.cpp's ``convert_lora_to_gguf.py`` on several adapters in one process.

Arguments: the script, the base's folder, the folder for the results, all names, then all folders.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main(words: list[str]) -> None:
    """Convert each adapter to ``<name>.gguf`` in f16."""
    script, base, out, *rest = words
    half = len(rest) // 2
    sys.path.insert(0, str(Path(script).parent))  # as if the script had been started directly
    for name, folder in zip(rest[:half], rest[half:], strict=True):
        options = ["--base", base, "--outtype", "f16", "--outfile", str(Path(out) / f"{name}.gguf")]
        sys.argv = [script, *options, folder]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
