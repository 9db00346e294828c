"""The base of all request bodies, as strict models. An unknown field is refused by name.

``fields`` has the rule of each field. Sizes are checked before contents. Checking stops at the first error,
so a million wrong items cost no more than one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from server.http.fields import Rules
from server.http.fields.json_schema import add_rules

MAX_ITEMS = 2048
"""Most items of a list or an object, unless a field declares another limit. It is OpenAI's for messages."""
MAX_VALUES = 1 << 19
"""Most values (numbers, strings, lists, …) in a whole body. Only token ids can be that many."""
MAX_NAMES = 1 << 16
"""Most names of fields in a whole body, at all levels together. Parts and tools need far fewer."""

Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A JSON object. It may have the fields that its ``rules`` accept. A null counts as absent.

    Attributes:
        rules: the rule of each field. A field that is not there is refused.
        drops_empty: whether a field that is not declared is dropped if its value is empty.
        longest: the most items of a field, if it is not ``MAX_ITEMS``.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
    rules: ClassVar[Rules]
    drops_empty: ClassVar[bool] = False
    longest: ClassVar[dict[str, int]] = {}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        add_rules(handler.resolve_ref_schema(schema), cls.rules, cls.drops_empty)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _apply_rules(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_ITEMS:
            raise PydanticCustomError("too_many", f"has {len(data)} fields; at most {MAX_ITEMS} are allowed")
        cls._prepare(data)
        declared, kept = cls.model_fields, {}
        for key, value in data.items():
            if value is None:
                continue
            if key not in declared:
                cls._refuse_unless_accepted(key, value)
                continue
            if isinstance(value, (list, dict)) and len(value) > (most := cls.longest.get(key, MAX_ITEMS)):
                raise _too_long(key, value, most)
            kept[key] = value
        return kept

    @classmethod
    def _prepare(cls, data: dict[str, Any]) -> None:
        """Change ``data`` in place before it is checked."""

    @classmethod
    def _refuse_unless_accepted(cls, key: str, value: object) -> None:
        rule = cls.rules.get(key)
        empty = cls.drops_empty and value in ("", [], {})
        if not empty and (rule is None or not rule.accepts(value)):
            raise unsupported(key, "leave it out" if rule is None else rule.remedy)


def unsupported(field: str, remedy: str) -> PydanticCustomError:
    """The error of a field that is refused by name."""
    return PydanticCustomError("unsupported", "{remedy}", {"field": field, "remedy": remedy})


def _too_long(field: str, value: list[Any] | dict[str, Any], most: int) -> PydanticCustomError:
    kind = "array" if isinstance(value, list) else "object"
    message = (  # OpenAI's words
        f"{kind} too long. Expected an {kind} with maximum length {most}, "
        f"but got an {kind} with length {len(value)} instead"
    )
    context = {"field": field, "message": message}
    return PydanticCustomError(f"{kind}_above_max_length", "{message}", context)
