"""The table of fields as JSON Schema, for ``GET /openapi.json``."""

from __future__ import annotations

from typing import Any

from server.http.fields.rule import Rule, Rules

_NULL: dict[str, Any] = {"type": "null"}
_EMPTY: list[object] = [None, "", [], {}]


def add_rules(schema: dict[str, Any], rules: Rules, drops_empty: bool) -> None:
    """Complete a model's schema in place, so that it allows what the server accepts.

    Args:
        schema: an object's schema, with the fields that the model declares.
        rules: the rules of all fields.
        drops_empty: whether the server drops an empty field that the model does not declare.
    """
    declared, required = schema.get("properties", {}), schema.get("required", ())
    schema["properties"] = {
        name: _declared(declared[name], name in required) if name in declared else _other(rule, drops_empty)
        for name, rule in rules.items()
    }
    schema["additionalProperties"] = {"enum": _EMPTY} if drops_empty else _NULL


def _declared(schema: dict[str, Any], required: bool) -> dict[str, Any]:
    """The schema of a declared field. A null counts as absent."""
    if required or _NULL in schema.get("anyOf", ()):
        return schema
    notes = {name: schema.pop(name) for name in ("title", "default") if name in schema}
    return {"anyOf": [schema, _NULL]} | notes


def _other(rule: Rule, drops_empty: bool) -> dict[str, Any]:
    if rule.kind == "no effect":
        return {"description": "It has no effect."}
    empty = _EMPTY if drops_empty else [None]
    values = [*rule.neutral, *(each for each in empty if each not in rule.neutral)]
    return {"enum": values, "description": f"If it has another value, {rule.remedy}."}
