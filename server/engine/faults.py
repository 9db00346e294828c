"""Handling of exceptions that a step raised."""

from __future__ import annotations

import traceback

import torch

from server.errors import OutOfMemory, RequestError, RequestFailed


def error_for(raised: Exception) -> RequestError:
    """The error for a request whose computation raised even when it was alone in the step."""
    if _is_out_of_memory(raised):
        return OutOfMemory("The device has too little memory left for this request now; try again later.")
    return RequestFailed(f"Processing the request raised {type(raised).__name__}.")


def recover(raised: Exception) -> None:
    """Free memory for another try. Raises the device's error if the device is broken."""
    traceback.clear_frames(raised.__traceback__)  # the frames hold the step's tensors
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _is_out_of_memory(raised: Exception) -> bool:
    """Whether the allocator or the driver ran out of memory."""
    if isinstance(raised, torch.OutOfMemoryError):
        return True
    return isinstance(raised, torch.AcceleratorError) and "out of memory" in str(raised)
