"""``adapter_config.json`` of a PEFT adapter directory, as data: which modules it adapts, and how. Imports no torch.

Of LoRA, and of trainable tokens alone, which are rows of embeddings as a LoRA may have them too. Read as PEFT 0.21 reads it.
Unsupported options that would change the result are refused by name: initialisations that changed the base weights, and every unknown
option that is switched on and that nobody says to have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from lora_fx.errors import AdapterError, RuleError, hub_hint, option, warn
from lora_fx.files.bounded import CONFIG_BYTES, read_bounded
from lora_fx.rules.peft_config.name_matching import admits_layer, is_bias, is_named, modules_of, value_of_pattern
from lora_fx.rules.peft_config.other_keys import UNUSED, is_off, problem_of_key
from lora_fx.rules.peft_config.other_methods import why_not_applied
from lora_fx.rules.rule_file import Regex, Setting
from lora_fx.rules.safe_regex import problem_of_patterns
from lora_fx.rules.validation import (
    Dropout,
    Flag,
    Natural,
    Positive,
    Table,
    Text,
    expecting,
    one_of,
    plain,
    shown,
    validated,
    wrong,
)
from lora_fx.rules.vocabulary import Scaling, Start, Variant, splits_weight

CONFIG_NAME = "adapter_config.json"
MAX_VALUES = 300_000  # of a config: all rows of a large vocabulary, as trainable tokens

DUMMY = "dummy-target-modules"
"""By what PEFT adapts no module."""

ALL_LINEAR = "all-linear"
"""Word of PEFT's users for all linear layers but the head; its files have the layers' names instead."""


def _check_init(init: bool | str) -> bool | str:
    if init in _CHANGED_BASE:
        raise wrong(
            f"{_CHANGED_BASE[str(init)]} changed the base weights when the adapter was made, so that its factors do not fit the base "
            "that you have. Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…), or fold it there"
        )
    if isinstance(init, str) and init not in _SAME_BASE and not splits_weight(init):
        raise wrong(f"expected true, false or one of {', '.join(map(repr, _SAME_BASE))}, found {shown(init)}")
    return init


def _check_patterns(patterns: Any) -> Any:
    problem = problem_of_patterns(patterns) if isinstance(patterns, dict) else None
    if problem is not None:
        raise wrong(problem)
    return patterns


def _check_rows(rows: Any) -> Any:
    for each in rows.values() if isinstance(rows, dict) else (rows or (),):
        if len(set(each)) < len(each):
            raise wrong(f"expected each row once, found {shown(list(each))}")
    return rows


_CHANGED_BASE = {"corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_SAME_BASE = ("gaussian", "eva", "orthogonal", "mica")
_STARTS: Mapping[bool | str, Start] = {True: "kaiming", "eva": "kaiming", False: "random"}

Number = Annotated[float, Field(strict=True, allow_inf_nan=False), expecting("a finite number")]
Names = Annotated[tuple[Text, ...], expecting("a list of names")]
Bias = Literal["none", "all", "lora_only"]
Method = Literal["LORA", "TRAINABLE_TOKENS"]
Config = TypeVar("Config", bound=Table)
LayerMap = tuple[tuple[int, int], ...]
"""Ranges of layers, each from its first to past its last, that a model has one after the other."""


def problem_of_layers(expected: LayerMap, found: LayerMap) -> str | None:
    """Return why an adapter for a graph with ranges of layers is none for another graph; None if it is. No ranges are the model's own layers."""
    if expected == found:
        return None
    wanted, has = (f"the layers {shown(list(map(list, each)))}" if each else "" for each in (expected, found))
    advice = (
        "Give the model to from_adapter or rewrite, which replicate them; graph.merge_and_unload() makes a model of that with weights of its "
        "own in each layer"
        if expected
        else "Trace the model without layer_replication: lora_fx.trace(model)"
    )
    return (
        f"layer_replication: expected a graph with {wanted or 'the layers of the model itself'}, and this has "
        f"{has or 'those of the model itself'}. {advice}"
    )


