"""Quantises a base once and caches it as a checkpoint that transformers loads.

The checkpoint is keyed by the content of its source. So a changed base is quantised again and a copied one is
not. It is created atomically by a rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from adapters.base.experts import nf4_experts
from adapters.base.head import quantize_head
from adapters.base.quantizer import Nf4Config, bitsandbytes_nf4
from adapters.base.quiet import quiet_libraries
from adapters.base.source import Source, resolve
from adapters.errors import BaseCorrupt, BaseModelError

Quantization = Literal["nf4", "none"]

logger = logging.getLogger(__name__)

# Increase this when the same source must give another checkpoint. All cached ones are then made again.
_FORMAT = 2


_UNSUPPORTED_ERRORS = (RuntimeError, TypeError, AttributeError, AssertionError, ImportError)
"""Errors that mean an unsupported model, not damaged files."""


@dataclass(frozen=True)
class PreparedBase:
    """A base on disk, ready for ``load_base``.

    Attributes:
        name: short, for people (``smollm2-135m``, a folder's name, a hub id).
        path: a transformers folder that ``AutoModelForCausalLM.from_pretrained`` loads.
        digest: sha256 (hex) of the source's digest, the quantisation and the checkpoint format.
        quantization, head_quantization: ``nf4`` or ``none`` (bf16), of the linears and of the output head.
        source: the name of this base in adapters (``base_model_name_or_path``): a hub id or a path.
    """

    name: str
    path: Path
    digest: str
    quantization: Quantization
    source: str
    head_quantization: Quantization = "none"


def prepare_base(
    base: str,
    cache_dir: Path,
    quantization: Quantization = "nf4",
    head_quantization: Quantization = "none",
    progress: bool = True,
    check: Callable[[Any], None] | None = None,
) -> PreparedBase:
    """Fetch and quantise ``base``, unless there is already a checkpoint of it.

    Args:
        base: ``smollm2-135m``, a transformers folder, a ``.gguf`` file, or a hub id.
        cache_dir: where downloads and checkpoints are kept; several processes may share it.
        quantization: ``nf4`` (double quantisation, bf16 compute) or ``none`` (bf16).
        head_quantization: the same for the output head. Adapters are trained against the head, so a base with
            another head counts as another base.
        progress: bars on stderr.
        check: gets transformers' config and raises BaseModelError if the caller cannot use the base, before
            hours are spent on it. It is not called if only a conversion would give the config.

    Raises:
        BaseNotFound, BaseCorrupt, BaseModelError: see ``source.resolve``.
    """
    cache_dir = cache_dir.expanduser().resolve()
    source = resolve(base, cache_dir, progress)
    if check is not None and source.folder is not None:
        check(_config_of(source.folder))
    if source.prequantized and quantization == "none":
        raise BaseModelError(f"{source.name} is quantised already; leave --quantization at nf4 for it.")
    if head_quantization != "none" and quantization == "none":
        raise BaseModelError(
            f"--head-quantization {head_quantization} with --quantization none would quantise only the "
            "head; leave out one of the two options."
        )
    how = quantization if head_quantization == "none" else f"{quantization}\nhead {head_quantization}"
    digest = hashlib.sha256(f"{source.digest}\n{how}\n{_FORMAT}".encode()).hexdigest()
    target = cache_dir / "bases" / digest
    path = _checkpoint(source, quantization, head_quantization, target, progress)
    return PreparedBase(source.name, path, digest, quantization, source.name_or_path, head_quantization)


def _config_of(folder: Path) -> Any:
    with convert_read_errors(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _checkpoint(
    source: Source, quantization: Quantization, head: Quantization, target: Path, progress: bool
) -> Path:
    if target.is_dir():
        return target
    with _lock(target.with_suffix(".lock")):
        if target.is_dir():  # another process made it in the meantime
            return target
        files = source.fetch()
        if files.is_dir() and (source.prequantized or quantization == "none"):
            return files  # it is served in place: a copy would only cost disk space
        with _atomic_folder(target) as partial:
            logger.info("Preparing %s (%s); this happens once.", source.name, quantization)
            _convert(files, quantization, head, partial, progress)
    return target


def _convert(
    files: Path, quantization: Quantization, head: Quantization, target: Path, progress: bool
) -> None:
    """Write the checkpoint of ``files`` (a folder or a GGUF) to ``target``."""
    with quiet_libraries(progress):
        if files.is_dir():
            _quantize(files, head, target)
        elif quantization == "none":
            _unpack_gguf(files, target, progress)
        else:  # transformers handles one quantisation at a time: first from GGUF, then to NF4
            dense = target / "dense"
            _unpack_gguf(files, dense, progress)
            _quantize(dense, head, target)
            shutil.rmtree(dense)


def _unpack_gguf(gguf: Path, target: Path, progress: bool) -> None:
    # transformers' switch for progress bars does not affect its bar for GGUF files.
    bar = nullcontext() if progress else redirect_stderr(io.StringIO())
    with convert_read_errors(gguf), bar:
        model = load_whole(gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True))
        tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _quantize(folder: Path, head: Quantization, target: Path) -> None:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with convert_read_errors(folder):
        model = load_whole(folder, quantization_config=Nf4Config(), device_map={"": device})
        is_sparse = bool(nf4_experts(model))
        if not is_sparse:  # then bitsandbytes alone can load it
            model.config.quantization_config = bitsandbytes_nf4()
        if head == "nf4":
            quantize_head(model)
        tokenizer = load_tokenizer(folder)
    # The original format has each expert by itself. Packed experts stay together.
    model.save_pretrained(target, save_original_format=not is_sparse)
    tokenizer.save_pretrained(target)


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
        **options,
    )
    missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if missing:
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


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` at the end, or is removed on an error. The caller holds the lock."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` across processes; it ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
