"""A checkpoint's folder while its shards are written. A shard is there whole or not at all.

It knows neither models nor quantisation. After a kill, the finished shards are found again and verified.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.base.digests import sha256_of
from adapters.fsync import sync_path

logger = logging.getLogger(__name__)

_RECORD = "finished.json"


class ShardFolder:
    """Writes shards to ``folder``. Only one process may do so at a time.

    Args:
        folder: is created. Everything in it is removed except shards of the same plan whose size and digest
            are those that were recorded.
        plan: identifies what the shards contain. Shards of another plan are removed.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._plan = folder, plan
        self._shards = {
            name: entry for name, entry in self._recorded().items() if self._is_whole(name, entry)
        }
        self._sweep()
        if self._shards:
            logger.info("%d finished shards are there already; the others follow.", len(self._shards))

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def size(self, name: str) -> int:
        """Bytes of a finished shard."""
        return int(self._shards[name]["size"])

    def tensors(self, name: str) -> list[str]:
        """The names in a finished shard."""
        with safe_open(self._folder / name, "pt") as opened:
            return list(opened.keys())

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard, wait until it is on disk, and record it."""
        shard, partial = self._folder / name, self._folder / f"{name}.partial"
        save_file(dict(tensors), partial, metadata={"format": "pt"})
        sync_path(partial)
        os.replace(partial, shard)
        sync_path(self._folder)
        self._shards[name] = {"size": shard.stat().st_size, "sha256": sha256_of(shard)}
        self._record()

    def close(self) -> None:
        """Remove the record: from now on the folder is a checkpoint like any other."""
        (self._folder / _RECORD).unlink(missing_ok=True)

    def _recorded(self) -> dict[str, Any]:
        try:
            record = json.loads((self._folder / _RECORD).read_text())
            return dict(record["shards"]) if record["plan"] == self._plan else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _is_whole(self, name: str, entry: Mapping[str, Any]) -> bool:
        path = self._folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return bool(sha256_of(path) == entry["sha256"])

    def _sweep(self) -> None:
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._shards:
                path.unlink()
        self._record()

    def _record(self) -> None:
        record = self._folder / _RECORD
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps({"plan": self._plan, "shards": self._shards}))
        sync_path(partial)
        os.replace(partial, record)
        sync_path(self._folder)
