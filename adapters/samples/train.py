"""The recipe of the sample adapters: QLoRA on the very 4-bit base that the server serves.

::

    python -m adapters.samples.train pirate --output-dir pirate

Data in, a plain PEFT folder out. ``adapters.samples.heldout`` then asks it questions it has not seen.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adapters.base import DEFAULT_BASE, load_base, prepare_base
from adapters.samples.task import CACHE_DIR, Conversation, training_rows

IGNORED = -100  # the label that the loss skips
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Low ranks, so that a sample stays under 1.5 MB; high learning rates, because the ranks are low."""

    rank: int
    target_modules: tuple[str, ...]
    epochs: int = 4
    learning_rate: float = 2e-3
    batch_size: int = 8
    seed: int = 0


RECIPES = {
    "pirate": Recipe(rank=2, target_modules=ATTENTION + MLP),
    "json-answers": Recipe(rank=4, target_modules=ATTENTION),
}


def encode(messages: Conversation, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of one conversation; labels on the assistant's turns only, their end of turn included."""
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False).rstrip("\n")
        # Prompt and answer are tokenised apart, as they are when the model is served.
        for text, learnt in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        done = whole
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def train(task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Train the sample ``task`` on ``model``, whose own weights stay as they are."""
    recipe = RECIPES[task]
    set_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            per_device_train_batch_size=recipe.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            seed=recipe.seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        )
        rows = [encode(messages, tokenizer) for messages in training_rows(task)]
        collator = DataCollatorForSeq2Seq(tokenizer)
        Trainer(peft_model, arguments, train_dataset=rows, data_collator=collator).train()
    return peft_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sample adapter on the default base.")
    parser.add_argument("task", choices=sorted(RECIPES))
    parser.add_argument("--output-dir", type=Path, required=True, help="where the PEFT folder is written")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="where the 4-bit base is kept")
    options = parser.parse_args()
    base = load_base(prepare_base(DEFAULT_BASE, options.cache_dir))
    adapter = train(options.task, base.model, base.tokenizer)
    adapter.to(torch.bfloat16).save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
