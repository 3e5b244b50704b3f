"""Lookup of rules: by path, by the name of a file, by model type, or by role. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

from lora_fx.errors import RuleError, did_you_mean, option
from lora_fx.rules.peft_config.rules import ConfigObject, PeftRules, peft_rules, prefix_document, read_peft_rules
from lora_fx.rules.rule_file import FileDefaults, RuleFile, RuleSet, Selection
from lora_fx.rules.toml_lines import KeyPath, read_toml
from lora_fx.rules.validation import Bounds, validated

_log = logging.getLogger(__name__)

RULES_PATH = "LORA_FX_RULES"
"""Environment variable with directories of rule files."""


Rules = RuleSet | PeftRules
"""Rules as they are loaded."""

RulesLike = str | Path | Sequence[str] | Mapping[str, Any] | ConfigObject | Rules | None
"""What :func:`load` takes."""


def load(rules: RulesLike, model_type: str | None = None, directories: Sequence[str | Path] = ()) -> Rules:
    """Load rules.

    A name is looked for in ``directories``, then in those of the environment variable ``LORA_FX_RULES``, then among the
    built-in rules; in each of them a file's stem comes before its ``model_types``. A file hides those of the same stem in
    later directories.

    Args:
        rules: the stem of a rule file or one of its ``model_types``, ``"auto"`` (by ``model_type``; the queries and values
            of attention where there is no file for it), ``"all-linear"`` (every linear but heads, routers, and
            products with one output feature, such as gates), ``"all-conv"`` (every convolution that is not in groups),
            a path to a ``.toml`` file, names of modules, a mapping with the keys
            of such a file, a loaded rule set; None for ``"auto"``; or a configuration of PEFT: a ``peft.LoraConfig``, its mapping, or
            the path of its ``.json`` file.
        model_type: the model's ``config.model_type``, for ``"auto"``, and for a configuration of PEFT that names no modules.
        directories: of further rule files.

    Raises:
        RuleError: there is no such rule file or directory, or the file is malformed; every problem of the file is named.
    """
    if isinstance(rules, Rules):
        return rules
    if rules is None:
        return load("auto", model_type, directories)
    if isinstance(rules, ConfigObject) or (isinstance(rules, Mapping) and "peft_type" in rules):
        if (ahead := prefix_document(rules)) is not None:
            return _rule_set(ahead, "peft", "rules", {})
        return _with_default_targets(peft_rules(rules), model_type)
    if isinstance(rules, Mapping):
        _check_not_of_peft(rules)
        return _rule_set(rules, "custom", "rules", {})
    if isinstance(rules, list | tuple | set | frozenset) and all(isinstance(name, str) for name in rules):
        names = sorted(rules) if isinstance(rules, set | frozenset) else list(rules)
        return _rule_set({"select": [{"target": names}]}, "custom", "rules", {})
    if not isinstance(rules, str | Path):
        expected = "a name, a path, names of modules, a mapping, loaded rules or a configuration of PEFT"
        raise RuleError("rules", [f"expected {expected}, got {type(rules).__name__}"])
    if str(rules).endswith(".json"):
        return _with_default_targets(read_peft_rules(Path(rules)), model_type)
    if isinstance(rules, Path) or rules.endswith(".toml"):
        return _read(Path(rules))
    if rules == "all-linear":
        return _made(rules, Selection(op=("linear",), exclude_role=("head", "router"), out_features=Bounds(min=2)))
    if rules == "all-conv":
        return _made(rules, Selection(op=("conv1d", "conv2d", "conv3d"), exclude_role=("head",), groups=Bounds(max=1)))
    folders = _folders(directories)
    name = model_type if rules == "auto" else rules
    found = None if name is None else _find(name, folders)
    if found is None and rules == "auto":
        why = f"no rule file is for model type {name!r}" if name else "the model has no config.model_type"
        _log.info("%s: rules 'auto' select the query and value projections of attention by their role", why)
        return _made(rules, Selection(role=("attention.query", "attention.value")))
    return found or _unknown(rules, folders)


def has_prefix(rules: Rules) -> bool | Literal["prompt"]:
    """Tell whether rules ask for a prefix that is a past, or for a prompt, which graphs are traced for."""
    return isinstance(rules, RuleSet) and (
        "prompt" if rules.prompt else any(each.place is None for each in rules.prefix)
    )


def model_type_of(config: object) -> str | None:
    """Return the type of a model by which rules are found: of its config's ``model_type``, or its class where diffusers wrote the config."""
    named = config.get("_class_name") if isinstance(config, Mapping) else None
    found = getattr(config, "model_type", None) or named
    return found if isinstance(found, str) else None