class SharedKeys(Table):
    """What the configs of all methods say in the same words."""

    modules_to_save: Names | None = None
    """Modules that train as a whole, by the ends of their names."""

    inference_mode: Flag = False
    """Whether the adapter is frozen once loaded."""

    task_type: Text | None = None
    """The task that PEFT wraps the model for."""

    auto_mapping: Annotated[dict[str, Any] | None, expecting("an object")] = None
    """The class of the model, where there is no task."""

    base_model_name_or_path: Text | None = None
    """The model that the adapter was trained on."""

    revision: Text | None = None
    """Of that model."""

    peft_version: Text | None = None
    """By which the file was written."""


class AdapterConfig(SharedKeys):
    """Modules that an adapter adapts, and how, in PEFT's words."""

    peft_type: Annotated[Method, one_of(Method)]
    """The kind of adapter. Trainable tokens alone have no branches, and ``target_modules`` names their embeddings."""

    r: Positive = 8
    """Rank of the branches that ``rank_pattern`` does not name."""

    lora_alpha: Number = 8
    """Numerator of the scaling of the branches that ``alpha_pattern`` does not name."""

    rank_pattern: Annotated[dict[Regex, Positive], BeforeValidator(_check_patterns)] = {}  # noqa: RUF012 -- pydantic copies it
    """Regular expression → rank. The first that matches a name, or its end after a dot, counts."""

    alpha_pattern: Annotated[dict[Regex, Number], BeforeValidator(_check_patterns)] = {}  # noqa: RUF012
    """Regular expression → numerator of the scaling, matched as in ``rank_pattern``."""

    use_rslora: Flag = False
    """Whether the scaling is alpha / √rank, not alpha / rank."""

    use_dora: Flag = False
    """Whether the branches are DoRA's, with magnitudes."""

    lora_bias: Flag = False
    """Whether the factors B have biases."""

    alora_invocation_tokens: Annotated[tuple[Natural, ...] | None, expecting("a list of integers ≥ 0")] = None
    """The tokens from whose last place in each row on the branches act."""

    lora_dropout: Dropout = 0.0
    """Probability with which an element of a branch's input is dropped in training."""

    target_modules: Annotated[Regex | Names | None, expecting("a regular expression or a list of names")] = None
    """A regular expression for whole names, or names and ends of names after a dot."""

    exclude_modules: Annotated[Regex | Names | None, expecting("a regular expression or a list of names")] = None
    """Modules without a branch, given as in ``target_modules``."""

    layers_to_transform: Annotated[Natural | tuple[Natural, ...] | None, expecting("an integer or a list of them")] = (
        None
    )
    """Of the modules that are listed by their names, only those in these layers."""

    layers_pattern: Annotated[Regex | tuple[Regex, ...] | None, expecting("a name or a list of names")] = None
    """The part of a name before the number of a layer."""

    target_parameters: Names | None = None
    """Parameters that are no module's ``weight``, or ends of their names after a dot."""

    bias: Annotated[Bias, one_of(Bias)] = "none"
    """Which biases train as well."""

    trainable_token_indices: Annotated[
        tuple[Natural, ...] | dict[str, tuple[Natural, ...]] | None,
        expecting("a list of integers ≥ 0, or an object with such lists by names of modules"),
        AfterValidator(_check_rows),
    ] = None
    """Rows of embeddings that train: of the input embedding, or of modules by the ends of their names."""

    layer_replication: Annotated[
        tuple[tuple[Natural, Natural], ...] | None,
        expecting("a list of pairs of integers ≥ 0"),
        AfterValidator(lambda ranges: ranges or None),
    ] = None
    """Ranges of layers that the model has one after the other, over its own weights, in place of its layers."""

    ensure_weight_tying: Flag = False
    """Whether modules that share a weight with one that is adapted or trains are adapted or train with it."""

    init_lora_weights: Annotated[Flag | Text, AfterValidator(_check_init)] = True
    """How the factors began."""

    fan_in_fan_out: Flag = False
    """Whether weights are stored (in, out). Not to be trusted: the operator tells."""

    @property
    def has_rows_alone(self) -> bool:
        """Whether it is of trainable tokens alone."""
        return self.peft_type == "TRAINABLE_TOKENS"

    @property
    def rows_key(self) -> str:
        """The key of its file that says which rows of embeddings train."""
        return "token_indices" if self.has_rows_alone else "trainable_token_indices"

    def selects(self, module: str) -> bool:
        """Tell whether a module of this name gets a branch; PEFT gives none to what ``modules_to_save`` names.

        Raises:
            TimeoutError: a regular expression takes too long.
        """
        if self.has_rows_alone:
            return False
        if self.exclude_modules is not None and is_named(module, self.exclude_modules):
            return False
        if any(f".{saved}." in f".{module}." for saved in self.modules_to_save or ()):
            return False
        if self.target_modules is None or not is_named(module, self.target_modules):
            return False
        return (
            isinstance(self.target_modules, str)
            or module in self.target_modules
            or admits_layer(module, self.layers_to_transform, self.layers_pattern)
        )

    def selects_parameter(self, parameter: str) -> bool:
        """Tell whether a parameter gets a branch of its own."""
        return self.target_parameters is not None and is_named(parameter, self.target_parameters)

    def saves(self, module: str) -> bool:
        """Tell whether a module trains as a whole."""
        return any(module.endswith(name) for name in self.modules_to_save or ())

    def saves_any(self, parameter: str) -> bool:
        """Tell whether a parameter is in a module that trains as a whole."""
        return any(self.saves(module) for module in modules_of(parameter))

    def setting_of(self, module: str) -> Setting:
        """Return the settings of the branch at a module or a parameter.

        Raises:
            TimeoutError: a regular expression takes too long.
        """
        rank = value_of_pattern(self.rank_pattern, module, self.r)
        alpha = value_of_pattern(self.alpha_pattern, module, self.lora_alpha)
        start = _STARTS.get(self.init_lora_weights) or str(self.init_lora_weights)
        scaling: Scaling = "rslora" if self.use_rslora else "standard"
        variant: Variant = "dora" if self.use_dora else "lora"
        return Setting(
            rank,
            alpha,
            self.lora_dropout,
            scaling,
            start,
            variant=variant,
            bias=self.lora_bias,
            invocation_tokens=self.alora_invocation_tokens or (),
        )

    def problem_of_layers(self, layers: LayerMap) -> str | None:
        """Return why an adapter is none for a graph whose model has these ranges of layers; None if it is.

        One that says nothing of layers is for any: PEFT adds it to the model as it is.
        """
        return None if self.layer_replication is None else problem_of_layers(self.layer_replication, layers)

    def to_json(self) -> str:
        """Return the file, with all keys that PEFT 0.21 writes, in its form."""
        said = {key: value for key, value in self.model_dump(mode="json").items() if key in AdapterConfig.model_fields}
        for key in ("lora_alpha", "alpha_pattern"):
            said[key] = whole_numbers(said[key])
        if self.has_rows_alone:
            rows = {"token_indices": said["trainable_token_indices"], "init_weights": True}
            return json.dumps({**{key: said[key] for key in _SHARED}, **rows}, indent=2, sort_keys=True)
        return json.dumps({**UNUSED, **said}, indent=2, sort_keys=True)


