"""What ``manylora serve`` was told: a frozen ``ServerConfig``, made from flags and variables. No torch.

A flag wins over its variable, which wins over the default (``options.py`` lists them all). "auto" is
resolved before the config is built, except where only the device or the loaded model can tell: None there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from server.config.options import HEADINGS, OPTIONS, USAGE, OneLineParser, Option, add_options
from server.config.values import key, keys_in

Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["nf4", "none"]


class ConfigError(Exception):
    """A value that cannot be used; the message names where it was set, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which base is served, and as what.

    Attributes:
        name: a known name, a local transformers folder, a local GGUF file or a hub id.
        served_names: names clients may ask for the base by; empty = the base's own name.
        generation_config: where defaults of sampling come from: ``auto`` (the base), ``none``, or a folder.
        allow_special_tokens: in messages special tokens are such; False = they are text.
    """

    name: str
    quantization: Quantization
    head_quantization: Quantization
    served_names: tuple[str, ...]
    generation_config: str
    allow_special_tokens: bool
    device: Device


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Where adapters come from and how much room they may take.

    Attributes:
        folder: the watched folder, one sub-folder an adapter.
        max_loras: how many adapters of rank 16 the device pool was sized for; None = what suits the device.
        max_lora_rank: an adapter with a larger rank anywhere is refused at load.
        pool_rows: rank rows of the device pool, for each site; None = what suits the device.
        extra_memory: bytes on the device for what adapters have besides rank rows.
        host_memory: bytes the host tier may hold.
        max_bytes: most bytes of one adapter's weights.
        ignore_templates: adapters' own chat templates are not looked at.
    """

    folder: Path
    max_loras: int | None
    max_lora_rank: int
    pool_rows: int | None
    extra_memory: int
    host_memory: int
    max_bytes: int
    ignore_templates: bool


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the engine.

    Attributes:
        max_model_len: tokens of prompt and answer together; None = the model's own, as far as KV allows.
        max_num_seqs: most answers generated at once.
        max_num_batched_tokens: most tokens in one step; None = what suits the device (128 on a CPU).
        kv_cache_memory: bytes; None = 1 GiB on a CPU, what the rest leaves on a GPU.
        gpu_memory_utilization: share of the GPU's memory that may be in use, other processes included.
        block_size: tokens in one KV block; None = what suits the device.
        enforce_eager: decode without CUDA graphs.
        async_scheduling: launch each step before the one before it is read; None = if the device is a GPU.
        max_queued_requests: most requests that wait; one more is answered 429.
        threads: threads of the CPU kernels.
    """

    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    kv_cache_memory: int | None
    gpu_memory_utilization: float
    block_size: int | None
    prefix_caching: bool
    enforce_eager: bool
    async_scheduling: bool | None
    max_queued_requests: int
    threads: int


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """How clients reach the server.

    Attributes:
        port: 0 = any free one.
        api_keys: bearer keys, one of which every route but the probes needs; empty = none is needed.
        admin_key: the key of the admin routes; None = they are open to loopback peers only.
        metrics_key: opens ``/metrics`` alone; None = every key of a client opens it too.
        api_key_file, admin_key_file, metrics_key_file: where (more of) them came from; already read.
        shutdown_timeout: seconds that running requests have to finish after SIGTERM.
        max_body_bytes: a larger request body is answered 413.
        allowed_hosts: what the Host header may be besides loopback names and ``host`` where no key is needed.
    """

    host: str
    port: int
    api_keys: tuple[str, ...] = field(repr=False)
    admin_key: str | None = field(repr=False)
    metrics_key: str | None = field(repr=False)
    api_key_file: Path | None
    admin_key_file: Path | None
    metrics_key_file: Path | None
    shutdown_timeout: float
    max_body_bytes: int
    allowed_hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConnectionConfig:
    """What one connection may cost before, while and after it is served. Times are seconds.

    Attributes:
        limit_concurrency: most connections with a request; idle ones are closed for new ones.
        timeout_keep_alive: how long a connection may be idle after an answer.
        keep_alive_max_requests: requests after which a connection is closed.
        max_url_bytes, max_header_bytes, max_header_count: more is answered 414 or 431.
        header_timeout: for all headers of a request, and for a new connection's first byte.
        body_timeout, write_timeout: a client that sends, or reads, fewer than ``min_data_rate`` bytes a
            second for that time is disconnected.
    """

    limit_concurrency: int
    timeout_keep_alive: int
    keep_alive_max_requests: int
    max_url_bytes: int
    max_header_bytes: int
    max_header_count: int
    header_timeout: float
    body_timeout: float
    write_timeout: float
    min_data_rate: int


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How fine-tuning jobs may run.

    Attributes:
        max_jobs: most that run at once.
        threads: threads of one job.
        idle_share: share of its time that a job sleeps.
        nice: added to the niceness of its process; 19: it also gets Linux's idle class.
        gpu: ``auto`` (the server's), ``none``, or a GPU as CUDA_VISIBLE_DEVICES names it.
        gpu_memory: bytes of it that a job may take; None = nine tenths of what is free when it begins.
        max_file_bytes: a larger upload is answered 413.
    """

    max_jobs: int
    threads: int
    idle_share: float
    nice: int
    gpu: str
    gpu_memory: int | None
    max_file_bytes: int


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is logged, and how: one JSON object a line, or text for people."""

    level: Literal["debug", "info", "warning", "error"]
    format: Literal["json", "text"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything ``manylora serve`` was told. ``home`` is the folder of all state."""

    home: Path
    model: ModelConfig
    adapters: AdapterConfig
    engine: EngineConfig
    http: HttpConfig
    connections: ConnectionConfig
    training: TrainingConfig
    log: LogConfig


