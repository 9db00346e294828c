"""The configuration of ``manylora serve``: a frozen ``ServerConfig``, made from flags and variables.

A flag has precedence over its variable, and a variable over the default. ``options.py`` lists all options.
"auto" is resolved before the config is built. It stays None if only the device or the loaded model decides.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapters.suggest import did_you_mean, near_names
from server.config.options import HEADINGS, OPTIONS, USAGE, OneLineParser, Option, add_options
from server.config.values import key, keys_in

Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["nf4", "none"]


class ConfigError(Exception):
    """A value is not valid. The message names the flag or variable, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base model, and the names it is served under.

    Attributes:
        name: a known name, a local transformers folder, a local GGUF file or a hub id.
        hf_overrides: a JSON object with fields that replace those of the base's config; None: no fields.
        rope_scaling: a JSON object that replaces its ``rope_scaling``.
        served_names: the names of the base in the API; empty: the base's own name.
        generation_config: the source of sampling defaults: ``auto`` (the base), ``none``, or a folder.
        allow_special_tokens: read special tokens in messages as tokens; False: read them as text.
    """

    name: str
    quantization: Quantization
    head_quantization: Quantization
    hf_overrides: str | None
    rope_scaling: str | None
    served_names: tuple[str, ...]
    generation_config: str
    allow_special_tokens: bool
    device: Device

    @property
    def overrides(self) -> str:
        """``hf_overrides`` with ``rope_scaling`` in it, as JSON; empty: no fields."""
        fields = json.loads(self.hf_overrides or "{}")
        if self.rope_scaling is not None:
            fields["rope_scaling"] = json.loads(self.rope_scaling)
        return json.dumps(fields, sort_keys=True) if fields else ""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The source of adapters, and limits on their size and memory.

    Attributes:
        folder: the watched folder. Each sub-folder is one adapter.
        max_loras: how many adapters of rank 16 fit into the device pool; None: the device decides.
        max_lora_rank: an adapter with a larger rank at any site is refused at load.
        pool_rows: rank rows of the device pool at each site; None: the device decides.
        extra_memory: bytes on the device for adapters' weights that are not rank rows.
        host_memory: bytes of the host tier.
        max_bytes: the most bytes of one adapter's weights.
        ignore_templates: ignore adapters' own chat templates.
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
        max_model_len: the most tokens of prompt and answer together; None: the model's own limit, or less if
            the KV cache is smaller.
        max_num_seqs: the most answers that are generated at once.
        max_num_batched_tokens: the most tokens in one step; None: the device decides (128 on a CPU).
        kv_cache_memory: bytes; None: 1 GiB on a CPU, and the remaining memory on a GPU.
        gpu_memory_utilization: fraction of the GPU's memory that may be in use, including other processes.
        block_size: tokens in one KV block; None: the attention backend decides.
        enforce_eager: decode without CUDA graphs.
        async_scheduling: launch a step before the result of the previous one is read; None: on GPUs only.
        max_queued_requests: the most waiting requests. The next one gets status 429.
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
    """Settings of the HTTP server.

    Attributes:
        port: the port; 0: any free port.
        api_keys: bearer keys of clients. All routes except the probes need one; empty: no key is needed.
        admin_key: the key of the admin routes; None: only loopback peers may use them.
        metrics_key: a key that opens only ``/metrics``; None: there is no such key.
        api_key_file, admin_key_file, metrics_key_file: files with further keys. The keys above include them.
        shutdown_timeout: seconds in which running requests may finish after SIGTERM.
        max_body_bytes: the largest request body. A larger one gets status 413.
        allowed_hosts: further names that the Host header may have. Loopback names and ``host`` are always
            allowed. Other names are refused if no key is needed, or if this is not empty.
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
    """Limits of one connection. Times are in seconds.

    Attributes:
        limit_concurrency: the most connections with a request. Idle ones are closed for new ones.
        timeout_keep_alive: the longest idle time after an answer.
        keep_alive_max_requests: the most requests on one connection.
        max_url_bytes, max_header_bytes, max_header_count: a larger request gets status 414 or 431.
        header_timeout: time for all headers of a request, and for a new connection's first byte.
        body_timeout, write_timeout: a client that sends (reads) fewer than ``min_data_rate`` bytes a second
            for this time is disconnected.
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
    """Settings of fine-tuning jobs.

    Attributes:
        max_jobs: the most jobs that run at once.
        threads: threads of one job.
        idle_share: fraction of its time that a job sleeps.
        nice: is added to the niceness of a job's process. With 19, the process also gets Linux's idle class.
        gpu: ``auto`` (the server's GPU), ``none``, or a GPU as in CUDA_VISIBLE_DEVICES.
        gpu_memory: the most bytes of GPU memory for a job; None: nine tenths of the free memory at its start.
        max_file_bytes: the largest upload. A larger one gets status 413.
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
    """The level of the log, and its format: a JSON object on each line, or readable text."""

    level: Literal["debug", "info", "warning", "error"]
    format: Literal["json", "text"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The whole configuration of ``manylora serve``. ``home`` is the folder of all state."""

    home: Path
    model: ModelConfig
    adapters: AdapterConfig
    engine: EngineConfig
    http: HttpConfig
    connections: ConnectionConfig
    training: TrainingConfig
    log: LogConfig


def resolve(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ServerConfig:
    """The config from flags and variables. Raises ConfigError for the first wrong value."""
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
    """The config from the arguments after ``manylora serve``. For tests and embedding."""
    parser = OneLineParser(prog="manylora serve", usage=USAGE, allow_abbrev=False)
    add_options(parser)
    return resolve(parser.parse_args(argv), environ)


def from_options(options: Mapping[str, object], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """The config from options by name: ``{"max_num_seqs": 8}`` means ``--max-num-seqs 8``.

    None means that the option is not set. Raises ConfigError for an unknown option or a wrong value.
    """
    names = [option.dest for option in OPTIONS]
    for name in options.keys() - names:
        raise ConfigError(f"There is no option {name!r}{did_you_mean(near_names(name, names, count=1))}")
    texts = {name: _as_text(value) for name, value in options.items()}
    return resolve(argparse.Namespace(**(dict.fromkeys(names) | texts)), environ)


def _as_text(value: object) -> object:
    """The value, or each of several values, as text on a command line. A mapping becomes JSON."""
    if isinstance(value, Mapping):
        return json.dumps(value)
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
    """Add the keys from key files. They are read only here."""
    http["api_keys"] += _keys_in(http["api_key_file"], "--api-key-file")
    for name in ("admin", "metrics"):
        flag = f"--{name}-key-file"
        keys = _keys_in(http[f"{name}_key_file"], flag)
        if len(keys) > 1 or (keys and http[f"{name}_key"] is not None):
            raise ConfigError(f"{flag}: more than one --{name}-key was given; leave the others out")
        http[f"{name}_key"] = keys[0] if keys else http[f"{name}_key"]


def _keys_in(file: Path | None, flag: str) -> tuple[str, ...]:
    try:
        return keys_in(file) if file is not None else ()
    except ValueError as error:
        raise ConfigError(f"{flag} {file}: {error}") from None


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cross_check(config: ServerConfig) -> None:
    adapters, engine, model = config.adapters, config.engine, config.model
    twice = json.loads(model.hf_overrides or "{}").keys() & {"rope_scaling", "rope_parameters"}
    if model.rope_scaling is not None and twice:
        raise ConfigError(f"--rope-scaling: --hf-overrides has {min(twice)} too; leave out one of them")
    if adapters.pool_rows is not None and adapters.pool_rows < adapters.max_lora_rank:
        raise ConfigError(
            f"--lora-pool-rows {adapters.pool_rows}: an adapter of --max-lora-rank {adapters.max_lora_rank} "
            f"does not fit; set it to {adapters.max_lora_rank} or more, or lower --max-lora-rank"
        )
    budget = engine.max_num_batched_tokens
    if budget is not None and budget < engine.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {budget}: each of --max-num-seqs {engine.max_num_seqs} answers needs "
            f"a token in each step; set it to {engine.max_num_seqs} or more, or lower --max-num-seqs"
        )
