"""Teaches transformers to load and save bases whose experts are NF4, beside bitsandbytes' 4-bit linears.

transformers chooses a quantizer by ``quant_method`` in ``config.json``. Ours does what bitsandbytes' does,
and replaces the experts before weights are loaded. So a layer's experts are dense only until they are
quantised, and never when a prepared base is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from adapters.base.experts import MATRICES, SCALES, Nf4Experts, quantize, replace_experts

METHOD = "manylora_nf4"


def bitsandbytes_nf4(**fields: Any) -> BitsAndBytesConfig:
    """NF4 linears with double quantisation, computing in bf16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **fields,
    )


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):  # type: ignore[misc]
    """``bitsandbytes_nf4`` for the linears, and NF4 experts."""

    def __init__(self, llm_int8_skip_modules: list[str] | None = None, **_: Any) -> None:
        self.__dict__.update(bitsandbytes_nf4(llm_int8_skip_modules=llm_int8_skip_modules).__dict__)
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Without ``load_in_4bit``, by which transformers would choose bitsandbytes' own quantizer."""
        return {"quant_method": METHOD, "llm_int8_skip_modules": self.llm_int8_skip_modules}


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """See the module's docstring."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **options)
        replace_experts(model)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, Nf4Experts):
            return name in MATRICES and not self.pre_quantized
        return bool(super().param_needs_quantization(model, param_name, **options))

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(super().get_quantize_ops())


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Quantises what was read for one parameter: experts, or a linear's weight as bitsandbytes does."""

    def __init__(self, linears: ConversionOps) -> None:
        self._linears = linears

    def convert(self, input_dict: dict[str, Any], model: Any = None, **options: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if isinstance(get_module_from_name(model, name)[0], Nf4Experts):
                weights = value[0] if isinstance(value, list) else value
                result[name], result[name + SCALES] = quantize(weights)
            else:
                result |= self._linears.convert({name: value}, model=model, **options)
        return result
