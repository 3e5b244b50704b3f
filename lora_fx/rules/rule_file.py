"""Rule files: which call sites get a branch, as data. TOML → frozen, validated rules. Imports no torch.

A rule file names the architectures it is for, the defaults of a branch, and one or more selections::

    model_types = ["t5", "mt5"]

    [defaults]
    rank = 8
    alpha = 32
    dropout = 0.1

    [[select]]
    target = ["q", "v"]

A selection claims the call sites that all its predicates admit. Whatever a file contains, the outcome is a rule set or a
:class:`RuleError` that names line and key of every problem.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    SkipValidation,
)

from lora_fx.rules.dotted_names import admits, ends_in, matches
from lora_fx.rules.prefix_table import PREFIXES, Prefix, Prompt
from lora_fx.rules.safe_regex import problem_of
from lora_fx.rules.toml_lines import KeyPath
from lora_fx.rules.validation import (
    Bounds,
    Dropout,
    Flag,
    Items,
    Layers,
    Natural,
    Plain,
    Positive,
    Table,
    Text,
    expecting,
    located,
    one_of,
    shown,
    validated,
    wrong,
)
from lora_fx.rules.vocabulary import (
    FOREIGN_KEYS,
    NITER,
    Init,
    Op,
    Part,
    RoleName,
    Scaling,
    Start,
    TaskType,
    Variant,
    splits_weight,
)


def _check_regex(pattern: str) -> str:
    problem = problem_of(pattern)
    if problem is not None:
        raise wrong(problem)
    return pattern


def _check_frozen(frozen: tuple[str, ...]) -> tuple[str, ...]:
    if len(frozen) > 1:
        raise wrong("expected one factor at most, since none would train, found A and B")
    return frozen


Alpha = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), Plain, expecting("a finite number > 0")]
Pattern = Annotated[
    str,
    Field(strict=True, pattern=r"^[^.\s]+(\.[^.\s]+)*$"),
    expecting('a dotted name or its end, such as "self.query" or "layers.*.q_proj"'),
]
Patterns = Annotated[tuple[Pattern, ...], Items('["q"]')]
Regex = Annotated[Text, AfterValidator(_check_regex), Field(json_schema_extra={"format": "regex"})]
BranchBias = Annotated[
    bool, Field(strict=True), expecting('true or false (of a bias in B; trainable = "bias" trains the model\'s own)')
]
Invocation = Annotated[
    tuple[Natural, ...], Items("[27, 91]", distinct=False), expecting("a list of tokens, which are integers ≥ 0")
]
Calls = Annotated[
    Literal["all", "each"] | Annotated[tuple[Positive, ...], Items("[1]")],
    expecting('"all", "each" or a list of different integers ≥ 1'),
]
Trainable = Annotated[
    Literal["bias", "all"] | Annotated[tuple[Natural, ...], Items("[0]")],
    expecting("'bias', 'all' or a list of different integers ≥ 0 (rows)", ("bias", "all")),
]
InitName = Annotated[
    Init | Annotated[str, Field(strict=True, pattern=f"^{NITER.pattern}$")],
    expecting(f"{', '.join(map(repr, get_args(Init)))} or 'pissa_niter_16'", get_args(Init)),
]
Frozen = Annotated[
    tuple[Literal["A", "B"], ...],
    Items('["A"]', least=0),
    expecting("['A'], ['B'] or an empty list"),
    AfterValidator(_check_frozen),
]
Role = Annotated[RoleName, one_of(RoleName)]


class _Table(Table):
    foreign_keys: ClassVar[Mapping[str, str]] = FOREIGN_KEYS


class Defaults(_Table):
    """Settings of every branch that its selection does not override."""

    rank: Positive = 8
    """Inner dimension of a branch."""

    alpha: Alpha = 8.0
    """Numerator of the scale of a branch."""

    dropout: Dropout = 0.0
    """Probability with which an element of a branch's input is dropped in training."""

    scaling: Annotated[Scaling, one_of(Scaling)] = "standard"
    """The scale: alpha / rank, or alpha / √rank."""

    init: InitName = "kaiming"
    """How the factors start."""

    freeze: Frozen | None = None
    """The factor that never trains: A of LoRA-FA (arXiv 2308.03303), for one."""

    variant: Annotated[Variant, one_of(Variant)] | None = None
    """The kind of branch, "lora" unless said."""

    bias: BranchBias | None = None
    """Whether the factor B has a bias, which trains with it."""

    invocation_tokens: Invocation | None = None
    """The tokens from whose last place in each row on the branch acts (aLoRA, arXiv 2504.12397); before them all is the base's."""


