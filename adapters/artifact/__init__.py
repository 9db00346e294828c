"""A PEFT folder on disk → a validated, immutable ``Adapter`` that is named by its content.

Nothing here knows of registries, pools or models: the base is seen through ``BaseLayout`` alone.
Reading order: ``adapter.py`` (the nouns), ``load.py`` (the way through), then its steps ``files.py``,
``config.py``, ``header.py``, ``plan.py`` and ``targets.py``.
"""

from adapters.artifact.adapter import Adapter, AdapterInfo, Limits, LoraWeights
from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.artifact.load import inspect_adapter, load_adapter

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterInfo",
    "Limits",
    "LoraWeights",
    "inspect_adapter",
    "load_adapter",
]
