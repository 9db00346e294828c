"""Random Llama bases, created on the device. Nothing is read from disk or written to it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base import LoadedBase, PreparedBase, Quantization, find_sites
from adapters.base.load import layout_of
from server.bench.gpu_check.rows import Skip
from server.bench.roofline import WEIGHT_BYTES, Step, llama_stack, works
from server.bench.shapes import SHAPES

TINY: Mapping[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES_BY_SIZE: Mapping[str, Mapping[str, Any]] = {"tiny": TINY, **SHAPES}


def weights_of(quantization: Quantization) -> str:
    """The key of ``roofline.WEIGHT_BYTES`` for these weights, as the fused step stores them."""
    return "bf16" if quantization == "none" else "nf4, scales in float32"


def bytes_of(shape: str, quantization: Quantization) -> float:
    """The bytes of the linears, the head and the embedding on the device."""
    stack = llama_stack(SHAPES_BY_SIZE[shape])
    parts = works(stack, Step(1, 0), WEIGHT_BYTES[weights_of(quantization)])
    return parts["linears"].nbytes + 2 * parts["head"].nbytes


def why_not(quantization: Quantization) -> str | None:
    """Why this base cannot be made on this machine; None = it can."""
    if quantization == "nf4" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed, so there are no NF4 bases"
    return None


@torch.no_grad()
def random_base(shape: str, quantization: Quantization, device: torch.device, seed: int = 0) -> LoadedBase:
    """A base of a shape in ``SHAPES_BY_SIZE``. The same seed gives the same base.

    Raises:
        Skip: it cannot be made on this machine.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    reason = why_not(quantization)
    if reason is not None:
        raise Skip(reason)
    gc.collect()  # models hold reference cycles, and the previous one must leave the device
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES_BY_SIZE[shape], dtype="bfloat16")).to(
            torch.bfloat16
        )
    _fill(model, quantization, torch.Generator(device).manual_seed(seed))
    with device:  # its angles are not parameters, and they are on the meta device too
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.name_or_path = model.config._name_or_path = name = f"random-{shape}"
    model.eval().requires_grad_(False)
    digest = hashlib.sha256(f"{name} {quantization} {seed}".encode()).hexdigest()
    prepared = PreparedBase(name, Path(name), digest, quantization, name)
    return LoadedBase(model, _tokenizer(), prepared, layout_of(model, name))


def _fill(model: Any, quantization: Quantization, generator: torch.Generator) -> None:
    """Give random weights to every module of a model on the meta device, one by one."""
    if quantization == "nf4":
        model.is_loaded_in_4bit = True  # PEFT reads this attribute
        for name, site in find_sites(model).items():
            weight = _random(torch.Size((site.out_features, site.in_features)), generator)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _nf4(weight))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_random(parameter.shape, generator), requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random bf16 weights. A matrix keeps the scale of its input; the weights of a norm are about 1."""
    values = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    if len(shape) == 1:
        return values.normal_(1.0, 0.1, generator=generator)
    return values.normal_(0.0, shape[-1] ** -0.5, generator=generator)


def _nf4(weight: Tensor) -> nn.Module:
    """A 4-bit linear, like those that ``prepare_base`` makes."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    outputs, inputs = weight.shape
    linear: Any = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    parameter = Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear)
    linear.weight = parameter.to(weight.device)
    return linear  # type: ignore[no-any-return]


def _tokenizer() -> Any:
    """An empty tokenizer: requests and answers here are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
