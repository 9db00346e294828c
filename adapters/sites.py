"""Sites: the modules of the base that an adapter may add to or bring its own of.

A site is named as the base's own module is (``model.layers.0.self_attn.q_proj``). This file is the
vocabulary that artifact checking, the rank pool and the model share; it holds names and shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Site:
    """One linear of the base, or its embedding: the linear that a token id, as a one-hot row, goes into.

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
        embedding, head: the token embedding (vocabulary → hidden) and the output head (hidden → vocabulary).
        tied: whether these two share one matrix where adapters are made.
        head_apart: whether the head that is served is a 4-bit copy of that matrix, the embedding it itself.
        norms: by name, the parameters of every norm and their lengths.
        biases: the linears (the head too) and the norms that have a bias.
        unservable: the linears that are no sites, by name, and why.
    """

    sites: Mapping[str, Site]
    modules: frozenset[str]
    name_or_path: str
    embedding: Site | None = None
    head: Site | None = None
    tied: bool = False
    head_apart: bool = False
    norms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    unservable: Mapping[str, str] = field(default_factory=dict)

    @property
    def ends(self) -> dict[str, Site]:
        """The embedding and the output head by name: where the decoder blocks begin and end."""
        return {site.name: site for site in (self.embedding, self.head) if site is not None}
