"""Adapters whose modules have other names in the graph: those that transformers renamed since, by its own table for checkpoints.

The table (``transformers.conversion_mapping``) goes by the model's class, and then by its type; ``model.`` in front is added where it
is missing, and dropped where it is twice. Experts that were modules of their own become parts of stacks, see
:mod:`lora_fx.adapters.peft_format.experts`. The config is read by the names that the adapter was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from lora_fx.adapters.peft_format.experts import ExpertKey, stacked
from lora_fx.adapters.peft_format.keys import PREFIX, base_name, is_of_method, module_of_key, token_key
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.errors import AdapterError, LoraFxError, shortened
from lora_fx.graph.adapter_names import is_of_adapter
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import known_info
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig
from lora_fx.rules.peft_config.name_matching import modules_of
from lora_fx.sites.call_sites import sites
from lora_fx.tracing.transformers_models import KeyConversions, empty_double


def fitted(files: AdapterFiles, graph_module: fx.GraphModule) -> AdapterFiles:
    """Return an adapter with the names that its modules have in a graph; keys that fit nowhere stay as they are.

    Args:
        files: of the adapter.
        graph_module: it may be on the meta device.

    Raises:
        AdapterError: no factor is at a module of the graph, or the factors of experts cannot be stacked.
    """
    try:
        return _fitted(files, graph_module)
    except TimeoutError as error:  # of a regular expression
        raise AdapterError(str(files.directory), [f"{CONFIG_NAME}: {error}"]) from error


def _fitted(files: AdapterFiles, graph_module: fx.GraphModule) -> AdapterFiles:
    names = _Names.of(graph_module)
    files = files.placed(_sizes(graph_module, names)) if files.foreign else files
    strange = [key for key in files.file.entries if not names.have(key)]
    moved: dict[str, str] = {}
    experts: list[ExpertKey] = []
    conversions = _Conversions.of(graph_module, names) if strange else _Conversions(KeyConversions(), names)
    for key in strange:
        if (new := conversions.renamed(key)) is not None:
            moved[key] = new
        elif (expert := conversions.expert(key)) is not None:
            experts.append(expert)
    rest = set(strange) - moved.keys() - {expert.key for expert in experts}
    _check_any_fits(files, rest, names, known_info(graph_module).model_class.rpartition(":")[2])
    twice = [
        f"{old} and {new} are both for {module_of_key(new)!r}"
        for old, new in moved.items()
        if new in files.file.entries
    ]
    if twice:
        raise AdapterError(str(files.directory), shortened(twice, _MAX_NAMED, "keys"))
    entries = {moved.get(key, key): entry for key, entry in files.file.entries.items()}
    config = _renamed_config(
        files.config, {module_of_key(new): module_of_key(old) for old, new in moved.items() if ".lora_" in old}
    )
    owners = [each for each in known_info(graph_module).parameter_modules if f"{each}.weight" in names.own]
    config = _with_parameters(config, entries, owners)
    files = replace(files, config=config, file=replace(files.file, entries=entries))
    return stacked(files, experts, sites(graph_module), list(names.own)) if experts else files


def _sizes(graph_module: fx.GraphModule, names: _Names) -> dict[str, tuple[int, int] | None]:
    """Return the modules of a graph, with the input and output features of those that multiply by a weight."""
    features = {site.module: (site.in_features, site.out_features) for site in sites(graph_module)}
    return {path: features.get(path) for path in sorted(names.modules)}


@dataclass(frozen=True)
class _Names:
    """The names of a model's tensors, of its modules, and of those among them that are called."""

    own: Collection[str]
    modules: Collection[str]
    called: Sequence[str]

    @staticmethod
    def of(graph_module: fx.GraphModule) -> _Names:
        own = [name for name in state_of(graph_module).tensors if not is_of_adapter(name)]
        called = [site.module for site in sites(graph_module)]
        return _Names(dict.fromkeys(own), {*called, "", *(path for name in own for path in modules_of(name))}, called)

    def have(self, key: str) -> bool:
        """Tell whether a key is that of a tensor, or of a factor at a module."""
        if not is_of_method(key):
            return base_name(key, self.own) is not None
        return key.startswith(PREFIX) and module_of_key(key) in self.modules

    @cached_property
    def weights(self) -> dict[str, bool]:
        """What transformers asks when it adds or drops a prefix: the tensors, and a weight of each module."""
        return {**dict.fromkeys(self.own, True), **{f"{module}.weight": True for module in self.modules}}


