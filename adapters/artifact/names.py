"""Parses tensor names, as PEFT and other tools write them, into module and role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from adapters.errors import AdapterInvalid, AdapterUnsupported
from adapters.sites import BaseLayout
from adapters.suggest import near_names

Role = Literal["lora_A", "lora_B", "lora_B.bias", "magnitude", "weight", "bias"]
"""``lora_A`` and ``lora_B`` also stand for the embedding's pair. ``weight`` and ``bias`` replace the
module's."""

Copy = Literal["saved", "wrapped", "original"]
"""Which parameter of a module a name stands for. PEFT's ``modules_to_save`` wraps the module. It saves the
trained copy under the module's name. With ``save_embedding_layers`` it saves the copy again under the
wrapper's name, beside the original of the base."""

MAX_COMPARED = 2000
"""How many modules a wrong name is compared with to find the nearest ones."""

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAME = r"(?:\.(?P<adapter>[^.]+))?"
_FORMS: dict[re.Pattern[str], Role] = {
    re.compile(rf"(?P<module>.+)\.lora_A{_NAME}\.weight"): "lora_A",
    re.compile(rf"(?P<module>.+)\.lora_B{_NAME}\.weight"): "lora_B",
    re.compile(rf"(?P<module>.+)\.lora_B{_NAME}\.bias"): "lora_B.bias",
    re.compile(rf"(?P<module>.+)\.lora_embedding_A{_NAME}"): "lora_A",
    re.compile(rf"(?P<module>.+)\.lora_embedding_B{_NAME}"): "lora_B",
    re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"): (
        "magnitude"
    ),
}
_WRAPPER = rf"(?:\.base_layer|(?P<wrapped>\.modules_to_save{_NAME})|(?P<original>\.original_module))?"
_REPLACED: dict[re.Pattern[str], Role] = {
    re.compile(rf"(?P<module>.+?){_WRAPPER}\.weight"): "weight",
    re.compile(rf"(?P<module>.+?){_WRAPPER}\.bias"): "bias",
}
_FOREIGN = {
    re.compile(
        r"\.lora_[ab]$"
    ): "mlx-lm, which stores its pairs transposed; convert the adapter to PEFT's format",
    re.compile(
        r"lora_(?:down|up|unet|te\d?)"
    ): "a diffusion model's LoRA; this server serves language models",
    re.compile(r"^(?:base_model\.model\.)?(?:score|classifier|qa_outputs|v_head)\."): (
        "the head of a classifier or a reward model, which a causal language model does not have"
    ),
    re.compile(r"token_adapter|trainable_tokens"): "trained rows of an embedding (trainable_token_indices)",
    re.compile(r"lora_[A-Za-z_]+"): "a kind of LoRA that this server does not know",
}


@dataclass(frozen=True, slots=True)
class TensorName:
    """``module`` is a module of the base. ``adapter`` is the adapter's name in the file, or None."""

    module: str
    role: Role
    adapter: str | None
    copy: Copy = "saved"


def parse_name(name: str, layout: BaseLayout) -> TensorName:
    """Raises AdapterInvalid (no module of the base) or AdapterUnsupported (a kind that is not served)."""
    bare = _WRAPPERS.sub("", name)
    parsed = _match(bare, _FORMS)
    if parsed is None:
        for pattern, kind in _FOREIGN.items():
            if pattern.search(bare):
                raise AdapterUnsupported(f"Tensor {name!r} cannot be served: it belongs to {kind}.")
        parsed = _match(bare, _REPLACED)
    if parsed is None:
        raise AdapterInvalid(
            f"Tensor {name!r} has a name that PEFT's LoRA never writes; save the adapter with "
            "PEFT's save_pretrained."
        )
    _check_module(name, parsed, layout)
    return parsed


def _match(name: str, forms: Mapping[re.Pattern[str], Role]) -> TensorName | None:
    for form, role in forms.items():
        if match := form.fullmatch(name):
            groups = match.groupdict()
            copy: Copy = (
                "wrapped" if groups.get("wrapped") else "original" if groups.get("original") else "saved"
            )
            return TensorName(groups["module"].removeprefix(_PREFIX), role, groups["adapter"], copy)
    return None


def not_adaptable(module: str, layout: BaseLayout) -> str:
    """The reason for refusing LoRA on that module of the base."""
    if module in layout.unservable:
        return f"LoRA on {module!r} of the base is not served: {layout.unservable[module]}."
    return (
        f"{module or 'the whole model'!r} of the base is not a linear, its embedding or its output head; "
        "LoRA on anything else is not served."
    )


def _check_module(name: str, parsed: TensorName, layout: BaseLayout) -> None:
    replaces = parsed.role in ("weight", "bias")
    if parsed.module in layout.sites or parsed.module in layout.embedding_and_head:
        return
    if replaces and parsed.module in layout.norms:
        return
    if parsed.module in layout.modules:
        raise AdapterUnsupported(
            f"Tensor {name!r} would replace a part of the base that is neither a norm, a bias, the embedding "
            "nor the output head; train that part with LoRA."
            if replaces
            else not_adaptable(parsed.module, layout)
        )
    last = parsed.module.rpartition(".")[2]
    if last in layout.original_names:
        raise AdapterInvalid(
            f"Tensor {name!r} is for the model's own code, which is never run here. The base is converted to "
            f"a class of transformers, where {last} is {layout.original_names[last]}; train the adapter on "
            "that, for example with manylora train."
        )
    near = _near(parsed.module, layout)
    raise AdapterInvalid(
        f"Tensor {name!r} matches no module of the base ({layout.name_or_path}); "
        + (f"the nearest are {', '.join(near)}." if near else "the adapter seems to be for another base.")
    )


def _near(module: str, layout: BaseLayout) -> list[str]:
    """The nearest module names.

    Of very many modules only those with the same ending are compared, to save time.
    """
    places = [*layout.sites, *layout.embedding_and_head]
    if len(places) > MAX_COMPARED:
        last = module.rpartition(".")[2]
        places = [place for place in places if place.rpartition(".")[2] == last]
    return near_names(module, places, neighbours=MAX_COMPARED // 2)