_SHARED = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("target_modules", "task_type"),
)
"""Keys that a config of trainable tokens alone has as a LoRA's has them."""


def known_keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says by keys that are applied, under the names that these have here."""
    if document.get("peft_type") != "TRAINABLE_TOKENS":
        return {key: value for key, value in document.items() if key in AdapterConfig.model_fields}
    rows = {"trainable_token_indices": document.get("token_indices") or ()}
    return {key: value for key, value in document.items() if key in _SHARED} | rows


def other_keys(document: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return what a config says by other keys than the known ones, and than those of trainable tokens."""
    of_tokens = ("token_indices", "init_weights") if document.get("peft_type") == "TRAINABLE_TOKENS" else ()
    return {key: value for key, value in document.items() if key not in known and key not in of_tokens}


def validated_config(known: Mapping[str, Any], source: str) -> AdapterConfig:
    """Return the config that known keys make.

    Raises:
        RuleError: some have other values than they can have; all problems are named.
    """
    rows, is_alone = known.get("trainable_token_indices"), known["peft_type"] == "TRAINABLE_TOKENS"
    try:
        config = validated(AdapterConfig, dict(known), source)
    except RuleError as error:
        renamed = [text.replace("trainable_token_indices", "token_indices") for text in error.problems]
        raise RuleError(source, renamed if is_alone else error.problems) from None
    if is_alone and not (rows and isinstance(rows, list | tuple)):
        raise RuleError(
            source, [f"token_indices: expected a list of integers ≥ 0, the rows that train, found {shown(rows)}"]
        )
    return config


