"""Every option of ``manylora serve``, declared once: a row is a flag and a ``MANYLORA_…`` variable."""

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
        flag: as typed; the variable is ``MANYLORA_`` and the same in capitals.
        target: ``group.field`` of ``ServerConfig``; the group is also the heading in ``--help``.
        parse: turns the text into the value; raises ``ValueError("must be …")``.
        default: as text, as if it had been typed; None = nothing.
        metavar: how the value is called in ``--help``; None = a switch, turned off by ``--no-…``.
        several: may be given more than once (in the variable: separated by commas).
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
           "the same of the output head, for training and serving alike; nf4 makes single answers on a CPU a "
           "third faster and costs the default base 0.2 nats of loss, an adapter trained on it 0.02"),
    Option("--served-model-name", "model.served_names", name, None, "NAME",
           "what clients call the base (may be repeated)", several=True),
    Option("--allow-special-tokens", "model.allow_special_tokens", flag, "false", None,
           "read special tokens in messages (<|im_end|>) as tokens, not as text: users may then forge turns"),
    Option("--generation-config", "model.generation_config", generation_config, "auto", "{auto,none,DIR}",
           "where requests get temperature, top_p, top_k, min_p, repetition_penalty and max_tokens from that "
           "they do not give: auto: the base's generation_config.json; none: the API's defaults; or a folder "
           "with such a file"),
    Option("--device", "model.device", choice("auto", "cpu", "cuda"), "auto", "{auto,cpu,cuda}",
           "where to compute; auto: cuda if there is one"),

    Option("--adapter-dir", "adapters.folder", text, None, "DIR",
           "watched folder, one sub-folder an adapter (default: adapters/ under --home)"),
    Option("--max-loras", "adapters.max_loras", auto_or(integer(1, 65536)), "auto", "N",
           "size the device pool for N adapters of rank 16, or more smaller ones; auto: 16 on a CPU, "
           "on a GPU one for each of --max-num-seqs, if a quarter of the memory left by the base holds them"),
    Option("--max-lora-rank", "adapters.max_lora_rank", integer(1, 4096), "64", "R",
           "refuse an adapter of a larger rank when it is loaded"),
    Option("--lora-pool-rows", "adapters.pool_rows", auto_or(integer(1, 1 << 24)), "auto", "ROWS",
           "rank rows of the device pool; auto: 16 for each of --max-loras, at least --max-lora-rank"),
    Option("--lora-extra-memory", "adapters.extra_memory", size(0), "512MiB", "SIZE",
           "device memory for what adapters have besides rank rows: DoRA, biases, norms, embeddings, heads"),
    Option("--lora-host-memory", "adapters.host_memory", size(0), "1GiB", "SIZE",
           "memory for adapters that are not on the device; beside a GPU it is pinned at the start"),
    Option("--max-lora-bytes", "adapters.max_bytes", size(1), "512MiB", "SIZE",
           "refuse an adapter with more bytes of weights"),
    Option("--ignore-adapter-templates", "adapters.ignore_templates", flag, "false", None,
           "ignore adapters' own chat templates and ends of answers, and speak with all as with the base"),

    Option("--max-model-len", "engine.max_model_len", auto_or(integer(2, 1 << 24)), "auto", "TOKENS",
           "most tokens of prompt and answer; auto: the model's own, as far as the KV cache allows"),
    Option("--max-num-seqs", "engine.max_num_seqs", integer(1, 65536), "64", "N",
           "most answers generated at once"),
    Option("--max-num-batched-tokens", "engine.max_num_batched_tokens", auto_or(integer(1, 1 << 24)), "auto",
           "TOKENS", "most tokens in one step; auto: what suits the device (128 on a CPU)"),
    Option("--kv-cache-memory", "engine.kv_cache_memory", auto_or(size(1)), "auto", "SIZE",
           "memory for keys and values; auto: 1GiB on a CPU, what --gpu-memory-utilization leaves on a GPU"),
    Option("--gpu-memory-utilization", "engine.gpu_memory_utilization", fraction, "0.9", "SHARE",
           "part of a GPU's memory that may be taken, what other processes hold included"),
    Option("--block-size", "engine.block_size", auto_or(integer(1, 1024)), "auto", "TOKENS",
           "tokens in one KV block; auto: 256 for FlashAttention-2, which takes no others but multiples, 64 "
           "for its Triton build, else 16"),
    Option("--enable-prefix-caching", "engine.prefix_caching", flag, "true", None,
           "reuse the KV of prompts that begin alike under the same adapter"),
    Option("--enforce-eager", "engine.enforce_eager", flag, "false", None,
           "launch every kernel of a decode step by itself, without CUDA graphs (only matters on a GPU)"),
    Option("--async-scheduling", "engine.async_scheduling", auto_or(flag), "auto", None,
           "prepare and queue each step while the device still runs the one before; auto: on a GPU"),
    Option("--max-queued-requests", "engine.max_queued_requests", integer(1, 1 << 20), "512", "N",
           "most requests that wait; one more is answered 429"),
    Option("--threads", "engine.threads", auto_or(integer(1, 4096)), "auto", "N",
           "threads of the CPU kernels; auto: as many as this process may run on"),

    Option("--host", "http.host", text, "127.0.0.1", "ADDRESS", "address to listen on"),
    Option("--port", "http.port", integer(0, 65535), "8000", "PORT", "port to listen on; 0: any free one"),
    Option("--api-key", "http.api_keys", key, None, "KEY",
           "bearer key that clients must send (may be repeated; safer in a file or variable)", several=True),
    Option("--api-key-file", "http.api_key_file", path, None, "FILE",
           "the same from a file that is read at the start: one key a line, # begins a comment"),
    Option("--admin-key", "http.admin_key", key, None, "KEY",
           "bearer key of the admin routes; without one only loopback peers may use them"),
    Option("--admin-key-file", "http.admin_key_file", path, None, "FILE", "the same from a file"),
    Option("--metrics-key", "http.metrics_key", key, None, "KEY",
           "bearer key that opens /metrics and nothing else"),
    Option("--metrics-key-file", "http.metrics_key_file", path, None, "FILE", "the same from a file"),
    Option("--shutdown-timeout", "http.shutdown_timeout", seconds, "30", "SECONDS",
           "how long running requests may go on after SIGTERM"),
    Option("--max-body-bytes", "http.max_body_bytes", size(1024), "8MiB", "SIZE",
           "answer 413 to a larger body"),

    Option("--allowed-hosts", "http.allowed_hosts", host_pattern, None, "NAME",
           "more names that the Host header may have where no key is needed; *.example.com, or * for any "
           "(may be repeated)", several=True),

    Option("--limit-concurrency", "connections.limit_concurrency", integer(1, 1 << 20), "1024", "N",
           "requests answered at once; one more is answered 503, except on health, metrics and admin routes"),
    Option("--timeout-keep-alive", "connections.timeout_keep_alive", whole_seconds, "75", "SECONDS",
           "close a connection that has been idle for this time"),
    Option("--keep-alive-max-requests", "connections.keep_alive_max_requests", integer(1, 1 << 30), "1000",
           "N", "close a connection after this number of requests"),
    Option("--max-url-bytes", "connections.max_url_bytes", size(256), "8KiB", "SIZE",
           "answer 414 to a longer URL"),
    Option("--max-header-bytes", "connections.max_header_bytes", size(1024), "64KiB", "SIZE",
           "answer 431 to more bytes of headers"),
    Option("--max-header-count", "connections.max_header_count", integer(16, 65536), "256", "N",
           "answer 431 to more headers"),
    Option("--header-timeout", "connections.header_timeout", some_seconds, "20", "SECONDS",
           "answer 408 to a client that takes longer to send a request's headers"),
    Option("--body-timeout", "connections.body_timeout", some_seconds, "30", "SECONDS",
           "answer 408 to a client that sends its body slower than --min-data-rate for this time"),
    Option("--write-timeout", "connections.write_timeout", some_seconds, "30", "SECONDS",
           "disconnect a client that reads slower than --min-data-rate for this time"),
    Option("--min-data-rate", "connections.min_data_rate", size(1), "1KiB", "SIZE",
           "bytes a second below which a client is too slow, in both directions"),

    Option("--max-training-jobs", "training.max_jobs", integer(0, 64), "1", "N",
           "fine-tuning jobs that run at once; 0: none, they wait"),
    Option("--train-threads", "training.threads", auto_or(integer(1, 1024)), "auto", "N",
           "threads of a job; auto: half of the CPUs, at least one"),
    Option("--train-yield", "training.idle_share", share, "0", "SHARE",
           "share of its time that a job sleeps to leave the processor to serving: 0 to 0.95"),
    Option("--train-nice", "training.nice", integer(0, 19), "19", "N",
           "niceness of a job's process; 19: it runs only on idle processors"),
    Option("--train-gpu", "training.gpu", gpu, "auto", "ID",
           "GPU of jobs, as CUDA_VISIBLE_DEVICES names it; auto: the server's; none: jobs train on the CPU"),
    Option("--train-gpu-memory", "training.gpu_memory", auto_or(size(1)), "auto", "SIZE",
           "most memory of that GPU for a job; auto: nine tenths of what is free when it begins"),
    Option("--max-file-bytes", "training.max_file_bytes", size(1), "512MiB", "SIZE",
           "answer 413 to a larger upload"),

    Option("--log-level", "log.level", choice("debug", "info", "warning", "error"), "info", "LEVEL",
           "debug, info, warning or error"),
    Option("--log-format", "log.format", choice("json", "text"), "json", "{json,text}",
           "a JSON object a line, or text for people"),
)
# fmt: on

USAGE = "manylora serve [OPTION …]   (every option is also the variable in brackets; the option wins)"

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
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare every row of ``OPTIONS`` on ``parser``, grouped; values stay text until ``resolve``."""
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
