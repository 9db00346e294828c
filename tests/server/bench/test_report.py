from __future__ import annotations

import json
import math

from server.bench.serving.compare import Measured
from server.bench.serving.report import Spread, document, errors, ratios, table

OURS = Measured(
    "ours",
    [{"output_throughput": 300.0, "failed": 0}, {"output_throughput": 330.0, "failed": 1}],
    ["x", "x", "y"],
)
PEER = Measured(
    "peer", [{"output_throughput": 100.0, "failed": 0}, {"output_throughput": 150.0, "failed": 0}]
)


def test_ratios_pair_the_runs() -> None:
    assert ratios(OURS, PEER) == {"output_throughput": Spread(2.6, 2.2, 3.0)}


def test_the_table_is_aligned_and_shows_ratios() -> None:
    header, line, *rows = table([OURS, PEER]).splitlines()
    assert {len(row) for row in (header, line, *rows)} >= {len(header)}
    assert header.split("  ")[-1].strip() == "ours/peer"
    (speed,) = (row for row in rows if row.startswith("output tokens/s"))
    assert speed.split("  ")[-1].strip() == "2.60 (2.20 to 3)"
    assert "315 (300 to 330)" in speed


def test_there_is_no_ratio_to_nothing() -> None:
    nothing = Measured("peer", [{"prefill_throughput": 0.0}])
    assert ratios(Measured("ours", [{"prefill_throughput": 1.0}]), nothing) == {}


def test_errors_are_counted_by_kind() -> None:
    assert errors([OURS, PEER]) == ["ours: 2 times x", "ours: 1 times y"]


def test_the_document_is_plain_json() -> None:
    text = json.dumps(document({"request_rate": math.inf}, {"cores": 2}, [OURS, PEER]), allow_nan=False)
    read = json.loads(text)
    assert read["config"] == {"request_rate": "inf"}
    assert read["servers"][0]["median"]["output_throughput"] == 315
    assert read["servers"][0]["runs"][1] == {"output_throughput": 330.0, "failed": 1}
    assert read["ratios"]["peer"]["output_throughput"] == {"median": 2.6, "min": 2.2, "max": 3.0}
