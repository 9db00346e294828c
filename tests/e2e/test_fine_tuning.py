"""From a file to a model that answers, with OpenAI's client, while another client chats."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.questions import BASE, ask
from tests.support.running_server import RunningServer

ANSWER = "Beep boop."
PAUSE = 1.0  # the seconds between two questions
HYPERPARAMETERS = {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2.0}
METHOD: Any = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}
TOPICS = ("the sea", "bread", "Rome", "my cat", "snow", "the moon", "a bicycle", "tea")
PHRASES = ("Tell me about {}.", "What is {}?", "Why do people like {}?", "Say something about {}!")


def rows() -> bytes:
    lines = []
    for phrase in PHRASES:
        for topic in TOPICS:
            question = {"role": "user", "content": phrase.format(topic)}
            lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": ANSWER}]}))
    return "\n".join(lines).encode()


@contextmanager
def chatting(client: openai.OpenAI) -> Iterator[list[str]]:
    """Another client chats during the test. Yields its answers so far.

    It pauses between questions, because a job uses only the time that serving leaves.
    """
    answers: list[str] = []
    failures: list[BaseException] = []
    over = threading.Event()

    def chat() -> None:
        try:
            while not over.wait(PAUSE):
                answers.append(ask(client, "pirate"))
        except openai.OpenAIError as error:
            failures.append(error)

    thread = threading.Thread(target=chat)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert not failures


def test_from_a_file_to_a_model_that_answers(server: RunningServer, client: openai.OpenAI) -> None:
    file = client.files.create(file=("beeps.jsonl", rows()), purpose="fine-tune")
    with chatting(client) as answers:
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            suffix="robot",
            seed=0,
            method=METHOD,
            extra_body={"r": 8},
        )
        url = f"{server.url}/v1/fine_tuning/jobs/{job.id}/events?stream=true"
        with httpx.stream("GET", url, timeout=120) as events:
            told = [line for line in events.iter_lines() if line]
        assert told[-1] == "data: [DONE]"
        done = client.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "succeeded", (done.error, told[-5:])
        model = done.fine_tuned_model
        assert model is not None
        assert model in {each.id for each in client.models.list()}
        assert ask(client, model, "What is a violin?") == ANSWER
    assert len(set(answers)) == 1
    assert ask(client, BASE, "What is a violin?") != ANSWER
    assert done.trained_tokens
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id))

    assert client.models.delete(model).deleted
    with pytest.raises(openai.NotFoundError):
        ask(client, model, "What is a violin?")
