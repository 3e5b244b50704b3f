"""Strict reading of an adapter directory for a graph.

The selection of the config, the keys of the file and the sites of the graph must agree key by key; all disagreements are
reported at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from lora_fx.adapters.peft_format.fingerprint import recorded, recorded_version
from lora_fx.adapters.peft_format.keys import (
    PREFIX,
    Slot,
    apart_from_calls,
    base_key,
    base_name,
    slots,
)
from lora_fx.adapters.peft_format.opening import FILE_NAME, AdapterFiles
from lora_fx.adapters.peft_format.stacks import LAYOUTS, Stack, Writer, is_transposed, stack_layouts
from lora_fx.errors import AdapterError, did_you_mean
from lora_fx.files.safetensors import TensorEntry
from lora_fx.graph.adapter_names import copy_name, is_of_adapter, original_name
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import known_info
from lora_fx.graph.records import BranchSpec, Origin, Trained
from lora_fx.numerics.factor_init import adapter_dtype
from lora_fx.planning.plan import owners_of
from lora_fx.rules.peft_config.config import ALL_LINEAR, CONFIG_NAME, AdapterConfig, trains_bias
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import Site, is_bare, parameter_of, sites


@dataclass(frozen=True)
class AdapterContents:
    """An adapter from a directory, fitted to a graph.

    Attributes:
        branches: by their keys: what chose them, and the branch.
        trained: parameters of the model that have trained values.
        factors: A and B of each branch, by its key.
        copies: the trained values, by the parameter's name.
        origin: where it comes from.
        echoes: what the file has of the model's own tensors, which a graph on the meta device could not be compared with: the
            key of each, by its name in the graph.
    """

    branches: Mapping[str, tuple[str, BranchSpec]]
    trained: tuple[Trained, ...]
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    copies: Mapping[str, torch.Tensor]
    origin: Origin
    echoes: Mapping[str, str] = field(default_factory=dict)

    def values_of(self, adapter: str, *, inference: bool) -> dict[str, nn.Parameter]:
        """Return the parameters by the names that they have in a graph."""
        values: dict[str, nn.Parameter] = {}
        for key, (a, b) in self.factors.items():
            branch = self.branches[key][1]
            names, trains_b = branch.names(adapter), branch.setting.trains_b
            values |= {names.a: nn.Parameter(a, not inference), names.b: nn.Parameter(b, trains_b and not inference)}
        copies = {copy_name(name, adapter): nn.Parameter(value, not inference) for name, value in self.copies.items()}
        return values | copies


def read_contents(files: AdapterFiles, graph_module: fx.GraphModule) -> AdapterContents:
    """Fit what a directory holds to a graph, which may be on the meta device.

    Raises:
        AdapterError: config, file and graph do not agree; all problems are named.
    """
    return _Reader(files, graph_module).contents()


def another_value(key: str, name: str, own: torch.Tensor) -> str:
    """Return the message for a tensor in an adapter's file that differs from the model's own."""
    return (
        f"{key}: another value than the model's {name!r} ({described(own)}), and {CONFIG_NAME} lets neither a bias nor a module train "
        "there. If that is meant, as of a resized embedding, add its module to modules_to_save"
    )


def is_selected(site: Site, config: AdapterConfig, keys: Collection[str]) -> bool:
    """Tell whether an adapter has factors beside a site, by its config, and where that leaves it to the model by its keys.

    Raises:
        TimeoutError: a regular expression takes too long.
    """
    if config.selects_parameter(parameter_of(site)):
        return True
    if is_bare(site):
        return False
    if str(config.target_modules).lower() == ALL_LINEAR or (
        config.target_modules is None and not config.target_parameters
    ):
        a, _ = Slot(site, site.module, site.module).keys
        return a in keys  # PEFT chose by the model, and wrote keys for its choice
    return config.selects(site.module)


class KeyLedger:
    """The keys of an adapter's file that no branch has taken yet, and the problems found on the way, which are raised together."""

    def __init__(self, files: AdapterFiles) -> None:
        self.unread = dict(files.file.entries)
        self.problems: list[str] = []
        self._directory, self._config = files.directory, files.config

    def stop_if_wrong(self) -> None:
        """Raise :class:`AdapterError` with all problems so far, if there are any."""
        if self.problems:
            raise AdapterError(str(self._directory), self.problems)

    def selects(self, site: Site) -> bool:
        """Tell whether the adapter has factors beside a site; see :func:`is_selected`."""
        try:
            return is_selected(site, self._config, self.unread)
        except TimeoutError as error:
            self.problems.append(f"{CONFIG_NAME}: {error}")
            return False

    def weights_of(self, chosen: Iterable[Site]) -> set[str]:
        """Return which of these sites' modules have a weight that ``target_parameters`` names; problems where PEFT adapts none."""
        weights = {s.module: s for s in chosen if not is_bare(s) and self._config.selects_parameter(parameter_of(s))}
        for module, site in weights.items():
            where = f"{CONFIG_NAME}: target_parameters names {parameter_of(site)!r}"
            if site.kernel:
                self.problems.append(
                    f"{where}, the weight of a convolution, which PEFT takes for a stack of matrices. Merge the adapter with PEFT, "
                    "and use the result"
                )
            if self._config.selects(module):
                self.problems.append(f"{where}, and target_modules selects its module: PEFT adapts one of the two")
        return set(weights)

    def setting_of(self, module: str) -> Setting:
        """Return the settings of the branch at a module or a parameter; the default ones with a problem."""
        try:
            return self._config.setting_of(module)
        except TimeoutError as error:
            self.problems.append(f"{CONFIG_NAME}: {error}")
            return AdapterConfig(peft_type="LORA").setting_of(module)

    def take(self, key: str, shape: tuple[int, ...], why: str, of: str) -> TensorEntry | None:
        """Take a key from the unread ones, and return its entry; None with a problem.

        Args:
            key: in the file.
            shape: that it is to have.
            why: a key is expected, for the message where it is missing.
            of: the reason for the shape, for the message where it has another.
        """
        entry = self.unread.pop(key, None)
        if entry is None:
            self.problems.append(f"{key}: missing in {FILE_NAME}: {why}")
        elif entry.shape != shape:
            self.problems.append(f"{key}: expected shape {shape}, {of}, got {entry.shape}")
            return None
        return entry


