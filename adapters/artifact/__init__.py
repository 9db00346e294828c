"""A PEFT folder on disk → a validated, immutable ``Adapter`` that is identified by its content.

This package knows no registries, pools or models. It knows the base only as a ``BaseLayout``.
Reading order: ``adapter.py`` (the data types), ``load.py`` (the whole path), then its steps ``files.py``,
``config.py`` (``fields.py``), ``header.py``, ``plan.py`` (``names.py``, ``targets.py``, ``replaced.py``) and
``assemble.py``. ``recognise.py`` says what a folder is if it is not an adapter.
"""

from adapters.artifact.adapter import (
    Adapter,
    AdapterInfo,
    Adjustment,
    EmbeddingOrHead,
    Extras,
    Limits,
    LoraWeights,
)
from adapters.artifact.assemble import BaseWeights
from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.artifact.load import inspect_adapter, load_adapter

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterInfo",
    "Adjustment",
    "BaseWeights",
    "EmbeddingOrHead",
    "Extras",
    "Limits",
    "LoraWeights",
    "inspect_adapter",
    "load_adapter",
]
