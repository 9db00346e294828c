"""The listing of adapters can always be written as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.artifact import AdapterInfo
from adapters.registry import Registry
from server.engine.listing import AdapterListing

ODD = "caf\udce9 \ud800 \n"


class OnDisk:
    """A residency without adapters."""

    def tier(self, _: str) -> str:
        return "disk"


def test_text_from_files_is_listed_in_printable_characters(tmp_path: Path) -> None:
    info = AdapterInfo("d", {}, 8, base_model=ODD, warnings=(ODD,))
    registry = Registry(tmp_path, lambda _: info)
    registry.register("a", "a", replace=False)
    registry.fail("b", tmp_path / ODD, ODD)
    registry.wait("c", tmp_path / "c", "It is not finished.")
    residency: Any = OnDisk()
    told = [asdict(status) for status in AdapterListing(registry, residency).all()]
    text = json.dumps(told, ensure_ascii=False).encode().decode()
    assert "\\n" in text
    assert [(each["name"], each["state"]) for each in told] == [
        ("a", "ready"),
        ("b", "failed"),
        ("c", "waiting"),
    ]
    shown = "caf\\xe9 \\ud800 \\n"
    assert (told[0]["base_model"], told[0]["warnings"]) == (shown, (shown,))
    assert (told[1]["reason"], told[1]["path"]) == (shown, str(tmp_path / shown))
