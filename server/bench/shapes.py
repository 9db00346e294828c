"""Makes models of a known shape with random weights: as fast as real models, but with random answers.

They measure shapes whose weights are not available. Only its functions import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.bench.errors import BenchError

# name → the fields of transformers' LlamaConfig. Source: the published configs of Llama 3.2 1B and 3.1 8B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def make_model(shape: dict[str, Any], tokenizer: Path, out: Path, seed: int) -> None:
    """Write a random Llama of ``shape`` to ``out``: bf16 safetensors, config and tokenizer.

    Args:
        shape: fields of ``LlamaConfig``.
        tokenizer: a transformers folder. Its fast tokenizer is copied and filled up to ``vocab_size``.
        seed: equal seeds give equal weights.

    Raises:
        BenchError: ``out`` exists, or the tokenizer has more tokens than the shape.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if out.exists():
        raise BenchError(f"--output {out} exists already; give a folder that does not exist")
    source = json.loads((tokenizer / "tokenizer.json").read_text())
    filled = fill_vocabulary(source, shape["vocab_size"])
    special = {key: value for key, value in _special_tokens(tokenizer).items() if value is not None}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, **special, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(filled, ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (tokenizer / name).exists():
            (out / name).write_bytes((tokenizer / name).read_bytes())


def fill_vocabulary(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """A ``tokenizer.json`` with unused tokens added, until every id below ``size`` has a text.

    A random model samples any id, and a server must be able to decode it.
    """
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    if max(taken) >= size:
        raise BenchError(f"the tokenizer has ids up to {max(taken)}, but the shape has only {size} tokens")
    fillers = {f"<unused{index}>": index for index in range(size) if index not in taken}
    return {**tokenizer, "model": {**tokenizer["model"], "vocab": {**vocabulary, **fillers}}}


def _special_tokens(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
