"""Describes the machine and the versions that a figure was measured with, for reports."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "manylora",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "triton",
    "uvicorn",
    "starlette",
    "httpx",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, system, versions, thread settings and the present load, as JSON values."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
        "threads": {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))
        },
        "load_average": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    """The processor's model name. On Linux, ``platform`` knows only its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
