"""The performance targets of the GPU path, checked against what the sections measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.bench.gpu_check.rows import Result, Value

_SEQUENCES = 64

Table = Sequence[Mapping[str, Value]]


@dataclass(frozen=True, slots=True)
class Target:
    """One measured value and its bound.

    Attributes:
        at_least: whether ``bound`` is a lower bound; otherwise it is an upper bound.
    """

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def measured_targets(results: Sequence[Result]) -> list[Target]:
    """The targets whose values were all measured. Without a GPU there are none."""
    tables = {result.name: result for result in results}
    if "device" not in tables or not tables["device"].table("gpu"):
        return []
    decode, peft, loads = (
        tables[name].table(table) if name in tables else []
        for name, table in (("decode", "decode"), ("peft_peer", "PEFT"), ("loads", "first tokens"))
    )
    speed = {int(row["adapters"]): float(row["tokens/s"]) for row in decode if row["sequences"] == _SEQUENCES}
    found = [
        _ratio("64 adapters / base only, tokens/s", speed.get(64), speed.get(0), 0.85, at_least=True),
        _ratio("256 adapters / 1 adapter, tokens/s", speed.get(256), speed.get(1), 0.97, at_least=True),
        _step_over_floor(decode, 0),
        _step_over_floor(decode, 64),
        _over_peft(decode, peft),
        _first_tokens(loads),
    ]
    return [target for target in found if target is not None]


def _ratio(name: str, over: float | None, under: float | None, bound: float, at_least: bool) -> Target | None:
    return None if over is None or not under else Target(name, over / under, bound, at_least)


def _step_over_floor(decode: Table, adapters: int) -> Target | None:
    for row in decode:
        same = (row["sequences"], row["adapters"], row["base"]) == (_SEQUENCES, adapters, "llama-8b")
        if same and "times the floor" in row:
            name = f"step / its floor, 8B, {adapters} adapters"
            return Target(name, float(row["times the floor"]), 1.6, at_least=False)
    return None


def _over_peft(decode: Table, peft: Table) -> Target | None:
    same = ("base", "weights", "sequences", "adapters")
    for theirs in peft:
        for ours in decode:
            if all(ours[field] == theirs[field] for field in same) and theirs["sequences"] == _SEQUENCES:
                name = "64 sequences on 64 adapters / PEFT's adapter_names, tokens/s"
                return _ratio(name, float(ours["tokens/s"]), float(theirs["tokens/s"]), 10, at_least=True)
    return None


def _first_tokens(loads: Table) -> Target | None:
    mean = {row["adapters"]: float(row["mean ms"]) for row in loads}
    name = "time to first token, half of the adapters away / all there"
    return _ratio(name, mean.get("half fit"), mean.get("all fit"), 2, at_least=False)
