"""DoRA (arXiv 2402.09353): the weight and its update together have a magnitude for each output feature, which trains.

y = m / ‖W + s · B A‖ · (W x + s · B A x) + bias

The norm is over the input features of each output feature, and no gradient goes through it (section 4.3). Beside a site these are the
nodes of PEFT's layers in their order, ``k = m / ‖W + s · B A‖``::

    y + ((k - 1) · (y - bias) + k · B A x · s)          an embedding: k · y + k · B A x · s

With dropout, PEFT multiplies by W once more in training, the dropped input: a module that follows the mode does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.adapters.starts import model_weight
from lora_fx.branches.find import find_branches
from lora_fx.errors import PlanError
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import AdapterRecord, info_of
from lora_fx.graph.records import BranchSpec, TokenRows
from lora_fx.graph.training_only import TrainingOnly
from lora_fx.numerics.factor_init import adapter_dtype
from lora_fx.planning.plan import Chosen, Plan, magnitude_shape, owners_of
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import Site, sites
from lora_fx.sites.weight_ops import Emit, WeightOp, weight_op

aten = torch.ops.aten


def initial_magnitude(site: Site, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> nn.Parameter:
    """Return ``‖W + s · B A‖``, with which the branch starts as if it were LoRA's. The norm is in the dtype of the weight.

    Args:
        site: where the branch is.
        weight: as it is stored.
        a: its factor A.
        b: its factor B.
        scale: of their product.
    """
    dtype = adapter_dtype(site.cast or weight.dtype)
    if weight.is_meta:
        return nn.Parameter(torch.empty(magnitude_shape(site), dtype=dtype, device="meta"))
    weight, own = weight.detach(), weight.dtype
    exact = torch.float32 if own == torch.float16 else own  # as PEFT, which multiplies such factors in float32
    a, b = (factor.detach().to(own).to(exact) for factor in (a, b))
    if site.kernel:
        rank = a.shape[0]
        update = torch.mm(b.view(-1, rank), a.view(rank, -1)).reshape(weight.shape).to(own)
        total = weight + scale * update
        norm = total.norm(p=2, dim=tuple(range(1, total.dim())), keepdim=True).transpose(1, 0)
    else:
        dense = weight.T if site.layout == "in_out" else weight
        norm = torch.linalg.norm(dense + scale * (b @ a).to(own), dim=1).to(own)
    return nn.Parameter(norm.to(dtype).contiguous())


def missing_magnitudes(
    wanted: Iterable[str],
    branches: Iterable[tuple[str, BranchSpec]],
    found: Iterable[Site],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return initial magnitudes for the branches that have none yet.

    Args:
        wanted: names of tensors without a value.
        branches: adapter and branch, of every branch in a graph.
        found: the sites of the graph.
        tensors: its weights and factors.
    """
    site_of = {owner: site for site in found for owner in owners_of(site)}
    names, values = set(wanted), dict[str, torch.Tensor]()
    for adapter, branch in branches:
        own = branch.names(adapter)
        if branch.setting.variant == "dora" and own.magnitude in names:
            site, scale = site_of[branch.owner], branch.setting.scale / branch.setting.strength
            values[own.magnitude] = initial_magnitude(site, tensors[site.weight], tensors[own.a], tensors[own.b], scale)
    return values


def product_in_training(product: WeightOp, target: Callable[..., torch.Tensor]) -> TrainingOnly:
    """Return a module that in training multiplies its second input by its third one, a weight, and returns the first in evaluation."""
    graph = fx.Graph()
    _, x, weight = (graph.placeholder(name) for name in ("value", "x", "weight"))
    more = () if product.op == "linear" else (None, *(list(each) for each in product.geometry[:-1]), product.groups)
    graph.output(graph.call_function(aten.linear.default if product.op == "linear" else target, (x, weight, *more)))
    return TrainingOnly(graph)


def dropout_modules(
    graph: fx.Graph, branches: Iterable[tuple[Chosen, BranchSpec]], adapter: str
) -> dict[str, nn.Module]:
    """Return the modules of branches with dropout, LoRA's too, by which it follows the mode.

    Args:
        graph: with the sites.
        branches: each with its site.
        adapter: that they belong to.
    """
    nodes = {node.name: node for node in graph.nodes}
    modules: dict[str, nn.Module] = {}
    for chosen, branch in branches:
        if branch.setting.dropout > 0 and branch.op != "embedding":  # indices cannot be dropped
            names, node = branch.names(adapter), nodes[chosen.site.node]
            modules[names.dropout] = nn.Dropout(branch.setting.dropout)
            product = weight_op(node)
            if branch.setting.variant == "dora" and product is not None and callable(node.target):
                modules[names.training_product] = product_in_training(product, node.target)
    return modules


