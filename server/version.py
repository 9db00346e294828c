"""The version, as installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("manylora")
except PackageNotFoundError:
    VERSION = "0+source"  # run from a checkout that was not installed
