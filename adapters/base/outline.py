"""A base without its weights. It is read in a second, and suffices to check training data and adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from adapters.base.checkpoint import PreparedBase
from adapters.base.context import served_length
from adapters.base.load import layout_of
from adapters.base.quiet import quiet_libraries
from adapters.base.reading import config_of, convert_read_errors, load_tokenizer
from adapters.sites import BaseLayout


@dataclass(frozen=True)
class BaseOutline:
    """What is known about a base from its config and its tokenizer.

    Attributes:
        layout: its sites and modules.
        tokenizer: the fast tokenizer, with the model's chat template.
        eos: the token ids that end an answer.
        context: tokens of the longest sequence.
    """

    layout: BaseLayout
    tokenizer: Any
    eos: frozenset[int]
    context: int


def outline_of(prepared: PreparedBase) -> BaseOutline:
    """Raises BaseCorrupt if it cannot be read."""
    with quiet_libraries(progress=False), convert_read_errors(prepared.path):
        config = config_of(prepared.path, prepared.hf_overrides)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.tie_weights()
        tokenizer = load_tokenizer(prepared.path)
        eos = _eos_of(prepared, model)
    ids = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    context = served_length(model.config.get_text_config(), None)
    return BaseOutline(layout_of(model, prepared.source), tokenizer, frozenset(ids), context)


def _eos_of(prepared: PreparedBase, model: Any) -> Any:
    """The end-of-answer tokens in ``generation_config.json``, or else in the model's config."""
    try:
        return GenerationConfig.from_pretrained(prepared.path, local_files_only=True).eos_token_id
    except OSError:
        return model.generation_config.eos_token_id
