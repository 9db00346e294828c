"""Converts failures during training to one sentence that names the last good checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapters.errors import TrainingDiverged, TrainingOutOfResources
from adapters.training.run_folder import RunFolder

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
_GPU = ("CUDA", "CUBLAS", "cuDNN")
_DISK_FULL = os.strerror(errno.ENOSPC)


@contextmanager
def explain_failures(run: RunFolder) -> Iterator[None]:
    """Raises TrainingOutOfResources or TrainingDiverged instead of torch's and the system's errors."""
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{error} {_last_good(run)}") from error
    except Exception as error:
        if is_disk_full(error, run):
            raise TrainingOutOfResources(f"The disk of {run.path} is full. {_last_good(run)}") from error
        if is_out_of_memory(error):
            raise TrainingOutOfResources(f"{_memory_ran_out(error)} {_last_good(run)}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _memory_ran_out(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _GPU):
        return (
            "The GPU's memory ran out; lower --batch-size (and raise --accumulation) or --max-seq-len, set "
            "--gradient-checkpointing on, or give the run more memory (--gpu-memory, or another GPU)."
        )
    return (
        "Memory ran out; lower --batch-size or --max-seq-len, or set --gradient-checkpointing on "
        "and --cache-dequantized off."
    )


def is_disk_full(error: BaseException, run: RunFolder) -> bool:
    """Whether the error means ENOSPC. torch's writer, for example, only reports a failure."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if _DISK_FULL in str(error):
        return True
    writing = "PytorchStreamWriter" in str(error) or "iostream" in str(error)
    return writing and os.statvfs(run.path).f_bavail == 0


def _last_good(run: RunFolder) -> str:
    last = run.last_checkpoint()
    if last is None:
        return "No checkpoint was saved yet."
    return f"The last good checkpoint is {last}; --resume continues from it."
