"""Bases whose own code is not in transformers, converted to a class of transformers that computes the same.

The code in a model's repository is never run. Each family has a module here with its equations: it makes the
config of the native class, and gives each tensor its native name and layout.
"""

from __future__ import annotations

from adapters.base.converted.conversion import Conversion
from adapters.base.converted.families import conversion_of, original_names
from adapters.base.converted.folder import write_native

VERSION = 1
"""Increase it when the same files must give other tensors."""

__all__ = ["VERSION", "Conversion", "conversion_of", "original_names", "write_native"]
