"""The process that runs sections: a line of JSON in, a line out for each row and for each section's end."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.bench.gpu_check.rows import Row, Skip, skipped
from server.bench.gpu_check.sections import SECTIONS, Section

Emit = Callable[[dict[str, Any]], None]


def main() -> None:
    """Read what to do from standard input, and do it; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    ends: dict[str, float] = json.loads(sys.stdin.readline())["ends"]

    def emit(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    gpu = _prepare()
    for section in (section for section in SECTIONS if section.name in ends):
        if not _run(section, gpu, ends[section.name], emit):
            return


def _prepare() -> Any:
    """The GPU, or None; then Triton is told to interpret, which it must be before it is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        return None
    from server.bench.gpu_check.device import find_gpu

    return find_gpu()


def _run(section: Section, gpu: Any, ends: float, emit: Emit) -> bool:
    """False if the process is better not used again: a fault on a GPU outlasts the call that raised it."""
    from server.bench.gpu_check.context import Context

    began, failed = time.monotonic(), ""
    emit({"section": section.name, "began": began})
    with tempfile.TemporaryDirectory(prefix="manylora-gpu-check-") as scratch:
        try:
            for row in section.load()(Context(gpu, Path(scratch), ends)):
                _emit_row(emit, section, row)
        except Skip as reason:
            _emit_row(emit, section, skipped("", str(reason)))
        except Exception as error:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"[:500]
    emit({"section": section.name, "seconds": time.monotonic() - began, "failed": failed})
    if failed and gpu:
        return False  # nor can a GPU at fault be asked to give anything back
    _forget(gpu)
    return True


def _emit_row(emit: Emit, section: Section, row: Row) -> None:
    emit({"section": section.name, "row": asdict(row)})


def _forget(gpu: Any) -> None:
    """Give back what the section had on the device."""
    import gc

    gc.collect()
    if gpu is not None:
        import torch

        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
