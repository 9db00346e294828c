"""How many bytes of a base's weights are in 4 bits, and which experts are not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapters.base.unpack import four_bit_linears

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model's weights. A tensor that two modules share counts once.

    Attributes:
        four_bit: the 4-bit weights and their scales.
        dense: all other weights, usually in bf16.
        dense_experts: those of ``dense`` that hold several experts in one parameter of three dimensions.
        dense_kinds: the classes of the modules that ``dense_experts`` counts.
    """

    four_bit: int
    dense: int
    dense_experts: int = 0
    dense_kinds: tuple[str, ...] = ()


def count_weight_bytes(model: Any) -> WeightBytes:
    """Count the parameters of ``model``, which is loaded."""
    linears = four_bit_linears(model)
    four_bit = sum(_quantized_bytes(linear.weight) for linear in linears.values())
    counted = {id(linear.weight) for linear in linears.values() if hasattr(linear.weight, "quant_state")}
    dense = experts = 0
    kinds: set[str] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            dense += parameter.nbytes
            if parameter.dim() == 3 and hasattr(module, "num_experts"):
                experts += parameter.nbytes
                kinds.add(type(module).__name__)
    return WeightBytes(four_bit, dense, experts, tuple(sorted(kinds)))


def log_weight_bytes(found: WeightBytes, quantization: str) -> None:
    """State the sizes, and warn if experts are not quantised although the base is."""
    logger.info("weights: %.1f MB in 4 bits, %.1f MB in bf16", found.four_bit / 1e6, found.dense / 1e6)
    if found.dense_experts and quantization == "nf4":
        logger.warning(
            "%.1f MB of the weights are experts in bf16: 4 bits are not supported for %s",
            found.dense_experts / 1e6,
            ", ".join(found.dense_kinds),
        )


def _quantized_bytes(weight: Any) -> int:
    """Bytes of a 4-bit weight with its scales; 0 if it is not in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return 0
    nested = getattr(state, "state2", None)
    scales = [state.absmax] + ([nested.absmax] if nested is not None else [])
    return int(weight.nbytes) + sum(scale.nbytes for scale in scales if isinstance(scale, Tensor))
