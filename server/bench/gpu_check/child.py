"""The child process that runs sections. It reads one line of JSON.

It writes one line when a section begins, one for each row, and one when the section ends.
"""

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
    """Run the sections named on standard input. The output of libraries goes to standard error."""
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
    """The GPU, or None. Without one it turns on Triton's interpreter, before Triton is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        return None
    from server.bench.gpu_check.device import find_gpu

    return find_gpu()


def _run(section: Section, gpu: Any, ends: float, emit: Emit) -> bool:
    """Run a section. False if the process must not be used again: a fault on a GPU breaks later calls too."""
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
        return False  # a GPU with a fault cannot free memory either
    _forget(gpu)
    return True


def _emit_row(emit: Emit, section: Section, row: Row) -> None:
    emit({"section": section.name, "row": asdict(row)})


def _forget(gpu: Any) -> None:
    """Free the memory that the section used on the device."""
    import gc

    gc.collect()
    if gpu is not None:
        import torch

        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
