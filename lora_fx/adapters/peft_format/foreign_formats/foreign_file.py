"""An adapter in one safetensors file with other keys than PEFT's, as tools for diffusion models write it, in PEFT's words.

Such a file has A and B of modules, and no config: ranks are those of the factors, and a scaling is alpha / rank, where the file has an
alpha, or else 1. It may be the adapter of several models of a pipeline, its *components*. Which of them a graph is, and which of its
modules a key means, is told by the names of the graph's modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from lora_fx.adapters.peft_format.keys import PREFIX, beside_factors, is_of_rows, module_of_key
from lora_fx.adapters.peft_format.tensors import AdapterTensor, AdapterTensors
from lora_fx.errors import AdapterError, did_you_mean, listed, printable, shortened, warn
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.name_matching import is_named
from lora_fx.rules.rule_file import Setting

Form = Literal["diffusers", "kohya"]

Spelling = Callable[[Collection[str]], Mapping[str, Sequence[str]]]
"""From the paths of a graph's modules to these by what a file calls them; one that several have is ambiguous."""

Fused = Callable[[Collection[str]], Mapping[str, Sequence[str]]]
"""From the paths of a graph's modules to the names of a file that mean several of them, whose outputs lie behind one another."""

Sizes = Mapping[str, tuple[int, int] | None]
"""The paths of a graph's modules, with the input and output features of those that multiply by a weight."""

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers writes, and looks for in a directory."""


@dataclass(frozen=True)
class Factors:
    """A and B of one module in such a file.

    Attributes:
        a: of shape (rank, in, …).
        b: of shape (out, rank, …).
        setting: rank and scaling.
    """

    a: AdapterTensor
    b: AdapterTensor
    setting: Setting

    def fits(self, features: tuple[int, int] | None) -> bool:
        """Tell whether they fit a module with these input and output features, as far as those are known."""
        return features is None or (self.a.shape[1], self.b.shape[0]) == features

    def rows(self, first: int, count: int) -> Factors:
        """Return the factors of some of the output features: those rows of B."""
        shape = (count, *self.b.shape[1:])
        return replace(self, b=AdapterTensor(self.b.dtype, shape, partial(_rows, self.b, first, count)))


def _rows(tensor: AdapterTensor, first: int, count: int) -> torch.Tensor:
    return tensor.read()[first : first + count].clone()


def _not_fused(_: Collection[str]) -> Mapping[str, Sequence[str]]:
    return {}


@dataclass(frozen=True)
class ForeignFile:
    """An adapter in another form than PEFT's.

    Attributes:
        form: of its keys.
        path: of the file.
        metadata: texts that its writer put in.
        components: by the prefix of their keys, which is empty where there is none: the factors by what the file calls a module.
        spelling: of the names of modules.
        joint: what stands between a prefix and the name of a module.
        fused: names that mean several modules.
    """

    form: Form
    path: Path
    metadata: Mapping[str, str]
    components: Mapping[str, Mapping[str, Factors]]
    spelling: Spelling
    joint: str
    fused: Fused = _not_fused

    def as_written(self) -> tuple[AdapterConfig, AdapterTensors]:
        """Return config and tensors of all components, by what the file calls the modules."""
        named = self._named()
        return _config(named), self._tensors(named)

    def placed(self, modules: Sizes) -> tuple[AdapterConfig, AdapterTensors]:
        """Return config and tensors of the component that a graph with these modules is, by the names of its modules.

        Raises:
            AdapterError: no component has a module of the graph, several may be meant, or a name is unknown or ambiguous.
        """
        return replace(self, components=self._split(modules), fused=_not_fused)._placed(modules)

    def _split(self, modules: Sizes) -> dict[str, dict[str, Factors]]:
        """Return the components with factors of each module in place of those of several; A of the several is that of each."""
        fused = self.fused(modules)
        components: dict[str, dict[str, Factors]] = {}
        for prefix, component in self.components.items():
            made = components.setdefault(prefix, {})
            for name, factors in component.items():
                paths = fused.get(name, ())
                outputs = [sizes[1] for path in paths if (sizes := modules.get(path)) is not None]
                if not paths or len(outputs) < len(paths) or sum(outputs) != factors.b.shape[0]:
                    made[name] = factors
                    continue
                for place, path in enumerate(paths):
                    made[path] = factors.rows(sum(outputs[:place]), outputs[place])
        return components

    def _placed(self, modules: Sizes) -> tuple[AdapterConfig, AdapterTensors]:
        known = {**{path: [path] for path in modules}, **self.spelling(modules)}
        named = self._named()
        chosen = named if all(map(known.get, named)) else self._component(known, modules)
        placed: dict[str, Factors] = {}
        problems: list[str] = []
        for name, factors in chosen.items():
            paths = known.get(name, ())
            if not paths:
                hint = did_you_mean(name, known) if len(problems) < MAX_NAMED else ""  # a search through all names
                problems.append(f"{printable(name)}: the graph has no such module{hint}{_of_fused(name)}")
            elif len(paths) > 1:
                problems.append(
                    f"{printable(name)}: expected the name of one module, got that of {' and '.join(paths)}"
                )
            elif paths[0] in placed:
                problems.append(f"{printable(name)}: a second name of {paths[0]!r}")
            else:
                placed[paths[0]] = factors
        if problems:
            raise AdapterError(str(self.path), shortened(problems, MAX_NAMED, "modules"))
        return _config(placed), self._tensors(placed)

    def _component(self, known: Mapping[str, Sequence[str]], modules: Sizes) -> Mapping[str, Factors]:
        """Return the component that the graph is, whose sizes fit and of which it has the most modules; warn of all others."""
        having = {prefix: [name for name in each if name in known] for prefix, each in self.components.items()}
        most = max(map(len, having.values()))
        told = {prefix: f"{prefix or 'no prefix'} ({len(each)} modules)" for prefix, each in self.components.items()}
        if not most:
            of_graph = next((path for path, sizes in modules.items() if sizes is not None), "")
            of_file = printable(next(iter(self._named())))
            problem = f"expected modules of the graph, such as {of_graph!r}, got {of_file!r} and others. Is it the adapter of another model?"
            raise AdapterError(str(self.path), [f"{listed(list(told.values()), MAX_NAMED)}: {problem}"])
        by_sizes = {prefix: having[prefix] for prefix in having if self._fits(prefix, known, modules)}
        having = {prefix: names for prefix, names in by_sizes.items() if names} or having
        most = max(map(len, having.values()))
        fitting = [prefix for prefix, names in having.items() if len(names) == most]
        if len(fitting) > 1:
            problem = f"expected the adapter of one model, got {' and '.join(fitting)}, each of which fits. Split the file by these prefixes"
            raise AdapterError(str(self.path), [problem])
        left_out = [text for prefix, text in told.items() if prefix != fitting[0]]
        if left_out:
            warn(
                f"{self.path}: the graph has the modules of {told[fitting[0]]}; what is for other models of the pipeline is left out: "
                f"{listed(left_out, MAX_NAMED)}."
            )
        return self.components[fitting[0]]

    def _fits(self, prefix: str, known: Mapping[str, Sequence[str]], modules: Sizes) -> bool:
        component = self.components[prefix].items()
        return all(any(each.fits(modules[path]) for path in known[name]) for name, each in component if name in known)

    def _named(self) -> dict[str, Factors]:
        """Return the factors of all components, by prefix and name."""
        return {
            f"{prefix}{self.joint if prefix else ''}{name}": each
            for prefix, component in self.components.items()
            for name, each in component.items()
        }

    def _tensors(self, factors: Mapping[str, Factors]) -> AdapterTensors:
        entries: dict[str, AdapterTensor] = {}
        for module, each in factors.items():
            entries |= {f"{PREFIX}{module}.lora_A.weight": each.a, f"{PREFIX}{module}.lora_B.weight": each.b}
        return AdapterTensors(self.path, self.metadata, entries)


def _of_fused(name: str) -> str:
    """Return what to do about the name of a projection of several, which other code than the graph's has."""
    if not name.endswith("qkv"):
        return ""
    return (
        "; it is the projection of q, k and v in one. Load the file into a pipeline of diffusers that has a converter for it, and save it from "
        "there (save_lora_weights)"
    )


