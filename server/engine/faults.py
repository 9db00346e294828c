"""What to make of an exception that a step raised."""

from __future__ import annotations

import traceback

import torch

from server.errors import OutOfMemory, RequestError, RequestFailed


def error_for(raised: Exception) -> RequestError:
    """What a request is told whose computation raised this even with nobody else in the step."""
    if _is_out_of_memory(raised):
        return OutOfMemory("The device has too little memory left for this request now; try again later.")
    return RequestFailed(f"Processing the request raised {type(raised).__name__}.")


def recover(raised: Exception) -> None:
    """Make room for another try; raises what ails the device if it is broken, and no try can do better."""
    traceback.clear_frames(raised.__traceback__)  # they hold what the step had allocated
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _is_out_of_memory(raised: Exception) -> bool:
    """The allocator's own error, or the driver's."""
    if isinstance(raised, torch.OutOfMemoryError):
        return True
    return isinstance(raised, torch.AcceleratorError) and "out of memory" in str(raised)
