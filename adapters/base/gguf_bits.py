"""Tells when a base was quantised twice: made from a GGUF file that was already in few bits.

Reading a GGUF's header takes seconds. So the figures are kept beside the checkpoint that is made from it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_NOTE = "gguf.json"

_FEW = 6.0
"""Bits of a weight below which quantising again costs quality. Q4_K_M has about 4.9, Q5_K_M 5.7, Q6_K 6.6."""


def note_bits(gguf: Path, checkpoint: Path) -> None:
    """Write to the folder ``checkpoint`` how many bits the linears in ``gguf`` have."""
    from gguf import GGUFReader

    blocks = [t for t in GGUFReader(gguf).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    weights = sum(int(tensor.n_elements) for tensor in blocks)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in blocks) / weights
    kinds = sorted({tensor.tensor_type.name for tensor in blocks})
    (checkpoint / _NOTE).write_text(json.dumps({"bits": bits, "types": kinds}))


def tell_few_bits(name: str, checkpoint: Path) -> None:
    """Log one line if the base ``name`` was already in few bits before it was quantised to NF4."""
    try:
        note = json.loads((checkpoint / _NOTE).read_text())
        bits, kinds = float(note["bits"]), ", ".join(note["types"])
    except (OSError, ValueError, TypeError, KeyError):
        return
    if bits < _FEW:
        logger.info(
            "%s is quantised twice: its GGUF file already has %.1f bits a weight (%s), and NF4 is made from "
            "that. This costs quality. A base in bf16, F16 or Q8_0 costs less.",
            name, bits, kinds,
        )  # fmt: skip
