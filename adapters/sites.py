"""Sites: the modules of the base that an adapter may change or replace.

A site has the name of the base's module (``model.layers.0.self_attn.q_proj``). Artifact checking, the rank
pool and the model share these types. They contain names and shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Site:
    """One linear of the base, or its embedding, seen as a linear whose input is a one-hot row.

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
    """What is needed to check an adapter against the base, without any weights.

    Attributes:
        sites: every linear inside the decoder blocks, by name.
        modules: the names of all modules of the base (to explain a target that is not a site).
        name_or_path: the base's name (compared with ``base_model_name_or_path``).
        embedding, head: the token embedding (vocabulary → hidden) and the output head (hidden → vocabulary).
        tied: whether embedding and head share one matrix in the model that adapters are trained on.
        head_apart: whether the served head is a 4-bit copy of that matrix. The embedding uses the matrix
            itself.
        norms: by name, the parameters of every norm and their lengths.
        biases: the linears (the head too) and the norms that have a bias.
        unservable: the linears that are not sites, by name, with the reason.
        original_names: for a converted base, linears of the original by the end of their names, with what
            they are here.
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
    original_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def embedding_and_head(self) -> dict[str, Site]:
        """The embedding and the output head, by name."""
        return {site.name: site for site in (self.embedding, self.head) if site is not None}
