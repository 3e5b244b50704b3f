"""``[inputs]`` of rule files: example inputs to trace with, where those that are made from the config do not fit.

::

    [inputs]
    bbox = { shape = ["batch", "sequence", 4], below = "config.max_2d_position_embeddings // 2" }
    pixel_values = { shape = ["batch", 3, "config.image_size", "config.image_size"], dtype = "float" }
    return_loss = false
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictStr,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from lora_fx.errors import RuleError, did_you_mean
from lora_fx.rules.validation import (
    INTEGERS_END,
    Items,
    Positive,
    Table,
    beside,
    expecting,
    one_of,
    plain,
    shown,
    wrong,
)

if TYPE_CHECKING:  # rule files are read without torch
    import torch

    from lora_fx.rules.rule_file import RuleSet

AXES = ("batch", "sequence", "target_sequence")
ELEMENTS = 2**28  # of one example, as a guard against a size that is a slip

_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_SIZE = re.compile(
    r"\s*(?:(?P<term>[0-9]+|config(?:\.[a-z]\w*)+|[a-z]\w*)|(?P<operator>[-+*]|//)|(?P<end>\Z)|(?P<other>.))",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)

_MISSING = object()


def parse_size(text: str) -> tuple[str, ...]:
    """Split a size such as ``"config.hidden_size // 2 + 1"`` into terms, and the operators between them.

    Raises:
        ValueError: it is no sum of products; the message names the position of what does not belong.
    """
    tokens = [
        (kind, match[kind], match.start(kind)) for match in _SIZE.finditer(text.rstrip()) if (kind := match.lastgroup)
    ]
    for index, (kind, token, start) in enumerate(tokens):
        if index % 2 == 0:
            expected = f"a number, {', '.join(AXES)} or config.<field>"
            fits = token in AXES or (kind == "term" and (token[0].isdecimal() or token.startswith("config.")))
        else:
            expected, fits = "+, -, * or //", kind in ("operator", "end")
        if not fits:
            found = f"{token!r}{did_you_mean(token, AXES)}" if token else "the end"
            raise ValueError(f"expected {expected} at position {start + 1} of {shown(text)}, found {found}")
    return tuple(token for _, token, _ in tokens[:-1])


def _check_size(value: int | str) -> int | str:
    if isinstance(value, str):
        try:
            parse_size(value)
        except ValueError as error:
            raise wrong(str(error)) from None
    return value


def evaluate(size: int | str, axes: Mapping[str, int], config: object) -> int:
    """Return the value of a size, with ``*`` and ``//`` before ``+`` and ``-``, each of them from left to right.

    Raises:
        ValueError: a field is missing or no integer, something is divided by zero, or the value is out of range.
    """
    if isinstance(size, int):
        return size
    first, *others = parse_size(size)
    total, sign, product = 0, 1, _term(first, axes, config)
    for operator, term in zip(others[::2], others[1::2], strict=True):
        value = _term(term, axes, config)
        if operator in ("+", "-"):
            total, sign, product = total + sign * product, 1 if operator == "+" else -1, value
        elif operator == "*":
            product *= value
        elif value == 0:
            raise ValueError(f"expected a divisor that is not 0, found {term} = 0 in {shown(size)}")
        else:
            product //= value
    total += sign * product
    if not 1 <= total < INTEGERS_END:
        raise ValueError(f"expected an integer ≥ 1, found {shown(size)} = {shown(total)}")
    return total


def _term(term: str, axes: Mapping[str, int], config: object) -> int:
    if term in axes:
        return axes[term]
    return _config_field(term, config) if term.startswith("config.") else int(term)


def _config_field(term: str, config: object) -> int:
    name, value = type(config).__name__, config
    for field in term.split(".")[1:]:
        fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        found = fields.get(field, getattr(value, field, _MISSING))
        if found is _MISSING:
            near = did_you_mean(field, map(str, fields))
            raise ValueError(f"expected {term} in {name}, found no {field!r} in {type(value).__name__}{near}")
        value = found
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"expected an integer as {term} in {name}, found {shown(value)}")
    return value


Size = Annotated[
    Positive | StrictStr,
    expecting('an integer ≥ 1 or a size such as "config.hidden_size // 2"'),
    AfterValidator(_check_size),
]


def _no_integer(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError("an integer")  # pydantic would make a float of one that has more than 64 bits
    return value


Integer = Annotated[int, Field(strict=True, ge=-INTEGERS_END, lt=INTEGERS_END)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_no_integer)]
Number = Integer | Finite


class ExampleInput(Table):
    """How to make an example of an input that is a tensor."""

    shape: Annotated[tuple[Size, ...], Items('["batch", "sequence"]', distinct=False)]
    """Sizes: integers, the axes batch, sequence and target_sequence, fields of the config, and sums of products of them."""

    dtype: Annotated[Literal["int64", "float", "bool"], one_of(Literal["int64", "float", "bool"])] = "int64"
    """Integers, the dtype of the model, or truth values."""

    below: Size | None = None
    """Integers are drawn from those that are ≥ 0 and less than this."""

    fill: Annotated[StrictBool | Number, expecting("a number, true or false")] | None = None
    """One value for all elements, in place of random ones."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Tell which of below and fill are wanted, and whether the value of fill has the dtype."""
        dtype, below, fill = given.get("dtype", "int64"), given.get("below"), given.get("fill")
        if below is not None and fill is not None:
            yield "below", f"expected none beside fill, found {shown(below)}"
        elif below is not None and dtype != "int64":
            yield "below", f"expected none for dtype {shown(dtype)}, found {shown(below)}"
        elif below is None and fill is None and dtype == "int64":
            yield "", "expected below or fill for dtype 'int64', found neither"
        allowed = {"int64": (int,), "float": (int, float), "bool": (bool,)}.get(str(dtype), (bool, int, float))
        if isinstance(fill, bool | int | float) and type(fill) not in allowed:
            yield "fill", f"expected a value of dtype {dtype!r}, found {shown(fill)}"


