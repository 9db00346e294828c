"""The 4-bit base that training and serving share: locate it, quantise it once, load it.

This package knows files, digests and transformers. It knows neither adapters nor requests.
"""

from __future__ import annotations

from adapters.base.checkpoint import PreparedBase, Quantization, prepare_base
from adapters.base.load import LoadedBase, find_sites, load_base
from adapters.base.source import DEFAULT_BASE

__all__ = [
    "DEFAULT_BASE",
    "LoadedBase",
    "PreparedBase",
    "Quantization",
    "find_sites",
    "load_base",
    "prepare_base",
]
