"""Factors of experts that were modules of their own, as in transformers 4, for the stacks of matrices that they became parts of.

A stack ``(experts, out, in)`` has the weights of all experts, and the outputs of several projections one after the other:

    W[e] = [gate[e]; up[e]]        ΔW[e] = [B_gate 0; 0 B_up] [A_gate; A_up]

Of a stack, A is ``(experts · r, in)``, one expert after the other, and B is ``(out, r · experts)``, where the experts take turns: PEFT's layout
``"exchanged"``, see :mod:`lora_fx.adapters.peft_format.stacks`. So does PEFT (``utils/transformers_weight_conversion.py``), but for rsLoRA,
whose scaling it lowers with the rank that grows, and for a projection without its neighbour, which it refuses: here its rows are zero.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lora_fx.adapters.peft_format.keys import slots
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.adapters.peft_format.tensors import AdapterTensor
from lora_fx.errors import AdapterError, shortened
from lora_fx.rules.peft_config.config import CONFIG_NAME
from lora_fx.rules.peft_config.target_names import alpha_of
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import Site, is_bare


@dataclass(frozen=True)
class ExpertKey:
    """The place of a factor of one expert in the stacks of a model.

    Attributes:
        key: in the file.
        owner: path of the list of experts that the adapter was trained with.
        expert: number of the expert.
        leaf: name of the projection.
        leaves: names of all projections of the stack, in the order of their outputs.
        stack: name of the stack.
    """

    key: str
    owner: str
    expert: int
    leaf: str
    leaves: tuple[str, ...]
    stack: str

    @staticmethod
    def of(key: str, module: str, stack: str, pattern: str, converter: WeightConverter) -> ExpertKey | None:
        """Return the place of a key; None where transformers makes the stack otherwise than by stacking and joining outputs.

        Args:
            key: in the file.
            module: that it names.
            stack: that transformers makes of the module's weight and others.
            pattern: of transformers', which matches the name of the weight.
            converter: that has the pattern.
        """
        merge, *join = converter.operations
        joined = len(join) == 1 and isinstance(join[0], Concatenate) and join[0].dim == 1
        if not (isinstance(merge, MergeModulelist) and merge.dim == 0 and (joined or not join)):
            return None
        found = re.fullmatch(r"(?P<owner>.+)\.(?P<expert>\d{1,6})\.(?P<leaf>\w+)", module)
        leaves = tuple(each.replace("\\", "").split(".")[-2] for each in converter.source_patterns)
        if found is None or found["leaf"] not in leaves or ".*." not in pattern:
            return None
        return ExpertKey(key, found["owner"], int(found["expert"]), found["leaf"], leaves, stack)

    def module(self, expert: int, leaf: str) -> str:
        """Return the path that a projection of an expert had."""
        return f"{self.owner}.{expert}.{leaf}"


@dataclass(frozen=True)
class _ExpertFactors:
    """The factors of a projection of one expert, and what the config says of them."""

    a: AdapterTensor
    b: AdapterTensor
    setting: Setting


def stacked(
    files: AdapterFiles, experts: Iterable[ExpertKey], found: Iterable[Site], order: Sequence[str]
) -> AdapterFiles:
    """Return an adapter with the factors of experts stacked, and with a config that names the stacks.

    Args:
        files: of the adapter.
        experts: the keys of factors of experts.
        found: the call sites of the graph.
        order: the names of all parameters of the model, in its order.

    Raises:
        AdapterError: a factor is missing or does not fit; all problems are named.
    """
    by_stack: dict[str, list[ExpertKey]] = {}
    for each in experts:
        by_stack.setdefault(each.stack, []).append(each)
    of_stack = {site.weight: site for site in found if site.op == "expert" and is_bare(site)}
    problems: list[str] = []
    made: dict[str, _ExpertStack] = {}
    for stack, keys in by_stack.items():
        if stack not in of_stack:
            problems.append(f"{keys[0].key}: an expert of {stack!r}, at which the graph has no call site")
            continue
        made[stack] = _ExpertStack.of(files, keys, of_stack[stack], problems)
    problems += _lacking(files, by_stack, of_stack)
    if problems:
        raise AdapterError(str(files.directory), shortened(problems, _MAX_NAMED, "problems"))
    placed = slots([of_stack[stack] for stack in made], order)
    taken = {each.key for keys in by_stack.values() for each in keys}
    entries = {key: entry for key, entry in files.file.entries.items() if key not in taken}
    for stack, parts in made.items():
        key_a, key_b = placed[of_stack[stack].module].keys
        problems += [
            f"{key}: the factors of all experts of {stack}, and there are those of single ones"
            for key in (key_a, key_b)
            if key in entries
        ]
        entries |= {key_a: parts.entry_a, key_b: parts.entry_b}
    if problems:
        raise AdapterError(str(files.directory), shortened(problems, _MAX_NAMED, "problems"))
    ranks = {f"^{re.escape(stack)}$": parts.rank for stack, parts in made.items()}
    alphas = {
        f"^{re.escape(stack)}$": alpha_of(parts.rank, parts.scale, rslora=files.config.use_rslora)
        for stack, parts in made.items()
    }
    config = files.config.model_copy(
        update={
            "target_parameters": (*(files.config.target_parameters or ()), *made),
            "rank_pattern": {**ranks, **files.config.rank_pattern},
            "alpha_pattern": {**alphas, **files.config.alpha_pattern},
        }
    )
    return replace(files, config=config, file=replace(files.file, entries=entries), stacks="exchanged")


_MAX_NAMED = 20


@dataclass(frozen=True)
class _ExpertStack:
    """The factors of all experts of a stack; by expert and projection, where there are some."""

    pairs: Mapping[tuple[int, int], _ExpertFactors]
    experts: int
    leaves: int
    features: tuple[int, int]
    scale: float
    ranks: tuple[int, ...]

    @staticmethod
    def of(files: AdapterFiles, keys: Sequence[ExpertKey], site: Site, problems: list[str]) -> _ExpertStack:
        """Collect the factors of a stack, and add what is wrong to the problems."""
        some, entries, config = keys[0], files.file.entries, files.config
        modules = {key.module(key.expert, key.leaf): key.key.partition(".lora_")[0] for key in keys}
        out, leaves = site.out_features // len(some.leaves), len(some.leaves)
        pairs: dict[tuple[int, int], _ExpertFactors] = {}
        for expert in range(max(site.matrices, 1 + max(key.expert for key in keys))):
            for index, leaf in enumerate(some.leaves):
                module = some.module(expert, leaf)
                if module not in modules and not config.selects(module):
                    continue
                setting = config.setting_of(module)
                prefix = modules.get(module, _like(some, expert, leaf))
                factors = [entries.get(f"{prefix}.lora_{side}.weight") for side in "AB"]
                shapes = ((setting.rank, site.in_features), (out, setting.rank))
                wrong = [
                    f"{prefix}.lora_{side}.weight: missing in {files.file.path.name}: {CONFIG_NAME} selects {module!r}"
                    if entry is None
                    else f"{prefix}.lora_{side}.weight: expected shape {shape}, of expert {expert} of {site.weight}, got {entry.shape}"
                    for side, entry, shape in zip("AB", factors, shapes, strict=True)
                    if entry is None or entry.shape != shape
                ]
                if expert >= site.matrices:
                    wrong = [
                        f"{prefix}: expected an expert below {site.matrices}, the number of experts of {site.weight}"
                    ]
                problems += wrong
                a, b = factors
                if not wrong and a is not None and b is not None:
                    pairs[expert, index] = _ExpertFactors(a, b, setting)
        ranks = [
            max((p.setting.rank for (_, i), p in pairs.items() if i == index), default=0) for index in range(leaves)
        ]
        scale = next((pair.setting.scale for pair in pairs.values()), 1.0)
        return _ExpertStack(pairs, site.matrices, leaves, (site.in_features, site.out_features), scale, tuple(ranks))

    @property
    def rank(self) -> int:
        """Rank of the update of each expert."""
        return sum(self.ranks)

    @property
    def entry_a(self) -> AdapterTensor:
        return AdapterTensor(self._dtype, (self.experts * self.rank, self.features[0]), self._a)

    @property
    def entry_b(self) -> AdapterTensor:
        return AdapterTensor(self._dtype, (self.features[1], self.rank * self.experts), self._b)

    @property
    def _dtype(self) -> torch.dtype:
        dtypes = [entry.dtype for pair in self.pairs.values() for entry in (pair.a, pair.b)]
        made = dtypes[0]
        for dtype in dtypes:
            made = torch.promote_types(made, dtype)
        return made

    def _a(self) -> torch.Tensor:
        """Return A, ``(experts · r, in)``: for each expert the rows of its projections."""
        whole = torch.zeros(self.experts, self.rank, self.features[0], dtype=self._dtype)
        for (expert, index), pair in self.pairs.items():
            start = sum(self.ranks[:index])
            whole[expert, start : start + pair.setting.rank] = pair.a.read()
        return whole.flatten(0, 1)

    def _b(self) -> torch.Tensor:
        """Return B, ``(out, r · experts)``: for each rank the columns of all experts."""
        whole = torch.zeros(self.features[1], self.rank, self.experts, dtype=self._dtype)
        out = self.features[1] // self.leaves
        for (expert, index), pair in self.pairs.items():
            start, ratio = sum(self.ranks[:index]), pair.setting.scale / self.scale
            value = pair.b.read() if ratio == 1 else pair.b.read() * ratio
            whole[index * out : (index + 1) * out, start : start + pair.setting.rank, expert] = value
        return whole.flatten(1)


def _like(some: ExpertKey, expert: int, leaf: str) -> str:
    """Return how the keys of a projection begin, by those of another one."""
    before = some.key.partition(".lora_")[0]
    return f"{before.removesuffix(f'{some.expert}.{some.leaf}')}{expert}.{leaf}"


def _lacking(files: AdapterFiles, by_stack: Mapping[str, Sequence[ExpertKey]], found: Collection[str]) -> list[str]:
    """Return a problem for each stack that the config selects by the names of its experts, and for which the file has nothing."""
    problems = []
    for keys in by_stack.values():
        some = keys[0]
        for other in found:
            if other in by_stack or _NUMBER.sub("#", other) != _NUMBER.sub("#", some.stack):
                continue
            numbers = iter(_NUMBER.findall(other))
            owner = _NUMBER.sub(lambda _, given=numbers: next(given), some.owner)  # type: ignore[misc]
            module = replace(some, owner=owner).module(0, some.leaf)
            if files.config.selects(module):
                problems.append(f"{module}: missing in {files.file.path.name}: {CONFIG_NAME} selects it, for {other}")
    return list(dict.fromkeys(problems))


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
