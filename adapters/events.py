"""The fields of adapters' log events, so that all events name an adapter in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from adapters.registry import Version

Tier = Literal["device", "host", "disk"]
"""Where an adapter's weights are."""


def event_fields(
    name: str, version: Version | None = None, tier: Tier | None = None, **more: object
) -> dict[str, object]:
    """The argument ``extra`` of a logging call: ``name``, ``digest``, ``version``, ``tier`` and ``more``.

    ``digest`` has the first 12 hex digits. ``version`` is the time of registration, in seconds of Unix time.
    Without a version, only ``name`` and ``more`` are given.
    """
    fields: dict[str, object] = {"name": name}
    if version is not None:
        fields |= {"digest": version.digest[:12], "version": round(version.created, 3), "tier": tier}
    return {"fields": fields | more}