def check_dora_alone(graph_module: fx.GraphModule, plan: Plan, adapter: str, tokens: Sequence[TokenRows]) -> None:
    """Refuse DoRA where something else changes the weight: its norm would be that of the weight without the other.

    Args:
        graph_module: in which the other adapters act.
        plan: of the adapter that is to act.
        adapter: its name.
        tokens: its rows.

    Raises:
        PlanError: at a site of DoRA another adapter that acts has a branch too, or the model has one, or an adapter has rows of its weight.
    """
    acting = {n: each for n, each in info_of(graph_module).adapters.items() if each.acts}
    specs = [branch for chosen in plan.chosen for branch in chosen.branches]
    specs += [branch for record in acting.values() for _, branch in record.branches.values()]
    if all(branch.setting.variant != "dora" for branch in specs):
        return
    found = sites(graph_module)
    kinds = {chosen.site.node: {each.setting.variant for each in chosen.branches} for chosen in plan.chosen}
    mine = [chosen.site for chosen in plan.chosen if "dora" in kinds[chosen.site.node]]
    at, rows = {adapter: mine}, {adapter: tokens, **{name: record.tokens for name, record in acting.items()}}
    for other, record in acting.items():
        theirs = _kinds(record, found)
        at[other] = [site for site in found if "dora" in theirs.get(site.node, ())]
        both = (site for site in found if "dora" in theirs.get(site.node, set()) | kinds.get(site.node, set()))
        if (met := next((site for site in both if site.node in theirs.keys() & kinds.keys()), None)) is not None:
            raise PlanError(
                f"adapters {other!r} and {adapter!r} would both act at {met.name!r}, and one of them is DoRA's, whose magnitudes are "
                "those of the weight with its own update alone. Let one of them act at a time, or fold one first."
            )
    _check_without_rows(at, rows, state_of(graph_module).aliases())
    own = {branch.site.name for branch in find_branches(graph_module)} if mine else set()
    if (met := next((site for site in mine if site.node in own), None)) is not None:
        raise PlanError(
            f"adapter {adapter!r} would have DoRA at {met.name!r}, where the model came with a branch of its own: its magnitudes are those of "
            "the weight without that. Fold the model first (lora_fx.fold), or adapt that layer without DoRA."
        )


def _kinds(record: AdapterRecord, found: Iterable[Site]) -> dict[str, set[str]]:
    """Return the kinds of branches that an adapter has, by the nodes of their sites."""
    owned: dict[str, set[str]] = {}
    for _, branch in record.branches.values():
        owned.setdefault(branch.owner, set()).add(branch.setting.variant)
    kinds = {site.node: {kind for owner in owners_of(site) for kind in owned.get(owner, ())} for site in found}
    return {node: each for node, each in kinds.items() if each}


def _check_without_rows(
    at: Mapping[str, Sequence[Site]], rows: Mapping[str, Sequence[TokenRows]], aliases: Mapping[str, str]
) -> None:
    """Refuse DoRA of adapters beside rows of the weight that these, or others, write over."""
    for adapter, site in ((name, site) for name, each in at.items() for site in each):
        for other, tokens in ((name, tokens) for name, each in rows.items() for tokens in each):
            reads = not tokens.alone or tokens.module == site.module
            if reads and aliases[tokens.weight] == aliases[model_weight(site)]:
                raise PlanError(
                    f"adapter {adapter!r} would have DoRA at {site.name!r}, and adapter {other!r} has rows of its weight, {tokens.weight!r}: "
                    "the magnitudes are those of the weight without these rows. Let one of them act at a time, or leave out DoRA or the rows."
                )


