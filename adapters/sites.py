"""Sites: the linears of the base that an adapter may add to.

A site is named as the base's own module is (``model.layers.0.self_attn.q_proj``). This file is the
vocabulary that artifact checking, the rank pool and the model share; it holds names and shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """One linear of the base.

    Attributes:
        name: dotted module path within the causal LM.
        in_features: length of the input row.
        out_features: length of the output row.
    """

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """What an adapter must know of the base to be checked against it, without any weights.

    Attributes:
        sites: every linear inside the decoder blocks, by name.
        modules: the names of all modules of the base (to explain a target that is not a site).
        name_or_path: what the base calls itself (compared with ``base_model_name_or_path``).
    """

    sites: Mapping[str, Site]
    modules: frozenset[str]
    name_or_path: str
