"""vLLM on the CPU, with the base in bf16, because its 4-bit kernels need a GPU.

It runs with its best settings: all cores, as many sequences as requests in flight, and room for all adapters
that a batch can have. Compiled (its default) or eager (``vllm:eager``) may be faster, depending on the load.
Measure both.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from server.bench.errors import BenchError
from server.bench.peers import Setup, dense_base
from server.bench.peers.environments import Environment
from server.bench.peers.http import HttpServer
from server.bench.peers.process import cores

_BF16_BYTES = 2
# The values that vLLM accepts for --max-lora-rank.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VllmPeer(HttpServer):
    """``vllm serve`` with every adapter registered at start."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        if mode not in ("", "compiled", "eager"):
            raise BenchError(f"vllm:{mode} is unknown; use vllm (compiled) or vllm:eager")
        self._eager = mode == "eager"
        self.name = f"vllm:{mode}" if mode else "vllm"

    def command(self, setup: Setup, port: int) -> list[str]:
        environment = Environment("vllm", setup.home).require()
        dense = dense_base(setup).path
        flags = {
            "--host": "127.0.0.1",
            "--port": port,
            "--dtype": "bfloat16",
            "--max-model-len": setup.context,
            "--max-num-seqs": setup.slots,
            "--kv-cache-memory-bytes": _cache_bytes(dense, setup.slots * setup.context),
        }
        words = [str(part) for flag in flags.items() for part in flag]
        words += ["--enforce-eager"] if self._eager else []
        serve = [str(environment.bin / "vllm"), "serve", str(dense)]
        return [*serve, *words, *_lora_flags(setup)]

    def environment(self, setup: Setup) -> dict[str, str]:
        environment = Environment("vllm", setup.home)
        return {
            "PATH": f"{environment.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores())),
            "VLLM_CACHE_ROOT": str(environment.path / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


def _cache_bytes(base: Path, tokens: int) -> int:
    """Bytes of a KV cache for twice ``tokens``, so that it never limits a batch."""
    config = json.loads((base / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * tokens * config["num_hidden_layers"] * 2 * kv_heads * head_dim * _BF16_BYTES)


def _lora_flags(setup: Setup) -> list[str]:
    if not setup.adapters:
        return []
    count = len(setup.adapters)
    rank = max(_rank(folder) for folder in setup.adapters.values())
    flags = {
        "--max-loras": min(count, setup.slots),
        "--max-cpu-loras": count,
        "--max-lora-rank": min((allowed for allowed in _RANKS if allowed >= rank), default=rank),
    }
    words = [str(part) for flag in flags.items() for part in flag]
    modules = [f"{name}={folder}" for name, folder in setup.adapters.items()]
    return ["--enable-lora", *words, "--lora-modules", *modules]


def _rank(folder: Path) -> int:
    config = json.loads((folder / "adapter_config.json").read_text())
    return max([int(config["r"]), *map(int, config.get("rank_pattern", {}).values())])
