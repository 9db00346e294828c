"""One run, from the config to the finished adapter folder."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE
from adapters.base import LoadedBase, load_base
from adapters.base.context import served_length
from adapters.base.outline import BaseOutline, outline_of
from adapters.base.quiet import quiet_libraries
from adapters.base.rope import settle_rope
from adapters.base.unpack import unpack_weights
from adapters.errors import RecipeInvalid
from adapters.text.renderer import ChatRenderer, base_renderer
from adapters.training.arguments import training_arguments
from adapters.training.attention import use_packed_attention
from adapters.training.card import write_card
from adapters.training.dataset import Dataset, read_dataset
from adapters.training.encode import Encoded, encode_dataset
from adapters.training.export import Nominal
from adapters.training.failures import explain_failures
from adapters.training.fit import check_questions
from adapters.training.flash import use_flash_attention
from adapters.training.gpu import claim_memory, optimizer_for, release_memory
from adapters.training.isolation import keep_rows_separate
from adapters.training.methods import RankAllocation, add_adapter
from adapters.training.overlap import repetitions
from adapters.training.packing import Pack, collate, pack
from adapters.training.plot import draw_losses
from adapters.training.progress import Throttle
from adapters.training.prune import prune
from adapters.training.recipe import EXECUTION, TrainConfig, learning_rate_for
from adapters.training.resources import choose_device, decide_recomputing, decide_unpacking
from adapters.training.run_folder import RunFolder
from adapters.training.schedule import epochs_for, steps_for
from adapters.training.servable import Serving, check_servable, prepare_run_base
from adapters.training.stop import Stop
from adapters.training.trainer import CheckpointSchedule, QloraTrainer

# These are places, not what a run computes; the digests of base and data identify that.
_PLACES = (*EXECUTION, "data", "eval_data")


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a run.

    Attributes:
        folder: the finished PEFT folder in the run folder; None if the run was interrupted.
        metrics: ``train_loss`` (mean of the last epoch), ``eval_loss``, ``trained_tokens``, ``steps``, …
    """

    folder: Path | None
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Everything that is read before training begins."""

    base: LoadedBase
    data: Dataset
    train: Encoded
    held_out: Encoded | None
    device: str


def train(
    config: TrainConfig,
    run: RunFolder,
    stop: Stop | None = None,
    show: bool = False,
    serving: Serving | None = None,
) -> Trained:
    """Train an adapter, or resume the run in ``run``.

    Args:
        serving: the limits of the server that will serve the adapter; None = there is none.
        stop: checked after each step. If it is requested, the run ends with a checkpoint.
        show: print choices on stderr, and bars on a terminal.

    Raises:
        DatasetInvalid, RecipeInvalid, RunFolderInvalid: before training starts.
        TrainingDiverged, TrainingOutOfResources: names the last good checkpoint.
        BaseModelError: the base is not available.
    """
    stop = stop or Stop()
    bars = show and sys.stderr.isatty()
    with explain_failures(run), quiet_libraries(bars), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses transformers' older names
        if config.threads:
            torch.set_num_threads(config.threads)
        inputs = _read(config, run, show, serving)
        config = _choose_attention(config, run, inputs, show)
        trainer = _trainer(config, run, inputs, stop, show)
        begin = time.monotonic()
        with stop.graceful():
            last = run.last_checkpoint()
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            trainer.finish()
        if not run.writes:
            return Trained(None, {})
        metrics = _metrics(run, trainer, inputs, time.monotonic() - begin)
        draw_losses(run.path / "loss.png", run.curve("step"), run.curve("eval"))
        if stop.requested:
            return Trained(None, metrics)
        return _finish(config, run, inputs, trainer, metrics)


def _read(config: TrainConfig, run: RunFolder, show: bool, serving: Serving | None) -> _Inputs:
    """Reads base and data, and checks them and the run to resume before weights are loaded."""
    data = read_dataset(config.data)
    held_out = read_dataset(config.eval_data) if config.eval_data else None
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    bars = show and sys.stderr.isatty()
    prepared = prepare_run_base(config, serving, bars)
    run.check_same_run(
        {
            **config.as_json(),
            "base_digest": prepared.digest,
            "data_sha256": data.sha256,
            "eval_sha256": held_out.sha256 if held_out else None,
            "optimizer": optimizer_for(device)[0],  # a method cannot resume another method's state
        },
        _PLACES,
    )
    outline = outline_of(prepared)
    check_servable(config, outline.layout, serving)
    for warning in repetitions(data, held_out):
        _warn(run, warning, show)
    renderer = base_renderer(outline.tokenizer, config.allow_special_tokens)
    encoded = [
        _encode(one, config, outline, renderer, run, show) for one in (data, held_out) if one is not None
    ]
    if held_out is not None and serving is not None and renderer is not None:
        check_questions(held_out, renderer, outline.context, serving.is_asked)
    steps_for(len(_packs(encoded[0], config)), config)
    if run.writes and serving is not None and serving.check_base is not None:
        serving.check_base(prepared, device)
        release_memory()
    if device != "cpu":
        _note(run, claim_memory(device, config.gpu_memory, prepared.path), show)
    base = load_base(prepared, device, progress=bars)
    limit = serving.max_model_len if serving is not None else None
    settle_rope(base.model, served_length(base.model.config.get_text_config(), limit))
    return _Inputs(base, data, encoded[0], encoded[1] if held_out else None, device)


def _encode(
    data: Dataset,
    config: TrainConfig,
    outline: BaseOutline,
    renderer: ChatRenderer | None,
    run: RunFolder,
    show: bool,
) -> Encoded:
    longest = min(config.max_seq_len, outline.context)
    with tqdm(total=len(data.rows), desc="Rows", delay=1, disable=None if show else True) as bar:
        encoded = encode_dataset(data, renderer, outline.eos, longest, bar.update)
    _note(run, f"{data.path.name}: {encoded.summary(data.format)}.", show)
    for name, count in data.unused_by(renderer is not None and renderer.template.takes_reasoning).items():
        _note(run, f"{data.path.name}: the field {name!r} of {count} rows is not used.", show)
    return encoded


def _trainer(config: TrainConfig, run: RunFolder, inputs: _Inputs, stop: Stop, show: bool) -> QloraTrainer:
    model = inputs.base.model
    packs = _packs(inputs.train, config)
    steps = steps_for(len(packs), config)
    _choose(config, run, inputs, _largest(packs, config.batch_size), show)
    set_seed(config.seed)
    adapted = add_adapter(model, config, steps, inputs.base.layout)
    trained, all_ = adapted.get_nb_trainable_parameters()
    rate = (config.learning_rate or learning_rate_for(all_)) * config.lr_multiplier
    text = (
        f"{config.method}, rank {config.r}: {trained} of {all_} parameters are trained ({trained / all_:.2%})"
    )
    passes = "" if config.max_steps else f"{epochs_for(len(packs), config):g} epochs, "
    _note(run, f"{text}, learning rate {rate:g}, {passes}{steps} steps.", show)
    held_out = _packs(inputs.held_out, config) if inputs.held_out else []
    throttle = Throttle(config.duty)
    trainer = QloraTrainer(
        adapted,
        training_arguments(config, run.checkpoints, inputs.device, steps, rate),
        train_dataset=packs,
        data_collator=collate,
        callbacks=[RankAllocation()] if config.method == "adalora" else [],
        run=run,
        nominal=nominal_of(config, inputs.base.prepared.source),
        sites=sorted(inputs.base.layout.sites),
        held_out=held_out,
        throttle=throttle,
        keep=config.keep_checkpoints,
        show=show,
        stop=stop,
    )
    trainer.add_callback(CheckpointSchedule(stop, config.checkpoint_steps, bool(held_out)))
    run.event("start", total_steps=steps, rows=inputs.train.rows, trained_parameters=trained)
    return trainer


def _choose_attention(config: TrainConfig, run: RunFolder, inputs: _Inputs, show: bool) -> TrainConfig:
    """Use the fastest attention that keeps rows separate. Returns the config to train with."""
    model = inputs.base.model
    own = model.config.get_text_config()._attn_implementation
    if inputs.device == "cpu":
        use_packed_attention(model)
    else:
        attention = use_flash_attention(model, torch.cuda.get_device_capability(inputs.device))
        _note(run, f"{optimizer_for(inputs.device)[1]} {attention}", show)
    longest = max(len(example.ids) for example in inputs.train.examples)
    config, change = keep_rows_separate(model, own, config, longest)
    if change is not None:
        _note(run, change, show)
    return config


def _choose(config: TrainConfig, run: RunFolder, inputs: _Inputs, tokens: int, show: bool) -> None:
    """Trade memory for speed if there is enough memory, and report the choices."""
    model = inputs.base.model
    unpacking = decide_unpacking(model, config, inputs.device)
    recomputing = decide_recomputing(model, config, inputs.device, tokens)
    _note(run, f"{unpacking.reason} {recomputing.reason}", show)
    if unpacking.on:
        unpack_weights(model)
    if recomputing.on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False


def nominal_of(config: TrainConfig, base_model: str) -> Nominal:
    """The settings of the adapter's config for all its linears."""
    return Nominal(config.alpha, config.method == "rslora", config.method == "dora", base_model)