def _check_not_of_peft(rules: Mapping[str, Any]) -> None:
    """Raise :class:`RuleError` for a mapping with the keys of a PEFT configuration that does not say that it is one."""
    theirs = [key for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save") if key in rules]
    if theirs and "select" not in rules:
        raise RuleError(
            "rules",
            [
                f"{', '.join(theirs)} are keys of a PEFT configuration: add 'peft_type': 'LORA' to have it read as PEFT reads it; as rules "
                "say {'defaults': {'rank': 8, 'alpha': 16}, 'select': [{'target': ['q', 'v']}]}"
            ],
        )


def directory() -> Path:
    """Return the directory of the built-in rule files: ``rules/`` of a checkout, ``lora_fx/_rules/`` of a wheel."""
    package = Path(str(resources.files("lora_fx")))
    packaged = package / "_rules"
    return packaged if packaged.is_dir() else package.parent / "rules"


def builtin() -> Sequence[RuleSet]:
    """Return every built-in rule set, sorted by name."""
    return [_read(path) for path in _files(directory())]


def available(directories: Sequence[str | Path] = ()) -> Sequence[RuleSet]:
    """Return every rule set that :func:`load` finds by its name: those of the directories, of the environment variable, built in."""
    found: dict[str, RuleSet] = {}
    for folder in _folders(directories):
        found = {**{rules.name: rules for rules in map(_read, _files(folder))}, **found}
    return [found[name] for name in sorted(found)]


def file_of(name: str, directories: Sequence[str | Path] = ()) -> Path:
    """Return the file of rules of a name, as :func:`load` finds it.

    Raises:
        RuleError: there is none.
    """
    if name in ("auto", "all-linear", "all-conv"):
        raise RuleError(_named(name), ["these follow from the model, and have no file"])
    if name.endswith((".toml", ".json")):
        raise RuleError(_named(name), ["expected a name of rules, got the path of some"])
    found = _find(name, folders := _folders(directories))
    return Path(found.source) if found is not None else _unknown(name, folders)


def _with_default_targets(rules: PeftRules, model_type: str | None) -> PeftRules:
    """Return a configuration with the modules that PEFT takes for a model type where it names none: those of the built-in rules."""
    found = None if model_type is None else _find(model_type, [directory()])
    selection = found.select[0] if found is not None and len(found.select) == 1 else None
    return rules.with_targets(None if selection is None else selection.target or selection.regex)


def _folders(directories: Sequence[str | Path]) -> list[Path]:
    listed = [Path(entry) for entry in os.environ.get(RULES_PATH, "").split(os.pathsep) if entry]
    for folder in (given := [*map(Path, directories), *listed]):
        if not folder.is_dir():
            origin = (
                f"the environment variable {RULES_PATH}" if folder in listed else option("directories", "--rules-dir")
            )
            raise RuleError(str(folder), [f"is no directory; it is listed in {origin}"])
    return [*given, directory()]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.toml") if path.is_file())


def _find(name: str | None, folders: Sequence[Path]) -> RuleSet | None:
    hidden: set[str] = set()
    for folder in folders:
        paths = {path.stem: path for path in _files(folder) if path.stem not in hidden}
        if name in paths:
            return _read(paths[name])
        found = next((rules for rules in map(_read, paths.values()) if name in rules.model_types), None)
        if found:
            return found
        hidden |= paths.keys()
    return None


def _unknown(name: str, folders: Sequence[Path]) -> NoReturn:
    names = {
        folder: sorted({n for path in _files(folder) for n in (path.stem, *_read(path).model_types)})
        for folder in folders
    }
    near = did_you_mean(name, {"auto", "all-linear", "all-conv", *(n for known in names.values() for n in known)})
    built_in = ", ".join(names.pop(directory()))
    further = "".join(f"; in {folder}: {', '.join(known)}" for folder, known in names.items())
    if os.path.exists(name):  # noqa: PTH110 -- False for a name that no path can have, where Path.exists raises
        what = "directory" if Path(name).is_dir() else "file"
        raise RuleError(_named(name), [f"there are no rules of this name, and the {what} is no .toml or .json file"])
    modules = json.dumps([part.strip() for part in name.split(",")])
    listing = option(
        f"names of modules are a list, {modules}",
        f"names of modules stand in a .toml file: [[select]] target = {modules}",
    )
    near = near or f"; {listing}"
    problem = (
        f"there are no rules of this name{near}. For any model: auto, all-linear, all-conv, or a path (.toml, or .json of PEFT); "
        f"built in: {built_in}{further}"
    )
    raise RuleError(_named(name), [problem])


def _named(name: str) -> str:
    """Return how messages name rules."""
    return option(f"rules={name!r}", f"--rules {name}")


def _made(name: str, selection: Selection) -> RuleSet:
    return RuleSet(
        name=name, source=_named(name), defaults=FileDefaults(rank=8, alpha=32, dropout=0.1), select=(selection,)
    )


def _read(path: Path) -> RuleSet:
    document, lines = read_toml(path)
    return _rule_set(document, path.stem, str(path), lines)


def _rule_set(document: Mapping[str, Any], name: str, source: str, lines: Mapping[KeyPath, int]) -> RuleSet:
    file = validated(RuleFile, document, source, lines)
    said = {key: getattr(file, key) for key in RuleFile.model_fields}
    return RuleSet(name=name, source=source, lines=lines, **said)
