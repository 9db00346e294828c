"""``python -m tests.fuzz.fuzzer PROGRAM TARGET ARGUMENT …``: one run of libFuzzer, which ends the process.

``PROGRAM`` is the file that libFuzzer runs when it merges.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["adapters", "server", "python_multipart", "json"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    _, program, target, *arguments = sys.argv
    atheris.Setup([program, *arguments], TARGETS[target])
    atheris.Fuzz()