@dataclass(frozen=True)
class _Conversions:
    """How transformers renames the keys of older checkpoints of a model."""

    of_keys: KeyConversions
    names: _Names

    @staticmethod
    def of(graph_module: fx.GraphModule, names: _Names) -> _Conversions:
        if not (isinstance(graph_module, TracedGraphModule) and known_info(graph_module).pretrained):
            return _Conversions(KeyConversions(), names)
        try:
            model = empty_double(graph_module)
        except LoraFxError:  # a class of hub code, which the table does not know
            return _Conversions(KeyConversions(), names)
        return _Conversions(KeyConversions.of(model), names)

    def renamed(self, key: str) -> str | None:
        """Return the key under which a tensor is read; None where the graph has none for it."""
        if not is_of_method(key):
            new = self._new_name(".".join(part for part in key.removeprefix(PREFIX).split(".") if part != "base_layer"))
            return f"{PREFIX}{new}" if new in self.names.own else None
        path, _, factor = key.removeprefix(PREFIX).partition(".lora_")
        module = self._new_name(f"{module_of_key(key)}.weight").removesuffix(".weight")
        if not factor:
            return token_key(module) if module in self.names.modules else None
        inner = ".base_layer" * path.split(".").count("base_layer")
        return f"{PREFIX}{module}{inner}.lora_{factor}" if module in self.names.modules else None

    def expert(self, key: str) -> ExpertKey | None:
        """Return the place in a stack of the factor of an expert that was a module of its own; None for any other key."""
        module = module_of_key(key)
        name, pattern = self.of_keys.applied(f"{module}.weight", self.names.weights)
        converter = next((each for each in self.of_keys.converters if pattern in each.source_patterns), None)
        return None if converter is None else ExpertKey.of(key, module, name, str(pattern), converter)

    def _new_name(self, name: str) -> str:
        return self.of_keys.without_converters().applied(name, self.names.weights)[0]


def _check_any_fits(files: AdapterFiles, rest: Set[str], names: _Names, model_class: str) -> None:
    """Refuse an adapter of which no factor is at a module of the graph in one line, with the classes or the prefixes of both."""
    factors = [key for key in files.file.entries if ".lora_" in key]
    special = any(".base_layer." in key.partition(".lora_")[0] for key in factors)  # of nn.MultiheadAttention
    if len(factors) < _MIN_FACTORS or special or not set(factors) <= rest:
        return
    module = module_of_key(factors[0])
    trained_on = (files.config.auto_mapping or {}).get("base_model_class")
    if trained_on and model_class and trained_on != model_class:
        told = f"the adapter was trained on {trained_on}, and this is {model_class}, which has no {module!r}"
        raise AdapterError(str(files.directory), [told])
    shared = next(_prefixes(module, names), None)
    if shared is not None:
        found, expected = (prefix or "no prefix" for prefix in shared)
        told = f"the modules are under {found!r}, those of the graph under {expected!r}"
    else:
        own = next(iter(names.called), "")
        told = f"the file has {module!r}, for instance, and {model_class or 'the graph'} {own!r}"
    task = f" Its config names the task {files.config.task_type}." if files.config.task_type else ""
    problem = f"{files.file.path.name}: none of its {len(factors)} factors is at a module of the graph: {told}.{task}"
    raise AdapterError(str(files.directory), [f"{problem} Is it the adapter of another model?"])


_MAX_NAMED = 10
_MIN_FACTORS = 4
"""Fewer keys that do not fit are told one by one."""


def _prefixes(module: str, names: _Names) -> Iterator[tuple[str, str]]:
    """Yield prefixes of a module's path, and of a path in the graph that has the same end; the longest end comes first."""
    parts = module.split(".")
    for place in range(len(parts)):
        end = ".".join(parts[place:])
        for each in names.modules:
            if f".{each}".endswith(f".{end}"):
                yield module.removesuffix(end), each.removesuffix(end)


def _renamed_config(config: AdapterConfig, old_names: Mapping[str, str]) -> AdapterConfig:
    """Return a config that says of renamed modules what it said of them by their old names."""
    chosen = [new for new, old in old_names.items() if config.selects(old) and not config.selects(new)]
    settings = {new: (config.setting_of(old), config.setting_of(new)) for new, old in old_names.items()}
    ranks = {f"^{re.escape(new)}$": was.rank for new, (was, now) in settings.items() if was.rank != now.rank}
    alphas = {f"^{re.escape(new)}$": was.alpha for new, (was, now) in settings.items() if was.alpha != now.alpha}
    return config.model_copy(
        update={
            "target_modules": _with_names(config.target_modules, chosen),
            "rank_pattern": {**ranks, **config.rank_pattern},
            "alpha_pattern": {**alphas, **config.alpha_pattern},
        }
    )


def _with_names(given: str | tuple[str, ...] | None, names: Sequence[str]) -> str | tuple[str, ...] | None:
    """Return targets that take these modules too."""
    if not names:
        return given
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, names)])
    return (*(given or ()), *names)


def _with_parameters(config: AdapterConfig, entries: Collection[str], modules: Collection[str]) -> AdapterConfig:
    """Return a config that names weights under ``target_parameters`` where PEFT has no layer for their modules any more.

    A router was a linear layer in transformers 4, and a branch beside its product is an update of its weight.
    """
    found = [
        module
        for module in modules
        if f"{PREFIX}{module}.lora_A.weight" in entries
        and config.selects(module)
        and not config.selects_parameter(f"{module}.weight")
    ]
    if not found:
        return config
    return config.model_copy(
        update={
            "target_parameters": (*(config.target_parameters or ()), *(f"{module}.weight" for module in found)),
            "exclude_modules": _with_names(config.exclude_modules, found),
        }
    )