@dataclass(frozen=True)
class DoraBranch:
    """The nodes of a branch.

    Attributes:
        product: what the site computes.
        shape: of the weight as it is stored.
        layout_swapped: whether that is ``(in, out)``.
        end: the complete output of the site.
        bias: the node of the bias in it, or None.
        x: the input of the branch, after its cast and its dropout.
        a: factor A.
        b: factor B.
        magnitude: the magnitudes.
        low_rank: ``B(A(x))``.
        rank: of the factors.
        scale: of their product.
        wide: the dtype of the factors, if that is not the weight's.
    """

    product: WeightOp
    shape: tuple[int, ...]
    layout_swapped: bool
    end: fx.Node
    bias: fx.Node | None
    x: fx.Node
    a: fx.Node
    b: fx.Node
    magnitude: fx.Node
    low_rank: fx.Node
    rank: int
    scale: float
    wide: torch.dtype | None

    @staticmethod
    def of(
        site: fx.Node,
        end: fx.Node,
        weight: torch.Tensor,
        nodes: tuple[fx.Node, fx.Node, fx.Node, fx.Node],
        magnitude: fx.Node,
        setting: Setting,
    ) -> DoraBranch:
        """Return the branch beside a site.

        Args:
            site: the site's node.
            end: the complete output of the site.
            weight: of the site, as it is stored.
            nodes: x after its cast and its dropout, A, B and ``B(A(x))``.
            magnitude: the magnitudes.
            setting: of the branch.
        """
        product = weight_op(site)
        assert product is not None
        x, a, b, low_rank = nodes
        narrow = product.dtype or weight.dtype
        # The other summand of a sum with a bias; a cast of the product has none.
        bias = next((node for node in end.all_input_nodes if end is not site and node is not site), product.addend)
        wide = adapter_dtype(narrow)
        return DoraBranch(
            product, tuple(weight.shape), product.layout == "in_out", end, bias, x, a, b, magnitude, low_rank,
            setting.rank, setting.scale, wide if wide != narrow else None,
        )  # fmt: skip

    def write(self, emit: Emit, in_training: Callable[..., fx.Node] | None) -> fx.Node:
        """Append the nodes to a graph, and return the output of the site with its branch.

        Args:
            emit: appends a node.
            in_training: appends a call of :func:`product_in_training`; None where the branch has no dropout.
        """
        if self.product.op == "embedding":
            return self._embedding(emit)
        weight = self.product.weight
        weight = weight if self.wide is None else emit("norm", aten.to.dtype, weight, self.wide)
        weight = emit("norm", aten.numpy_T.default, weight) if self.layout_swapped else weight
        factor = emit("magnitude", aten.div.Tensor, self.magnitude, self._norm(emit, weight))
        if self.product.op == "linear":
            factor = emit("magnitude", aten.view.default, factor, [1, -1])
        base = self.end
        if self.bias is not None:
            ones = [1] * (len(self.shape) - 2)
            bias = emit("base", aten.view.default, self.bias, [1, -1, *ones]) if ones else self.bias
            base = emit("base", aten.sub.Tensor, base, bias)
        if in_training is not None:
            base = in_training(base, self.x, weight)
        less = emit("magnitude", aten.sub.Tensor, factor, 1)
        changed = emit("magnitude", aten.mul.Tensor, less, base)
        scaled = emit("scale", aten.mul.Tensor, emit("magnitude", aten.mul.Tensor, factor, self.low_rank), self.scale)
        return emit("add", aten.add.Tensor, self.end, emit("sum", aten.add.Tensor, changed, scaled))

    def _norm(self, emit: Emit, weight: fx.Node) -> fx.Node:
        """Write ``‖W + s · B A‖``, of which no gradient goes back."""
        if self.product.op == "linear":
            # PEFT: B(A(identity)) transposed; these have its bits
            turned = emit("norm", aten.contiguous.default, emit("norm", aten.numpy_T.default, self.a))
            update = emit("norm", aten.numpy_T.default, emit("norm", aten.linear.default, turned, self.b))
            total = self._sum(emit, weight, update)
            return emit("norm", aten.detach.default, emit("norm", aten.linalg_norm.default, total, None, [1]))
        shape = list(self.shape)
        left = emit("norm", aten.view.default, self.b, [-1, self.rank])
        right = emit("norm", aten.view.default, self.a, [self.rank, -1])
        update = emit("norm", aten.reshape.default, emit("norm", aten.mm.default, left, right), shape)
        total = self._sum(emit, weight, update)
        norm = emit("norm", aten.norm.ScalarOpt_dim, total, 2, list(range(1, len(shape))), True)
        return emit("norm", aten.detach.default, emit("norm", aten.transpose.int, norm, 1, 0))

    def _sum(self, emit: Emit, weight: fx.Node, update: fx.Node) -> fx.Node:
        apart = emit("norm", aten.detach.default, update)
        return emit("norm", aten.add.Tensor, weight, emit("norm", aten.mul.Tensor, apart, self.scale))

    def _embedding(self, emit: Emit) -> fx.Node:
        left, right = (emit("norm", aten.numpy_T.default, factor) for factor in (self.a, self.b))
        update = emit("norm", aten.numpy_T.default, emit("norm", aten.matmul.default, left, right))
        total = self._sum(emit, emit("norm", aten.numpy_T.default, self.product.weight), update)
        norm = emit("norm", aten.detach.default, emit("norm", aten.linalg_norm.default, total, None, [1]))
        factor = emit("magnitude", aten.div.Tensor, self.magnitude, norm)
        changed = emit("magnitude", aten.mul.Tensor, factor, self.end)
        scaled = emit("scale", aten.mul.Tensor, emit("magnitude", aten.mul.Tensor, factor, self.low_rank), self.scale)
        return emit("add", aten.add.Tensor, changed, scaled)