class FileDefaults(Defaults):
    """Settings of every branch that its selection does not override, and the task."""

    task_type: Annotated[TaskType, one_of(TaskType)] | None = None
    """The task, as PEFT names it: for SEQ_CLS, TOKEN_CLS and QUESTION_ANS the task head trains as a whole."""


PREDICATES = ("target", "regex", "role", "op", "layers", "in_features", "out_features", "groups")
OF_BRANCHES = (
    *("rank", "alpha", "dropout", "scaling", "init", "freeze", "variant", "bias", "invocation_tokens", "features"),
    "calls",
)


class Selection(_Table):
    """One ``[[select]]``: the call sites that all its predicates admit, and the branches that they get."""

    target: Patterns | None = None
    """Whole dotted names or their ends, any of them: "q" is the end of "layer.0.q", not of "seq"; * stands for anything within a part."""

    regex: Regex | None = None
    """A regular expression that matches the whole dotted name."""

    role: Annotated[tuple[Role, ...], Items('["attention.query"]')] | None = None
    """Any of these roles, as the dataflow tells."""

    op: Annotated[tuple[Annotated[Op, one_of(Op)], ...], Items('["linear"]')] | None = None
    """Any of these kinds of operator."""

    layers: Annotated[tuple[Layers, ...], Items('[0, "4-7"]')] | None = None
    """Layers, or ranges of them with both ends included. The layer of a name is the first of its parts that is a number."""

    in_features: Bounds | None = None
    """Width of the input."""

    out_features: Bounds | None = None
    """Width of the output."""

    groups: Bounds | None = None
    """Groups of a convolution, as many as input channels if it is depthwise; 1 for all other operators."""

    exclude: Patterns | None = None
    """Excluded names, as in target."""

    exclude_role: Annotated[tuple[Role, ...], Items('["head"]')] | None = None
    """Excluded roles, as in role."""

    calls: Calls = "all"
    """Whether all calls of a module share one branch, each has its own, or which of them, counted from 1, have their own."""

    features: Annotated[tuple[Annotated[Part, one_of(Part)], ...], Items('["query"]')] | None = None
    """Parts of a fused projection; each has its own branch."""

    rank: Positive | None = None
    """In place of the default."""

    alpha: Alpha | None = None
    """In place of the default."""

    dropout: Dropout | None = None
    """In place of the default."""

    scaling: Annotated[Scaling, one_of(Scaling)] | None = None
    """In place of the default."""

    init: InitName | None = None
    """In place of the default."""

    freeze: Frozen | None = None
    """In place of the default."""

    variant: Annotated[Variant, one_of(Variant)] | None = None
    """In place of the default."""

    bias: BranchBias | None = None
    """In place of the default."""

    invocation_tokens: Invocation | None = None
    """In place of the default."""

    trainable: Trainable | None = None
    """No branch: the biases or all parameters of the modules train themselves, or these rows of embeddings, as of new tokens."""

    override: Flag = False
    """Whether this selection takes sites over from those before it."""

    optional: Flag = False
    """Whether this selection may match nothing."""

    alternatives: Flag = False
    """Whether names in target may match nothing beside others that do, as in rules for several versions of a model."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Tell whether something is selected, and which settings of branches stand beside ``trainable``."""
        if not any(key in given for key in PREDICATES):
            yield "", f"expected at least one of {', '.join(PREDICATES)}, found {', '.join(sorted(given)) or 'none'}"
        for key in OF_BRANCHES if "trainable" in given else ():
            if key in given and (key, given[key]) != ("calls", "all"):
                yield key, f"expected none beside trainable, which adds no branch, found {shown(given[key])}"

    def matches_name(self, name: str, where: str = "a selection") -> bool:
        """Tell whether the predicates on a dotted name admit it: target, regex, layers and exclude.

        Raises:
            RuleError: the regular expression takes too long; ``where`` says which selection it is of.
        """
        return self.admits_layer(name) and not self.excludes(name) and self.names(name, where)

    def names(self, name: str, where: str = "a selection") -> bool:
        """Tell whether target and regex admit a dotted name.

        Raises:
            RuleError: as :meth:`matches_name` does.
        """
        return (self.target is None or ends_in(name, self.target)) and (
            self.regex is None or matches(self.regex, name, where)
        )

    def admits_layer(self, name: str) -> bool:
        """Tell whether layers admit a dotted name."""
        return self.layers is None or any(admits(layers, name) for layers in self.layers)

    def excludes(self, name: str) -> bool:
        """Tell whether exclude has a dotted name."""
        return ends_in(name, self.exclude or ())

    def excluding(self, name: str) -> str:
        """Return the first pattern of exclude that a dotted name has."""
        return next(pattern for pattern in self.exclude or () if ends_in(name, [pattern]))


