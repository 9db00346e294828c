"""The check without a server, for a base that is only trained: what cannot be served is not trained."""

from __future__ import annotations

import logging
from pathlib import Path

from adapters.base import PreparedBase, load_base
from adapters.base.context import served_length
from adapters.base.rope import settle_rope
from adapters.pool.rank_pool import RankPool
from server.engine.attention import uninstall
from server.engine.attention.choice import preferred_block_size
from server.engine.check.start_check import StartCheck, has_passed
from server.engine.model import build_model
from server.engine.model.probe import probe, servable
from server.engine.model.supported import naming

log = logging.getLogger("manylora.engine")

_RANK_ROWS, _STEP_TOKENS, _SEQUENCES = 16, 128, 2

_TOKENS = 512
"""Tokens of keys and values that are held, more than the check's requests have."""


def check_alone(prepared: PreparedBase, home: Path, device: str, max_model_len: int | None) -> None:
    """Load the base, check it and free it, unless it has passed here with these versions.

    Args:
        device: a torch device.
        max_model_len: the operator's limit of a sequence's tokens.

    Raises:
        BaseModelError: it cannot be served.
    """
    if has_passed(home, prepared.digest):
        return
    log.info("%s is checked against transformers; this happens once", prepared.name)
    base = load_base(prepared, device)
    found = probe(base, max_model_len)
    try:
        base = servable(base, found)
        text = base.model.config.get_text_config()
        block_size = preferred_block_size(text, base.model.device, base.model.dtype)
        num_blocks = -(-_TOKENS // block_size) + 1
        longest = served_length(text, max_model_len)
        with naming(base.model.config, "the check"):
            settle_rope(base.model, longest)
            pool = RankPool(base.layout.sites, _RANK_ROWS, base.model.dtype, base.model.device)
            check = StartCheck(home, base, found, longest, f"alone, {longest} tokens")
            check.prepare(pool)
            model = build_model(base, pool, block_size, _STEP_TOKENS, _SEQUENCES, True, found)
            model.allocate(num_blocks, block_size)
            check.run(model, pool, _STEP_TOKENS, num_blocks, block_size)
    finally:
        uninstall(base.model)
