"""Targets, patterns and trained parts for a config: names that PEFT matches with exactly the modules of an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fx.rules.peft_config.config import DUMMY, Bias, whole_numbers
from lora_fx.rules.peft_config.name_matching import is_bias, is_named, matches_key, modules_of


def patterns(values: Mapping[str, float], default: float) -> dict[str, Any]:
    """Return ``rank_pattern`` or ``alpha_pattern`` for modules whose value is not the default.

    No two keys match one module: PEFT sorts them when it saves, so that overlapping ones change their meaning.

    Args:
        values: module → value, for all modules of the adapter.
        default: the value of modules that no key needs to match.
    """
    found: dict[str, Any] = {}
    by_leaf: dict[str, list[str]] = {}
    for module in values:
        by_leaf.setdefault(module.rpartition(".")[2], []).append(module)
    for leaf, modules in by_leaf.items():
        wanted = {values[module] for module in modules}
        if wanted == {default}:
            continue
        alike = len(wanted) == 1 and bool(_PLAIN.fullmatch(leaf)) and _matched(leaf, values) == set(modules)
        for module in [leaf] if alike else [m for m in modules if values[m] != default]:
            single = _PLAIN.fullmatch(module) and (alike or _matched(module, values) == {module})
            key = module if single else f"^{re.escape(module)}"
            found[key] = whole_numbers(values[modules[0]] if alike else values[module])
    return found


def alpha_of(rank: int, scale: float, *, rslora: bool) -> float:
    """Return the alpha that gives a scale exactly, if one does."""
    divisor = rank**0.5 if rslora else float(rank)
    near = scale * divisor
    candidates = (near, float(round(near)), *(near * (1 + ulps * 2.0**-52) for ulps in (-2, -1, 1, 2)))
    return next((alpha for alpha in sorted(candidates, key=_digits) if alpha / divisor == scale), near)


def _digits(number: float) -> int:
    return len(repr(number))


_PLAIN = re.compile(r"[\w.-]+")
"""Names that mean themselves as regular expressions, but for the dot."""


def targets(chosen: Sequence[str], others: Sequence[str]) -> tuple[str, ...] | str:
    """Return ``target_modules`` that select exactly these modules: by the ends of their names where these tell them apart.

    For no modules it is the word by which PEFT takes an adapter without branches.

    Args:
        chosen: names of the modules to select.
        others: names of all other modules, which must not match.
    """
    if not chosen:
        return DUMMY
    leaves = tuple(sorted({module.rpartition(".")[2] for module in chosen}))
    if not any(is_named(module, leaves) for module in others):
        return leaves
    if not any(is_named(module, tuple(chosen)) for module in others):
        return tuple(chosen)
    return "|".join(re.escape(module) for module in chosen)


@dataclass(frozen=True)
class TrainedParts:
    """Parameters of the model itself that train, in PEFT's words."""

    bias: Bias
    modules: tuple[str, ...]


def trained_parts(
    trained: Collection[str],
    parameters: Sequence[str],
    unread: Collection[str],
    adapted: Collection[str],
    modules: Collection[str],
) -> TrainedParts:
    """Say in PEFT's words which of a model's parameters train.

    Args:
        trained: their names.
        parameters: the names of all.
        unread: names of parameters that the model does not compute with, so that it does not matter whether they train.
        adapted: names of the modules with a branch.
        modules: names of modules that can train as a whole, which lists of modules cannot.

    Raises:
        ValueError: it cannot be said; the argument lists the parameters left over.
    """
    wanted, either = set(trained), {*trained, *unread}
    whole: list[str] = []
    covered: set[str] = set()
    candidates = {path for name in trained for path in modules_of(name)} & set(modules)
    for module in sorted(candidates, key=lambda path: (path.count("."), path)):
        parts = {n for n in parameters if any(path.endswith(module) for path in modules_of(n))}  # as PEFT matches names
        if parts <= either and not parts <= covered and not all(map(is_bias, parts)):
            whole.append(module)
            covered |= parts
    rest = wanted - covered
    biases = {name for name in parameters if is_bias(name)} - (wanted - rest)
    of_adapted = {name for name in biases if name.rpartition(".")[0] in set(adapted)}
    kinds: dict[Bias, set[str]] = {"none": set(), "lora_only": of_adapted, "all": biases}
    bias = next((kind for kind, names in kinds.items() if rest <= names <= rest | set(unread)), None)
    if bias is None:
        raise ValueError(", ".join(sorted(rest)))
    return TrainedParts(bias, tuple(whole))


def _matched(key: str, modules: Mapping[str, float]) -> set[str]:
    return {module for module in modules if matches_key(key, module)}
