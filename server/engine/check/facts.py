"""What the result of a check depends on, besides the base's content and quantisation (its digest)."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import adapters
import server.engine
from adapters.kernels.cpu import isa
from server.version import VERSION

_PACKAGES = ("torch", "transformers", "bitsandbytes", "triton", "flash-attn")


def facts_of(device: Any, options: str) -> dict[str, str]:
    """Everything: the versions, a torch device, and the options that decide which kernels run."""
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else isa()
    return {**versions(), "device": f"{device.type}, {kernels}", "options": options}


def versions() -> dict[str, str]:
    """The versions of manylora and of the packages that compute."""
    packages = {package: _version(package) for package in _PACKAGES}
    return {**packages, "manylora": f"{VERSION}, {code_digest()}"}


@cache
def code_digest() -> str:
    """A digest of the code that loads and runs models. A checkout changes without a new version."""
    digest = hashlib.sha256()
    for package in (adapters, server.engine):
        root = Path(str(package.__file__)).parent
        for file in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".so")):
            digest.update(f"{file.relative_to(root)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
