"""Where PEFT keeps the factors of a branch, and in which form: the keys of ``adapter_model.safetensors``.

    linear, convolution   base_model.model.<module>.lora_A.weight            as here
    embedding             base_model.model.<module>.lora_embedding_A         as here
    rows of an embedding  base_model.model.<module>.token_adapter.trainable_tokens_delta
                          base_model.model.<module>.trainable_tokens_delta   where nothing else is adapted (trainable tokens alone)
    bias of B             base_model.model.<module>.lora_B.bias              as here
    magnitudes of DoRA    base_model.model.<module>.lora_magnitude_vector    as here
    parameter             base_model.model.<parent>.lora_A.weight            of the last parameter of <parent> that is adapted
                          base_model.model.<parent>.base_layer.lora_A.weight of the one before, and so on
    nn.MultiheadAttention base_model.model.<module>.lora_A.weight            of its in_proj_weight
                          base_model.model.<module>.base_layer.out_proj.lora_A.weight

A parameter is one that ``target_parameters`` names: a bare one, or the weight of a module, as of a router.

PEFT takes a single matrix for ``(out, in)``; what it takes a stack of them for, see :mod:`lora_fx.adapters.peft_format.stacks`.
Where it is mistaken, its A has the outputs and its B the inputs: ``ΔWᵀ = A B`` in place of ``ΔW = B A``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.adapters.peft_format.stacks import StackLayout
from lora_fx.errors import did_you_mean
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.provenance import module_path, source_line, stamp_of
from lora_fx.graph.records import BranchSpec
from lora_fx.planning.plan import factor_shapes, magnitude_shape
from lora_fx.rules.peft_config.config import CONFIG_NAME
from lora_fx.sites.call_sites import Site, biased, cast_back, is_bare, parameter_of, sites
from lora_fx.sites.weight_ops import readers, weight_op
from lora_fx.torch_internals import OpOverload

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Slot:
    """The place of the factors of one branch in PEFT's files.

    Attributes:
        site: the call site that the branch is beside.
        name: what the config calls it: the path of a module, or the full name of a parameter.
        path: of the layer that PEFT puts there.
        layout: of the factors of a stack of matrices in the file.
        in_attention: whether PEFT adapts it with the other projection of its ``nn.MultiheadAttention``.
    """

    site: Site
    name: str
    path: str
    layout: StackLayout = "exchanged"
    in_attention: bool = False

    @property
    def times(self) -> int:
        """How many times PEFT 0.21 adds the update to the weight.

        Its layer of an ``nn.MultiheadAttention`` merges the factors of ``out_proj`` into the weight, and has the layer there merge them too.
        """
        return 2 if self.in_attention and not is_bare(self.site) else 1

    @property
    def is_parameter(self) -> bool:
        """Whether the config names it under ``target_parameters``: a bare parameter, or the weight of a module."""
        return not self.in_attention and (is_bare(self.site) or self.name != self.site.module)

    @property
    def is_stack(self) -> bool:
        """Whether it is a parameter that is a stack of matrices."""
        return self.is_parameter and self.site.op == "expert"

    @property
    def swapped(self) -> bool:
        """Whether PEFT's A is on the side of the outputs."""
        last_is_in = self.site.layout == "out_in"
        return self.is_parameter and last_is_in == (self.is_stack and self.layout == "as_stored")

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of A and B."""
        if self.site.op == "embedding" and not self.is_parameter:
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        return f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight"

    def vectors(self, branch: BranchSpec) -> dict[str, tuple[int, ...]]:
        """Return the keys of what a branch has besides A and B, each with its shape: the bias of B, the magnitudes."""
        found: dict[str, tuple[int, ...]] = {}
        if branch.setting.bias:
            found[f"{PREFIX}{self.path}.lora_B.bias"] = (self.site.out_features,)
        if branch.setting.variant == "dora":
            found[f"{PREFIX}{self.path}.lora_magnitude_vector"] = magnitude_shape(self.site)
        return found

    def shapes(self, branch: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of PEFT's A and B for a branch."""
        a, b = factor_shapes(branch, self.site)
        return ((a[0], b[0]), (a[1], b[1])) if self.swapped else (a, b)

    @property
    def is_module(self) -> bool:
        """Whether PEFT has a layer of its own for the module of the site."""
        return not (is_bare(self.site) or self.in_attention)

    def of_graph(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of a graph for those of a file, which PEFT may add several times."""
        a, b = self.converted(a, b)
        return (a, b) if self.times == 1 else (a, b * self.times)

    def of_file(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of a file for those of a graph: the inverse of :meth:`of_graph`, exact for a power of two."""
        a, b = self.converted(a, b)
        return (a, b) if self.times == 1 else (a, b / self.times)

    def converted(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return PEFT's factors for ours, or ours for PEFT's: where these differ, each is made of the other one."""
        if not self.swapped:
            return a, b
        matrices = self.site.matrices
        rows = a.unflatten(0, (matrices, -1)).permute(2, 1, 0).flatten(1)  # (matrices, rank, n) → (n, rank · matrices)
        columns = b.unflatten(1, (-1, matrices)).permute(2, 1, 0).flatten(0, 1)
        return columns.contiguous(), rows.contiguous()


def slots(
    chosen: Iterable[Site],
    order: Iterable[str],
    weights: Collection[str] = (),
    layouts: Mapping[str, StackLayout] | None = None,
    attentions: Mapping[str, str] | None = None,
) -> dict[str, Slot]:
    """Return the slot of each of these sites, by their modules; calls of one module share it.

    Args:
        chosen: the sites that an adapter has branches beside.
        order: the names of all parameters of the model, in its order.
        weights: modules whose weight ``target_parameters`` names.
        layouts: of the factors of stacks of matrices in the file, by the names of the stacks.
        attentions: the sites that are adapted as parts of an ``nn.MultiheadAttention``, by their modules, with its path.
    """
    owners = attentions or {}
    by_module = {site.module: site for site in chosen}
    named = {
        parameter_of(site)
        for module, site in by_module.items()
        if module not in owners and (is_bare(site) or module in weights)
    }
    depths: dict[str, int] = {}
    paths: dict[str, str] = {}
    for name in reversed([name for name in order if name in named]):
        parent = name.rpartition(".")[0]
        depth = depths[parent] = depths.get(parent, -1) + 1
        paths[name] = ".".join([parent] * bool(parent) + ["base_layer"] * depth)
    found = {}
    for module, site in by_module.items():
        if (owner := owners.get(module)) is not None:
            path = owner if is_bare(site) else f"{owner}.base_layer.out_proj"
            found[module] = Slot(site, owner, path, in_attention=True)
            continue
        name = parameter_of(site)
        layout = (layouts or {}).get(name, "exchanged")
        found[module] = Slot(site, name if name in paths else module, paths.get(name, module), layout)
    return found


def base_key(parameter: str, adapted: Collection[str]) -> str:
    """Return the key of a parameter of the model itself, which is inside PEFT's layer if its module is adapted."""
    module, _, leaf = parameter.rpartition(".")
    return PREFIX + ".".join([module] * bool(module) + ["base_layer"] * (module in adapted) + [leaf])


def token_key(module: str) -> str:
    """Return the key of the values for rows of an embedding."""
    return f"{PREFIX}{module}.{_TOKENS}"


def beside_factors(key: str) -> str:
    """Return the key that values for rows have in a LoRA's file for their key in a file of trainable tokens alone; others as they are."""
    module = key.removesuffix(f".{_TOKENS_ALONE}")
    return key if module == key else f"{module}.{_TOKENS}"


def without_factors(key: str) -> str:
    """Return the inverse of :func:`beside_factors`."""
    module = key.removesuffix(f".{_TOKENS}")
    return key if module == key else f"{module}.{_TOKENS_ALONE}"


def module_of_key(key: str) -> str:
    """Return the module that the key of a factor, or of the values for rows of an embedding, names."""
    path = key.removeprefix(PREFIX).removesuffix(f".{_TOKENS}").partition(".lora_")[0]
    return ".".join(part for part in path.split(".") if part != "base_layer")


def is_of_rows(key: str) -> bool:
    """Tell whether a key is that of the values for rows of an embedding."""
    return key.endswith(f".{_TOKENS}")


def is_of_method(key: str) -> bool:
    """Tell whether a key is that of a factor, or of the values for rows of an embedding, and of no tensor of the model."""
    return ".lora_" in key or is_of_rows(key)


_TOKENS_ALONE = "trainable_tokens_delta"
_TOKENS = f"token_adapter.{_TOKENS_ALONE}"
_LAYERS = ("base_layer", "original_module", "token_adapter")  # of PEFT, around a layer of the model


def base_name(key: str, names: Collection[str]) -> str | None:
    """Return which of these parameters of the model a key stands for, if it does for one.

    PEFT may write one of a module that trains as a whole twice, and the second time with the adapter's name behind
    ``modules_to_save``, whatever that was.
    """
    parts = key.removeprefix(PREFIX).split(".")
    if key.startswith(PREFIX) and "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        candidates = [parts[:place] + parts[place + 1 :], parts[:place] + parts[place + 2 :]]
    else:
        candidates = [[part for part in parts if part not in _LAYERS]]
    found = (".".join(candidate) for candidate in (parts, *candidates))
    return next((name for name in found if name in names), None) if key.startswith(PREFIX) else None


def apart_from_calls(
    graph_module: fx.GraphModule,
    modules: Collection[str],
    weights: Collection[str] = (),
    attentions: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return at which of these modules PEFT would compute something else than a branch beside the product, and why.

    PEFT has its branch beside the call of a module; of what ``target_parameters`` names, it adds the update to the parameter
    for the length of the call. Of a graph whose nodes do not tell their modules, nothing is known.

    Args:
        graph_module: with the call sites.
        modules: of the sites in question; of a bare parameter, its name.
        weights: those modules whose weight ``target_parameters`` names.
        attentions: see :func:`slots`; PEFT adds their updates for the length of the call of the ``nn.MultiheadAttention``.
    """
    owners = attentions or {}
    frames: dict[str, list[fx.Node]] = {}
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for node in graph_module.graph.nodes:
        if not stamp_of(node):
            frames.setdefault(_frame(node)[0], []).append(node)
    found: dict[str, str] = {}
    tensors = state_of(graph_module).tensors
    adapted = [site for site in sites(graph_module) if site.module in modules]
    for site in adapted:
        node = nodes[site.node]
        if not node.meta.get("nn_module_stack"):
            continue
        if is_bare(site) or site.module in weights or site.module in owners:
            products = {nodes[each.node] for each in adapted if each.module == site.module}
            owner = owners.get(site.module, parameter_of(site).rpartition(".")[0])
            reason = _apart_from_parameter(owner, node, products)
        else:
            returned = cast_back(node, tensors[site.weight])
            reason = _apart_from_module(site, node, returned, frames)
        if reason:
            found.setdefault(site.module, f"{site.module}: {reason}")
    return found


def _apart_from_parameter(owner: str, node: fx.Node, products: Collection[fx.Node]) -> str:
    """Return why the module that owns the weight of a product, during its call, is not the place of these products alone."""
    if not _is_inside(node, owner):
        return f"its weight is multiplied with outside of the module{source_line(node)}{_IN_CALL}"
    product = weight_op(node)
    assert product is not None
    others = [each for each, _ in readers(product.weight) if each not in products and _is_inside(each, owner)]
    return f"its weight is read by {others[0].target} too{source_line(others[0])}{_IN_CALL}" if others else ""


def _apart_from_module(
    site: Site, node: fx.Node, returned: fx.Node | None, frames: Mapping[str, Collection[fx.Node]]
) -> str:
    """Return why the call of a module is not the product alone, given its cast back, if any, and the nodes of each call."""
    frame, kind = _frame(node)
    if module_path(node) != site.module:
        return f"its weight is multiplied with outside of the module{source_line(node)}{_BESIDE}"
    product = weight_op(node)
    if site.kernel and product is not None and set(product.geometry[2]) != {1} != set(site.kernel):
        return f"its convolution has the dilation {product.geometry[2]}, and PEFT's branch has none{source_line(node)}"
    if site.op == "embedding" and kind.endswith("ScaledWordEmbedding"):
        return ""  # of transformers; PEFT knows of their scale
    expected = {node, biased(node)} if returned is None else {node, returned, *node.all_input_nodes}
    own = [each for each in frames[frame] if each.op == "call_function" and not _depends_on_weights_alone(each)]
    more = [each for each in own if each not in expected and not _moves_values(each)]
    return f"its module computes more than the product, {more[0].target}{source_line(more[0])}{_BESIDE}" if more else ""


def _is_inside(node: fx.Node, module: str) -> bool:
    """Tell whether a node was recorded in a call of a module, or of one inside of it."""
    stack = node.meta.get("nn_module_stack") or {}
    return not module or any(path.split("@")[0] == module for path, _ in stack.values())


_BESIDE = "; PEFT's branch is beside the call of the module, and would compute something else"
_IN_CALL = "; PEFT changes the parameter during the call of its module, and would compute something else"


def _frame(node: fx.Node) -> tuple[str, str]:
    """Return the innermost call of a module that recorded a node, and the name of its class."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    call, (_, kind) = next(reversed(stack.items()))
    return call, kind if isinstance(kind, str) else kind.__qualname__


def _depends_on_weights_alone(node: fx.Node) -> bool:
    return all(each.op == "get_attr" or _depends_on_weights_alone(each) for each in node.all_input_nodes) and bool(
        node.all_input_nodes
    )


def _moves_values(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", "")
    return name in RESHAPES or not isinstance(node.target, OpOverload) or name.startswith("sym_")


RESHAPES = frozenset(
    {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "clone"}
)


def why_left(key: str, chosen: Collection[str], known: Collection[str]) -> str:
    """Return why nothing asks for a key of a file, given the modules with branches and those of all call sites."""
    if not key.startswith(PREFIX):
        return f"expected a key that begins with {PREFIX}"
    if "lora_magnitude_vector" in key:
        return f"magnitudes of DoRA, and {CONFIG_NAME} does not say use_dora"
    module, found, _ = key.removeprefix(PREFIX).partition(".lora_")
    if not found:
        return "the model has no such parameter"
    if key.endswith((".lora_B.bias", ".lora_A.bias")):
        return f"a bias of a factor, and {CONFIG_NAME} does not say lora_bias"
    if ".base_layer." in f".{module}.":
        return "inside of a layer of PEFT's own, as it puts into nn.MultiheadAttention; this is not supported"
    if module in chosen:
        return "the branch has no such factor"
    if module in known:
        return f"{CONFIG_NAME} does not select {module!r}"
    if f"{module}.out_proj" in known and f"{module}.in_proj_weight" not in known:
        return "an nn.MultiheadAttention whose query is another tensor than its key has no call site at its in_proj_weight; this is not supported"
    return f"the graph has no call site {module!r}{did_you_mean(module, known)}"
