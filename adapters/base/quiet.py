"""Keeps the libraries' chatter off the console while a base is read; their bars stay if asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries(progress: bool) -> Iterator[None]:
    """Only errors from transformers and bitsandbytes; bars only with ``progress``. Restored at the end."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    # bitsandbytes warns about an optional kernel package when it is first imported.
    bitsandbytes_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = bitsandbytes_logger.level
    transformers_logging.set_verbosity_error()
    bitsandbytes_logger.setLevel(logging.ERROR)
    _show_bars(progress, progress)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        bitsandbytes_logger.setLevel(level)
        _show_bars(*had_bars)


def _show_bars(transformers: bool, hub: bool) -> None:
    (
        transformers_logging.enable_progress_bar
        if transformers
        else transformers_logging.disable_progress_bar
    )()
    (enable_progress_bars if hub else disable_progress_bars)()
