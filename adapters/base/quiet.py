"""Silences the libraries' messages while a base is read. Their progress bars stay on a terminal."""

from __future__ import annotations

import sys
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
    """Shows only errors from transformers, and bars only with ``progress`` on a terminal.

    Restored at the end.
    """
    progress = progress and sys.stderr.isatty()
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    _show_bars(progress, progress)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        _show_bars(*had_bars)


def _show_bars(transformers: bool, hub: bool) -> None:
    (
        transformers_logging.enable_progress_bar
        if transformers
        else transformers_logging.disable_progress_bar
    )()
    (enable_progress_bars if hub else disable_progress_bars)()
