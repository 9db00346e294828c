"""Fine-tuning jobs through OpenAI's client."""

from __future__ import annotations

import time
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

from tests.support.training_server import rows


def upload(client: openai.OpenAI, orders: str = "", name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, rows(orders)), purpose="fine-tune").id


def create(client: openai.OpenAI, orders: str = "", **fields: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, orders), **fields)


def ended(client: openai.OpenAI, job: FineTuningJob, seconds: float = 20) -> FineTuningJob:
    deadline = time.monotonic() + seconds
    while (now := client.fine_tuning.jobs.retrieve(job.id)).finished_at is None:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now
