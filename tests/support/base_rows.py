"""The results of serving and training a tiny model of each causal LM class, as rows of docs/bases.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapters.base import load_base, prepare_base
from adapters.errors import AdapterUnsupported, BaseModelError, RecipeInvalid
from adapters.sites import BaseLayout
from adapters.training.attention import use_packed_attention
from adapters.training.isolation import keep_rows_separate
from adapters.training.methods import add_adapter
from adapters.training.recipe import TrainConfig
from server.engine.build import Parts
from tests.support.running_engine import build
from tests.support.tiny_configs import quiet
from tests.support.tiny_exceptions import NOT_BUILT
from tests.support.tiny_models import make_peft_adapter
from tests.support.tiny_zoo import save_tiny_model

YES = "yes"
FUSED = "fused"
"""The name of the model that runs the fused step on a CPU."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model type.

    Attributes:
        served: the blocks that compute it, FUSED or "transformers"; "" = it is refused or was not tried.
        reason: why it is not served or was not tried.
        targets: the linears that adapters may change, by the last part of their names.
        all_linear: whether an adapter that PEFT made for all-linear is served: YES, or why not.
        trained: whether our training works on it: YES, perhaps without some linears, or why not.
    """

    model_type: str
    served: str = ""
    reason: str = ""
    targets: str = ""
    all_linear: str = ""
    trained: str = ""

    @property
    def tried(self) -> bool:
        return self.model_type not in NOT_BUILT

    @property
    def architecture(self) -> str:
        return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type])


def row_of(model_type: str, home: Path) -> Row:
    """Start the engine with a tiny model of that type in ``home``, and try to train it."""
    row = Row(model_type)
    if model_type in NOT_BUILT:
        return replace(row, reason=NOT_BUILT[model_type])
    folder = save_tiny_model(model_type, home / "model")
    try:
        with quiet():
            parts = build(folder, home)
    except BaseModelError as error:
        return replace(row, reason=_short(str(error)))
    try:
        served, layout = parts.model.name, parts.base.layout
        all_linear = _all_linear(parts, folder, home)
    finally:
        parts.close()
    trained = _trained(folder, home, layout)
    return replace(row, served=served, targets=_endings(layout.sites), all_linear=all_linear, trained=trained)


def _all_linear(parts: Parts, folder: Path, home: Path) -> str:
    """Whether an adapter for PEFT's all-linear is accepted."""
    made = home / "adapters" / "all-linear"
    with quiet():
        make_peft_adapter(load_base(_prepared(folder, home)).model, made, r=2)
    try:
        parts.registry.register("all-linear", made, replace=False)
    except AdapterUnsupported as error:
        return _short(str(error))
    return YES


def _trained(folder: Path, home: Path, layout: BaseLayout) -> str:
    """Whether training keeps the rows of a batch separate, and trains only modules that can be served."""
    config = TrainConfig(data=folder, r=2)
    with quiet():
        base = load_base(_prepared(folder, home))
        own = base.model.config.get_text_config()._attn_implementation
        use_packed_attention(base.model)
        try:
            keep_rows_separate(base.model, own, config, longest=40)
            adapted = add_adapter(base.model, config, 1, base.layout)
        except (BaseModelError, RecipeInvalid) as error:
            return _short(str(error))
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    linears = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    served = set(layout.sites)
    if not linears <= served:
        return "it trains other linears than those that are served"
    return YES if linears == served else f"{YES}, without {_endings(served - linears)}"


def _prepared(folder: Path, home: Path) -> Any:
    return prepare_base(str(folder), home, progress=False)


def _endings(names: Iterable[str]) -> str:
    return " ".join(f"`{ending}`" for ending in sorted({name.rpartition(".")[2] for name in names}))


_PATTERNS = (
    (r"layers of the kind (.+?), and", r"layers of the kind \1"),
    (r"does not use transformers' attention interface", "it does not use transformers' attention interface"),
    (r"needs 's_aux'", "attention sinks"),
    (r"adds a mask of its own", "its attention has a mask of its own"),
    (r"its layers attend in chunks", "a context beyond one chunk of its attention; give `--max-model-len`"),
    (r"attends twice", "a layer attends twice"),
    (r"do not attend through", "layers that do not attend"),
    (r"its logits differ", "its logits differ from transformers' own"),
    (r"no 4-bit weights", "transformers cannot load it in 4 bits"),
    (r"no causal language model", "transformers cannot load its saved text model"),
    (r"PEFT adapts experts", "PEFT adapts experts with the same names"),
    (r"target_parameters is set", "experts (`target_parameters`)"),
    (r"LoRA on '(?:.+\.)?([^'.]+)' .* not served", r"`\1` and others that not every token passes"),
)
"""Parts of error texts, and their short form in the table."""


def _short(message: str) -> str:
    for pattern, short in _PATTERNS:
        if found := re.search(pattern, message):
            return found.expand(short)
    return message.replace("|", "/")  # a bar would end the table's cell
