"""Sends all held-out rows for all models to an engine, and scores the results.

Each model uses its own chat template, as in serving. Passages give the log-probabilities of their learnt
tokens. Questions are answered greedily. The requests of all models share the engine's batches, as in serving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from adapters.registry import Version
from adapters.training.dataset import Dataset
from server.engine.build import Parts
from server.engine.interface import GenerationRequest
from server.engine.sampling_params import SamplingParams
from server.engine.sync_engine import SyncEngine
from server.finetune.evaluation.cases import Passage, Question, make_passages, make_questions
from server.finetune.evaluation.errors import EvaluationFailed
from server.finetune.evaluation.metrics import exact_match, token_f1
from server.finetune.evaluation.result import Answers, Evaluation, Model, Scores
from server.finetune.evaluation.scoring import PromptScorer

Sampled = dict[str, list[int]]
"""The sampled tokens by request id."""

Tick = Callable[[int, int], object]
"""Called with the number of requests that are done, and the number of all requests."""


@dataclass(frozen=True, slots=True)
class Cases:
    """All rows, rendered through one chat template."""

    passages: Sequence[Passage]
    questions: Sequence[Question]


class Examiner:
    """Runs one evaluation. ``parts`` must not serve other requests.

    Args:
        parts: an engine without a prefix cache. Tokens from the cache would not be scored.
        folders: the adapters to compare with the base, by their names in the result.
        progress: show a bar on stderr.
        tick: called after every step.

    Raises:
        AdapterError: a folder is not an adapter of this base that can be served.
    """

    def __init__(
        self,
        parts: Parts,
        folders: Mapping[Model, Path],
        progress: bool = False,
        tick: Tick = lambda *_: None,
    ) -> None:
        self._parts = parts
        self._engine = SyncEngine(parts)
        self._progress, self._tick = progress, tick
        self._versions: dict[Model, Version | None] = {"base": None}
        for model, folder in folders.items():
            info = parts.registry.inspect(folder)
            self._versions[model] = Version(model, info.digest, folder, info, time.time())
        chat_formats = parts.tokenizer.chat_formats
        self._chat_formats = {
            model: chat_formats.of(version.info.chat_config if version else None)
            for model, version in self._versions.items()
        }

    def examine(self, data: Dataset) -> Evaluation:
        """Evaluate all models on all rows.

        Raises:
            EvaluationFailed: a question does not fit into the context, or the engine could not finish a row.
            TrainingError: rows cannot be encoded as in training.
        """
        began = time.monotonic()
        tokenizer, max_model_len = self._parts.tokenizer, self._parts.info.max_model_len
        cases = {
            chat_format: Cases(
                make_passages(data, chat_format, max_model_len),
                make_questions(data.rows, tokenizer, chat_format, max_model_len),
            )
            for chat_format in set(self._chat_formats.values())
        }
        asked = {model: cases[chat_format] for model, chat_format in self._chat_formats.items()}
        scorer, sampled = self._ask(asked)
        passages, questions = asked["base"].passages, asked["base"].questions
        answers = tuple(self._answers(i, question, sampled) for i, question in enumerate(questions))
        scores = {
            model: _scores(model, len(asked[model].passages), scorer, answers) for model in self._versions
        }
        return Evaluation(
            rows=len(data.rows),
            tokens=sum(len(passage.targets) for passage in passages),
            short_rows=len(questions),
            seconds=time.monotonic() - began,
            base=scores["base"],
            adapter=scores["adapter"],
            replaced=scores.get("replaced"),
            answers=answers,
        )

    def _ask(self, asked: Mapping[Model, Cases]) -> tuple[PromptScorer, Sampled]:
        """Run all requests of all models until they have ended."""
        targets = {
            _passage_id(model, i): passage.targets
            for model in self._versions
            for i, passage in enumerate(asked[model].passages)
        }
        self._parts.engine.model = scorer = PromptScorer(self._parts.model, targets)
        sampled: Sampled = {}
        for model in self._versions:
            for i, passage in enumerate(asked[model].passages):
                self._add(model, _passage_id(model, i), passage.tokens, 1, sampled)
            for i, question in enumerate(asked[model].questions):
                self._add(model, _question_id(model, i), question.prompt, question.max_tokens, sampled)
        done = 0
        hidden = None if self._progress else True  # None = hidden without a terminal
        with tqdm(total=len(sampled), desc="Evaluating", unit="request", disable=hidden) as bar:
            while self._engine.busy:
                self._step(sampled)
                ended = len(self._engine.take_ended())
                bar.update(ended)
                done += ended
                self._tick(done, len(sampled))
        return scorer, sampled

    def _add(
        self, model: Model, request_id: str, prompt: tuple[int, ...], max_tokens: int, sampled: Sampled
    ) -> None:
        version = self._versions[model]
        greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        name = version.name if version is not None else None
        request = GenerationRequest(request_id, prompt, name, greedy)
        self._engine.add(request, version, eos=self._chat_formats[model].eos)
        sampled[request_id] = []

    def _step(self, sampled: Sampled) -> None:
        for output in self._engine.step():
            if output.error is not None:
                raise EvaluationFailed(f"The engine could not finish {output.request_id}: {output.error}")
            sampled[output.request_id].append(output.token)

    def _answers(self, i: int, question: Question, sampled: Sampled) -> Answers:
        decode = self._parts.tokenizer.decode
        given = {
            model: decode(sampled[_question_id(model, i)], skip_special_tokens=True)
            for model in self._versions
        }
        return Answers(question.line, question.reference, given)


def _passage_id(model: Model, i: int) -> str:
    return f"passage {i + 1} of the {model}"


def _question_id(model: Model, i: int) -> str:
    return f"question {i + 1} of the {model}"


def _scores(model: Model, passages: int, scorer: PromptScorer, answers: Sequence[Answers]) -> Scores:
    logprobs = [value for i in range(passages) for value in scorer.logprobs[_passage_id(model, i)].values()]
    loss = -math.fsum(logprobs) / len(logprobs)
    if not answers:
        return Scores(loss, None, None)
    return Scores(
        loss,
        exact_match=fmean(exact_match(one.given[model], one.reference) for one in answers),
        token_f1=fmean(token_f1(one.given[model], one.reference) for one in answers),
    )
