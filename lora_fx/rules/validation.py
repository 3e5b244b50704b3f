"""Tables of a file that take no key they do not know, and tell every problem in one form.

A problem reads ``line 12: select[0].rank: expected an integer ≥ 1, found 0``.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from lora_fx.errors import RuleError, did_you_mean
from lora_fx.rules.plain_numbers import plain_number
from lora_fx.rules.toml_lines import KeyPath

Made = TypeVar("Made")

INTEGERS_END = 2**63  # TOML's integers have 64 bits


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if abs(x) < INTEGERS_END else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        return str(x) if isinstance(x, date | time) else super().repr_instance(x, level)


shown = _Shown().repr
"""A value as problems show it, of bounded length."""


def located(path: KeyPath, lines: Mapping[KeyPath, int]) -> str:
    """Return a key path as problems name it, with its line, or the line of its table, where one is known."""
    line = _line_of(path, lines)
    parts = (f"[{part}]" if isinstance(part, int) else f".{_quoted(part)}" for part in path)
    return (f"line {line}: " if line else "") + "".join(parts).removeprefix(".")


def _line_of(path: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    return next((lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in lines), 0)


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,80}", key) else shown(key)


def wrong(text: str) -> PydanticCustomError:
    """Return the exception by which a validator reports a problem."""
    return PydanticCustomError("rule", "{text}", {"text": text})


def expecting(what: str, words: Sequence[str] = ()) -> WrapValidator:
    """Say ``expected …, found …`` of a value in whichever way it is invalid, and which of the words is near to it."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            near = did_you_mean(value, words) if isinstance(value, str) else ""
            raise wrong(f"expected {what}, found {shown(value)}{near}") from None

    return WrapValidator(validate)


def one_of(literal: Any) -> WrapValidator:
    """Say so of a ``Literal`` of two words or more."""
    words = get_args(literal)
    return expecting(f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}", words)


Plain = BeforeValidator(plain_number)
"""Numbers of numpy and tensors without dimensions are taken too, by rules that are given in code."""

Natural = Annotated[int, Field(strict=True, ge=0, lt=INTEGERS_END), Plain, expecting("an integer ≥ 0")]
Positive = Annotated[int, Field(strict=True, ge=1, lt=INTEGERS_END), Plain, expecting("an integer ≥ 1")]
Flag = Annotated[bool, Field(strict=True), expecting("true or false")]
Text = Annotated[str, Field(strict=True), expecting("a string")]
Dropout = Annotated[float, Field(strict=True, ge=0, lt=1), Plain, expecting("a number ≥ 0 and < 1")]


def _check_layers(layers: int | str) -> int | str:
    if isinstance(layers, str):
        first, _, last = layers.partition("-")
        if last and int(last) < int(first):
            raise wrong(f"expected the first layer before the last, found {layers!r}")
    return layers


Layers = Annotated[
    Natural | Annotated[str, Field(strict=True, pattern=r"^[0-9]{1,9}-([0-9]{1,9})?$")],
    expecting('an integer ≥ 0 or a range such as "4-7" or "4-"'),
    AfterValidator(_check_layers),
]


def beside(problems: Sequence[tuple[KeyPath, str]], handler: Callable[[Any], Made], value: Any) -> Made:
    """Return the result of ``handler`` for a value, or raise these problems together with its own."""
    found = list(problems)
    try:
        made = handler(value)
    except ValidationError as error:
        found += [(detail["loc"], _message(detail)) for detail in error.errors(include_url=False)]
    if found:
        details = [InitErrorDetails(type=wrong(text), loc=path, input=None) for path, text in found]
        raise ValidationError.from_exception_data("table", details)
    return made


@dataclass(frozen=True)
class Items:
    """Metadata of a tuple that is a list in a file."""

    example: str
    least: int = 1
    distinct: bool = True

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "minItems": self.least, "uniqueItems": self.distinct}

    def _validate(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, list | tuple):
            raise wrong(f"expected a list, e.g. {self.example}, found {shown(value)}")
        if len(value) < self.least:
            raise wrong(f"at least one is required, found {shown(value)}")
        items = handler(value)
        if self.distinct and len(set(items)) < len(items):
            twice = next(item for item in items if items.count(item) > 1)
            raise wrong(f"expected each item once, found {shown(twice)} {items.count(twice)} times")
        return items


class Table(BaseModel):
    """A table that takes no key which it does not know, and tells all its problems at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    foreign_keys: ClassVar[Mapping[str, str]] = {}
    """How others spell keys: a better hint than spelling distance can give."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG003
        """Yield a key, or nothing for the table, and the problem with the combination of the given values.

        The values are not validated yet, so that these problems are reported beside those of each value.
        """
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_problems(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise wrong(f"expected a table, found {shown(value)}")
        given = {key: item for key, item in value.items() if key in cls.model_fields and item is not None}
        problems: list[tuple[KeyPath, str]] = [
            ((key,), cls.unknown(key)) for key in map(plain, value) if key not in cls.model_fields
        ]
        problems += [((key,) if key else (), text) for key, text in cls.as_a_whole(given)]
        return beside(problems, handler, given)

    @classmethod
    def unknown(cls, key: str) -> str:
        """Return the message for a key that the table does not have."""
        known = sorted(cls.model_fields)
        foreign = cls.foreign_keys.get(key)
        hint = f" (did you mean {foreign!r}?)" if foreign in known else did_you_mean(key, known)
        return f"unknown key{hint}; known here: {', '.join(known)}"


class Bounds(Table):
    """An inclusive range; one of its ends may be left open."""

    min: Natural | None = None
    """The least."""

    max: Natural | None = None
    """The greatest."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Tell whether there is a bound, and whether the two leave something between them."""
        least, most = given.get("min"), given.get("max")
        if not given:
            yield "", "expected min, max or both, found neither"
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield "", f"expected min ≤ max, found {shown(least)} and {shown(most)}"

    def admits(self, size: int) -> bool:
        """Tell whether ``size`` lies within."""
        return (self.min is None or self.min <= size) and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        if self.min is None:
            return f"≤ {self.max}"
        return f"≥ {self.min}" if self.max is None else f"{self.min} to {self.max}"


def plain(key: object) -> str:
    """Return a key as text that can be encoded, which one of a mapping given in code need not be."""
    return str(key).encode(errors="backslashreplace").decode()


def _message(detail: ErrorDetails) -> str:
    return "required, and missing" if detail["type"] == "missing" else detail["msg"]


TableKind = TypeVar("TableKind", bound=Table)


def validated(
    kind: type[TableKind],
    document: Mapping[str, Any],
    source: str,
    lines: Mapping[KeyPath, int] | None = None,
    *,
    within: KeyPath = (),
) -> TableKind:
    """Return a document as a table of a kind.

    Raises:
        RuleError: it is none; all problems are named, in the order of their lines.
    """
    known = lines or {}
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        found = [((*within, *detail["loc"]), _message(detail)) for detail in error.errors(include_url=False)]
        found.sort(key=lambda problem: _line_of(problem[0], known))
        raise RuleError(source, [f"{located(path, known)}: {text}" for path, text in found]) from error
