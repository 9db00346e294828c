"""Ask a sample adapter its held-out questions, greedily, and print the share that has its style.

::

    python -m adapters.samples.heldout pirate [--adapter-dir FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapters.base import DEFAULT_BASE, load_base, prepare_base
from adapters.samples.task import CACHE_DIR, FOLDER, HAS_STYLE, Conversation, heldout_rows

MAX_NEW_TOKENS = 64


@torch.inference_mode()
def answer(messages: Conversation, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The greedy answer, or None if it did not end within MAX_NEW_TOKENS."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new = output[0, prompt["input_ids"].shape[1] :]
    if new[-1] != tokenizer.eos_token_id:
        return None
    return str(tokenizer.decode(new, skip_special_tokens=True))


def heldout_share(task: str, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Print every held-out question with its answer; the share, 0 to 1, of those that end in style."""
    hits = []
    for *question, _reference in heldout_rows(task):
        text = answer(question, model, tokenizer)
        hits.append(text is not None and HAS_STYLE[task](text))
        print(f"{question[-1]['content']}\n    {text}")
    return sum(hits) / len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a sample adapter its held-out questions.")
    parser.add_argument("task", choices=sorted(HAS_STYLE))
    parser.add_argument("--adapter-dir", type=Path, help="PEFT folder (default: the sample itself)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="where the 4-bit base is kept")
    options = parser.parse_args()
    base = load_base(prepare_base(DEFAULT_BASE, options.cache_dir))
    model = PeftModel.from_pretrained(base.model, options.adapter_dir or FOLDER / options.task).eval()
    print(f"{heldout_share(options.task, model, base.tokenizer):.0%} in style")


if __name__ == "__main__":
    main()