_ELSEWHERE = {
    "name": "unknown key; a rule set is named after its file",
    "inputs": "unknown key; example inputs are given by --example-inputs FILE.safetensors, or by example_inputs= in Python",
}
"""Keys that a rule file might be expected to have, and the hint for each."""


class RuleFile(_Table):
    """Which call sites of a model get a low-rank branch."""

    model_types: Annotated[tuple[Text, ...], Items('["t5"]', least=0)] = ()
    """The architectures that the file is for, as config.model_type names them."""

    defaults: FileDefaults = FileDefaults()
    """Settings of branches, where a selection has none of its own, and the task."""

    select: Annotated[tuple[Selection, ...], Items("tables under [[select]]", least=0, distinct=False)] = ()
    """Which call sites. At least one, unless there is a prefix or a prompt."""

    prefix: Annotated[tuple[Prefix, ...], Items("one table under [[prefix]]", least=0, distinct=False)] = ()
    """Learned keys and values in front of those of attentions, one table at most."""

    prompt: Annotated[tuple[Prompt, ...], Items("one table under [[prompt]]", least=0, distinct=False)] = ()
    """Learned embeddings in front of those of the inputs, one table at most, and none beside a prefix."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Tell whether there is something to add, and one prefix or prompt at most."""
        ahead = [(key, len(each)) for key in PREFIXES if isinstance(each := given.get(key), list | tuple) and each]
        if not given.get("select", ()) and not any(map(given.get, PREFIXES)):
            yield "select", "at least one is required, found []" if "select" in given else "required, and missing"
        yield from ((key, f"expected one table at most, found {count}") for key, count in ahead if count > 1)
        if len(ahead) > 1:
            yield "prompt", "expected none beside [[prefix]]: a graph computes with one of them"

    @classmethod
    def unknown(cls, key: str) -> str:
        """Return the message for a key that the table does not have."""
        return _ELSEWHERE.get(key) or super().unknown(key)


