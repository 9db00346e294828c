"""Quantises a base once and caches it as a checkpoint that transformers loads.

The checkpoint is keyed by the content of its source. So a changed base is quantised again and a copied one is
not. It is created atomically by a rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GgufConfig

from adapters.base import converted
from adapters.base.experts import nf4_experts
from adapters.base.gguf_bits import note_bits, tell_few_bits
from adapters.base.head import quantize_head
from adapters.base.overrides import apply_overrides
from adapters.base.quantizer import Nf4Config, bitsandbytes_nf4
from adapters.base.quiet import quiet_libraries
from adapters.base.reading import config_of, convert_read_errors, load_tokenizer, load_whole
from adapters.base.skeleton import CannotStream
from adapters.base.source import Source, resolve
from adapters.base.stream import plan_stream, stream
from adapters.errors import BaseModelError, BaseTooLarge
from adapters.fsync import sync_folder, sync_path

Quantization = Literal["nf4", "none"]

logger = logging.getLogger(__name__)

# Increase this when the same source must give another checkpoint. All cached ones are then made again.
_FORMAT = 2


@dataclass(frozen=True)
class PreparedBase:
    """A base on disk, ready for ``load_base``.

    Attributes:
        name: short, for people (``smollm2-135m``, a folder's name, a hub id).
        path: a transformers folder that ``AutoModelForCausalLM.from_pretrained`` loads.
        digest: sha256 (hex) of the source's digest, the quantisation, the checkpoint format, the overrides.
        quantization, head_quantization: ``nf4`` or ``none`` (bf16), of the linears and of the output head.
        source: the name of this base in adapters (``base_model_name_or_path``): a hub id or a path.
        hf_overrides: see ``overrides.py``; empty: none. The files do not contain them.
    """

    name: str
    path: Path
    digest: str
    quantization: Quantization
    source: str
    head_quantization: Quantization = "none"
    hf_overrides: str = ""


def prepare_base(
    base: str,
    cache_dir: Path,
    quantization: Quantization = "nf4",
    head_quantization: Quantization = "none",
    progress: bool = True,
    check: Callable[[Any], None] | None = None,
    hf_overrides: str = "",
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
        hf_overrides: a JSON object with fields that replace those of the base's config; empty: none.

    Raises:
        BaseNotFound, BaseCorrupt, BaseModelError: see ``source.resolve``.
        BaseTooLarge: there is too little memory or disk space to quantise it.
    """
    cache_dir = cache_dir.expanduser().resolve()
    source = resolve(base, cache_dir, progress)
    if source.folder is not None:
        config = source.conversion.config if source.conversion else config_of(source.folder)
        config = apply_overrides(config, hf_overrides) if hf_overrides else config
        if check is not None:
            check(config)
    if source.prequantized and quantization == "none":
        raise BaseModelError(f"{source.name} is quantised already; leave --quantization at nf4 for it.")
    if head_quantization != "none" and quantization == "none":
        raise BaseModelError(
            f"--head-quantization {head_quantization} with --quantization none would quantise only the "
            "head; leave out one of the two options."
        )
    how = quantization if head_quantization == "none" else f"{quantization}\nhead {head_quantization}"
    how += f"\nconverted {converted.VERSION}" if source.conversion else ""
    digest = hashlib.sha256(f"{source.digest}\n{how}\n{_FORMAT}".encode()).hexdigest()
    target = cache_dir / "bases" / digest
    path = _checkpoint(source, quantization, head_quantization, target, progress)
    tell_few_bits(source.name, path)
    if hf_overrides:
        config_of(path, hf_overrides)
        digest = hashlib.sha256(f"{digest}\n{hf_overrides}".encode()).hexdigest()
    return PreparedBase(
        source.name, path, digest, quantization, source.name_or_path, head_quantization, hf_overrides
    )


def _checkpoint(
    source: Source, quantization: Quantization, head: Quantization, target: Path, progress: bool
) -> Path:
    if target.is_dir():
        return target
    with _lock(target.with_suffix(".lock")):
        if target.is_dir():  # another process made it in the meantime
            return target
        files = source.fetch()
        is_ready = files.is_dir() and source.conversion is None
        if is_ready and (source.prequantized or quantization == "none"):
            return files  # it is served in place: a copy would only cost disk space
        with _atomic_folder(target) as partial:
            logger.info("Preparing %s (%s); this happens once.", source.name, quantization)
            _convert(files, source.conversion, quantization, head, partial, progress)
    return target


def _convert(
    files: Path,
    conversion: converted.Conversion | None,
    quantization: Quantization,
    head: Quantization,
    target: Path,
    progress: bool,
) -> None:
    """Write the checkpoint of ``files`` (a folder or a GGUF) to ``target``."""
    with quiet_libraries(progress):
        if files.is_dir() and conversion is None:
            _quantize(files, head, target)
        elif quantization == "none":
            _empty(target)
            _write_dense(files, conversion, target, progress)
        else:  # transformers handles one conversion at a time: first to its own format, then to NF4
            with _scratch_folder(target.with_suffix(".dense")) as dense:
                _write_dense(files, conversion, dense, progress)
                _quantize(dense, head, target)
            if conversion is None:
                note_bits(files, target)


def _write_dense(files: Path, conversion: converted.Conversion | None, target: Path, progress: bool) -> None:
    """Write the folder that transformers reads."""
    if conversion is None:
        _unpack_gguf(files, target, progress)
    else:
        logger.info(
            "The weights are converted to %s.", type(conversion.config).__name__.removesuffix("Config")
        )
        with convert_read_errors(files):
            converted.write_native(conversion, files, target)


def _unpack_gguf(gguf: Path, target: Path, progress: bool) -> None:
    # transformers' switch for progress bars does not affect its bar for GGUF files.
    bar = nullcontext() if progress else redirect_stderr(io.StringIO())
    with convert_read_errors(gguf), bar:
        model = load_whole(gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True))
        tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _quantize(folder: Path, head: Quantization, target: Path) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        stream(plan_stream(folder, head), target, device)
    except CannotStream as error:
        logger.info("The whole model is loaded to quantise it: %s.", error)
        _quantize_whole(folder, head, target, device)
    with convert_read_errors(folder):
        load_tokenizer(folder).save_pretrained(target)


def _quantize_whole(folder: Path, head: Quantization, target: Path, device: torch.device) -> None:
    with convert_read_errors(folder):
        model = load_whole(folder, quantization_config=Nf4Config(), device_map={"": device})
        is_sparse = bool(nf4_experts(model))
        if not is_sparse:  # then bitsandbytes alone can load it
            model.config.quantization_config = bitsandbytes_nf4()
        if head == "nf4":
            quantize_head(model)
    _empty(target)
    # The original format has each expert by itself. Packed experts stay together.
    model.save_pretrained(target, save_original_format=not is_sparse)


def _empty(folder: Path) -> None:
    """Remove what a process that was killed left in ``folder``."""
    shutil.rmtree(folder)
    folder.mkdir()


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` at the end. The caller holds the lock.

    It is removed if the base cannot be used. If something else ends the work (a kill, too little memory), the
    folder stays, and the next try continues with it.
    """
    partial = target.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    try:
        yield partial
    except BaseTooLarge:
        raise
    except BaseModelError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(partial)
    os.replace(partial, target)
    sync_path(target.parent)


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """A folder that is removed at the end."""
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` across processes; it ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
