"""Trains a tenant's rows into a plain PEFT folder: QLoRA on exactly the 4-bit weights that the server serves.

This package does not know the server, publishing or jobs. Importing it does not import torch, so uploads can
be checked (``dataset``) and options declared (``recipe``) without it.
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
    """See ``run.train``. It imports torch only now."""
    from adapters.training.run import train as run_training

    return run_training(config, run, stop, show, serving)
