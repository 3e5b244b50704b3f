"""A PEFT configuration as a rule set: ``LoraConfig`` objects, their mappings and JSON files. PEFT is not imported for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

from lora_fx.errors import RuleError
from lora_fx.rules.peft_config.config import (
    AdapterConfig,
    LayerMap,
    Method,
    known_keys,
    other_keys,
    read_document,
    validated_config,
)
from lora_fx.rules.peft_config.other_keys import VARIANTS, is_without_effect, way_of
from lora_fx.rules.peft_config.prefix_config import AHEAD, PrefixConfig
from lora_fx.rules.validation import plain, shown
from lora_fx.rules.vocabulary import TASK_HEADS, Init, TaskType, splits_weight


@runtime_checkable
class ConfigObject(Protocol):
    """What tells PEFT's ``LoraConfig`` from other objects."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping of the configuration."""


@dataclass(frozen=True)
class PeftRules:
    """A PEFT configuration that says which sites of a model get a branch.

    Attributes:
        config: of a LoRA whose factors start as in :func:`lora_fx.rewrite`: A random, B zero unless ``init_lora_weights`` is false.
        name: for plans, and for the metadata of adapters.
        source: where it comes from, for messages.
    """

    config: AdapterConfig
    name: str
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of what the configuration says, as hexadecimal digits."""
        later = {
            key for key in ("use_dora", "lora_bias", "alora_invocation_tokens") if not getattr(self.config, key)
        }  # earlier digests had them not
        return hashlib.sha256(self.config.model_dump_json(exclude_none=True, exclude=later).encode()).hexdigest()

    @property
    def saved(self) -> tuple[str, ...]:
        """Ends of the names of modules that train as a whole: those of the configuration, and those that PEFT adds for its task."""
        has_head = self.config.task_type and not self.config.has_rows_alone
        task = TASK_HEADS.get(self.config.task_type, ()) if has_head else ()  # type: ignore[call-overload]
        return (*(self.config.modules_to_save or ()), *task)

    def with_overrides(
        self, rank: int | None, alpha: float | None, dropout: float | None, task_type: str | None = None
    ) -> PeftRules:
        """Return the rules with ``r``, ``lora_alpha``, ``lora_dropout`` and ``task_type`` replaced; patterns keep their precedence.

        Raises:
            RuleError: a value is out of range.
        """
        given = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "task_type": task_type}
        changed = {key: value for key, value in given.items() if value is not None}
        source = f"arguments to rules {self.name!r}"
        return (
            replace(self, config=_checked({**json.loads(self.config.to_json()), **changed}, source))
            if changed
            else self
        )

    def with_targets(self, targets: str | tuple[str, ...] | None) -> PeftRules:
        """Return the rules with ``target_modules`` where they have none, nor ``target_parameters``.

        Raises:
            RuleError: there are none to give.
        """
        config = self.config
        if config.target_modules is not None or config.target_parameters is not None or config.has_rows_alone:
            return self
        if targets is None:
            problem = "target_modules: required, since no built-in rules name the modules of this model type"
            raise RuleError(self.source, [problem])
        return replace(self, config=self.config.model_copy(update={"target_modules": targets}))


def layers_of(rules: object) -> LayerMap | None:
    """Return the ranges of layers that rules give a model, if they are a configuration of PEFT that does."""
    return rules.config.layer_replication if isinstance(rules, PeftRules) else None


def read_peft_rules(path: Path) -> PeftRules:
    """Read a configuration from a JSON file.

    Raises:
        RuleError: there is none, or it asks for what lora_fx cannot do; all problems are named.
    """
    document = read_document(path, RuleError, "a PEFT configuration")
    return PeftRules(_checked(document, str(path)), path.stem, str(path))


def peft_rules(given: ConfigObject | Mapping[str, Any]) -> PeftRules:
    """Return a configuration that was given in code as rules.

    Raises:
        RuleError: it asks for what lora_fx cannot do; all problems are named.
    """
    source = "rules" if isinstance(given, Mapping) else type(given).__name__
    document = _as_json(given if isinstance(given, Mapping) else given.to_dict())
    custom = None if isinstance(given, Mapping) else getattr(given, "_custom_modules", None)
    if custom:
        raise RuleError(source, ["layers of classes of your own are not supported: train with PEFT"])
    return PeftRules(_checked(document, source), "peft", source)


def prefix_document(given: ConfigObject | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a configuration of prefix or prompt tuning as the document of a rule file; None for one of another method.

    Sizes that it names are those of the model, or PEFT fails.

    Raises:
        RuleError: it asks for what rules cannot say.
    """
    document = _as_json(given if isinstance(given, Mapping) else given.to_dict())
    if (config := AHEAD.get(str(document.get("peft_type")))) is None:
        return None
    random = str(document.get("prompt_tuning_init") or "RANDOM").rpartition(".")[2] == "RANDOM"
    for key in ("init_weights", "modules_to_save", *([] if random else ["prompt_tuning_init"])):
        if document.get(key):
            raise RuleError(
                "rules", [f"{key}: not supported with a {config.kind}: found {shown(document[key])}. Train with PEFT"]
            )
    table = {"tokens": document.get("num_virtual_tokens")}
    if config is PrefixConfig:
        table |= {"role": "peft", "projection": document.get("prefix_projection")}
    if table.get("projection"):
        table["hidden"] = document.get("encoder_hidden_size")
    said = {"task_type": document.get("task_type")}
    return {"defaults": said, config.kind: [{key: value for key, value in table.items() if value is not None}]}


