"""``python -m tests.fuzz.fuzzer TARGET ARGUMENT …``: one run of libFuzzer, which ends the process."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["adapters", "server", "python_multipart", "json"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
