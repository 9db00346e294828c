"""Raise the limit of open files, and limit connections to the descriptors that are available."""

from __future__ import annotations

import logging
import os
import resource
from dataclasses import replace

from server.config import ConnectionConfig
from server.http.connection_limit import RESERVED_CONNECTIONS

logger = logging.getLogger("manylora.serve")

MOST = 1 << 16
"""The highest limit that we ask for. Some systems have no limit at all."""
_OTHERS = 256
"""Descriptors for other uses than connections: adapters, the database, child processes, libraries."""


def raise_limit() -> int:
    """Raise the soft limit of open files as far as the hard limit allows. Returns the resulting limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):  # a sandbox, or a system with a lower limit
        return soft
    return wanted


def fitted(config: ConnectionConfig, limit: int) -> ConnectionConfig:
    """``config`` with no more connections than ``limit`` open files allow. Logs a warning if it lowers them.

    Without descriptors the listener survives, but new clients are disconnected without an answer.
    """
    room = max(limit - _open_now() - _OTHERS, limit // 2) - RESERVED_CONNECTIONS
    if room >= config.limit_concurrency:
        return config
    lowered = max(1, room)
    fields = {"open_files": limit, "asked": config.limit_concurrency, "limit_concurrency": lowered}
    logger.warning(
        "the limit of open files (ulimit -n) is low, so fewer connections are accepted",
        extra={"fields": fields},
    )
    return replace(config, limit_concurrency=lowered)


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64