class _PlacedConfig(AdapterConfig):
    """The config of factors whose modules are known by name: of a file with a rank for each, patterns would take the square of their number."""

    settings: dict[str, Setting]
    """The settings at each module that has factors."""

    def selects(self, module: str) -> bool:
        """Tell whether a module has factors, and is not excluded."""
        return module in self.settings and not (self.exclude_modules and is_named(module, self.exclude_modules))

    def setting_of(self, module: str) -> Setting:
        """Return the settings of the branch at a module."""
        return self.settings[module] if module in self.settings else super().setting_of(module)


def _config(factors: Mapping[str, Factors]) -> AdapterConfig:
    """Return the config of a PEFT adapter with these factors and settings at its modules, and at no other."""
    settings = {module: each.setting for module, each in factors.items()}
    rank, alpha = (
        Counter(getattr(each, name) for each in settings.values()).most_common(1)[0][0] for name in ("rank", "alpha")
    )
    return _PlacedConfig(
        peft_type="LORA",
        r=rank,
        lora_alpha=alpha,
        use_rslora=all(each.scaling == "rslora" for each in settings.values()),
        lora_dropout=max(each.dropout for each in settings.values()),
        settings=settings,
    )


def pairs(
    path: Path,
    factors: Mapping[str, Mapping[str, AdapterTensor]],
    alphas: Mapping[str, AdapterTensor],
    settings: Mapping[str, Setting],
) -> dict[str, Factors]:
    """Return the factors of each module with their settings.

    Args:
        path: of the file.
        factors: A and B under ``"A"`` and ``"B"``, by the name of their module.
        alphas: by the name of their module; 1 is the scaling of modules without one.
        settings: what metadata say of a module, which an alpha has to agree with.

    Raises:
        AdapterError: a factor or alpha is missing or has a shape that none has. All problems are named.
    """
    found: dict[str, Factors] = {}
    problems = [f"{printable(name)}: an alpha without factors" for name in alphas.keys() - factors.keys()]
    for name, pair in factors.items():
        lacking = [kind for kind in ("A", "B") if kind not in pair]
        if lacking:
            problems.append(f"{printable(name)}: {lacking[0]} is missing")
            continue
        a, b = pair["A"], pair["B"]
        if min(len(a.shape), len(b.shape)) < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            problems.append(
                f"{printable(name)}: expected A of (rank, in) and B of (out, rank), got {a.shape} and {b.shape}"
            )
            continue
        rank = a.shape[0]
        setting = settings.get(name, Setting(rank, rank, 0.0))
        if setting.rank != rank:
            problems.append(f"{printable(name)}: expected rank {setting.rank}, by the metadata, got factors of {rank}")
            continue
        alpha = _alpha(name, alphas[name], problems) if name in alphas else setting.alpha
        if name in settings and alpha != setting.alpha:
            problems.append(f"{printable(name)}: expected alpha {setting.alpha:g}, by the metadata, got {alpha:g}")
        found[name] = Factors(a, b, replace(setting, alpha=alpha))
    if problems:
        raise AdapterError(str(path), shortened(sorted(problems), MAX_NAMED, "problems"))
    return found


