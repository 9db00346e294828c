"""The length of a run: optimiser steps, and the default number of epochs. Integers only."""

from __future__ import annotations

import math
import os

from adapters.errors import RecipeInvalid
from adapters.training.recipe import TrainConfig

ADALORA_LEAST_STEPS = 10
_EPOCHS, _MOST_EPOCHS = 3, 25
_FEW_STEPS, _MANY_EXAMPLES = 100, 25_000


def epochs_for(places: int, config: TrainConfig) -> float:
    """Passes over the data: the given number; otherwise three, more for small data and fewer for large data.

    OpenAI's rule for "auto" counts examples: three epochs, up to 25 to see at least 100 examples, down to one
    to see at most 25,000 (https://cookbook.openai.com/examples/chat_finetuning_data_prep). Small data means
    few steps, so here the rule is at least 100 optimiser steps.

    Args:
        places: the number of examples, or of packs.
    """
    if config.epochs is not None:
        return config.epochs
    few = math.ceil(_FEW_STEPS / _steps_of_epoch(places, config))
    many = max(1, _MANY_EXAMPLES // places)
    return min(max(_EPOCHS, min(few, _MOST_EPOCHS)), many)


def steps_for(places: int, config: TrainConfig) -> int:
    """The number of optimiser steps, as the Trainer counts them.

    Raises RecipeInvalid if AdaLoRA has too few.
    """
    steps = config.max_steps or math.ceil(epochs_for(places, config) * _steps_of_epoch(places, config))
    if config.method == "adalora" and steps < ADALORA_LEAST_STEPS:
        raise RecipeInvalid(
            f"--method adalora needs at least {ADALORA_LEAST_STEPS} optimiser steps to reallocate ranks, and "
            f"this run has {steps}; raise --epochs or --max-steps, or lower --batch-size."
        )
    return steps


def _steps_of_epoch(places: int, config: TrainConfig) -> int:
    batches = math.ceil(places / (config.batch_size * int(os.environ.get("WORLD_SIZE", "1"))))
    return max(1, math.ceil(batches / config.accumulation))
