"""transformers' Trainer with this project's saving, resuming, evaluation and reporting.

The training loop, the optimiser, the schedule, accumulation, clipping, accelerate, DeepSpeed and FSDP are
the Trainer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.base.unpack import four_bit_linears
from adapters.errors import TrainingDiverged
from adapters.training.export import Nominal, pairs_of, write_adapter
from adapters.training.failures import explain_failures
from adapters.training.methods import restore_state, trained_state
from adapters.training.packing import Pack, collate
from adapters.training.progress import Progress, Throttle
from adapters.training.run_folder import RunFolder
from adapters.training.stop import Stop

STATE_FILE = "trained_state.safetensors"
"""A checkpoint's file with the exact trained state. The PEFT tensors beside it are rounded to bf16."""

_SAVE_AFTER = 120.0
"""Seconds after which a checkpoint is saved, even within an epoch."""


class QloraTrainer(Trainer):  # type: ignore[misc]
    """The Trainer for LoRA on a 4-bit base.

    Args:
        run: the folder for checkpoints and events.
        nominal, sites: arguments of ``write_adapter``.
        held_out: packs for the evaluation; may be empty.
    """

    def __init__(
        self,
        *args: Any,
        run: RunFolder,
        nominal: Nominal,
        sites: Sequence[str],
        held_out: Sequence[Pack],
        throttle: Throttle,
        keep: int,
        show: bool,
        stop: Stop,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._run, self._nominal, self._sites, self._keep = run, nominal, sites, keep
        self._held_out, self._throttle, self._show, self._stop = held_out, throttle, show, stop
        self._saving_to: Path | None = None
        self._progress: Progress | None = None
        self._hits: list[torch.Tensor] = []
        self._last: dict[str, Any] = {}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One forward and backward pass. Raises TrainingDiverged before a bad gradient is applied."""
        if self._progress is None:
            self._progress = Progress(self.state.max_steps, self.state.global_step, self._show)
        tokens = inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}; lower --lr."
            )
        self._progress.tokens += tokens
        self._throttle.pause()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Like the Trainer's, and also counts the learnt tokens that were the most likely ones."""
        loss, outputs = super().compute_loss(model, inputs, *args, **{**kwargs, "return_outputs": True})
        self._hits.append(_hits(outputs.logits.detach(), inputs["labels"]))
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes events only to the run folder.

        The Trainer's history would be repeated in every checkpoint.
        """
        del start_time
        if "loss" not in logs or self._progress is None:
            return
        speed, eta = self._progress.step(self.state.global_step, logs["loss"])
        self._last = {"loss": logs["loss"], "accuracy": _share(torch.cat(self._hits))}
        self._hits.clear()
        self._run.event(
            "step",
            **self._place(),
            **self._last,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(speed, 1),
            eta_seconds=round(eta, 1),
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss, a mean over tokens."""
        loss, accuracy = held_out_figures(
            self.model.get_base_model(), self._held_out, self.args.train_batch_size, self._throttle
        )
        self._run.event("eval", **self._place(), loss=loss, accuracy=accuracy)
        self._last |= {"eval_loss": loss, "eval_accuracy": accuracy}
        metrics = {"eval_loss": loss}
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.close()

    def _place(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "total_steps": self.state.max_steps,
            "epoch": round(self.state.epoch or 0.0, 4),
        }

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with explain_failures(self._run), self._run.new_checkpoint(name, self._keep) as folder:
            self._saving_to = folder
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
        self._run.event("checkpoint", **self._place(), **self._last, path=self._run.checkpoints / name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves a PEFT folder that can be served, and the exact state to resume from."""
        if state_dict is not None:  # sharded: FSDP or DeepSpeed gathered it and have their own loading
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_adapter(folder, pairs_of(self.model), self._nominal, self._sites)
            save_file(trained_state(self.model), folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / STATE_FILE
        if file.exists():
            restore_state(self.model, load_file(file))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class CheckpointSchedule(TrainerCallback):  # type: ignore[misc]
    """Decides when to save, to evaluate and to stop."""

    def __init__(self, stop: Stop, every: int, evaluates: bool) -> None:
        self._stop, self._every, self._evaluates = stop, every, evaluates
        self._saved_at, self._saved_time = -1, time.monotonic()
        self._evaluated_at = -1

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        due = state.global_step % self._every == 0 if self._every else self._is_late()
        is_last = state.global_step >= state.max_steps
        control.should_save = due or self._stop.requested or is_last
        control.should_evaluate = is_last and self._may_evaluate(
            state
        )  # before it is saved, with the figures
        control.should_training_stop |= self._stop.requested

    def on_epoch_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_save = not self._every and state.global_step != self._saved_at
        control.should_evaluate = self._may_evaluate(state)

    def on_evaluate(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        self._evaluated_at = state.global_step

    def on_save(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        self._saved_at, self._saved_time = state.global_step, time.monotonic()

    def _may_evaluate(self, state: TrainerState) -> bool:
        return self._evaluates and not self._stop.requested and state.global_step != self._evaluated_at

    def _is_late(self) -> bool:
        return time.monotonic() - self._saved_time >= _SAVE_AFTER


@torch.no_grad()
def held_out_figures(
    model: Any, packs: Sequence[Pack], batch_size: int, throttle: Throttle
) -> tuple[float, float]:
    """The mean loss in nats over all trained tokens of ``packs``, and the share that was the most likely
    token.

    Both are NaN if there are no tokens.
    """
    total, count, hits = 0.0, 0, 0
    device = next(model.parameters()).device
    batches = (collate(packs[begin : begin + batch_size]) for begin in range(0, len(packs), batch_size))
    with evaluating(model), torch.autocast(device.type, torch.bfloat16):
        for batch in batches:
            there, trained = _on(device, batch), batch["labels"].numel()
            outputs = model(**there)
            total, count = total + outputs.loss.item() * trained, count + trained
            hits += int(_hits(outputs.logits, there["labels"]).sum())
            throttle.pause()
    return (total / count, hits / count) if count else (math.nan, math.nan)


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[tokens], for each label whether it is the most likely token."""
    return (logits.argmax(-1) == labels).flatten()


def _share(hits: torch.Tensor) -> float | None:
    return round(hits.float().mean().item(), 5) if hits.numel() else None


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for all modules except the 4-bit linears. On a CPU those would repack their weights
    permanently, and packed weights have no backward pass."""
    was_training = model.training
    model.eval()
    for module in four_bit_linears(model).values():
        module.train()
    try:
        yield
    finally:
        model.train(was_training)