def _example(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    # Not left to the union, which would tell of a table how it fails to be each of the constants.
    return ExampleInput.model_validate(value) if isinstance(value, Mapping) else handler(value)


def _by_name(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, Mapping):
        raise wrong(f"expected a table, found {shown(value)}")
    named = {plain(key): item for key, item in value.items()}
    problems = [
        ((key,), f"expected the name of an input, found {shown(key)}") for key in named if not re.fullmatch(_NAME, key)
    ]
    return beside(problems, handler, {key: item for key, item in named.items() if re.fullmatch(_NAME, key)})


Example = Annotated[
    ExampleInput | StrictBool | Number | StrictStr,
    expecting("a table, a number, a string, true or false"),
    WrapValidator(_example),
]
Examples = Annotated[dict[Annotated[str, Field(pattern=_NAME)], Example], WrapValidator(_by_name)]


def rule_inputs(
    rules: RuleSet, config: object, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], dict[str, tuple[str | None, ...]]]:
    """Return the example inputs that rules give, and which axis each dimension of a tensor among them is.

    A dimension is an axis if its size is that axis and nothing else; the others are None. The caller's random state is left
    alone.

    Args:
        rules: whose ``[inputs]``.
        config: of the model, where sizes may be read from.
        dtype: of the model, for inputs of dtype ``"float"``.
        device: of the tensors.

    Raises:
        RuleError: a size is not an integer, or out of range, with this config; all problems are named.
    """
    import torch

    from lora_fx.tracing.example_inputs import BATCH, SEQUENCE, TARGET_SEQUENCE

    lengths = dict(zip(AXES, (BATCH, SEQUENCE, TARGET_SEQUENCE), strict=True))
    generator = torch.Generator().manual_seed(0)
    problems: list[str] = []
    values: dict[str, Any] = {}
    axes: dict[str, tuple[str | None, ...]] = {}

    def evaluated(size: int | str, *path: str | int) -> int:
        try:
            return evaluate(size, lengths, config)
        except ValueError as error:
            problems.append(f"{rules.at('inputs', *path)}: {error}")
            return 1

    for name, example in rules.inputs.items():
        if not isinstance(example, ExampleInput):
            values[name] = example
            continue
        shape = [evaluated(size, name, "shape", index) for index, size in enumerate(example.shape)]
        below = None if example.below is None else evaluated(example.below, name, "below")
        if math.prod(shape) > ELEMENTS:
            problems.append(
                f"{rules.at('inputs', name, 'shape')}: expected at most {ELEMENTS} elements, found {shown(shape)}"
            )
        if not problems:
            values[name] = _tensor(example, shape, below, dtype, generator).to(device)
            axes[name] = tuple(axis if (axis := str(size).strip()) in AXES else None for size in example.shape)
    if problems:
        raise RuleError(rules.source or f"rules {rules.name!r}", problems)
    return values, axes


def _tensor(
    example: ExampleInput, shape: list[int], below: int | None, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    import torch

    kind = {"int64": torch.int64, "float": dtype, "bool": torch.bool}[example.dtype]
    wide = torch.float64 if example.dtype == "float" else kind
    # On the CPU whatever the default device is: there the generator is, and a seed means the same for every device.
    if example.fill is not None:
        return torch.full(shape, example.fill, dtype=wide, device="cpu").to(kind)
    if example.dtype == "float":
        return torch.randn(shape, generator=generator, dtype=wide, device="cpu").to(kind)
    return torch.randint(0, below or 2, shape, generator=generator, device="cpu").to(kind)
