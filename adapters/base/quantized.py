"""Whether a transformers folder is quantised already, and how. Only its config and headers are read.

bitsandbytes' NF4 and our own format are used as they are. All others are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from adapters.base.headers import Header, read_headers
from adapters.base.quantizer import METHOD
from adapters.errors import BaseCorrupt, BaseModelError

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
"""Weights that share a scale, and scales that share one, in all that we quantise ourselves."""

_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "torchao": "torchao",
}
_STATE = ".quant_state.bitsandbytes__"
_MARKS = (
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qweight$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"_proj_blocks$"), "MXFP4"),
    (re.compile(r"\.weight_scale(_inv)?$"), "FP8"),
    (re.compile(r"\.SCB$"), "8-bit bitsandbytes"),
)
_EXPERT = re.compile(r"\.experts\.\d+\..*" + re.escape(_STATE))


def is_nf4(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether ``folder`` is an NF4 checkpoint that is used as it is; False if it is not quantised.

    Args:
        config: the content of its ``config.json``.

    Raises:
        BaseModelError: it is quantised in another way.
        BaseCorrupt: its headers cannot be read, or they contradict the config.
    """
    settings = _settings(config)
    method = settings.get("quant_method")
    if method == METHOD:
        return True
    if settings and method != "bitsandbytes":
        raise _refusal(folder, _NAMES.get(str(method), f"{method}"))
    _check_settings(folder, settings)
    headers = read_headers(folder)
    _check_marks(folder, headers)
    states = {name: header for name, header in headers.items() if _STATE in name}
    if bool(states) != bool(settings):
        says = "has no quantization_config" if states else "says that they are"
        raise BaseCorrupt(
            f"{folder} has weights that are {'' if states else 'not '}quantised by bitsandbytes, but its "
            f"config.json {says}; fetch it again."
        )
    _check_states(folder, states)
    return bool(states)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Composite configs may have them one level down, and compressed-tensors has had a name of its own."""
    for one in (config, config.get("text_config")):
        if isinstance(one, Mapping):
            found = one.get("quantization_config") or one.get("compression_config")
            if isinstance(found, Mapping):
                return found
    return {}


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    if not settings:
        return
    if not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        raise _refusal(folder, "8-bit bitsandbytes")
    kind, storage = (
        settings.get("bnb_4bit_quant_type", "fp4"),
        settings.get("bnb_4bit_quant_storage", "uint8"),
    )
    if kind != "nf4":
        raise _refusal(folder, f"bitsandbytes {str(kind).upper()}")
    if storage != "uint8":
        raise _refusal(folder, f"bitsandbytes NF4 in {storage} (bnb_4bit_quant_storage)")


def _check_marks(folder: Path, headers: Mapping[str, Header]) -> None:
    """Tensors that only a quantised model has, whatever its config says."""
    for name, header in headers.items():
        if header.dtype.startswith("F8_"):
            raise _refusal(folder, "FP8", name)
        for pattern, method in _MARKS:
            if pattern.search(name):
                raise _refusal(folder, method, name)
        if f"{_STATE}fp4" in name:
            raise _refusal(folder, "bitsandbytes FP4", name)
        if _EXPERT.search(name):
            raise _refusal(folder, "bitsandbytes NF4 with each expert by itself", name)


def _check_states(folder: Path, states: Mapping[str, Header]) -> None:
    """Refuse other block sizes. Each state is a JSON text of a hundred bytes."""
    for name, state in _read_states(states):
        sizes = state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCKSIZE)
        if sizes != (BLOCKSIZE, NESTED_BLOCKSIZE):
            raise _refusal(folder, f"bitsandbytes NF4 in blocks of {sizes[0]} (scales: {sizes[1]})", name)


def _read_states(states: Mapping[str, Header]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for file in sorted({header.file for header in states.values()}):
        with safe_open(file, "pt") as opened:
            for name in (name for name, header in states.items() if header.file == file):
                try:
                    yield name, json.loads(bytes(opened.get_tensor(name).tolist()))
                except ValueError as error:
                    raise BaseCorrupt(
                        f"{file}: {name} is not a state of bitsandbytes ({error}); fetch it again."
                    ) from error


def _refusal(folder: Path, method: str, tensor: str | None = None) -> BaseModelError:
    seen = f" (tensor {tensor})" if tensor else ""
    return BaseModelError(
        f"{folder} is quantised already, as {method}{seen}. Only NF4 of bitsandbytes, in uint8 and in blocks "
        f"of {BLOCKSIZE}, is used as it is. Give --base the unquantised model (bf16): it is quantised here, "
        "layer by layer."
    )
