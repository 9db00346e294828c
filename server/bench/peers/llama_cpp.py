"""llama.cpp's server. Its own tools convert base and adapters to GGUF. Each request names its adapter.

It runs with its best settings: 4-bit weights in the format that is fastest here, flash attention, as many
slots as requests in flight, all cores, and no cache of prompts, because none is repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from server.bench.errors import BenchError
from server.bench.peers import Setup, dense_base
from server.bench.peers.environments import Environment
from server.bench.peers.http import HttpServer
from server.bench.peers.process import cores

QUANTS = ("iq4_nl", "q4_0", "q4_1", "q4_k_m", "q8_0", "bf16")


class LlamaCppPeer(HttpServer):
    """``llama-server`` with every adapter loaded. An adapter is applied only if a request names it."""

    def __init__(self, quant: str = "") -> None:
        super().__init__()
        self._quant = quant or QUANTS[0]
        if self._quant not in QUANTS:
            raise BenchError(f"llama.cpp:{quant} is unknown; choose from: {', '.join(QUANTS)}")
        self.name = f"llama.cpp:{quant}" if quant else "llama.cpp"

    def command(self, setup: Setup, port: int) -> list[str]:
        tools = Tools(Environment("llama.cpp", setup.home).require())
        adapters = tools.convert_adapters(setup)
        flags = {
            "--model": tools.convert_base(setup, self._quant),
            "--host": "127.0.0.1",
            "--port": port,
            "--parallel": setup.slots,
            "--ctx-size": setup.slots * setup.context,
            "--threads": len(cores()),
            "--flash-attn": "on",
            "--cache-ram": 0,
        }
        if adapters:
            flags["--lora"] = ",".join(map(str, adapters))
        words = [str(part) for flag in flags.items() for part in flag]
        return [str(tools.server), *words, "--lora-init-without-apply", "--offline", "--no-ui"]

    def known(self, url: str) -> set[str]:
        return set(_ids(url))

    def fields(self, url: str) -> Mapping[str | None, Mapping[str, Any]]:
        # Each request gives every adapter's scale. A request without scales gets all adapters at once, even
        # with --lora-init-without-apply.
        ids = _ids(url)
        return {
            wanted: {"lora": [{"id": ids[name], "scale": float(name == wanted)} for name in ids]}
            for wanted in [None, *ids]
        }


def _ids(url: str) -> dict[str, int]:
    """By adapter (its file's name), the number that requests use for it."""
    listed = httpx.get(f"{url}/lora-adapters", trust_env=False).raise_for_status().json()
    return {Path(one["path"]).stem: one["id"] for one in listed}


class Tools:
    """llama.cpp's own converters and quantiser.

    The converters are Python scripts. They run in our environment, which has torch and transformers, and
    import the rest from the peer's environment.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._source = environment.path / "source" / "llama.cpp"
        self._built = environment.path / "build" / "bin"

    @property
    def server(self) -> Path:
        return self._built / "llama-server"

    def convert_base(self, setup: Setup, quant: str) -> Path:
        """The base in bf16, converted to a GGUF of format ``quant``. The file is kept for the next time."""
        dense = dense_base(setup)
        models = self._environment.path / "models"
        models.mkdir(exist_ok=True)
        whole = models / f"{dense.digest}.bf16.gguf"
        target = models / f"{dense.digest}.{quant}.gguf"
        if not target.exists():
            if not whole.exists():
                script = str(self._source / "convert_hf_to_gguf.py")
                self._convert(whole, [script, str(dense.path), "--outtype", "bf16", "--outfile"])
            if quant != "bf16":
                partial = target.with_suffix(".partial")
                self._run([str(self._built / "llama-quantize"), str(whole), str(partial), quant.upper()])
                partial.rename(target)
        return target

    def convert_adapters(self, setup: Setup) -> list[Path]:
        """Convert every adapter to ``<name>.gguf`` in f16.

        One process converts all of them, because imports take most of the time.
        """
        out = setup.scratch / "llama.cpp"
        out.mkdir()
        if setup.adapters:
            script = str(self._source / "convert_lora_to_gguf.py")
            folders = [str(folder) for folder in setup.adapters.values()]
            names = list(setup.adapters)
            driver = [sys.executable, "-m", "server.bench.peers.convert_loras"]
            self._run([*driver, script, str(dense_base(setup).path), str(out), *names, *folders])
        return [out / f"{name}.gguf" for name in setup.adapters]

    def _convert(self, target: Path, words: list[str]) -> None:
        partial = target.with_suffix(".partial")
        self._run([sys.executable, *words, str(partial)])
        partial.rename(target)

    def _run(self, command: list[str]) -> None:
        paths = [str(self._environment.packages), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise BenchError(
                f"llama.cpp's converter failed ({' '.join(command[:3])} …):\n{done.stderr[-2000:]}"
            )