def resolve(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ServerConfig:
    """The config that flags and variables ask for. Raises ``ConfigError`` for the first wrong value."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in HEADINGS}
    for option in OPTIONS:
        groups[option.group][option.field] = _value(option, arguments, environ)
    _resolve_auto(groups)
    _read_keys(groups["http"])
    config = ServerConfig(
        **groups["state"],
        model=ModelConfig(**groups["model"]),
        adapters=AdapterConfig(**groups["adapters"]),
        engine=EngineConfig(**groups["engine"]),
        http=HttpConfig(**groups["http"]),
        connections=ConnectionConfig(**groups["connections"]),
        training=TrainingConfig(**groups["training"]),
        log=LogConfig(**groups["log"]),
    )
    _cross_check(config)
    return config


def from_args(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """The config of a command line without the ``manylora serve`` in front, for tests and embedding."""
    parser = OneLineParser(prog="manylora serve", usage=USAGE, allow_abbrev=False)
    add_options(parser)
    return resolve(parser.parse_args(argv), environ)


def from_options(options: Mapping[str, object], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """The config of options by their flags' names: ``{"max_num_seqs": 8}`` is ``--max-num-seqs 8``.

    None is as if the option had not been given. Raises ``ConfigError`` for an unknown one and a wrong value.
    """
    names = [option.dest for option in OPTIONS]
    for name in options.keys() - names:
        near = get_close_matches(name, names, n=1)
        raise ConfigError(f"There is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    texts = {name: _as_text(value) for name, value in options.items()}
    return resolve(argparse.Namespace(**(dict.fromkeys(names) | texts)), environ)


def _as_text(value: object) -> object:
    """A value, or several, as they would be typed."""
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    return None if value is None else str(value)


def _value(option: Option, arguments: argparse.Namespace, environ: Mapping[str, str]) -> Any:
    typed = getattr(arguments, option.dest)
    if typed is not None:
        texts = typed if option.several else [str(typed)]
        return _parse(option, texts, lambda value: f"{option.flag} {value!r}")
    if option.variable in environ:
        value = environ[option.variable]
        texts = [part.strip() for part in value.split(",") if part.strip()] if option.several else [value]
        return _parse(option, texts, lambda value: f"{option.variable}={value!r}")
    if option.default is None:
        return () if option.several else None
    return option.parse(option.default)


def _parse(option: Option, texts: Sequence[str], where: Callable[[str], str]) -> Any:
    values = []
    for value in texts:
        try:
            values.append(option.parse(value))
        except ValueError as error:
            shown = "…" if option.parse is key else value
            raise ConfigError(f"{where(shown)}: {error}") from None
    return tuple(values) if option.several else values[0]


def _resolve_auto(groups: dict[str, dict[str, Any]]) -> None:
    home, adapters, engine = Path(groups["state"]["home"]), groups["adapters"], groups["engine"]
    training = groups["training"]
    groups["state"]["home"] = home
    adapters["folder"] = Path(adapters["folder"]) if adapters["folder"] else home / "adapters"
    if adapters["pool_rows"] is None and adapters["max_loras"] is not None:
        adapters["pool_rows"] = max(adapters["max_loras"] * 16, adapters["max_lora_rank"])
    if engine["threads"] is None:
        engine["threads"] = _usable_cpus()
    if training["threads"] is None:
        training["threads"] = max(1, _usable_cpus() // 2)


def _read_keys(http: dict[str, Any]) -> None:
    """Add what is in key files; they are read once, here."""
    http["api_keys"] += _keys_in(http["api_key_file"], "--api-key-file")
    for name in ("admin", "metrics"):
        flag = f"--{name}-key-file"
        keys = _keys_in(http[f"{name}_key_file"], flag)
        if len(keys) > 1 or (keys and http[f"{name}_key"] is not None):
            raise ConfigError(f"{flag}: there is one --{name}-key, and more were given; leave the others out")
        http[f"{name}_key"] = keys[0] if keys else http[f"{name}_key"]


def _keys_in(file: Path | None, flag: str) -> tuple[str, ...]:
    try:
        return keys_in(file) if file is not None else ()
    except ValueError as error:
        raise ConfigError(f"{flag} {file}: {error}") from None


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cross_check(config: ServerConfig) -> None:
    adapters, engine = config.adapters, config.engine
    if adapters.pool_rows is not None and adapters.pool_rows < adapters.max_lora_rank:
        raise ConfigError(
            f"--lora-pool-rows {adapters.pool_rows}: an adapter of --max-lora-rank {adapters.max_lora_rank} "
            f"would never fit; set it to {adapters.max_lora_rank} or more, or lower --max-lora-rank"
        )
    budget = engine.max_num_batched_tokens
    if budget is not None and budget < engine.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {budget}: each of --max-num-seqs {engine.max_num_seqs} answers takes "
            f"a token a step; set it to {engine.max_num_seqs} or more, or lower --max-num-seqs"
        )
