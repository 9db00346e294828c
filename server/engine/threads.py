"""Makes the engine's thread the only one that computes in parallel.

OpenMP keeps a pool of workers for every thread that ever ran a parallel region. When there are more workers
than processors, waiting workers go to sleep at once, and waking them costs more than a whole layer of a small
model. So the main thread releases its workers when the model is built, and threads that load adapters compute
on one thread.
"""

from __future__ import annotations

import torch

from adapters.kernels.cpu import library


def claim(threads: int) -> None:
    """Make the calling thread compute with this many threads."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # a thread reads the number at its first operation: this one


def step_aside() -> None:
    """Release the calling thread's workers. It and all later threads compute on one thread.

    Threads that called ``claim`` keep their workers.
    """
    torch.set_num_threads(1)
    native = library()
    if native is not None:
        native.manylora_release_workers()
