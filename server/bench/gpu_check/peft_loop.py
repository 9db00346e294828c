"""PEFT on a base that is already in memory: the loop that users would write without this server.

It is like ``server/bench/peers/peft.py``, but for a GPU and in the same process. Its adapters stay in bf16,
which is faster on a GPU than PEFT's default, float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base import LoadedBase
from server.bench.gpu_check.served import Answer
from server.bench.peers.peft import StepTimes


class PeftLoop:
    """Takes over the base: nothing else may use it afterwards."""

    def __init__(self, base: LoadedBase) -> None:
        self._base: Any = base.model
        self._model: Any = None
        self._device = base.model.device

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter from its folder with PEFT."""
        from peft import PeftModel

        if self._model is None:
            self._model = PeftModel.from_pretrained(self._base, str(folder), adapter_name=name)
        else:
            self._model.load_adapter(str(folder), adapter_name=name)
        self._model.eval()

    def add_random(self, names: Sequence[str], rank: int, between: Callable[[], None]) -> None:
        """Create adapters on the device, on every linear but the head. PEFT takes about a second for each."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        options = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        first, *others = names
        self._model = get_peft_model(self._base, config, first, **options)
        for name in others:
            between()
            self._model.add_adapter(name, config, **options)
        _fill(self._model, self._device)
        self._model.eval()

    @torch.inference_mode()
    def greedy(self, name: str, prompt: Sequence[int], tokens: int) -> Answer:
        """One greedy answer under one adapter."""
        self._model.set_adapter(name)
        began = time.perf_counter()
        result = self._model.generate(
            **self._batch([prompt]),
            **_exactly(tokens),
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].float().log_softmax(-1).topk(2).values for logits in result.logits]
        sampled = result.sequences[0, len(prompt) :].tolist()
        return Answer(began, sampled, [float(two[0] - two[1]) for two in best])

    @torch.inference_mode()
    def step_seconds(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], tokens: int
    ) -> list[float]:
        """The seconds of each decode step of one mixed batch. All prompts have the same length."""
        times = StepTimes(time.perf_counter())
        batch = self._batch(prompts)
        self._model.generate(**batch, **_exactly(tokens), streamer=times, adapter_names=list(names))
        return [later - earlier for earlier, later in zip(times.steps, times.steps[1:], strict=False)]

    def _batch(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        ids = torch.tensor(prompts, device=self._device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _exactly(tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}


def _fill(model: nn.Module, device: torch.device) -> None:
    """Give memory and random values to the weights that PEFT created on the meta device."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                values.normal_(0.0, parameter.shape[-1] ** -0.5)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