@dataclass(frozen=True)
class Setting:
    """The settings of one branch: ``y + scale · B(A(dropout(x)))``.

    All are of the branch as it trains, ``bias`` whether B has one, but for ``strength``, at which an adapter is active among others, and
    for ``rule_rank``: the rank that the rules gave and the scale goes by, where the site is narrower and has a lower rank.
    """

    rank: int
    alpha: float
    dropout: float
    scaling: Scaling = "standard"
    init: Start = "kaiming"
    strength: float = 1.0
    rule_rank: int | None = None
    freeze: tuple[str, ...] = ()
    variant: Variant = "lora"
    bias: bool = False
    invocation_tokens: tuple[int, ...] = ()

    def lowered_to(self, width: int) -> Setting:
        """Return the settings with a rank of at most ``width``, and the same scale."""
        return self if self.rank <= width else replace(self, rank=width, rule_rank=self.rule_rank or self.rank)

    @property
    def trains_a(self) -> bool:
        """Whether A may train: LoRA-FA keeps it as it started (arXiv 2308.03303)."""
        return "A" not in self.freeze

    @property
    def trains_b(self) -> bool:
        """Whether B may train: MiCA keeps B at singular vectors of the weight, and trains A alone (arXiv 2604.01694, section 3)."""
        return self.init != "mica" and "B" not in self.freeze

    @property
    def splits(self) -> bool:
        """Whether the product of the factors as they start is taken out of the weight."""
        return splits_weight(self.init)

    @property
    def scale(self) -> float:
        """``alpha / rank`` (LoRA, arXiv 2106.09685, section 4.1), or ``alpha / √rank`` (rsLoRA, arXiv 2312.03732), × strength.

        The rank is that of the rules, also where the branch has a lower one.
        """
        rank = self.rule_rank or self.rank
        return self.strength * (self.alpha / (rank if self.scaling == "standard" else math.sqrt(rank)))


class RuleSet(RuleFile):
    """A rule file with its name. Rule sets are equal if they have the same name and say the same."""

    name: str
    """The stem of the file."""

    source: str = Field(default="", exclude=True)
    """Where it comes from, for messages."""

    rank_is_given: bool = Field(default=False, exclude=True)
    """Whether the default rank is an argument, which narrow sites do not lower."""

    lines: Annotated[Mapping[KeyPath, int], SkipValidation] = Field(default={}, exclude=True, repr=False)
    """The lines of the file on which keys stand."""

    def __eq__(self, other: object) -> bool:
        said = ("name", *RuleFile.model_fields)
        return isinstance(other, RuleSet) and all(getattr(self, key) == getattr(other, key) for key in said)

    def __hash__(self) -> int:
        return hash((self.name, self.model_types, self.defaults, self.select, self.prefix, self.prompt))

    @property
    def digest(self) -> str:
        """SHA-256 of what the rules say, as hexadecimal digits; the same for files that say the same."""
        # Earlier digests had no prefix.
        told = {"model_types", "defaults", "select", *(key for key in PREFIXES if getattr(self, key))}
        said = self.model_dump_json(include=told, exclude_none=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def where(self, index: int) -> str:
        """Return how messages name a selection: ``select[1] (line 12)``."""
        line = self.lines.get(("select", index))
        return f"select[{index}] (line {line})" if line else f"select[{index}]"

    def at(self, *path: str | int) -> str:
        """Return how messages name a key, given by its path: ``line 12: select[1].rank``."""
        return located(path, self.lines)

    def setting_of(self, selection: Selection) -> Setting:
        """Return the settings of the branches of a selection: its own, and the defaults for the others."""
        settings = set(Defaults.model_fields)
        own = selection.model_dump(include=settings, exclude_none=True)
        return Setting(**self.defaults.model_dump(include=settings, exclude_none=True) | own)

    def with_overrides(
        self, rank: int | None, alpha: float | None, dropout: float | None, task_type: str | None = None
    ) -> RuleSet:
        """Return the rules with the given ``[defaults]`` replaced; a selection's own settings keep their precedence.

        Raises:
            RuleError: a value is out of range.
        """
        given = {"rank": rank, "alpha": alpha, "dropout": dropout, "task_type": task_type}
        changed = {key: value for key, value in given.items() if value is not None}
        document = {**self.defaults.model_dump(), **changed}
        defaults = validated(FileDefaults, document, f"arguments to rules {self.name!r}", within=("defaults",))
        given_rank = rank is not None or self.rank_is_given
        return self.model_copy(update={"defaults": defaults, "rank_is_given": given_rank})
