"""Writes the native folder of a converted base. It holds one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.base.converted.conversion import Conversion
from adapters.base.headers import INDEX, weight_files

SHARD = 1 << 30
"""Bytes of a shard, before one more tensor."""

_COPIED = ("special_tokens_map.json", "tokenizer.json", "chat_template.jinja")
_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def write_native(conversion: Conversion, folder: Path, target: Path) -> None:
    """Convert the weights of ``folder``, tensor by tensor, and write them with all configs to ``target``.

    Raises:
        BaseCorrupt, BaseModelError: a tensor is not as it was published.
    """
    shards = _Shards(target)
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is not a dict
                for native, tensor in conversion.convert(name, opened.get_tensor(name)).items():
                    shards.add(native, tensor)
    shards.close()
    conversion.config.save_pretrained(target)
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if generation_config := _generation_config(conversion, folder):
        (target / _GENERATION_CONFIG).write_text(json.dumps(generation_config))
    (target / _TOKENIZER_CONFIG).write_text(json.dumps(_tokenizer_config(folder / _TOKENIZER_CONFIG)))


def _generation_config(conversion: Conversion, folder: Path) -> dict[str, Any]:
    """The original's, with the tokens that end an answer in its chat code."""
    file = folder / _GENERATION_CONFIG
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    ends = [ids[token] for token in conversion.turn_ends(settings) if token in ids]
    if ends:
        eos = settings.get("eos_token_id", conversion.config.eos_token_id)
        known = eos if isinstance(eos, list) else [] if eos is None else [eos]
        settings["eos_token_id"] = [*known, *(end for end in ends if end not in known)]
    return settings


def _tokenizer_config(file: Path) -> dict[str, Any]:
    """The tokenizer's settings for the class that reads ``tokenizer.json`` alone."""
    settings = json.loads(file.read_text()) if file.is_file() else {}
    settings.pop("auto_map", None)
    return {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}


class _Shards:
    """Collects tensors and writes them to numbered files and an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._index: dict[str, str] = {}
        self._count = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._waiting[name] = tensor.contiguous()
        if sum(one.nbytes for one in self._waiting.values()) >= SHARD:
            self._write()

    def close(self) -> None:
        self._write()
        (self._folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self._index}))

    def _write(self) -> None:
        if not self._waiting:
            return
        self._count += 1
        file = f"model-{self._count:05}.safetensors"
        save_file(self._waiting, self._folder / file, metadata={"format": "pt"})
        self._index |= dict.fromkeys(self._waiting, file)
        self._waiting = {}
