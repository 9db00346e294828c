"""Structured pruning: fewer rank rows, within a given increase of the held-out loss.

Each pair is rotated so that its rank rows are the singular directions of its product, the strongest first.
The product stays the same. Then the weakest directions of all linears are removed, as many as the allowed
increase permits. A bisection on the loss finds their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from adapters.artifact import WEIGHTS_FILE
from adapters.training.export import Nominal, Pair, pairs_of, write_adapter
from adapters.training.packing import Pack
from adapters.training.progress import Throttle
from adapters.training.recipe import ADAPTER, TrainConfig
from adapters.training.trainer import held_out_figures


@dataclass(frozen=True, slots=True)
class Pruned:
    """Rank rows of all linears, bytes of the tensors, and held-out loss, before and after."""

    rows_before: int
    rows_after: int
    bytes_before: int
    bytes_after: int
    loss_before: float
    loss_after: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        return (
            f"Pruned from {self.rows_before} to {self.rows_after} rank rows, {self.bytes_before} to "
            f"{self.bytes_after} bytes; held-out loss {self.loss_before:.4f} to {self.loss_after:.4f}."
        )


@torch.no_grad()
def prune(
    folder: Path,
    base: Any,
    packs: Sequence[Pack],
    config: TrainConfig,
    nominal: Nominal,
    sites: Sequence[str],
) -> Pruned:
    """Rewrite the adapter in ``folder`` with as few rank rows as ``config.prune_rank`` allows.

    Args:
        base: the model without an adapter; afterwards it has one.
        packs: the held-out rows.
    """
    model = PeftModel.from_pretrained(base, folder)
    pairs = {name: rotated(pair) for name, pair in pairs_of(model).items()}
    order = weakest_first(pairs)
    throttle = Throttle(config.duty)

    def without(count: int) -> dict[str, Pair]:
        gone = Counter(order[:count])
        return {name: _strongest(pair, pair.rank - gone[name]) for name, pair in pairs.items()}

    def loss_without(count: int) -> float:
        _install(model, without(count))
        return held_out_figures(model.get_base_model(), packs, config.batch_size, throttle)[0]

    loss_before = loss_without(0)
    allowed = loss_before + (config.prune_rank or 0.0)
    dropped = most_dropped(len(order), lambda count: loss_without(count) <= allowed)
    loss_after = loss_without(dropped)
    bytes_before = (folder / WEIGHTS_FILE).stat().st_size
    kept = {name: pair for name, pair in without(dropped).items() if pair.rank}
    bytes_after = write_adapter(folder, kept, nominal, sites)
    rows = sum(pair.rank for pair in pairs.values())
    return Pruned(rows, rows - dropped, bytes_before, bytes_after, loss_before, loss_after)


def rotated(pair: Pair) -> Pair:
    """The same product with singular directions as rank rows, the strongest first, and the scale inside.

    With b = Q_b R_b and aᵀ = Q_a R_a, only R_b R_aᵀ [rank, rank] is decomposed.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double() * pair.scale)
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, strengths, v = torch.linalg.svd(r_b @ r_a.T)
    root = strengths.sqrt()
    return Pair((root[:, None] * (v @ q_a.T)).float(), (q_b @ u * root).float(), 1.0, pair.magnitude)


def weakest_first(pairs: Mapping[str, Pair]) -> list[str]:
    """The pairs' names, one for each row that may be removed, in the order of removal.

    A row's strength is its singular value, the norm that the product loses with it. One row always stays.
    With DoRA one row of each pair stays, because the magnitude needs one.
    """
    strengths = [
        (float(a.norm() * b.norm()), name, row, pair.magnitude is not None and row == 0)
        for name, pair in pairs.items()
        for row, (a, b) in enumerate(zip(pair.a, pair.b.T, strict=True))
    ]
    order = [name for _, name, _, stays in sorted(strengths) if not stays]
    return order if any(stays for *_, stays in strengths) else order[:-1]


def most_dropped(most: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``most`` for which ``fits`` holds, by bisection. It holds for 0."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _strongest(pair: Pair, rank: int) -> Pair:
    return Pair(pair.a[:rank], pair.b[:, :rank], 1.0, pair.magnitude)


def _install(model: PeftModel, pairs: Mapping[str, Pair]) -> None:
    """Copy the pairs into the model. Removed rows become zero there."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            pair, a, b = pairs[name], module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            module.scaling[ADAPTER] = 1.0
            a.zero_()[: pair.rank].copy_(pair.a)
            b.zero_()[:, : pair.rank].copy_(pair.b)
