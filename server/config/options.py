"""All options of ``manylora serve``. Each row declares a flag and its ``MANYLORA_…`` variable."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from server.config.values import (
    auto_or,
    choice,
    flag,
    fraction,
    generation_config,
    gpu,
    host_pattern,
    integer,
    json_object,
    key,
    name,
    path,
    seconds,
    share,
    size,
    some_seconds,
    text,
    whole_seconds,
)


@dataclass(frozen=True, slots=True)
class Option:
    """One flag, one variable, one field of the config.

    Attributes:
        flag: the flag. The variable is ``MANYLORA_`` and the flag's name in capitals.
        target: ``group.field`` of ``ServerConfig``. The group decides the heading in ``--help``.
        parse: turns the text into the value. Raises ``ValueError("must be …")``.
        default: the default as text, before ``parse``; None: there is no default.
        metavar: the value's name in ``--help``; None: a switch. ``--no-…`` turns it off.
        several: the flag may be repeated. In the variable, commas separate the values.
    """

    flag: str
    target: str
    parse: Callable[[str], Any]
    default: str | None
    metavar: str | None
    help: str
    several: bool = False

    @property
    def group(self) -> str:
        return self.target.partition(".")[0]

    @property
    def field(self) -> str:
        return self.target.partition(".")[2]

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        return f"MANYLORA_{self.dest.upper()}"


# fmt: off
OPTIONS: tuple[Option, ...] = (
    Option("--home", "state.home", text, ".manylora", "DIR", "folder of all state"),

    Option("--base", "model.name", text, "smollm2-135m", "MODEL",
           "smollm2-135m, a transformers folder, a GGUF file or a hub id"),
    Option("--quantization", "model.quantization", choice("nf4", "none"), "nf4", "{nf4,none}",
           "nf4: 4 bits with double quantisation; none: bf16"),
    Option("--head-quantization", "model.head_quantization", choice("nf4", "none"), "none", "{nf4,none}",
           "quantization of the output head, in training and serving. nf4 makes single answers on a CPU a "
           "third faster; the loss rises by 0.2 nats for the default base, and by 0.02 for an adapter "
           "trained on it"),
    Option("--hf-overrides", "model.hf_overrides", json_object, None, "JSON",
           "fields that replace those of the base's config.json, in training and serving: "
           '{"max_position_embeddings": 65536}. They cannot change the weights'),
    Option("--rope-scaling", "model.rope_scaling", json_object, None, "JSON",
           'the same for rope_scaling alone: {"rope_type": "yarn", "factor": 4.0, '
           '"original_max_position_embeddings": 32768}'),
    Option("--served-model-name", "model.served_names", name, None, "NAME",
           "name of the base in the API (may be repeated)", several=True),
    Option("--allow-special-tokens", "model.allow_special_tokens", flag, "false", None,
           "read special tokens in messages (<|im_end|>) as tokens, not as text. Users can then forge turns"),
    Option("--generation-config", "model.generation_config", generation_config, "auto", "{auto,none,DIR}",
           "defaults of temperature, top_p, top_k, min_p, repetition_penalty and max_tokens. auto: from the "
           "base's generation_config.json; none: the API's defaults; DIR: from the file in this folder"),
    Option("--device", "model.device", choice("auto", "cpu", "cuda"), "auto", "{auto,cpu,cuda}",
           "device of the model; auto: cuda if there is a GPU"),

    Option("--adapter-dir", "adapters.folder", text, None, "DIR",
           "watched folder with one sub-folder for each adapter (default: adapters/ under --home)"),
    Option("--max-loras", "adapters.max_loras", auto_or(integer(1, 65536)), "auto", "N",
           "size of the device pool: N adapters of rank 16, or more smaller ones. auto: 16 on a CPU; on a "
           "GPU --max-num-seqs, if they fit into a quarter of the memory that the base leaves"),
    Option("--max-lora-rank", "adapters.max_lora_rank", integer(1, 4096), "64", "R",
           "refuse an adapter with a larger rank"),
    Option("--lora-pool-rows", "adapters.pool_rows", auto_or(integer(1, 1 << 24)), "auto", "ROWS",
           "rank rows of the device pool; auto: 16 for each of --max-loras, at least --max-lora-rank"),
    Option("--lora-extra-memory", "adapters.extra_memory", size(0), "512MiB", "SIZE",
           "device memory for adapters' other weights: DoRA, biases, norms, embeddings, heads"),
    Option("--lora-host-memory", "adapters.host_memory", size(0), "1GiB", "SIZE",
           "host memory for adapters that are not on the device. With a GPU, it is pinned at the start"),
    Option("--max-lora-bytes", "adapters.max_bytes", size(1), "512MiB", "SIZE",
           "refuse an adapter with more bytes of weights"),
    Option("--ignore-adapter-templates", "adapters.ignore_templates", flag, "false", None,
           "ignore adapters' own chat templates and end tokens; use those of the base"),

    Option("--max-model-len", "engine.max_model_len", auto_or(integer(2, 1 << 24)), "auto", "TOKENS",
           "most tokens of prompt and answer; auto: the model's own limit, as far as the KV cache allows"),
    Option("--max-num-seqs", "engine.max_num_seqs", integer(1, 65536), "64", "N",
           "most answers that are generated at once"),
    Option("--max-num-batched-tokens", "engine.max_num_batched_tokens", auto_or(integer(1, 1 << 24)), "auto",
           "TOKENS", "most tokens in one step; auto: depends on the device (128 on a CPU)"),
    Option("--kv-cache-memory", "engine.kv_cache_memory", auto_or(size(1)), "auto", "SIZE",
           "memory of the KV cache; auto: 1GiB on a CPU; on a GPU, the rest of --gpu-memory-utilization"),
    Option("--gpu-memory-utilization", "engine.gpu_memory_utilization", fraction, "0.9", "SHARE",
           "fraction of the GPU's memory that may be in use, including other processes"),
    Option("--block-size", "engine.block_size", auto_or(integer(1, 1024)), "auto", "TOKENS",
           "tokens in one KV block; auto: 256 for FlashAttention-2, which needs a multiple of 256; 64 for "
           "its Triton build; otherwise 16"),
    Option("--enable-prefix-caching", "engine.prefix_caching", flag, "true", None,
           "reuse the KV cache of prompts that begin alike and have the same adapter"),
    Option("--enforce-eager", "engine.enforce_eager", flag, "false", None,
           "decode without CUDA graphs; it has no effect on a CPU"),
    Option("--async-scheduling", "engine.async_scheduling", auto_or(flag), "auto", None,
           "launch each step while the device still runs the previous one; auto: on GPUs only"),
    Option("--max-queued-requests", "engine.max_queued_requests", integer(1, 1 << 20), "512", "N",
           "most waiting requests; the next one gets status 429"),
    Option("--threads", "engine.threads", auto_or(integer(1, 4096)), "auto", "N",
           "threads of the CPU kernels; auto: one for each CPU that this process may use"),

    Option("--host", "http.host", text, "127.0.0.1", "ADDRESS", "address to listen on"),
    Option("--port", "http.port", integer(0, 65535), "8000", "PORT", "port to listen on; 0: any free port"),
    Option("--api-key", "http.api_keys", key, None, "KEY",
           "bearer key that clients must send (may be repeated); a file or variable is safer", several=True),
    Option("--api-key-file", "http.api_key_file", path, None, "FILE",
           "the same from a file: one key on each line; a line that begins with # is a comment"),
    Option("--admin-key", "http.admin_key", key, None, "KEY",
           "bearer key of the admin routes; without one only loopback peers may use them"),
    Option("--admin-key-file", "http.admin_key_file", path, None, "FILE", "the same from a file"),
    Option("--metrics-key", "http.metrics_key", key, None, "KEY",
           "bearer key that opens /metrics and nothing else"),
    Option("--metrics-key-file", "http.metrics_key_file", path, None, "FILE", "the same from a file"),
    Option("--shutdown-timeout", "http.shutdown_timeout", seconds, "30", "SECONDS",
           "time in which running requests may finish after SIGTERM"),
    Option("--max-body-bytes", "http.max_body_bytes", size(1024), "8MiB", "SIZE",
           "largest request body; a larger one gets status 413"),

    Option("--allowed-hosts", "http.allowed_hosts", host_pattern, None, "NAME",
           "further name that the Host header may have if no key is needed: a name, *.example.com, or * for "
           "any (may be repeated)", several=True),

    Option("--limit-concurrency", "connections.limit_concurrency", integer(1, 1 << 20), "1024", "N",
           "most requests at once; the next one gets status 503, except on health, metrics and admin routes"),
    Option("--timeout-keep-alive", "connections.timeout_keep_alive", whole_seconds, "75", "SECONDS",
           "close a connection that has been idle for this time"),
    Option("--keep-alive-max-requests", "connections.keep_alive_max_requests", integer(1, 1 << 30), "1000",
           "N", "close a connection after this number of requests"),
    Option("--max-url-bytes", "connections.max_url_bytes", size(256), "8KiB", "SIZE",
           "longest URL; a longer one gets status 414"),
    Option("--max-header-bytes", "connections.max_header_bytes", size(1024), "64KiB", "SIZE",
           "most bytes of headers; more get status 431"),
    Option("--max-header-count", "connections.max_header_count", integer(16, 65536), "256", "N",
           "most headers; more get status 431"),
    Option("--header-timeout", "connections.header_timeout", some_seconds, "20", "SECONDS",
           "time for a request's headers; a slower client gets status 408"),
    Option("--body-timeout", "connections.body_timeout", some_seconds, "30", "SECONDS",
           "a client that sends its body slower than --min-data-rate for this time gets status 408"),
    Option("--write-timeout", "connections.write_timeout", some_seconds, "30", "SECONDS",
           "a client that reads slower than --min-data-rate for this time is disconnected"),
    Option("--min-data-rate", "connections.min_data_rate", size(1), "1KiB", "SIZE",
           "lowest rate, in bytes a second, at which a client may send or read"),

    Option("--max-training-jobs", "training.max_jobs", integer(0, 64), "1", "N",
           "fine-tuning jobs that run at once; 0: all jobs wait"),
    Option("--train-threads", "training.threads", auto_or(integer(1, 1024)), "auto", "N",
           "threads of a job; auto: half of the CPUs, at least one"),
    Option("--train-yield", "training.idle_share", share, "0", "SHARE",
           "fraction of its time that a job sleeps, so that serving gets the CPU: 0 to 0.95"),
    Option("--train-nice", "training.nice", integer(0, 19), "19", "N",
           "niceness of a job's process; 19: it runs only on idle CPUs"),
    Option("--train-gpu", "training.gpu", gpu, "auto", "ID",
           "GPU of jobs, as in CUDA_VISIBLE_DEVICES; auto: the server's GPU; none: train on the CPU"),
    Option("--train-gpu-memory", "training.gpu_memory", auto_or(size(1)), "auto", "SIZE",
           "most GPU memory of a job; auto: nine tenths of the free memory at its start"),
    Option("--max-file-bytes", "training.max_file_bytes", size(1), "512MiB", "SIZE",
           "largest upload; a larger one gets status 413"),

    Option("--log-level", "log.level", choice("debug", "info", "warning", "error"), "info", "LEVEL",
           "debug, info, warning or error"),
    Option("--log-format", "log.format", choice("json", "text"), "json", "{json,text}",
           "json: one object on each line; text: readable lines"),
)
# fmt: on

USAGE = "manylora serve [OPTION …]   (the variable in brackets sets the same; the option has precedence)"

HEADINGS = {
    "state": "state",
    "model": "base model",
    "adapters": "adapters",
    "engine": "engine",
    "http": "http",
    "connections": "connections",
    "training": "fine-tuning",
    "log": "logging",
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare all ``OPTIONS`` on ``parser``, in groups. Their values stay text until ``resolve``."""
    groups = {group: parser.add_argument_group(heading) for group, heading in HEADINGS.items()}
    for option in OPTIONS:
        shown = "" if option.default is None else f" (default: {option.default})"
        arguments: dict[str, Any] = {
            "dest": option.dest,
            "default": None,
            "help": f"{option.help}{shown} [{option.variable}]".replace("%", "%%"),
        }
        if option.metavar is None:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"metavar": option.metavar, "action": "append" if option.several else "store"}
        groups[option.group].add_argument(option.flag, **arguments)
