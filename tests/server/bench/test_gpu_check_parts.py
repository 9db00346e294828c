"""The parts of gpu-check without a whole run: the processes, the comparisons, the targets."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from server.bench.gpu_check import child, nf4_products, supervisor
from server.bench.gpu_check.agreement import ALLOWED, compare
from server.bench.gpu_check.bases import SHAPES_BY_SIZE, bytes_of, random_base
from server.bench.gpu_check.command import _sections
from server.bench.gpu_check.context import Context, Gpu
from server.bench.gpu_check.decode import run as run_decode
from server.bench.gpu_check.exactness import run as run_exactness
from server.bench.gpu_check.nf4_products import run as run_products
from server.bench.gpu_check.random_adapters import RandomAdapters
from server.bench.gpu_check.report import section_text, targets_text
from server.bench.gpu_check.rows import Result, Row, Value, skipped
from server.bench.gpu_check.sections import SECTIONS, Section
from server.bench.gpu_check.served import Answer
from server.bench.gpu_check.targets import measured_targets
from server.bench.roofline import Machine
from server.engine.model.cuda.products import PRODUCTS, ROWS
from server.engine.model.transformers_model import TransformersModel
from server.engine.unsupported import Unsupported

CPU = torch.device("cpu")
THREE = [Section(name, name, 1.0) for name in ("one", "two", "three")]

CHILD = """
import json, sys, time
for name in json.loads(sys.stdin.readline())["ends"]:
    print(json.dumps({"section": name, "began": time.monotonic()}), flush=True)
    row = {"table": "t", "values": {"a": 1}, "failed": "", "skipped": ""}
    print(json.dumps({"section": name, "row": row}), flush=True)
    if name == "two":
        TWO
    print(json.dumps({"section": name, "seconds": 0.1, "failed": ""}), flush=True)
"""


def conduct(script: str, budget: float = 60.0) -> list[Result]:
    seen: list[Result] = []
    results = supervisor.run(THREE, budget, seen.append, command=[sys.executable, "-c", script])
    assert seen == results
    return results


def test_a_fault_of_the_gpu_is_reported_with_its_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the fault every call to the GPU raises, and those errors are misleading."""

    def section(_: Context) -> Iterator[Row]:
        yield Row("t", {"a": 1})
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Section, "load", lambda _: section)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: pytest.fail("the GPU was used again"))
    told: list[dict[str, Any]] = []
    gpu = Gpu("a GPU", (9, 0), 132, 1 << 36, Machine(1.0, 1.0))
    assert not child._run(THREE[0], gpu, math.inf, told.append), "the process must not be used again"
    assert [set(message) - {"section"} for message in told] == [{"began"}, {"row"}, {"seconds", "failed"}]
    assert told[-1]["failed"] == "RuntimeError: CUDA error: an illegal memory access"


def test_sections_come_back_in_order() -> None:
    results = conduct(CHILD.replace("TWO", "pass"))
    assert [(one.name, one.status) for one in results] == [("one", "ok"), ("two", "ok"), ("three", "ok")]
    assert [dict(row.values) for one in results for row in one.rows] == [{"a": 1}] * 3


def test_a_section_that_kills_its_process_fails_alone_and_keeps_its_rows() -> None:
    one, two, three = conduct(CHILD.replace("TWO", "sys.exit('the card fell off the bus')"))
    assert (one.status, two.status, three.status) == ("ok", "failed", "ok")
    assert "code 1: the card fell off the bus" in two.failed
    assert len(two.rows) == 1


def test_a_section_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.5)
    one, two, three = conduct(CHILD.replace("TWO", "time.sleep(60)"), budget=1.0)
    assert (one.status, two.status, three.status) == ("ok", "failed", "ok")
    assert "hung" in two.failed


def test_a_process_that_never_starts_fails_each_section() -> None:
    results = conduct("import sys; sys.exit('no torch')")
    assert [one.name for one in results] == ["one", "two", "three"]
    assert all(one.status == "failed" and "no torch" in one.failed for one in results)


def test_the_shares_leave_time_only_for_the_start() -> None:
    assert 0.9 < sum(section.share for section in SECTIONS) <= 1


def test_sections_are_chosen_by_name_and_keep_their_order() -> None:
    assert [section.name for section in _sections("decode, device")] == ["device", "decode"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"no section 'speed'.*lora_kernels"):
        _sections("decode,speed")


def answers(tokens: Sequence[int], margin: float) -> dict[str, Answer]:
    return {"a": Answer(0.0, list(tokens), [margin] * len(tokens))}


def test_tokens_may_differ_only_if_two_logits_are_near() -> None:
    same = compare(answers([1, 2, 3], 5.0), answers([1, 2, 3], 5.0))
    near = compare(answers([1, 9, 9], 5.0), answers([1, 2, 3], ALLOWED / 2))
    far = compare(answers([1, 9, 9], 0.0), answers([1, 2, 3], 2 * ALLOWED))
    assert (same.equal, same.tokens, same.failed) == (1, 3, "")
    assert (near.equal, near.tokens, near.failed) == (0, 2, "")
    assert "more than bf16 explains" in far.failed


def decode(adapters: int, speed: float, floor: float) -> Row:
    same: dict[str, Value] = {"base": "llama-8b", "weights": "nf4", "sequences": 64}
    return Row("decode", {**same, "adapters": adapters, "tokens/s": speed, "times the floor": floor})


