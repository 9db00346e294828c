"""Compares two names of a base: whether they mean the same model, as far as names can tell."""

from __future__ import annotations

import re

_CACHED = re.compile(r"(?:^|/)models--(?:[^/]+--)?([^/]+?)(?:/snapshots/[^/]+)?$")
_QUANTISED = re.compile(
    r"-(?:unsloth-bnb-4bit|dynamic-bnb-4bit|unsloth|bnb-4bit|bnb-8bit|4bit|8bit|bf16|fp16)$"
)


def same_base(one: str, other: str) -> bool:
    """Hub ids, folders, and the hub's cache (``models--ORG--NAME/snapshots/…``) are compared alike."""
    return _model(one) == _model(other)


def _model(name_or_path: str) -> str:
    """The bare name of the model, without owner, folder and the suffix of its quantisation for training."""
    path = name_or_path.replace("\\", "/").rstrip("/")
    cached = _CACHED.search(path)
    last = cached[1] if cached else path.rpartition("/")[2]
    last = last.casefold().replace("___", ".")  # ModelScope's cache writes a dot like this
    while shorter := _QUANTISED.sub("", last):
        if shorter == last:
            break
        last = shorter
    return last
