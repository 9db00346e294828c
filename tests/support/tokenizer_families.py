"""Small real tokenizers of each family that bases use. They are built without a network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Literal, get_args

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_models import tiny_tokenizer

TokenizerFamily = Literal["byte-level", "llama2", "mistral", "gemma", "wordpiece", "unigram"]
TOKENIZER_FAMILIES: tuple[TokenizerFamily, ...] = get_args(TokenizerFamily)
BYTE_FALLBACK: tuple[TokenizerFamily, ...] = ("llama2", "mistral", "gemma")

TokenizerClass = Literal[
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "CohereTokenizer",
    "T5Tokenizer",
    "XLMRobertaTokenizer",
    "XGLMTokenizer",
]
TOKENIZER_CLASSES: tuple[TokenizerClass, ...] = get_args(TokenizerClass)
BYTE_FALLBACK_CLASSES = TOKENIZER_CLASSES[:3]
BYTE_LEVEL_CLASSES = TOKENIZER_CLASSES[3:7]

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_TURNS = ["<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def family_tokenizer(family: TokenizerFamily, template: str = _TEMPLATE) -> Any:
    """A transformers tokenizer that has ``<s>``, ``</s>``, ``<|im_start|>`` and ``<|im_end|>``."""
    if family == "byte-level":
        fast = tiny_tokenizer()
    else:
        built = _BUILDERS[family]()
        built.add_special_tokens([AddedToken(text, normalized=False) for text in [*_SPECIAL, *_TURNS]])
        pad, bos, eos, unk = _SPECIAL
        fast = PreTrainedTokenizerFast(
            tokenizer_object=built, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk
        )
    fast.chat_template = template
    return fast


def class_tokenizer(name: TokenizerClass) -> Any:
    """A tokenizer of a transformers class with a small vocabulary. The class sets normalizer and decoder."""
    if name in BYTE_FALLBACK_CLASSES:
        model: Any = _byte_fallback()
    elif name in BYTE_LEVEL_CLASSES:
        model = tiny_tokenizer().backend_tokenizer.model
    else:
        model = _unigram().model
    saved = json.loads(Tokenizer(model).to_str())["model"]
    if "merges" not in saved:
        return getattr(transformers, name)(vocab=[tuple(entry) for entry in saved["vocab"]])
    merges = [tuple(merge) for merge in saved["merges"]]
    return getattr(transformers, name)(vocab=saved["vocab"], merges=merges)


def _words() -> Iterator[str]:
    letters = random.Random(1)
    for _ in range(400):
        yield " ".join("".join(letters.choices("aeiourstlnm", k=letters.randint(1, 7))) for _ in range(8))


def _byte_fallback() -> models.BPE:
    """A SentencePiece BPE as transformers converts it: pieces with ``▁``, then a token for each byte."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        _words(), trainers.BpeTrainer(vocab_size=400, special_tokens=_SPECIAL, show_progress=False)
    )
    saved = json.loads(trained.to_str())["model"]
    vocab = dict(saved["vocab"])
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    merges = [tuple(merge) for merge in saved["merges"]]
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _llama2() -> Tokenizer:
    tokenizer = Tokenizer(_byte_fallback())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _sentencepiece_decoder(strip=True)
    return tokenizer


def _mistral() -> Tokenizer:
    tokenizer = Tokenizer(_byte_fallback())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _sentencepiece_decoder(strip=True)
    return tokenizer


def _gemma() -> Tokenizer:
    tokenizer = Tokenizer(_byte_fallback())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = _sentencepiece_decoder(strip=False)
    return tokenizer


def _sentencepiece_decoder(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    alphabet = [*"abcdefghijklmnopqrstuvwxyz<>|_"]
    tokenizer.train_from_iterator(
        _words(),
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [*"abcdefghijklmnopqrstuvwxyz<>|_"]
    tokenizer.train_from_iterator(
        _words(),
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=_SPECIAL,
            unk_token="<unk>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


_BUILDERS = {
    "llama2": _llama2,
    "mistral": _mistral,
    "gemma": _gemma,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
}
