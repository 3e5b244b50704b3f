"""Records of adapters: their branches, the model's parameters that they train, and where they come from. Plain frozen data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from lora_fx.graph.adapter_names import BranchNames
from lora_fx.rules.peft_config.config import AdapterConfig, Method
from lora_fx.rules.peft_config.rules import PeftRules
from lora_fx.rules.rule_file import RuleSet, Setting
from lora_fx.rules.vocabulary import AttentionPlace, Op, Part


@dataclass(frozen=True)
class Features:
    """A set of output features as ranges ``(first, past the last)``, in ascending order."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, indices: Iterable[int]) -> Features:
        """Return the set of these indices."""
        ordered = sorted(set(indices))
        runs = groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
        found = [[index for _, index in run] for _, run in runs]
        return cls(tuple((run[0], run[-1] + 1) for run in found))

    def __iter__(self) -> Iterator[int]:
        return (index for first, past in self.ranges for index in range(first, past))

    def __len__(self) -> int:
        return sum(past - first for first, past in self.ranges)

    def __and__(self, other: Features) -> Features:
        return Features.of(set(self) & set(other))

    def __or__(self, other: Features) -> Features:
        return Features.of((*self, *other))

    def __str__(self) -> str:
        shown = [str(first) if past == first + 1 else f"{first}–{past - 1}" for first, past in self.ranges[:4]]
        return ", ".join(shown) + (", …" if len(self.ranges) > 4 else "")