def config_in(document: Mapping[str, Any], source: str, ignored: Collection[str] = ()) -> AdapterConfig:
    """Return the config that a document of this method has; it raises as :func:`~lora_fx.rules.peft_config.read_config.read_config` does.

    Args:
        document: the object of its JSON.
        source: where it is, for messages.
        ignored: see :func:`~lora_fx.rules.peft_config.read_config.read_config`.
    """
    _check_method(document, source)
    given = known_keys(document)
    return beside_other_keys(given, other_keys(document, given), validated_config, source, ignored)


def beside_other_keys(
    given: Mapping[str, Any],
    others: Mapping[str, Any],
    make: Callable[[Mapping[str, Any], str], Config],
    source: str,
    ignored: Collection[str],
) -> Config:
    """Return the config that known keys make, if no other key has an effect on the result.

    Args:
        given: what a document says by the keys that are applied.
        others: what it says by others.
        make: returns the config of the known keys, or raises a :class:`RuleError`.
        source: where the document is, for messages.
        ignored: see :func:`~lora_fx.rules.peft_config.read_config.read_config`.

    Raises:
        AdapterError: it is malformed, or asks for what lora_fx cannot apply; all problems are named.
    """
    problems = [f"{key}: is applied, and cannot be ignored" for key in given if key in ignored]
    problems += [problem for key, value in others.items() if (problem := problem_of_key(key, value, ignored))]
    try:
        config = make(given, source)
    except RuleError as error:
        raise AdapterError(source, [*problems, *error.problems]) from None
    if problems:
        raise AdapterError(source, problems)
    passed = [plain(key) for key, value in others.items() if key in ignored and not is_off(value)]
    if passed:
        warn(f"{source}: {', '.join(passed)} ignored, as {option('ignore_config_keys', '--ignore-config-key')} says.")
    return config


def _check_method(document: Mapping[str, Any], source: str) -> None:
    """Refuse another method than LoRA in one line: the rest of its config, and its tensors, are of no interest."""
    method = document.get("peft_type")
    if isinstance(method, str) and (why := why_not_applied(method)) is not None:
        raise AdapterError(source, [f"peft_type: expected 'LORA', found {method!r}, {why}"])
    if method not in get_args(Method):
        found = "no such key: this is no PEFT adapter" if method is None else shown(method)
        raise AdapterError(source, [f"peft_type: expected 'LORA', the only method that lora_fx applies, found {found}"])


def trains_bias(config: AdapterConfig, parameter: str, adapted: Collection[str]) -> bool:
    """Tell whether a config lets a parameter train as a bias."""
    if config.bias == "none" or not is_bias(parameter):
        return False
    return config.bias == "all" or parameter.rpartition(".")[0] in adapted


def whole_numbers(value: Any) -> Any:
    """Return numbers without a fraction as integers, as PEFT's users write them."""
    if isinstance(value, dict):
        return {key: whole_numbers(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_document(path: Path, error_class: type[AdapterError | RuleError], expected: str) -> Mapping[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: of the file.
        error_class: raised where there is none.
        expected: noun phrase for it.
    """
    try:
        text = read_bounded(path, CONFIG_BYTES)
    except OSError as error:
        problem = f"expected {expected}, with {path.name}: {error.strerror}"
        hint = hub_hint(path.parent)
        raise error_class(str(path.parent), [f"{problem}.{hint}" if hint else problem]) from error
    if text.count(b",") > MAX_VALUES:
        raise error_class(str(path), [f"expected a config, found more than {MAX_VALUES} values"])
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise error_class(str(path), [f"expected JSON: {error}"]) from error
    if not isinstance(document, dict):
        raise error_class(str(path), [f"expected an object, found {shown(document)}"])
    return document
