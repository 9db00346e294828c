"""How many bytes of a base's weights are in 4 bits, and which experts are not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from adapters.base.experts import dense_experts, nf4_experts
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
    linears = [module for module in four_bit_linears(model).values() if hasattr(module.weight, "quant_state")]
    four_bit = sum(_quantized_bytes(linear.weight) for linear in linears)
    four_bit += sum(experts.bytes for experts in nf4_experts(model).values())
    quantized = {id(linear.weight) for linear in linears}
    dense = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in quantized)
    others = dense_experts(model).values()
    in_experts = sum(parameter.nbytes for module in others for parameter in module.parameters(recurse=False))
    return WeightBytes(four_bit, dense, in_experts, tuple(sorted({type(one).__name__ for one in others})))


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
    """Bytes of a 4-bit weight with its scales."""
    state = weight.quant_state
    nested = getattr(state, "state2", None)
    scales = [state.absmax] + ([nested.absmax] if nested is not None else [])
    return int(weight.nbytes) + sum(int(scale.nbytes) for scale in scales)
