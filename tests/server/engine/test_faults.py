from __future__ import annotations

import weakref

import pytest
import torch

from server.engine import faults
from server.errors import OutOfMemory, RequestFailed


class _Held:
    pass


def test_memory_of_a_failed_step_is_freed() -> None:
    """The frames of an exception keep their variables alive. On a GPU these can be gigabytes."""
    alive: list[weakref.ref[_Held]] = []

    def step() -> None:
        held = _Held()
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    assert alive[0]() is not None
    faults.recover(caught.value)
    assert alive[0]() is None


def test_an_out_of_memory_error_of_the_driver_counts_as_one() -> None:
    assert isinstance(faults.error_for(torch.AcceleratorError("CUDA error: out of memory")), OutOfMemory)
    assert isinstance(faults.error_for(ValueError("secret")), RequestFailed)
    assert "secret" not in str(faults.error_for(ValueError("secret")))
