"""The output head as a separate NF4 linear. The embedding, which may share its matrix, stays bf16."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapters.base.panels import PANEL
from adapters.errors import BaseModelError


def quantize_head(model: Any) -> None:
    """Quantise the head of ``model`` in the same way as its other linears, which are already in NF4.

    The config then has all that transformers needs to load the saved model: embedding and head are not tied,
    and the linears that are not in 4 bits are listed. Raises BaseModelError.
    """
    head: Any = model.get_output_embeddings()
    if head.out_features % PANEL:
        raise BaseModelError(
            f"--head-quantization nf4 needs a vocabulary that is a multiple of {PANEL}, but this base has "
            f"{head.out_features} tokens; use --head-quantization none."
        )
    model.config.tied_before_quantization = head.weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = False
    how = model.config.quantization_config
    model.set_output_embeddings(_in_4_bits(head, how))
    how.llm_int8_skip_modules = [name for name, module in model.named_modules() if _is_dense(module)]


def has_4bit_head(model: Any) -> bool:
    return _is_4bit(model.get_output_embeddings())


def was_tied(model: Any) -> bool:
    """Whether ``quantize_head`` has separated head and embedding."""
    return bool(getattr(model.config, "tied_before_quantization", False))


def _in_4_bits(head: nn.Linear, how: Any) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit  # only 4-bit bases need it

    four_bit = Linear4bit(
        head.in_features,
        head.out_features,
        compute_dtype=how.bnb_4bit_compute_dtype,
        compress_statistics=how.bnb_4bit_use_double_quant,
        quant_type=how.bnb_4bit_quant_type,
        device="meta",
    )
    weight = Params4bit(
        head.weight.detach().clone(),
        requires_grad=False,
        compress_statistics=how.bnb_4bit_use_double_quant,
        quant_type=how.bnb_4bit_quant_type,
        module=four_bit,
    )
    four_bit.weight, four_bit.bias = weight.to(head.weight.device), head.bias  # the move quantises it
    return four_bit


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not _is_4bit(module)


def _is_4bit(linear: nn.Module) -> bool:
    return hasattr(linear.weight, "quant_state")
