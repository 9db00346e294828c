"""Compares an answer with its reference: exact match and SQuAD's token F1."""

from __future__ import annotations

import re
import string
from collections import Counter

SHORT_WORDS = 16
"""The most words of a short reference. For longer references, other answers can be right too."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_short(reference: str) -> bool:
    return len(reference.split()) <= SHORT_WORDS


def exact_match(answer: str, reference: str) -> bool:
    """Whether the texts are equal apart from white space at both ends. Case and punctuation count."""
    return answer.strip() == reference.strip()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, 0 to 1, as SQuAD's ``evaluate-v2.0.py`` counts them.

    Words are compared in lower case, without ASCII punctuation and without a, an and the.
    """
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