def test_targets_are_computed_from_the_rows() -> None:
    steps = [decode(0, 1000, 1.5), decode(1, 990, 1.5), decode(64, 800, 1.7), decode(256, 970, 1.7)]
    theirs: dict[str, Value] = {
        "base": "llama-8b",
        "weights": "nf4",
        "sequences": 64,
        "adapters": 64,
        "tokens/s": 50.0,
    }
    waits = [Row("first tokens", {"adapters": "all fit", "mean ms": 10.0})]
    waits += [Row("first tokens", {"adapters": "half fit", "mean ms": 15.0})]
    parts = {"device": [Row("gpu", {})], "decode": steps, "peft_peer": [Row("PEFT", theirs)], "loads": waits}
    results = [Result(name, "", rows) for name, rows in parts.items()]
    found = [(round(target.value, 3), target.met) for target in measured_targets(results)]
    assert found == [(0.8, False), (0.98, True), (1.5, True), (1.7, False), (16.0, True), (1.5, True)]
    assert targets_text(results).count("reached") == 4
    assert measured_targets(results[1:]) == [], "a CPU has no targets"


def test_a_failed_row_fails_its_section_and_is_not_a_figure() -> None:
    rows = [Row("t", {"a": 1.5}), Row("t", {"a": 2.5}, failed="off by one"), skipped("t", "no luck")]
    result = Result("s", "a section", rows)
    text = section_text(result)
    assert result.status == "failed"
    assert result.table("t") == [{"a": 1.5}]
    assert "off by one" in text
    assert "skipped: no luck" in text
    assert Result("s", "", [skipped("", "no luck")]).status == "skipped"


def test_random_bases_depend_on_the_seed_and_have_the_predicted_size() -> None:
    one, same, other = (random_base("tiny", "none", CPU, seed).model for seed in (0, 0, 1))
    weight = one.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, same.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[1].mlp.up_proj.weight)
    linears = [p for name, p in one.named_parameters() if "proj" in name]
    embedding = one.model.embed_tokens.weight
    assert bytes_of("tiny", "none") == sum(p.nbytes for p in linears) + 2 * embedding.nbytes


@pytest.mark.parametrize("section", [run_exactness, run_decode])
def test_a_fallback_fails_the_check(
    section: Callable[[Context], Iterator[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = TransformersModel.__init__

    def fell_back(self: TransformersModel, *args: Any) -> None:
        init(self, *args)
        self.fallbacks.append("our product is off by 1.000")

    monkeypatch.setattr(TransformersModel, "__init__", fell_back)
    monkeypatch.setattr(
        "server.engine.model._build_cpu_model", lambda *_: Unsupported("it is switched off here")
    )
    rows = section(Context(None, tmp_path, float("inf")))
    row = next(row for row in rows if row.table in ("graphs", "what is measured") and not row.skipped)
    assert "off by 1.000" in row.failed


def test_no_two_random_adapters_are_alike() -> None:
    sites = random_base("tiny", "none", CPU).layout.sites
    adapters = RandomAdapters(sites, 8)
    name = next(iter(sites))
    one, other = (adapters.weights(number, 8)[name] for number in (0, 1))
    assert one.a.shape == (8, SHAPES_BY_SIZE["tiny"]["hidden_size"])
    assert not any(torch.equal(a, b) for a in one.a for b in other.a)


def test_nf4_products_agree(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rows = list(run_products(Context(None, tmp_path, float("inf"))))
    assert [row.values["rows"] for row in rows] == [1, 8]
    assert not any(row.failed for row in rows)


def test_random_nf4_weights_are_decoded_as_bitsandbytes_does() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = nf4_products.random_weight(8, 128, CPU)
    assert torch.equal(weight.code, functional.get_4bit_type("nf4", device="cpu"))
    theirs = PRODUCTS["dense"](weight, torch.eye(128, dtype=torch.bfloat16), None).T
    assert torch.equal(nf4_products.decoded(weight), theirs)


def test_nf4_products_are_timed_and_a_wrong_one_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PRODUCTS["dense"]
    forms = dict.fromkeys(("bitsandbytes", "dense", "fused"), right)
    monkeypatch.setattr(nf4_products, "_able", lambda _: forms | {"triton": lambda *of: 2 * right(*of)})
    monkeypatch.setattr(nf4_products, "_SHAPES", {"small": (64, 128)})
    monkeypatch.setattr(nf4_products, "_PAST_CACHE", 1.0)
    monkeypatch.setattr(Context, "device", CPU)
    seconds = cycle([4e-6, 3e-6, 2e-6])
    monkeypatch.setattr(nf4_products, "seconds_of", lambda *_: next(seconds))
    gpu = Gpu("", (9, 0), 132, 0, Machine(bandwidth=1e9, rate=1e15))
    *rows, choice = run_products(Context(gpu, tmp_path, float("inf")))
    assert len(rows) == len(ROWS)
    for row in rows:
        tried = int(row.values["rows"]) <= 128
        assert row.failed.startswith("triton: ") if tried else not row.failed
        assert row.values["floor us"] == round(64 * 128 * 0.5625 / 1e3, 1)
        assert row.values["chosen"] == "dense"
        assert row.values["bitsandbytes chooses well"] is False
        assert "triton us" not in row.values
    assert choice.values["chosen"] == "dense to 512 rows"
    assert choice.values["bitsandbytes chooses badly at"] == ", ".join(map(str, ROWS))
