"""Questions for the default base and its adapters, and functions that send them."""

from __future__ import annotations

import openai

BASE = "smollm2-135m"
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "What do bees make?",
    "How many days are in a week?",
)


def ask(client: openai.OpenAI, model: str, question: str = QUESTIONS[0]) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0
    )
    assert answer.model == model
    return answer.choices[0].message.content or ""
