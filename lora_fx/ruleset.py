"""Rule files: which call sites get a branch, as data. TOML → frozen, validated rules. Imports no torch.

A rule file names the architectures it is for, the defaults of a branch, and one or more selections::

    model_types = ["t5", "mt5"]

    [defaults]
    rank = 8
    alpha = 32
    dropout = 0.1

    [[select]]
    target = ["q", "v"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lora_fx.errors import RuleError, did_you_mean

Item = TypeVar("Item")


def _not_empty(items: tuple[Item, ...]) -> tuple[Item, ...]:
    # Runs on valid items only: a minimum length on the tuple itself would also complain of those that are not.
    if not items:
        raise ValueError("at least one is required")
    return items


Rank = Annotated[int, Field(strict=True, ge=1)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
DottedSuffix = Annotated[str, Field(pattern=r"^[^.\s]+(\.[^.\s]+)*$")]

# How other tools spell our keys: an unknown key is an error, and these get a better hint than spelling distance can give.
FOREIGN_KEYS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target"}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Defaults(_Strict):
    """Settings of every branch that its selection does not override."""

    rank: Rank = 8
    alpha: Alpha = 8.0
    dropout: Dropout = 0.0


class Selection(_Strict):
    """One ``[[select]]``: the sites it claims, and what differs from the defaults there."""

    target: Annotated[tuple[DottedSuffix, ...], AfterValidator(_not_empty)]
    rank: Rank | None = None
    alpha: Alpha | None = None
    dropout: Dropout | None = None

    def matches(self, name: str) -> bool:
        """Tell whether the dotted ``name`` ends in one of the targets, part by part: ``"q"`` matches ``"a.q"``, never ``"seq"``."""
        return any(name == target or name.endswith(f".{target}") for target in self.target)


class RuleSet(_Strict):
    """A whole rule file."""

    name: str
    model_types: tuple[str, ...] = ()
    defaults: Defaults = Defaults()
    select: Annotated[tuple[Selection, ...], AfterValidator(_not_empty)]

    def with_overrides(self, rank: int | None, alpha: float | None, dropout: float | None) -> RuleSet:
        """Return the rules with the given ``[defaults]`` replaced; a selection's own settings keep their precedence.

        Raises:
            RuleError: a value is out of range.
        """
        given = {"rank": rank, "alpha": alpha, "dropout": dropout}
        changed = {key: value for key, value in given.items() if value is not None}
        if not changed:
            return self
        document = self.model_dump(exclude={"name"}, exclude_none=True)
        document["defaults"].update(changed)
        return _validate(document, self.name, source=f"arguments to rules {self.name!r}")


def load(rules: str | Path | Mapping[str, Any] | RuleSet, model_type: str | None = None) -> RuleSet:
    """Load rules.

    Args:
        rules: a built-in name (a file's stem or one of its ``model_types``), ``"auto"`` (by ``model_type``), a path to
            a ``.toml`` file, a mapping with the keys of such a file, or a loaded rule set.
        model_type: the model's ``config.model_type``, for ``"auto"``.

    Raises:
        RuleError: there is no such rule file, or it is malformed; every problem of the file is named.
    """
    if isinstance(rules, RuleSet):
        return rules
    if isinstance(rules, Mapping):
        return _validate(dict(rules), "custom", source="rules")
    if isinstance(rules, Path) or rules.endswith(".toml"):
        return _read(Path(rules))
    if rules == "auto":
        if model_type is None:
            raise RuleError("rules='auto'", ["the model has no config.model_type; name the rules or give a .toml file"])
        rules = model_type
    return _builtin(rules)


def directory() -> Path:
    """Return the directory of the built-in rule files: ``rules/`` of a checkout, ``lora_fx/_rules/`` of a wheel."""
    packaged = Path(str(resources.files("lora_fx"))) / "_rules"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "rules"


def builtin() -> Sequence[RuleSet]:
    """Return every built-in rule set, sorted by name."""
    return [_read(path) for path in sorted(directory().glob("*.toml"))]


def _builtin(name: str) -> RuleSet:
    path = directory() / f"{name}.toml"
    if path.parent == directory() and path.is_file():
        return _read(path)
    known = builtin()
    for rules in known:
        if name in rules.model_types:
            return rules
    names = sorted({rules.name for rules in known} | {kind for rules in known for kind in rules.model_types})
    raise RuleError(
        f"rules={name!r}",
        [
            f"there are no built-in rules of this name{did_you_mean(name, names)}; built in: {', '.join(names)}; or give the path of a .toml file"
        ],
    )


def _read(path: Path) -> RuleSet:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RuleError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise RuleError(str(path), [f"is not UTF-8 text: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise RuleError(str(path), [f"is not valid TOML: {error}"]) from error
    return _validate(document, path.stem, source=str(path))


def _validate(document: dict[str, Any], name: str, source: str) -> RuleSet:
    if "name" in document:
        raise RuleError(source, ["name: unknown key; a rule set is named after its file"])
    try:
        return RuleSet.model_validate({"name": name, **document})
    except ValidationError as error:
        raise RuleError(source, [_problem(detail) for detail in error.errors()]) from error


def _problem(detail: ErrorDetails) -> str:
    location = list(detail["loc"])
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if detail["type"] == "extra_forbidden":
        key = str(location[-1])
        known = _keys_at(location[:-1])
        hint = f" (did you mean {FOREIGN_KEYS[key]!r}?)" if FOREIGN_KEYS.get(key) in known else did_you_mean(key, known)
        return f"{path}: unknown key{hint}; known here: {', '.join(sorted(known))}"
    if detail["type"] == "missing":
        return f"{path}: required, and missing"
    return f"{path}: {detail['msg'].removeprefix('Value error, ')}, found {detail['input']!r}"


def _keys_at(location: Sequence[int | str]) -> set[str]:
    models: dict[str, type[BaseModel]] = {"defaults": Defaults, "select": Selection}
    model = models[str(location[0])] if location else RuleSet
    return set(model.model_fields) - {"name"}
