"""PEFT answers a mixed batch with ``generate(adapter_names=[…])`` on the same 4-bit base.

There is no HTTP and no scheduler. A workload is cut into batches, and ``generate`` gets each batch whole.
It runs with the best settings that were found: SDPA attention, inference mode, adapters in float32 as PEFT
loads them, and ``set_adapter`` if the whole batch has the same adapter. (With adapters in bf16, a step of 16
requests on 16 adapters took 1.5 times the CPU time.)

``PeftPeer`` is the measuring side. ``main`` is its process. It reads one line of JSON with the setup. Then it
reads a line for each workload and writes a line of records.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.bench.errors import BenchError
from server.bench.peers import Setup
from server.bench.peers.process import ChildProcess
from server.bench.serving.stats import CallRecord, RunResult
from server.bench.serving.workload import Call, Workload

if TYPE_CHECKING:
    import torch


class PeftPeer:
    """A process that holds the base and all adapters in PEFT."""

    name = "peft"

    def __init__(self) -> None:
        self._process: ChildProcess | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, setup: Setup) -> None:
        command = [sys.executable, "-m", "server.bench.peers.peft"]
        self._process = ChildProcess(command, setup.scratch / "peft.log", talk=True)
        adapters = {name: str(folder) for name, folder in setup.adapters.items()}
        self._process.ask(json.dumps({"base": str(setup.base), "adapters": adapters}))

    def run(self, workload: Workload) -> RunResult:
        if any(call.due for call in workload.calls):
            raise BenchError("PEFT has no scheduler; use --request-rate inf, or remove it from --peers")
        assert self._process is not None, "start comes first"
        answer = json.loads(self._process.ask(json.dumps(asdict(workload))))
        return RunResult(tuple(CallRecord(**record) for record in answer))

    def stop(self) -> None:
        if self._process:
            self._process.stop()


class Generator:
    """The base with its adapters, ready to answer batches."""

    def __init__(self, base: Path, adapters: dict[str, str]) -> None:
        self._model = load_model(base)
        self._has_adapters = bool(adapters)
        if adapters:
            self._model = with_adapters(self._model, adapters)
        self._model.eval()

    def answer(self, workload: Workload) -> list[CallRecord]:
        """Answer all calls in batches of ``max_concurrency``, one batch after the other."""
        import torch

        start = time.perf_counter()
        records: list[CallRecord] = []
        with torch.inference_mode():
            for batch in batches(workload):
                records += self._answer_batch(batch, start)
        return records

    def _answer_batch(self, batch: Sequence[Call], start: float) -> list[CallRecord]:
        sent = time.perf_counter() - start
        tokens, mask = left_pad([call.prompt for call in batch])
        wanted = batch[0].max_tokens
        times = StepTimes(start)
        with self._adapters_of(batch) as options:
            self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=wanted,
                max_new_tokens=wanted,
                streamer=times,
                **options,
            )
        return [
            CallRecord(sent, tuple(times.steps), len(call.prompt), output_tokens=len(times.steps))
            for call in batch
        ]

    @contextmanager
    def _adapters_of(self, batch: Sequence[Call]) -> Iterator[dict[str, Any]]:
        """The arguments that tell ``generate`` the adapters.

        If the batch has one adapter or none, it is set on the model instead, which is faster.
        """
        names = [call.adapter or "__base__" for call in batch]
        if not self._has_adapters:
            yield {}
        elif len(set(names)) > 1:
            yield {"adapter_names": names}
        elif names[0] == "__base__":
            with self._model.disable_adapter():
                yield {}
        else:
            self._model.set_adapter(names[0])
            yield {}


def load_model(base: Path) -> Any:
    """The 4-bit base, from the same checkpoint as manylora loads."""
    from adapters.base import load_base, prepare_base

    # The base is prepared already, so nothing is fetched or written.
    return load_base(prepare_base(str(base), base.parent, progress=False)).model


def with_adapters(model: Any, adapters: dict[str, str]) -> Any:
    """The base with every adapter loaded."""
    from peft import PeftModel

    first, *others = adapters
    model = PeftModel.from_pretrained(model, adapters[first], adapter_name=first)
    for name in others:
        model.load_adapter(adapters[name], adapter_name=name)
    return model


class StepTimes:
    """A ``generate`` streamer that records when each step ends. Its first call gives the prompt."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._prompt_seen = False
        self.steps: list[float] = []

    def put(self, value: object) -> None:  # noqa: ARG002 (only the time matters)
        if self._prompt_seen:
            self.steps.append(time.perf_counter() - self._start)
        self._prompt_seen = True

    def end(self) -> None:
        """Part of the streamer's interface."""


def batches(workload: Workload) -> Iterator[tuple[Call, ...]]:
    """The calls in order, ``max_concurrency`` at a time."""
    size = workload.max_concurrency or len(workload.calls)
    for begin in range(0, len(workload.calls), size):
        yield workload.calls[begin : begin + size]


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [prompts, longest], padded on the left."""
    import torch

    longest = max(map(len, prompts))
    tokens = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens), torch.tensor(mask)


def main() -> None:
    """Answer workloads over standard input and output until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    setup = json.loads(sys.stdin.readline())
    generator = Generator(Path(setup["base"]), setup["adapters"])
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        calls = tuple(Call(**call) for call in asked["calls"])
        records = generator.answer(Workload(calls, asked["max_concurrency"]))
        print(json.dumps([asdict(record) for record in records]), file=answers, flush=True)


if __name__ == "__main__":
    main()
