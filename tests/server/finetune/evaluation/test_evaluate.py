"""The evaluation of a tiny model equals PEFT's results on the same 4-bit weights, and the served answers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import load_base, prepare_base
from adapters.errors import AdapterInvalid
from adapters.text.renderer import base_renderer
from adapters.training.dataset import Dataset, read_dataset
from adapters.training.encode import encode_row
from server.config import ServerConfig
from server.engine.sequence import Chunk
from server.finetune.evaluation import evaluate as evaluate_module
from server.finetune.evaluation.errors import EvaluationFailed
from server.finetune.evaluation.evaluate import evaluate_adapter
from server.finetune.evaluation.examiner import Examiner
from server.finetune.evaluation.result import Evaluation, Model
from tests.support.running_engine import Asked, Driver, build
from tests.support.tiny_models import make_peft_adapter, make_tiny_model

LONG = "a reference of many more words than sixteen " * 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluation")
    make_tiny_model("llama", home / "model")
    make_peft_adapter(home / "model", home / "new", r=4, seed=1)
    make_peft_adapter(home / "model", home / "old", r=8, seed=2)
    return home


@pytest.fixture(scope="module")
def data(home: Path) -> Dataset:
    conversations = [
        [("user", "lora rank"), ("assistant", "sir")],
        [("system", "tiles"), ("user", "mute"), ("assistant", LONG), ("user", "a"), ("assistant", "tin")],
        [("user", "noise " * 40), ("assistant", LONG)],
    ]
    return write(home / "eval.jsonl", conversations)


def write(path: Path, conversations: list[list[tuple[str, str]]]) -> Dataset:
    rows = [{"messages": [{"role": r, "content": c} for r, c in messages]} for messages in conversations]
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_dataset(path)


def evaluate(home: Path, data: Dataset, adapter: str, replaced: str | None = None) -> Evaluation:
    old = home / replaced if replaced else None
    return evaluate_adapter(str(home / "model"), home / "state", "nf4", "cpu", data, home / adapter, old, 1)


@pytest.fixture(scope="module")
def evaluation(home: Path, data: Dataset) -> Evaluation:
    return evaluate(home, data, "new", "old")


def peft_loss(home: Path, data: Dataset, adapter: str | None) -> float:
    base = load_base(prepare_base(str(home / "model"), home / "state", progress=False))
    model: Any = PeftModel.from_pretrained(base.model, home / adapter).eval() if adapter else base.model
    losses: list[float] = []
    renderer = base_renderer(base.tokenizer)
    assert renderer is not None
    for example in (e for row in data.rows for e in encode_row(row, renderer, frozenset({2}))):
        with torch.inference_mode():
            logprobs = model(torch.tensor([example.ids])).logits[0].float().log_softmax(-1)
        learnt = [i for i, learnt in enumerate(example.learnt) if learnt]
        losses += [-logprobs[i - 1, example.ids[i]].item() for i in learnt]
    return math.fsum(losses) / len(losses)


def test_the_losses_equal_pefts(home: Path, data: Dataset, evaluation: Evaluation) -> None:
    assert evaluation.replaced is not None
    measured = {None: evaluation.base, "new": evaluation.adapter, "old": evaluation.replaced}
    losses = [scores.loss for scores in measured.values()]
    assert max(losses) - min(losses) > 0.05, "the losses are too similar to show a mix-up"
    for adapter, scores in measured.items():
        assert scores.loss == pytest.approx(peft_loss(home, data, adapter), abs=0.01)


def test_the_counts_of_rows_and_tokens(evaluation: Evaluation) -> None:
    assert (evaluation.rows, evaluation.short_rows) == (3, 2)
    assert [answers.line for answers in evaluation.answers] == [1, 2]
    assert [answers.reference for answers in evaluation.answers] == ["sir", "tin"]
    assert all(set(one.given) == {"base", "adapter", "replaced"} for one in evaluation.answers)
    figures = evaluation.as_json()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["adapter"] == {"loss": evaluation.adapter.loss, "exact_match": 0.0, "token_f1": 0.0}


def test_the_answers_equal_the_served_ones(home: Path, data: Dataset, evaluation: Evaluation) -> None:
    for name in ("new", "old"):
        shutil.copytree(home / name, home / "state" / "adapters" / name)
    parts = build(home / "model", home / "state")
    prompts = [parts.tokenizer.render_chat(row.messages[:-1]) for row in data.rows[:2]]
    served_as: dict[Model, str | None] = {"base": None, "adapter": "new", "replaced": "old"}
    for model, called in served_as.items():
        asked = [Asked(prompt, called, {"max_tokens": 64}) for prompt in prompts]
        Driver(parts).run(*asked)
        served = [parts.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in asked]
        assert [answers.given[model] for answers in evaluation.answers] == served


def test_all_models_share_the_engines_steps(home: Path, data: Dataset) -> None:
    parts = build(home / "model", home / "mixed", "--no-enable-prefix-caching")
    spy: Any = Spy(parts.model)
    Examiner(replace(parts, model=spy), {"adapter": home / "new", "replaced": home / "old"}).examine(data)
    assert max(len(digests) for digests in spy.digests) == 3
    assert parts.registry.entries() == []


class Spy:
    """A model that records the adapters of each step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.digests: list[set[str | None]] = []

    def __call__(
        self, chunks: Sequence[Chunk], rows: Tensor | None = None, prev_tokens: Tensor | None = None
    ) -> Tensor:
        self.digests.append({chunk.sequence.digest for chunk in chunks})
        logits: Tensor = self._model(chunks, rows, prev_tokens)
        return logits


def test_rows_of_long_references_are_measured_by_loss_alone(home: Path) -> None:
    data = write(home / "long.jsonl", [[("user", "mute"), ("assistant", LONG)]])
    found = evaluate(home, data, "new")
    assert found.short_rows == 0
    assert found.adapter.exact_match is found.base.token_f1 is None


def test_a_question_that_fills_the_context_is_named(home: Path) -> None:
    data = write(home / "big.jsonl", [[("user", "tin"), ("assistant", "sir")] * 200])
    with pytest.raises(EvaluationFailed, match=r"line 1 has \d+ tokens"):
        evaluate(home, data, "new")


def test_the_memory_that_is_left_of_a_gpu_is_enough(
    home: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job evaluates beside the server, with less memory than --gpu-memory-utilization allows."""
    configs: list[ServerConfig] = []
    monkeypatch.setattr(evaluate_module, "evaluate", lambda config, *_: configs.append(config))
    evaluate(home, data, "new")
    (config,) = configs
    assert config.engine.kv_cache_memory == 1 << 30
    assert config.engine.enforce_eager


def test_a_broken_adapter_is_refused_as_the_server_would(home: Path, data: Dataset) -> None:
    with pytest.raises(AdapterInvalid):
        evaluate(home, data, "model")