class _Reader:
    """Reads an adapter for a graph, and collects all problems."""

    def __init__(self, files: AdapterFiles, graph_module: fx.GraphModule) -> None:
        self._files = files
        self._config = files.config
        self._ledger = KeyLedger(files)
        self._state = state_of(graph_module)
        self._first = self._state.aliases()
        self._sites = {site.module: site for site in sites(graph_module)}
        self._graph_module = graph_module

    def contents(self) -> AdapterContents:
        chosen = [site for site in self._sites.values() if self._ledger.selects(site)]
        chosen += self._tied_to(chosen)
        weights = self._ledger.weights_of(chosen)
        self._ledger.stop_if_wrong()
        apart = apart_from_calls(self._graph_module, {site.module for site in chosen}, weights)
        self._ledger.problems += apart.values()
        self._ledger.stop_if_wrong()
        own = {name: tensor for name, tensor in self._state.tensors.items() if not is_of_adapter(name)}
        branches = {slot: self._branch(slot) for slot in slots(chosen, own, weights).values()}
        self._ledger.stop_if_wrong()
        branches = self._with_layouts(branches)
        factors = {slot: self._factors(slot, branch) for slot, branch in branches.items()}
        copies = self._copies(own, [slot.site.module for slot in branches if not is_bare(slot.site)])
        self._rest(own, [slot.site.module for slot in branches])
        self._ledger.stop_if_wrong()
        read = {slot: self._read_factors(slot, *names) for slot, names in factors.items()}
        values = {name: self._read(key, own[name]) for name, key in copies.items()}
        echoes = self._check_rest(own, copies)
        self._ledger.stop_if_wrong()
        _, origin = recorded(self._files.file.metadata)
        config = self._config
        return AdapterContents(
            {branches[slot].key: (CONFIG_NAME, branches[slot]) for slot in branches},
            tuple(Trained(name, CONFIG_NAME, value.numel()) for name, value in values.items()),
            {branches[slot].key: pair for slot, pair in read.items()},
            values,
            replace(origin, task_type=config.task_type, base=config.base_model_name_or_path, revision=config.revision),
            echoes,
        )

    def _tied_to(self, chosen: Collection[Site]) -> list[Site]:
        """Return the sites that PEFT adapts too, since they share the weight of a chosen one; their factors have keys of their own."""
        if not self._config.ensure_weight_tying:
            return []
        weights, modules = {self._first[site.weight] for site in chosen}, {site.module for site in chosen}
        tied = [s for s in self._sites.values() if s.module not in modules and self._first[s.weight] in weights]
        found = [site for site in tied if Slot(site, site.module, site.module).keys[0] in self._ledger.unread]
        if found and not known_info(self._graph_module).inference:
            warnings.warn(
                f"{self._files.directory}: has the same factors at modules that share a weight ({', '.join(s.module for s in found)}), which "
                "PEFT trains as one (ensure_weight_tying). Here each module has its own, and training changes them apart.",
                stacklevel=6,
            )
        return found

    def _branch(self, slot: Slot) -> BranchSpec:
        return BranchSpec(owners_of(slot.site)[0], self._ledger.setting_of(slot.name), op=slot.site.op)

    def _with_layouts(self, branches: Mapping[Slot, BranchSpec]) -> dict[Slot, BranchSpec]:
        """Return the branches with the layouts that the file has at stacks of matrices."""
        stacks = [self._stack(*each) for each in branches.items() if each[0].is_stack and each[0].site.matrices > 1]
        writer = Writer(self._config.peft_version, recorded_version(self._files.file.metadata, "transformers"))
        layouts, problems = stack_layouts(stacks, writer, self._files.stacks)
        self._ledger.problems += problems
        return {replace(slot, layout=layouts.get(slot.name, slot.layout)): each for slot, each in branches.items()}

    def _stack(self, slot: Slot, branch: BranchSpec) -> Stack:
        module = known_info(self._graph_module).stacks.get(slot.name.rpartition(".")[0])
        entries = [self._ledger.unread.get(key) for key in slot.keys]
        found = None if None in entries else tuple(entry.shape for entry in entries if entry)
        fits = frozenset(layout for layout in LAYOUTS if replace(slot, layout=layout).shapes(branch) == found)
        return Stack(slot.name, module, is_transposed(slot.site, module), fits)

    def _factors(self, slot: Slot, branch: BranchSpec) -> tuple[str, str]:
        """Take the keys of a branch from those of the file, and check what the header says of them."""
        other = replace(slot, layout="as_stored") if slot.is_stack and slot.site.matrices > 1 else slot
        for key, shape, otherwise in zip(slot.keys, slot.shapes(branch), other.shapes(branch), strict=True):
            rank = branch.setting.rank
            groups = (
                f", in {slot.site.matrices} groups, which PEFT mixes,"
                if slot.site.kernel and slot.site.matrices > 1
                else ""
            )
            told = (
                f"rank {rank} at {slot.name}, of {slot.site.in_features} and {slot.site.out_features} features{groups}"
            )
            told += f", or {otherwise} as_stored" if otherwise != shape else ""
            self._ledger.take(key, shape, f"{CONFIG_NAME} selects {slot.name!r}", told)
        return slot.keys

    def _copies(self, own: Mapping[str, torch.Tensor], adapted: Collection[str]) -> dict[str, str]:
        """Return the key of each parameter that trains as a whole or as a bias, and take it from those of the file."""
        taken: dict[str, str] = {}
        declared: dict[str, list[str]] = {}
        for name, tensor in own.items():
            saved = self._config.saves_any(name)
            if not (saved or trains_bias(self._config, name, adapted)):
                continue
            key = base_key(name, () if saved else adapted)
            why = "modules_to_save" if saved else f"bias={self._config.bias!r}"
            if not isinstance(tensor, nn.Parameter):
                continue  # a buffer, which is compared with the model's
            first = self._first[name]
            declared.setdefault(first, []).append(name)
            if first in taken:
                continue  # another name of a tied parameter, compared with the value under the first
            self._ledger.take(key, tuple(tensor.shape), f"{CONFIG_NAME} says {why}", f"as {name} in the graph")
            taken[first] = key
        names = self._state.names()
        for first, meant in declared.items():
            tied = names[first]
            if len(meant) < len(tied) and not self._config.ensure_weight_tying:
                self._ledger.problems.append(
                    f"{' and '.join(tied)}: one tied parameter, of which {' and '.join(meant)} would train alone. Untie them in the "
                    "model first"
                )
        return taken

    def _rest(self, own: Mapping[str, torch.Tensor], chosen: Collection[str]) -> None:
        """Name every key that nothing asked for, but for copies of the model's own tensors."""
        dead = set()
        for key in list(self._ledger.unread):
            if base_name(key, own) is not None:
                continue
            module = key.removeprefix(PREFIX).partition(".lora_")[0]
            if self._is_dead(module, own):
                dead.add(module)
                del self._ledger.unread[key]
                continue
            self._ledger.problems.append(f"{key}: {self._why_not(key, chosen)}")
            del self._ledger.unread[key]
        if dead:
            warnings.warn(
                f"{self._files.directory}: has branches at {', '.join(sorted(dead))}, which the model never computes with; they are "
                "left out.",
                stacklevel=6,
            )

    def _is_dead(self, module: str, own: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether the config selects a module that the graph does not compute with."""
        weight = f"{module}.weight"
        if weight not in own or module in self._sites or not self._config.selects(module):
            return False
        nodes = self._graph_module.graph.find_nodes(op="get_attr")
        return self._first[weight] not in {original_name(str(node.target)) or str(node.target) for node in nodes}

    def _why_not(self, key: str, chosen: Collection[str]) -> str:
        if not key.startswith(PREFIX):
            return f"expected a key that begins with {PREFIX}"
        if "lora_magnitude_vector" in key:
            return "a magnitude of DoRA, which is not supported"
        module, found, _ = key.removeprefix(PREFIX).partition(".lora_")
        if not found:
            return "the model has no such parameter"
        if key.endswith((".lora_B.bias", ".lora_A.bias")):
            return "a bias of a factor (lora_bias), which is not supported"
        if ".base_layer." in f".{module}.":
            return "inside of a layer of PEFT's own, as it puts into nn.MultiheadAttention; this is not supported"
        if module in chosen:
            return "the branch has no such factor"
        if module in self._sites:
            return f"{CONFIG_NAME} does not select {module!r}"
        return f"the graph has no call site {module!r}{did_you_mean(module, self._sites)}"

    def _read_factors(self, slot: Slot, key_a: str, key_b: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._state.tensors[slot.site.weight]
        like = weight.new_empty(0, dtype=adapter_dtype(slot.site.cast or weight.dtype))
        return slot.converted(self._read(key_a, like), self._read(key_b, like))

    def _read(self, key: str, like: torch.Tensor) -> torch.Tensor:
        value = self._files.file.read(key)
        if not value.is_floating_point():
            if value.dtype != like.dtype:
                self._ledger.problems.append(
                    f"{key}: expected {like.dtype}, or what converts to it exactly, found {value.dtype}"
                )
            return value
        if not like.is_floating_point() or torch.promote_types(value.dtype, like.dtype) != like.dtype:
            self._ledger.problems.append(
                f"{key}: expected {like.dtype}, or what converts to it exactly, found {value.dtype}"
            )
            return value
        bad = int((~torch.isfinite(value)).count_nonzero())
        if bad:
            self._ledger.problems.append(f"{key}: expected finite numbers, found {bad} of {value.numel()} that are not")
        return value.to(like.dtype) if like.is_meta else value.to(like.device, like.dtype)

    def _check_rest(self, own: Mapping[str, torch.Tensor], copies: Mapping[str, str]) -> dict[str, str]:
        """Compare what the file has of the model's own tensors (PEFT writes adapted embeddings, for instance) with these.

        Return the ones without values to compare with.
        """
        echoes = {}
        for key, entry in self._ledger.unread.items():
            name = base_name(key, own)
            assert name is not None
            of_copy = ".original_module." not in key and self._first[name] in copies
            other = self._files.file.read(copies[self._first[name]]) if of_copy else own[name].detach()
            if other.is_meta:
                echoes[name] = key
            value = self._files.file.read(key)
            same = entry.shape == tuple(other.shape) and (
                other.is_meta or torch.equal(value.to(other.dtype), other.cpu())
            )
            if not same and not isinstance(own[name], nn.Parameter) and self._config.saves_any(name):
                self._ledger.problems.append(
                    f"{key}: the buffer {name!r} of a module that trains has changed too (running statistics, for instance), and an "
                    "adapter keeps the buffers of the model. Give the model these values first"
                )
            elif not same and of_copy and name != self._first[name]:
                self._ledger.problems.append(
                    f"{key}: expected the trained value of {self._first[name]!r}, with which {name!r} is one tied parameter, found another. "
                    "Untie them in the model first"
                )
            elif not same:
                self._ledger.problems.append(another_value(key, name, other))
        return echoes