def _packs(encoded: Encoded, config: TrainConfig) -> list[Pack]:
    if config.packing:
        return pack(encoded.examples, config.max_seq_len)
    return [[example] for example in encoded.examples]


def _largest(packs: Sequence[Pack], batch_size: int) -> int:
    """Tokens of the largest possible batch."""
    sizes = sorted((sum(len(example.ids) for example in one) for one in packs), reverse=True)
    return sum(sizes[:batch_size])


def _metrics(run: RunFolder, trainer: QloraTrainer, inputs: _Inputs, seconds: float) -> dict[str, Any]:
    losses, held_out = run.curve("step"), run.curve("eval")
    steps = sorted(losses)
    last = steps[-max(1, len(steps) // 10) :]
    passed = trainer.state.epoch or 0.0
    return {
        "train_loss": sum(losses[step] for step in last) / len(last) if last else None,
        "eval_loss": held_out[max(held_out)] if held_out else None,
        "steps": trainer.state.global_step,
        "epochs": round(passed, 3),
        "rows": inputs.train.rows,
        "tokens": inputs.train.tokens,
        "trained_tokens": inputs.train.trained_tokens,
        "truncated": inputs.train.truncated,
        "seconds": round(seconds, 1),
    }


def _finish(
    config: TrainConfig, run: RunFolder, inputs: _Inputs, trainer: QloraTrainer, metrics: dict[str, Any]
) -> Trained:
    """The last checkpoint's adapter, pruned if requested, with its model card."""
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        raise RecipeInvalid("No step was trained; raise --epochs or --max-steps.")
    making = run.path / ".adapter.partial"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(checkpoint / name, making / name)
    if config.prune_rank is not None and inputs.held_out:
        packs = _packs(inputs.held_out, config)
        base = trainer.model.unload()
        sites = sorted(inputs.base.layout.sites)
        pruned = prune(making, base, packs, config, nominal_of(config, inputs.base.prepared.source), sites)
        run.event("pruned", **pruned.as_json(), message=pruned.summary())
        metrics = {**metrics, "pruned": pruned.as_json(), "eval_loss": pruned.loss_after}
    write_card(making, config, inputs.base.prepared, inputs.data.sha256, metrics)
    shutil.rmtree(run.adapter, ignore_errors=True)
    os.replace(making, run.adapter)
    run.event("end", message=f"The adapter is in {run.adapter}.", path=run.adapter)
    return Trained(run.adapter, metrics)


def _warn(run: RunFolder, message: str, show: bool) -> None:
    run.event("warning", message=message)
    if show:
        tqdm.write(f"Warning: {message}", file=sys.stderr)


def _note(run: RunFolder, message: str, show: bool) -> None:
    run.event("note", message=message)
    if show:
        tqdm.write(message, file=sys.stderr)
