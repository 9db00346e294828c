"""Which thread computes in parallel: the engine's, and no other.

OpenMP keeps a pool of workers for every thread that ever ran a parallel region. Once there are more workers
than processors it lets waiting ones sleep at once, and waking them costs more than a whole layer of a small
model. So the main thread gives its pool back when the model is built, and whoever loads adapters computes
alone.
"""

from __future__ import annotations

import torch

from adapters.kernels.cpu import library


def claim(threads: int) -> None:
    """The calling thread computes with so many threads."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # a thread takes the number that was set last at its first operation: now


def step_aside() -> None:
    """The calling thread gives its workers back; it, and threads that start later, compute alone.

    Threads that have claimed theirs keep them.
    """
    torch.set_num_threads(1)
    native = library()
    if native is not None:
        native.manylora_release_workers()