@dataclass(frozen=True)
class BranchSpec:
    """One low-rank branch: ``y + scale · B(A(dropout(x)))``.

    Attributes:
        owner: the path after which its parameters are named: that of the module, or ``<module path>@n`` where the n-th call
            has a branch of its own.
        setting: rank, alpha, dropout, scaling, init.
        part: of a branch for one part of a fused projection.
        features: the output features of that part; None where the branch writes to all.
        op: what kind of site it is beside.
        mirrors: the owner of a branch beside an embedding, whose factors this one has at the tied head: its A is the other's B,
            transposed, and its B the other's A.
    """

    owner: str
    setting: Setting
    part: Part | None = None
    features: Features | None = None
    op: Op = "linear"
    mirrors: str | None = None

    @property
    def key(self) -> str:
        """Identifier among the branches of one adapter."""
        return self.owner if self.part is None else f"{self.owner}:{self.part}"

    def names(self, adapter: str) -> BranchNames:
        """Return the names of the branch's parameters in an adapter."""
        return BranchNames(self.owner, adapter, self.part, self.mirrors)

    @property
    def splits(self) -> bool:
        """Whether the branch is beside what its start left of the weight. Beside embeddings PEFT has no such start."""
        return self.op == "linear" and self.setting.splits

    @property
    def added(self) -> Setting:
        """The settings of a branch beside the weight itself that adds the same: of twice the rank where the start split the weight."""
        setting = self.setting
        if not self.splits:
            return setting
        return replace(setting, rank=2 * setting.rank, rule_rank=setting.rule_rank or setting.rank, init="kaiming")

    def parameters(self, adapter: str) -> tuple[str, ...]:
        """Return the names of all parameters that it has in an adapter: A, B, the bias of B, the magnitudes."""
        names, setting = self.names(adapter), self.setting
        more = [names.bias] * setting.bias + [names.magnitude] * (setting.variant == "dora")
        return (names.a, names.b, *more)

    def factors(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of the update of the weight from the tensors of a graph, without a gradient: of the settings ``added``."""
        names = self.names(adapter)
        a, b = (tensors[name].detach() for name in (names.a, names.b))
        if self.splits:  # s (B A - B₀ A₀), as PEFT converts it
            a0, b0 = (tensors[name].detach().to(a.dtype) for name in names.starts)
            return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
        return (a, b) if self.mirrors is None else (a.t(), b.t())


@dataclass(frozen=True)
class Trained:
    """A parameter of the model that trains beside the branches, in a copy.

    Attributes:
        name: its first name.
        rule: the selection that says so.
        elements: how many elements it has.
        whole: whether it is meant under all of its names, if it is tied.
        untied: whether the copy is for the module of ``name`` alone, and other modules that share the parameter do not compute with
            it; ``name`` may then be any of its names.
    """

    name: str
    rule: str
    elements: int
    whole: bool = True
    untied: bool = False


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that train beside the branches: the adapter has values of its own for them.

    Attributes:
        module: the path after which the values are named, of the embedding.
        rows: their numbers, in the order of the values.
        rule: the selection that says so.
        width: elements of a row.
        alone: whether the weight is tied, and other modules that share it do not compute with these values.
    """

    module: str
    rows: tuple[int, ...]
    rule: str
    width: int
    alone: bool = False

    @property
    def weight(self) -> str:
        """Name of the embedding's weight."""
        return f"{self.module}.weight".removeprefix(".")

    @property
    def elements(self) -> int:
        """How many elements train."""
        return len(self.rows) * self.width


@dataclass(frozen=True)
class PrefixSpec:
    """Learned keys and values in front of those of attentions, or embeddings in front of those of inputs: a prefix of so many tokens.

    Attributes:
        tokens: their number.
        layers: for which the parameters have keys and values, PEFT's ``num_layers``; none of a prompt, which is embeddings.
        heads: of keys and values.
        size: of a head.
        rule: the rule that says so.
        hidden: width between the two layers of a projection; None where the keys and values themselves are the parameters.
        pairs: for each layer of the model the pair of keys and values that it gets, if it is not the one of its own number; None for a
            layer without.
        dropout: rate at which elements are dropped in training.
        starts_as: name of the weight, and the rows of it, that the embeddings of a prompt start as.
        place: the attentions at which it is written as nodes; None for a past.
    """

    tokens: int
    layers: int
    heads: int
    size: int
    rule: str
    hidden: int | None = None
    pairs: tuple[int | None, ...] | None = None
    dropout: float = 0.0
    starts_as: tuple[str, tuple[int, ...]] | None = field(default=None, compare=False)
    place: AttentionPlace | None = None

    @property
    def is_prompt(self) -> bool:
        """Whether it is embeddings in front of those of the inputs."""
        return self.layers == 0

    @property
    def kind(self) -> str:
        """What messages call it."""
        return "prompt" if self.is_prompt else "prefix"

    @property
    def without(self) -> tuple[int, ...]:
        """The layers of the model that have no keys and values in front of their own."""
        return tuple(layer for layer, pair in enumerate(self.pairs or ()) if pair is None)

    @property
    def width(self) -> int:
        """Features of the keys, or of the values, of one layer, or of an embedding: PEFT's ``token_dim``."""
        return self.heads * self.size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by the ends of their names."""
        whole = (self.layers * 2 or 1) * self.width
        if self.hidden is None:
            return {"embedding.weight": (self.tokens, whole)}
        return {
            "embedding.weight": (self.tokens, self.width),
            "transform.0.weight": (self.hidden, self.width),
            "transform.0.bias": (self.hidden,),
            "transform.2.weight": (whole, self.hidden),
            "transform.2.bias": (whole,),
        }

    @property
    def elements(self) -> int:
        """How many elements train."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from: the rules that made it, and what its config said of the base.

    Attributes:
        rules: name of the rules that made it.
        digest: of these rules, see :attr:`lora_fx.rules.rule_file.RuleSet.digest`.
        task_type: as PEFT names tasks.
        base: the model that it was trained on, as its config names it.
        revision: of that model.
        method: as PEFT names it: LoRA's, or that of trainable tokens alone.
    """

    rules: str = ""
    digest: str = ""
    task_type: str | None = None
    base: str | None = None
    revision: str | None = None
    method: Method = "LORA"

    @staticmethod
    def of(rules: RuleSet | PeftRules) -> Origin:
        """Return the origin of an adapter that rules make."""
        if isinstance(rules, PeftRules):
            return Origin(rules.name, rules.digest).told_by(rules.config)
        return Origin(rules.name, rules.digest, rules.defaults.task_type)

    def told_by(self, config: AdapterConfig) -> Origin:
        """Return the origin with what a config says of it."""
        base, revision = config.base_model_name_or_path, config.revision
        return replace(self, task_type=config.task_type, base=base, revision=revision, method=config.peft_type)


@dataclass(frozen=True)
class TaskHead:
    """The part of a model that is beside its base model, for one task.

    Attributes:
        modules: paths of its modules.
        fresh: names of its parameters that are not known to have values from a checkpoint.
    """

    modules: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def has(self, module: str) -> bool:
        """Tell whether a module of this path is in the head."""
        return any(f"{module}.".startswith(f"{path}.") for path in self.modules)


@dataclass(frozen=True)
class ParameterModule:
    """What PEFT goes by at a module whose weights it adapts as parameters: stacks, classes that it has no layer for, nn.MultiheadAttention.

    Attributes:
        classes: its class and those that it derives from, as ``module:qualified.name``.
        transposed: whether it says ``is_transposed``.
    """

    classes: tuple[str, ...]
    transposed: bool

    @property
    def is_attention(self) -> bool:
        """Whether it is an ``nn.MultiheadAttention``, of which PEFT adapts ``in_proj_weight`` and ``out_proj`` together."""
        return "torch.nn.modules.activation:MultiheadAttention" in self.classes
