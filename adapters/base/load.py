"""Loads a prepared base, frozen, onto a device, and finds the modules in it that adapters may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from adapters.base.checkpoint import PreparedBase
from adapters.base.converted import original_names
from adapters.base.head import has_4bit_head, was_tied
from adapters.base.memory import check_memory, loaded_bytes
from adapters.base.quiet import quiet_libraries
from adapters.base.reading import config_of, convert_read_errors, load_tokenizer, load_whole
from adapters.base.unpack import check_quantized, unpack_odd_linears
from adapters.errors import BaseModelError
from adapters.sites import BaseLayout, Site


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory.

    Attributes:
        model: the causal LM: bf16 outside its 4-bit linears, in eval mode, nothing requires a gradient.
        tokenizer: the fast tokenizer, with the model's chat template.
        prepared: where it came from, and its digest.
        layout: its sites and modules, for checking adapters against.
    """

    model: Any
    tokenizer: Any
    prepared: PreparedBase
    layout: BaseLayout


def load_base(
    prepared: PreparedBase,
    device: str = "cpu",
    attn_implementation: str | None = None,
    progress: bool = False,
) -> LoadedBase:
    """Load the checkpoint onto ``device``.

    Args:
        prepared: what ``prepare_base`` returned.
        device: a torch device.
        attn_implementation: a name known to transformers' attention interface. None lets transformers choose:
            sdpa, or eager for models such as Gemma 2 that do not support it.
        progress: a bar on stderr.

    Raises:
        BaseCorrupt: the checkpoint cannot be read, or tensors are missing.
        BaseTooLarge: ``device`` has too little free memory.
        BaseModelError: a base that was already quantised has another head than requested, or transformers
            cannot load this architecture in 4 bits.
    """
    _check_memory(prepared, torch.device(device))
    with quiet_libraries(progress), convert_read_errors(prepared.path):
        model = load_whole(
            prepared.path,
            config=config_of(prepared.path, prepared.hf_overrides),
            device_map={"": device},
            attn_implementation=attn_implementation,
        )
        tokenizer = load_tokenizer(prepared.path)
    _check_head(prepared, model)
    check_quantized(model, prepared.name)
    unpack_odd_linears(model)
    # PEFT writes this name into the adapters that it saves. It is the base's name, not our cache folder's.
    model.name_or_path = model.config._name_or_path = prepared.source
    model.eval().requires_grad_(False)
    return LoadedBase(model, tokenizer, prepared, layout_of(model, prepared.source))


def _check_memory(prepared: PreparedBase, device: torch.device) -> None:
    smaller = "with --quantization nf4 it takes about a third; or " if prepared.quantization == "none" else ""
    check_memory(
        loaded_bytes(prepared.path),
        device,
        f"The base {prepared.name} ({prepared.quantization})",
        f"Free some (end other programs, raise the container's limit); {smaller}give --base a smaller model.",
    )


def _check_head(prepared: PreparedBase, model: Any) -> None:
    found = "nf4" if has_4bit_head(model) else "none"
    if found != prepared.head_quantization:
        raise BaseModelError(
            f"{prepared.name} is already quantised with --head-quantization {found}, not "
            f"{prepared.head_quantization}; use --head-quantization {found}, or give an unquantised base."
        )


def layout_of(model: Any, name_or_path: str) -> BaseLayout:
    """The layout that adapters are checked against."""
    names = {module: name for name, module in model.named_modules()}
    norms = {name: sizes for module, name in names.items() if (sizes := _norm_sizes(module)) is not None}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary, hidden = embedding.weight.shape
    sites = find_sites(model)
    places = {*sites, *norms, names[head]}
    return BaseLayout(
        sites=sites,
        modules=frozenset(name for name in names.values() if name),
        name_or_path=name_or_path,
        embedding=Site(names[embedding], vocabulary, hidden),
        head=_site(names[head], head),
        tied=head.weight is embedding.weight or was_tied(model),
        head_apart=was_tied(model),
        norms=norms,
        original_names=original_names(model.config),
        biases=frozenset(n for m, n in names.items() if n in places and getattr(m, "bias", None) is not None),
    )


def _norm_sizes(module: torch.nn.Module) -> dict[str, int] | None:
    """The parameters' lengths of a module that has only vectors, including ``weight``.

    None for other modules.
    """
    own = dict(module.named_parameters())
    if "weight" not in own or any(parameter.dim() != 1 for parameter in own.values()):
        return None
    return {name: parameter.shape[0] for name, parameter in own.items()}


def find_sites(model: torch.nn.Module) -> dict[str, Site]:
    """Every linear of a causal LM except its output head, by module name.

    They include 4-bit linears, whose sizes are their features, not the packed weight's shape. They also
    include transformers' ``Conv1D``, which stores its weight as [in, out].
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    sites = (_site(name, module) for name, module in model.named_modules() if module is not head)
    return {site.name: site for site in sites if site is not None}


def _site(name: str, module: torch.nn.Module) -> Site | None:
    if isinstance(module, torch.nn.Linear):
        return Site(name, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return Site(name, module.nx, module.nf)
    return None
