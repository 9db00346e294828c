from __future__ import annotations

import weakref

import pytest
import torch

from server.engine import faults
from server.errors import OutOfMemory, RequestFailed


class _Held:
    pass


def test_what_a_step_had_allocated_is_let_go() -> None:
    """An exception's frames keep their variables alive, on a GPU gigabytes of them."""
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


def test_the_drivers_lack_of_memory_is_one_too() -> None:
    assert isinstance(faults.error_for(torch.AcceleratorError("CUDA error: out of memory")), OutOfMemory)
    assert isinstance(faults.error_for(ValueError("secret")), RequestFailed)
    assert "secret" not in str(faults.error_for(ValueError("secret")))
