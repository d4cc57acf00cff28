"""Base classes of request bodies, and what becomes of fields that the server does not support.

A field that could change an answer is honoured or refused. One that cannot is accepted without effect and named in the
answer's header ``X-Ignored-Fields``; with ``--strict`` it is refused as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_MAX_UNKNOWN_FIELDS = 16
"""An error for each; of more, the first is named."""
_MAX_IGNORED_FIELDS = 64
"""Names in one request: each is compared with the known ones."""
_LONGEST_NAME = 64
_ALIKE = 0.885
"""From 0 to 1, how similar a name must be to a known one to be a misspelling of it: ``top_n`` is none of ``top_k``."""


class Leniency:
    """How much a body may ask for in vain. It is the context of a body's validation.

    Attributes:
        strict: whether fields without effect are refused.
        ignored: names of the fields that were there and have no effect, in their order.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.ignored: dict[str, None] = {}

    @classmethod
    def of(cls, info: ValidationInfo) -> Leniency:
        """That of the validation in progress; lenient where none was given."""
        return info.context if isinstance(info.context, cls) else cls()

    def ignore(self, name: str) -> None:
        """Note a field without effect; raises ``PydanticCustomError`` for too many of them."""
        self.ignored[name] = None
        if len(self.ignored) > _MAX_IGNORED_FIELDS:
            raise PydanticCustomError("extra_forbidden", "unknown", {"param": name})


class NoOp:
    """A field of the OpenAI API that is not supported: only the values that ask for nothing pass.

    ``tools: Annotated[Any, NoOp([])] = None`` accepts null and the empty list, and answers
    everything else with an error that names the field.
    """

    def __init__(self, *values: Any) -> None:
        self.values = [None, *values]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": self.values, "description": "Not supported; accepted only with a value that changes nothing."}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        return refuse_unless_among(self.values, value)


class Harmless(NoOp):
    """A field that never changes an answer here: every value passes, with ``--strict`` those that ask for nothing."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": "Accepted without effect."}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        leniency = Leniency.of(info)
        if leniency.strict:
            return refuse_unless_among(self.values, value)
        if value not in self.values and info.field_name:
            leniency.ignore(info.field_name)
        return value


def refuse_unless_among(values: list[Any], value: Any, **context: str) -> Any:
    """``value``, if it is one of those that ask for nothing; raises ``PydanticCustomError`` with ``context``."""
    if any(value == known and type(value) is type(known) for known in values):
        return value
    allowed = ", ".join(json.dumps(known) for known in values)
    raise PydanticCustomError(
        "unsupported_parameter", "not supported by this server (accepted: {allowed})", {"allowed": allowed, **context}
    )


class Body(BaseModel):
    """A request body: unknown fields are errors, and types are not coerced ("1" is not 1).

    A body has room for a million wrong values, and an error for each would keep everybody waiting: lists end at their
    first error (``fail_fast``), and so does a body at the first of many unknown fields.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def unknown_fields(cls, value: dict[str, Any]) -> list[str]:
        """The names in ``value`` that are none of this body's fields."""
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return [name for name in value if name not in known]

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse many unknown fields by the first."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            unknown = cls.unknown_fields(value)
            if len(unknown) > _MAX_UNKNOWN_FIELDS:
                raise PydanticCustomError("extra_forbidden", "unknown", {"param": unknown[0]})
        return value


class LenientBody(Body):
    """A body with fields of other servers' making: those that cannot change an answer are ignored.

    Refused are those of ``unsupported``, unless they ask for nothing, and other names for known fields: ``synonyms``,
    and what is so similar that it must be misspelt.
    """

    model_config = ConfigDict(extra="ignore")

    unsupported: ClassVar[Mapping[str, list[Any]]] = {}
    """By name, the values besides null that ask for nothing. A name that is among the synonyms, too, is one of them."""
    synonyms: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any, info: ValidationInfo) -> Any:
        """Judge each unknown field."""
        if isinstance(value, dict) and not value.keys() <= cls.model_fields.keys():
            leniency = Leniency.of(info)
            for name in cls.unknown_fields(value):
                cls._judge(name, value[name], leniency)
        return value

    @classmethod
    def _judge(cls, name: str, value: Any, leniency: Leniency) -> None:
        """Note a field as ignored; raises ``PydanticCustomError`` for one that could change the answer."""
        if name in cls.unsupported and name not in cls.synonyms:
            refuse_unless_among([None, *cls.unsupported[name]], value, param=name)
        elif leniency.strict:
            raise PydanticCustomError("extra_forbidden", "unknown", {"param": name})
        elif name not in leniency.ignored:
            if meant := cls._meant(name):
                raise PydanticCustomError("misspelt", "unknown; did you mean {meant}?", {"meant": meant, "param": name})
            leniency.ignore(name)

    @classmethod
    def _meant(cls, name: str) -> str | None:
        """The known field that must be meant."""
        if len(name) > _LONGEST_NAME:
            return None
        return cls.synonyms.get(name) or next(iter(get_close_matches(name, cls.model_fields, 1, _ALIKE)), None)


def at_most(limit: int) -> BeforeValidator:
    """Refuses a longer list or object before anything in it is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > limit:
            raise PydanticCustomError("too_long", "must have at most {limit} entries", {"limit": limit})
        return value

    return BeforeValidator(check)
