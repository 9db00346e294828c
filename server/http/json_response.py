"""JSON answers. Text from outside may contain half of a surrogate pair, which UTF-8 cannot encode."""

from __future__ import annotations

import json
from typing import Any

from starlette import responses


def json_bytes(content: object) -> bytes:
    """``content`` as compact JSON in UTF-8. Half of a surrogate pair is escaped."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # ``\udc80`` is JSON's escape too


class JSONResponse(responses.JSONResponse):
    """Starlette's JSON response, for any text."""

    def render(self, content: Any) -> bytes:
        return json_bytes(content)
