"""Strict reading of an adapter directory for a graph.

The selection of the config, the keys of the file and the sites of the graph must agree key by key; all disagreements are
reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from lora_fx.adapters.peft_format.fingerprint import recorded, recorded_version
from lora_fx.adapters.peft_format.keys import (
    Slot,
    apart_from_calls,
    base_key,
    base_name,
    module_of_key,
    slots,
    token_key,
    why_left,
)
from lora_fx.adapters.peft_format.ledger import KeyLedger
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.adapters.peft_format.own_tensors import (
    another_value,
    equal_as_saved,
    is_of_embedding,
    resized_and_adapted,
    untied_in_file,
    warn_of_embeddings,
    warn_of_rounding,
)
from lora_fx.adapters.peft_format.prefix_files import fitted_prefix
from lora_fx.adapters.peft_format.renaming import fitted
from lora_fx.adapters.peft_format.split_starts import no_weight, splits_of
from lora_fx.adapters.peft_format.stacks import LAYOUTS, Stack, Writer, is_transposed, stack_layouts
from lora_fx.adapters.starts import frozen_values
from lora_fx.errors import AdapterError, warn
from lora_fx.graph.adapter_names import copy_name, is_of_adapter, original_name, prefix_name, token_names
from lora_fx.graph.batch_norms import whole_norms
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import known_info
from lora_fx.graph.provenance import called_modules
from lora_fx.graph.records import BranchSpec, Origin, PrefixSpec, TokenRows, Trained
from lora_fx.numerics.factor_init import Split, adapter_dtype
from lora_fx.numerics.lowrank_merge import rounded
from lora_fx.planning.cautions import warn_of_untying
from lora_fx.planning.peft_tokens import Vocabulary, token_rows
from lora_fx.planning.plan import owners_of
from lora_fx.rules.peft_config.config import CONFIG_NAME, trains_bias
from lora_fx.sites.call_sites import Site, is_idle, sites


@dataclass(frozen=True)
class AdapterContents:
    """An adapter from a directory, fitted to a graph.

    Attributes:
        branches: by their keys: what chose them, and the branch.
        trained: parameters of the model that have trained values.
        factors: A and B of each branch, by its key.
        vectors: what branches have besides, by their keys: the bias of B, the magnitudes.
        copies: the trained values, by the parameter's name.
        origin: where it comes from.
        statistics: running statistics of batch norms that train as a whole, by their names.
        tokens: rows of embeddings that have trained values.
        rows: these values, by the paths of the embeddings.
        splits: of branches that split their weight, by their keys: the site, and the parts of the weight as they started.
        echoes: what the file has of the model's own tensors, which a graph on the meta device could not be compared with: the
            key of each, by its name in the graph.
        prefix: keys and values in front of those of attentions, with their values.
    """

    branches: Mapping[str, tuple[str, BranchSpec]]
    trained: tuple[Trained, ...]
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    copies: Mapping[str, torch.Tensor]
    origin: Origin
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    vectors: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    echoes: Mapping[str, str] = field(default_factory=dict)
    tokens: tuple[TokenRows, ...] = ()
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    splits: Mapping[str, tuple[Site, Split]] = field(default_factory=dict)
    prefix: tuple[PrefixSpec, torch.Tensor] | None = None

    def values_of(self, adapter: str, *, trainable: bool) -> dict[str, torch.Tensor]:
        """Return the tensors by the names that they have in a graph; parameters that are to train require a gradient."""
        values: dict[str, torch.Tensor] = {copy_name(name, adapter): value for name, value in self.statistics.items()}
        for key, (a, b) in self.factors.items():
            branch = self.branches[key][1]
            if branch.mirrors is not None:
                continue
            named = zip(branch.parameters(adapter), (a, b, *self.vectors.get(key, ())), strict=True)
            frozen = () if branch.setting.trains_b else (branch.names(adapter).b,)
            values |= {name: nn.Parameter(value, trainable and name not in frozen) for name, value in named}
        for key, (site, found) in self.splits.items():
            values |= frozen_values(site, self.branches[key][1], adapter, found)
        copies = {copy_name(name, adapter): nn.Parameter(value, trainable) for name, value in self.copies.items()}
        rows = {token_names(m, adapter)[0]: nn.Parameter(value, trainable) for m, value in self.rows.items()}
        ahead = {} if self.prefix is None else {prefix_name(adapter): nn.Parameter(self.prefix[1], trainable)}
        return values | copies | rows | ahead


def read_contents(
    files: AdapterFiles, graph_module: fx.GraphModule, weights: Callable[[str], torch.Tensor | None] | None = None
) -> AdapterContents:
    """Fit what a directory holds to a graph, which may be on the meta device.

    Args:
        files: the directory.
        graph_module: the graph.
        weights: reads a weight that a graph on the meta device has not, by its name; None for one that is quantised.

    Raises:
        AdapterError: config, file and graph do not agree; all problems are named.
    """
    if problem := files.config.problem_of_layers(known_info(graph_module).layers):
        raise AdapterError(str(files.directory), [problem])
    contents = _Reader(fitted(files, graph_module), graph_module, weights or no_weight).contents()
    return contents if files.prefix is None else replace(contents, prefix=fitted_prefix(files.prefix, graph_module))


class _Reader:
    """Reads an adapter for a graph, and collects all problems."""

    def __init__(
        self, files: AdapterFiles, graph_module: fx.GraphModule, weights: Callable[[str], torch.Tensor | None]
    ) -> None:
        self._files, self._weights = files, weights
        self._config = files.config
        self._ledger = KeyLedger(files)
        self._state = state_of(graph_module)
        self._first = self._state.aliases()
        self._sites = {site.module: site for site in sites(graph_module)}
        self._graph_module, self._modules = graph_module, known_info(graph_module).parameter_modules
        self._untied: set[str] = set()  # names of tied parameters of which their modules have copies of their own

    def contents(self) -> AdapterContents:
        chosen, attentions = self._ledger.chosen(self._sites.values(), self._modules)
        chosen += self._tied_to(chosen)
        weights = self._ledger.weights_of(chosen)
        self._ledger.stop_if_wrong()
        apart = apart_from_calls(self._graph_module, {site.module for site in chosen}, weights, attentions)
        self._ledger.problems += apart.values()
        self._ledger.stop_if_wrong()
        own = {name: tensor for name, tensor in self._state.tensors.items() if not is_of_adapter(name)}
        branches = {slot: self._branch(slot) for slot in slots(chosen, own, weights, None, attentions).values()}
        self._ledger.stop_if_wrong()
        branches = self._with_layouts(branches)
        factors = {slot: self._factors(slot, branch) for slot, branch in branches.items()}
        copies = self._copies(own, [slot.site.module for slot in branches if slot.is_module])
        tokens = self._tokens(own)
        resized = self._resized_embeddings(own, copies, {self._first[slot.site.weight] for slot in branches})
        copies |= resized
        norms = whole_norms(self._graph_module.graph, self._state.modules, copies, own)
        statistics = self._ledger.statistics({name: own[name] for name in norms})
        self._rest(own, [slot.site.module for slot in branches])
        self._ledger.stop_if_wrong()
        read = {slot: self._read_factors(slot, *names) for slot, names in factors.items()}
        vectors = {
            branch.key: tuple(self._read(key, self._like(slot)) for key in slot.vectors(branch))
            for slot, branch in branches.items()
        }
        branches = self._mirrored(branches, read)
        saved = {name: self._read_copy(key, own[name]) for name, key in copies.items()}
        measured = {name: self._read_copy(key, own[name]) for name, key in statistics.items()}
        measured = {n: v if own[n].is_meta else v.to(own[n]) for n, v in measured.items()}
        echoes = self._check_rest(own, copies)
        rows = {each.module: self._read_rows(each) for each in tokens}
        self._ledger.stop_if_wrong()
        trained = tuple(Trained(n, CONFIG_NAME, v.numel(), untied=n in self._untied) for n, v in saved.items())
        ensured = self._config.ensure_weight_tying
        warn_of_untying(trained, self._state.names(), str(self._files.directory), ensured=ensured)
        warn_of_embeddings(self._files.directory, list(resized))
        kept = {name: own[name].dtype for name in saved if not own[name].is_meta}
        warn_of_rounding(self._files.directory, saved, kept)
        values = {
            name: rounded(value, kept[name]).to(own[name].device) if name in kept else value
            for name, value in saved.items()
        }
        splits = splits_of(branches, read, self._state.tensors, self._weights, self._ledger.problems)
        self._ledger.stop_if_wrong()
        _, origin = recorded(self._files.file.metadata)
        return AdapterContents(
            {branches[slot].key: (CONFIG_NAME, branches[slot]) for slot in branches},
            trained,
            {branches[slot].key: pair for slot, pair in read.items()},
            values,
            origin.told_by(self._config),
            measured,
            vectors,
            echoes,
            tokens,
            rows,
            splits,
        )

    def _tied_to(self, chosen: Collection[Site]) -> list[Site]:
        """Return the sites that PEFT adapts too, since they share the weight of a chosen one; their factors have keys of their own."""
        if not self._config.ensure_weight_tying:
            return []
        weights, modules = {self._first[site.weight] for site in chosen}, {site.module for site in chosen}
        own = (name for name in self._state.tensors if not is_of_adapter(name))
        weights |= {self._first[name] for name in own if self._is_dead(name.rpartition(".")[0], self._state.tensors)}
        tied = [s for s in self._sites.values() if s.module not in modules and self._first[s.weight] in weights]
        return [site for site in tied if Slot(site, site.module, site.module).keys[0] in self._ledger.unread]

    def _mirrored(
        self, branches: Mapping[Slot, BranchSpec], factors: Mapping[Slot, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[Slot, BranchSpec]:
        """Return the branches, of which those at a head have the factors of its tied embedding where PEFT trains both as one."""
        found = dict(branches)
        if self._config.ensure_weight_tying:
            for slot in branches:
                mirrors = (
                    other.site.module
                    for other in branches
                    if other.site.op == "embedding"
                    and self._first[other.site.weight] == self._first[slot.site.weight]
                    and branches[other].setting == branches[slot].setting
                    and all(map(torch.equal, factors[slot], (each.t() for each in reversed(factors[other]))))
                )
                if slot.site.op == "linear" and (owner := next(mirrors, None)) is not None:
                    found[slot] = replace(branches[slot], mirrors=owner)
        return found

    def _branch(self, slot: Slot) -> BranchSpec:
        return BranchSpec(owners_of(slot.site)[0], self._ledger.setting_of(slot), op=slot.site.op)

    def _with_layouts(self, branches: Mapping[Slot, BranchSpec]) -> dict[Slot, BranchSpec]:
        """Return the branches with the layouts that the file has at stacks of matrices."""
        stacks = [self._stack(*each) for each in branches.items() if each[0].is_stack and each[0].site.matrices > 1]
        writer = Writer(self._config.peft_version, recorded_version(self._files.file.metadata, "transformers"))
        layouts, problems = stack_layouts(stacks, writer, self._files.stacks)
        self._ledger.problems += problems
        return {replace(slot, layout=layouts.get(slot.name, slot.layout)): each for slot, each in branches.items()}

    def _stack(self, slot: Slot, branch: BranchSpec) -> Stack:
        module = self._modules.get(slot.name.rpartition(".")[0])
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
        for key, shape in slot.vectors(branch).items():
            said = "use_dora" if branch.setting.variant == "dora" else "lora_bias"
            self._ledger.take(key, shape, f"{CONFIG_NAME} says {said}", f"of {slot.site.out_features} features")
        return slot.keys

    def _copies(self, own: Mapping[str, torch.Tensor], adapted: Collection[str]) -> dict[str, str]:
        """Return the key of each parameter that trains as a whole or as a bias, and take it from those of the file."""
        taken: dict[str, str] = {}
        apart = untied_in_file(self._files, self._state.names().values(), known_info(self._graph_module))
        for name, tensor in own.items():
            saved = self._config.saves_any(name) or name in apart
            if not (saved or trains_bias(self._config, name, adapted)):
                continue
            key = base_key(name, () if saved else adapted)
            why = "modules_to_save" if saved else f"bias={self._config.bias!r}"
            if not isinstance(tensor, nn.Parameter):
                continue  # a buffer, which is compared with the model's
            first = self._first[name]
            tied = len(self._state.names()[first]) > 1
            if saved and tied and (name in apart or not self._config.ensure_weight_tying):
                self._untied.add(name)
            elif first in taken:
                continue  # another name of a tied parameter, compared with the value under the first
            self._ledger.take(key, tuple(tensor.shape), f"{CONFIG_NAME} says {why}", f"as {name} in the graph")
            taken[name if name in self._untied else first] = key
        return taken

    def _tokens(self, own: Mapping[str, torch.Tensor]) -> tuple[TokenRows, ...]:
        """Return the rows of embeddings that have values, and take their keys from those of the file."""
        names = [names for names in self._state.names().values() if names[0] in own]
        vocabulary = Vocabulary.of(known_info(self._graph_module))
        found = list(self._sites.values())
        tokens = token_rows(self._config, found, names, vocabulary, CONFIG_NAME, self._ledger.problems)
        for each in tokens:
            self._ledger.take_rows(each, self._state.names()[self._first[each.weight]])
        return tokens

    def _read_rows(self, tokens: TokenRows) -> torch.Tensor:
        weight = self._state.tensors[tokens.weight]
        return self._read(token_key(tokens.module), weight.new_empty(0, dtype=adapter_dtype(weight.dtype)))

    def _copied_as(self, name: str, copies: Collection[str]) -> str | None:
        """Return the name of the copy with which the module of a parameter computes; None without one."""
        first = self._first[name]
        return name if name in copies else first if first in copies and first not in self._untied else None

    def _resized_embeddings(
        self, own: Mapping[str, torch.Tensor], copies: Collection[str], adapted: Collection[str]
    ) -> dict[str, str]:
        """Return the key of each embedding that has other values in the file, and take it; of a graph without weights none is known.

        PEFT's ``save_embedding_layers`` writes them, by itself where the vocabulary was resized, and the config does not say so.
        """
        found: dict[str, str] = {}
        for key, entry in list(self._ledger.unread.items()):
            name = base_name(key, own)
            if name is None or ".original_module." in key or not is_of_embedding(name, self._graph_module):
                continue
            first, mine = self._first[name], own[name]
            if self._copied_as(name, {*copies, *found}) is not None:
                continue
            if entry.shape != tuple(mine.shape):
                self._ledger.problems.append(
                    f"{key}: expected shape {tuple(mine.shape)}, as {name} in the graph, got {entry.shape}. If the vocabulary was resized in "
                    f"training, resize it before the trace: model.resize_token_embeddings({entry.shape[0] if entry.shape else 0})"
                )
                del self._ledger.unread[key]
            elif (
                not mine.is_meta
                and first in adapted
                and not equal_as_saved(self._files.file.read(key), mine.detach().cpu())
            ):
                self._ledger.problems.append(resized_and_adapted(key, name))
                del self._ledger.unread[key]
            elif not mine.is_meta and not equal_as_saved(self._files.file.read(key), mine.detach().cpu()):
                del self._ledger.unread[key]
                apart = not self._untied.isdisjoint(self._state.names()[first])
                self._untied.update([name] if apart else [])
                found[name if apart else first] = key
        return found

    def _rest(self, own: Mapping[str, torch.Tensor], chosen: Collection[str]) -> None:
        """Name every key that nothing asked for, but for copies of the model's own tensors."""
        dead = set()
        for key in list(self._ledger.unread):
            if base_name(key, own) is not None:
                continue
            module = module_of_key(key)
            if self._is_dead(module, own):
                dead.add(module)
                del self._ledger.unread[key]
                continue
            self._ledger.problems.append(f"{key}: {why_left(key, chosen, self._sites)}")
            del self._ledger.unread[key]
        if dead:
            warn(
                f"{self._files.directory}: has branches at {', '.join(sorted(dead))}, which the model never computes with; they are "
                "left out.",
            )

    def _is_dead(self, module: str, own: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether the config selects a module that the graph does not compute with."""
        weight = f"{module}.weight"
        if (site := self._sites.get(module)) is not None:
            return is_idle(site, self._modules) and self._config.selects(module)
        if weight not in own or not self._config.selects(module):
            return False
        nodes = self._graph_module.graph.find_nodes(op="get_attr")
        if self._first[weight] not in {original_name(str(node.target)) or str(node.target) for node in nodes}:
            return True
        called = called_modules(self._graph_module)  # T5's `shared` is read under its other names, and is not called
        return bool(called) and module not in called

    def _read_factors(self, slot: Slot, key_a: str, key_b: str) -> tuple[torch.Tensor, torch.Tensor]:
        like = self._like(slot)
        return slot.of_graph(self._read(key_a, like), self._read(key_b, like))

    def _like(self, slot: Slot) -> torch.Tensor:
        """Return a tensor of the dtype and on the device of the factors beside a site."""
        weight = self._state.tensors[slot.site.weight]
        return weight.new_empty(0, dtype=adapter_dtype(slot.site.cast or weight.dtype))

    def _read(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """Return a factor in the dtype that it has in the graph, if that loses nothing."""
        value = self._files.file.read(key)
        exact = value.is_floating_point() and like.is_floating_point()
        if value.dtype != like.dtype and not (exact and torch.promote_types(value.dtype, like.dtype) == like.dtype):
            self._ledger.problems.append(
                f"{key}: expected {like.dtype}, or what converts to it exactly, found {value.dtype}"
            )
            return value
        self._check_finite(key, value)
        return value.to(like.dtype) if like.is_meta else value.to(like.device, like.dtype)

    def _read_copy(self, key: str, own: torch.Tensor) -> torch.Tensor:
        """Return the trained value of a parameter as the file has it, which its dtype in the graph must be able to hold."""
        value = self._files.file.read(key)
        if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
            self._ledger.problems.append(f"{key}: expected {own.dtype}, found {value.dtype}")
            return value
        self._check_finite(key, value)
        most = torch.finfo(own.dtype).max if own.is_floating_point() else torch.inf
        over = int((value.abs() > most).count_nonzero())
        if over and torch.isfinite(value).all():
            self._ledger.problems.append(
                f"{key}: expected numbers within ±{most:g}, which {own.dtype} has, found {over} beyond"
            )
        return value

    def _check_finite(self, key: str, value: torch.Tensor) -> None:
        bad = int((~torch.isfinite(value)).count_nonzero())
        if bad:
            self._ledger.problems.append(f"{key}: expected finite numbers, found {bad} of {value.numel()} that are not")

    def _check_rest(self, own: Mapping[str, torch.Tensor], copies: Mapping[str, str]) -> dict[str, str]:
        """Compare what the file has of the model's own tensors (PEFT writes adapted embeddings, for instance) with these.

        Return the ones without values to compare with.
        """
        echoes = {}
        for key, entry in self._ledger.unread.items():
            name = base_name(key, own)
            assert name is not None
            copied = None if ".original_module." in key else self._copied_as(name, copies)
            other = own[name].detach() if copied is None else self._files.file.read(copies[copied])
            if other.is_meta:
                echoes[name] = key
            same = entry.shape == tuple(other.shape) and (
                other.is_meta or equal_as_saved(self._files.file.read(key), other.cpu())
            )
            if not same and not isinstance(own[name], nn.Parameter) and self._config.saves_any(name):
                self._ledger.problems.append(
                    f"{key}: the buffer {name!r} of a module that trains has changed too (running statistics, for instance), and an "
                    "adapter keeps the buffers of the model. Give the model these values first"
                )
            elif not same:
                self._ledger.problems.append(another_value(key, name, other))
        return echoes
