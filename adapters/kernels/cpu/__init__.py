"""Loads the native kernels and declares their C structs. No torch.

``src/native.h`` is the interface, and ``structs.py`` mirrors it. If no library was built, ``library()`` is
None and torch's kernels are used instead.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

log = logging.getLogger("manylora.native")


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None; then the reason is logged once.

    It shares one OpenMP runtime with torch and bitsandbytes, because all three link the same library name. So
    torch must be imported first.
    """
    built = sorted(Path(__file__).parent.glob("kernels*.so"))
    if not built:
        log.warning(
            "the native kernels were not built (install a C++ compiler); torch's slower kernels are used"
        )
        return None
    try:
        loaded = ctypes.CDLL(str(built[0]))
    except OSError as error:
        log.warning("the native kernels cannot be loaded (%s); torch's slower kernels are used", error)
        return None
    loaded.manylora_isa.restype = ctypes.c_char_p
    loaded.manylora_choose.argtypes = [ctypes.c_char_p]
    loaded.manylora_release_workers.restype = None
    for name in ("linears", "experts", "lora", "attention", "stack", "head"):
        function = getattr(loaded, f"manylora_{name}")
        function.argtypes = [ctypes.c_void_p]
        function.restype = None
    return loaded


def isa() -> str:
    """The instruction set in use: ``avx512bf16``, ``avx2`` or ``portable``; ``none`` without a library."""
    loaded = library()
    return loaded.manylora_isa().decode() if loaded is not None else "none"
