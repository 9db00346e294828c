"""Reads a transformers folder: the model, its tokenizer, its config.

It refuses what transformers only warns about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapters.base.overrides import apply_overrides
from adapters.errors import BaseCorrupt, BaseModelError

_UNSUPPORTED_ERRORS = (RuntimeError, TypeError, AttributeError, AssertionError, ImportError)
"""Errors that mean an unsupported model, not damaged files."""


def config_of(folder: Path, hf_overrides: str = "") -> Any:
    """transformers' config, with the overrides (see ``overrides.py``)."""
    with convert_read_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return apply_overrides(config, hf_overrides) if hf_overrides else config


def load_whole(folder: Path, **options: Any) -> Any:
    """Calls ``from_pretrained`` in bf16 on local safetensors, and refuses missing or wrong weights.

    transformers only warns about a missing tensor and initialises it at random.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reports them, and we refuse them
        **options,
    )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise BaseCorrupt(
            f"{folder}: {name} is {list(found)}, but config.json says {list(expected)}; "
            "fetch the model again."
        )
    if missing := sorted(report["missing_keys"]):
        raise BaseCorrupt(
            f"{folder} lacks {len(missing)} of the model's tensors (first: {missing[0]}); fetch it again."
        )
    return model


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The fast tokenizer that is saved beside the weights."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **options
    )
    if not tokenizer.is_fast:
        raise BaseModelError(f"{folder} has no fast tokenizer; save one there as tokenizer.json.")
    return tokenizer


@contextmanager
def convert_read_errors(path: Path) -> Iterator[None]:
    """Converts the libraries' errors about unreadable files, which have many types, to ours."""
    try:
        yield
    except (BaseModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, _UNSUPPORTED_ERRORS):
            raise BaseModelError(
                f"{path}, a {_architecture(path)}, cannot be loaded: {type(error).__name__} ({reason}). "
                "transformers or bitsandbytes do not support this architecture here; give --base another "
                "model, or try --quantization none."
            ) from error
        if "Unrecognized configuration class" in reason:
            raise BaseModelError(
                f"{path}, a {_architecture(path)}, cannot be loaded: transformers has no causal language "
                "model for its config. Give --base another model."
            ) from error
        raise BaseCorrupt(
            f"{path} cannot be read as a causal language model ({reason}); "
            "fetch it again (a cached one may be deleted), or give a model that transformers knows."
        ) from error


def _architecture(path: Path) -> str:
    """The architecture in the config of a folder."""
    try:
        config = json.loads((path / "config.json").read_text())
        return f"{config['architectures'][0]} ({config['model_type']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "model of unknown architecture"