def _alpha(name: str, tensor: AdapterTensor, problems: list[str]) -> float:
    """Return the number in a tensor of one element."""
    if tensor.shape not in ((), (1,)) or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        problems.append(f"{printable(name)}.alpha: expected one number, got {tensor.dtype} of shape {tensor.shape}")
        return 1.0
    value = float(tensor.read())
    if not abs(value) < float("inf"):
        problems.append(f"{printable(name)}.alpha: expected a finite number, got {value}")
        return 1.0
    return value


def branches_in(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, Setting]:
    """Return the modules of an adapter in PEFT's words that another form can say, with their settings.

    Raises:
        AdapterError: it has more than A and B of linear layers and convolutions; all of it is named.
    """
    modules, problems = [], []
    parameters = set(config.target_parameters or ())
    for key in tensors:
        module, found, kind = key.removeprefix(PREFIX).partition(".lora_")
        if is_of_rows(own := key if is_of_rows(key) else beside_factors(key)):
            problems.append(f"{module_of_key(own)}: rows of an embedding that train")
        elif not found:
            problems.append(f"{module}: trains as a whole")
        elif kind not in ("A.weight", "B.weight"):
            problems.append(f"{module}: lora_{kind}, where a linear layer or a convolution has lora_A and lora_B")
        elif kind == "A.weight" and ".base_layer." in module:
            problems.append(f"{module.replace('.base_layer', '')}: a part of an nn.MultiheadAttention")
        elif kind == "A.weight":
            modules.append(module)
    if config.alora_invocation_tokens:
        problems.append("invocation tokens, from which the branches act on (aLoRA)")
    problems += [f"{name}: an update of a parameter" for name in sorted(parameters)]
    if problems:
        raise AdapterError(f"{form}'s form has factors of linear layers and convolutions alone", problems)
    return {module: config.setting_of(module) for module in modules}


MAX_NAMED = 8
