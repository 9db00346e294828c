"""A tenant's rows in, a plain PEFT folder out: QLoRA on exactly the 4-bit weights that the server serves.

Nothing here knows of the server, of publishing or of jobs. Importing this package imports no torch, so that
uploads can be checked (``dataset``) and options declared (``recipe``) without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.training.recipe import TrainConfig
from adapters.training.run_folder import RunFolder
from adapters.training.stop import Stop

if TYPE_CHECKING:
    from adapters.training.run import Trained
    from adapters.training.servable import Serving

__all__ = ["RunFolder", "Stop", "TrainConfig", "train"]


def train(
    config: TrainConfig,
    run: RunFolder,
    stop: Stop | None = None,
    show: bool = False,
    serving: Serving | None = None,
) -> Trained:
    """See ``run.train``; torch is imported only now."""
    from adapters.training.run import train as run_training

    return run_training(config, run, stop, show, serving)