def _as_json(value: Any) -> Any:
    """Return a value of a configuration as its JSON file has it."""
    match value:
        case Mapping():
            return {key: _as_json(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted(map(_as_json, value))
        case list() | tuple():
            return [_as_json(item) for item in value]
        case Enum():
            return value.value
        case _:
            return value


def _checked(document: Mapping[str, Any], source: str) -> AdapterConfig:
    """Return the configuration in a document, all of whose keys can be followed."""
    method = document.get("peft_type")
    if method not in get_args(Method):
        raise RuleError(source, [f"peft_type: expected 'LORA', the only method of lora_fx, found {shown(method)}"])
    init = document.get("init_lora_weights", True)
    known = known_keys(document)
    problems = list(_problems(document, known, init))
    if not _starts(init):
        known["init_lora_weights"] = True  # which was told
    try:
        config = validated_config(known, source)
    except RuleError as error:
        raise RuleError(source, [*problems, *error.problems]) from None
    if problems:
        raise RuleError(source, problems)
    return config


_INITS = tuple(name for name in get_args(Init) if name != "kaiming")  # which PEFT calls true


def _starts(init: Any) -> bool:
    return init is None or isinstance(init, bool) or (isinstance(init, str) and (init in _INITS or splits_weight(init)))


def _problems(document: Mapping[str, Any], known: Mapping[str, Any], init: Any) -> Iterator[str]:
    if document.get("init_weights") is False:
        yield "init_weights: expected true, by which the rows start as they are in the model, found false. Leave it out"
    for key, value in other_keys(document, known).items():
        if is_without_effect(key, value):
            continue
        if key in VARIANTS:
            yield f"{plain(key)}: {VARIANTS[key]} is not supported: found {shown(value)}. Leave it out, or train with PEFT{way_of(key)}"
        else:
            yield f"{plain(key)}: unknown key: found {shown(value)}. Leave it out if the result does not depend on it"
    if not _starts(init):
        yield (
            f"init_lora_weights: expected true, false, {', '.join(map(repr, _INITS))} or 'pissa_niter_16', by which factors start without "
            f"data, found {shown(init)}. Pass start= to rewrite (lora_fx.eva makes that of EVA), leave it out, or train with PEFT"
        )
    task = known.get("task_type")
    if task not in (None, *get_args(TaskType)):
        yield f"task_type: expected {', '.join(map(repr, get_args(TaskType)))} or none, found {shown(task)}"
    if known.get("target_parameters") and known.get("lora_dropout"):
        yield "lora_dropout: PEFT has none with target_parameters: expected 0"
