"""Folds of what is affine in a site's input, beside PEFT's own merges; what is not affine is refused by its node.

Models that PEFT wrapped are traced, whichever method it is, and fold like any other graph with nominated parameters.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.graph.adapter_names import is_of_branch
from lora_fx.numerics.constant import Constant, Named

aten = torch.ops.aten


class Net(nn.Module):
    """An embedding, linears with a bias and without one, and GPT-2's Conv1D: no two widths are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.q, self.k, self.c = (
            nn.Embedding(11, 6),
            nn.Linear(6, 10),
            nn.Linear(10, 7, bias=False),
            Conv1D(9, 7),
        )
        nn.init.normal_(self.c.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.k(torch.tanh(self.q(self.emb(ids))))))  # type: ignore[no-any-return]


class Image(nn.Module):
    """Convolutions, with a bias and without one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.point = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1), nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.point(torch.tanh(self.wide(ids)))  # type: ignore[no-any-return]


IDS, PIXELS = torch.tensor([[3, 0, 10, 4, 1], [2, 2, 9, 7, 5]]), torch.linspace(-1, 1, 2 * 3 * 9 * 8).view(2, 3, 9, 8)
LINEAR, ALL = ["q", "k"], ["emb", "q", "k", "c"]

AFFINE: Mapping[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL, use_dora=True, init_lora_weights=False),
    "lora_bias": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q", "c"], lora_bias=True, init_lora_weights=False
    ),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=LINEAR, init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=[], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=LINEAR, init_weights=False),
    "randlora": lambda: peft.RandLoraConfig(r=3, target_modules=LINEAR, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=3, lora_alpha=5, total_step=10, target_modules=LINEAR, init_lora_weights=False
    ),
    "adalora of a convolution": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=3, lora_alpha=5, total_step=10, target_modules=["wide"], init_lora_weights=False
    ),
    "delora": lambda: peft.DeloraConfig(r=3, delora_lambda=4, target_modules=LINEAR, init_weights=False),
    "kasa": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=LINEAR, kasa_config=peft.KasaConfig(), init_lora_weights=False
    ),
    "velora": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=LINEAR, velora_config=VeloraConfig(num_groups=2), init_lora_weights=False
    ),
    "monteclora": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=LINEAR,
        monteclora_config=MontecloraConfig(num_samples=2),
        init_lora_weights=False,
    ),
    "qa-lora": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q"], use_qalora=True, qalora_group_size=2, init_lora_weights=False
    ),
    "trained tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["emb"], token_indices=[4, 1], init_weights=False
    ),
    "trained tokens and lora": lambda: peft.LoraConfig(
        r=3, target_modules=["q"], trainable_token_indices={"emb": [4, 1]}, init_lora_weights=False
    ),
    "dora of a convolution": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["wide", "point"], use_dora=True, init_lora_weights=False
    ),
    "lora_bias of a convolution": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["wide"], lora_bias=True, init_lora_weights=False
    ),
    "loha of a convolution": lambda: peft.LoHaConfig(r=3, target_modules=["wide", "point"], init_weights=False),
    "ia3 of a convolution": lambda: peft.IA3Config(
        target_modules=["wide", "point"], feedforward_modules=[], init_ia3_weights=False
    ),
}
DENSE = {"adalora of a convolution", "loha", "lokr", "loha of a convolution", "trained tokens"}
NOT_AFFINE: Mapping[str, tuple[Callable[[], Any], str]] = {
    "ia3 in front of a product": (
        lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["k"], init_ia3_weights=False),
        "aten.mul.Tensor",
    ),
    "oft": (
        lambda: peft.OFTConfig(oft_block_size=2, target_modules=["q"], init_weights=False),
        "aten.einsum.default",
    ),
    "bd-lora": (
        lambda: peft.LoraConfig(
            r=2, target_modules=["q"], use_bdlora=BdLoraConfig(target_modules_bd_a=["q"], nblocks=2)
        ),
        "aten.einsum.default",
    ),
    "boft": (
        lambda: peft.BOFTConfig(boft_block_size=2, target_modules=["q"], init_weights=False),
        "aten.unbind.int",
    ),
}


def wrapped(config: Any, images: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = peft.get_peft_model(Image() if images else Net(), config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # not what it begins with
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model, {"ids": PIXELS if images else IDS}


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Tell whether values are equal to 1e-6 of the largest of them."""
    return torch.allclose(mine, theirs, rtol=0, atol=1e-6 * max(1.0, float(theirs.abs().max())))


MATRIX = {"adalora of a convolution", "ia3 of a convolution", "velora", "monteclora", "qa-lora", "kasa"}
ROWS = [pytest.param(name, marks=[pytest.mark.matrix] if name in MATRIX else []) for name in AFFINE]


@pytest.fixture(scope="module", params=ROWS)
def traced(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, torch.Tensor], fx.GraphModule]:
    model, inputs = wrapped(AFFINE[request.param](), "convolution" in request.param)
    return request.param, model, inputs, lora_fx.trace(model, inputs, inference=True)


def test_a_trace_of_any_affine_method_folds_to_what_peft_merges(
    traced: tuple[str, Any, dict[str, torch.Tensor], Any],
) -> None:
    name, model, inputs, graph_module = traced
    before, expected = copy.deepcopy(graph_module.state_dict()), model(**inputs)
    merged = copy.deepcopy(model).merge_and_unload()
    folded = lora_fx.fold(graph_module)
    assert not any(is_of_branch(key) for key in folded.state_dict())
    assert close(folded(**inputs), expected)
    assert close(folded(**inputs), merged(**inputs))
    mine = {key.replace("base_model.model.", ""): value for key, value in folded.state_dict().items()}
    mine = {key.replace(".base_layer", "").replace(".token_adapter", ""): value for key, value in mine.items()}
    for key, value in merged.state_dict().items():
        assert close(mine[key], value), key
    base = lora_fx.trace(Image() if "convolution" in name else Net(), tuple(inputs.values()), inference=True)
    called = ([n.target for n in each.graph.nodes if n.op == "call_function"] for each in (folded, base))
    ours, theirs = (
        [target for target in each if target is not aten.to.dtype and target is not getattr] for each in called
    )
    assert ours == theirs  # but for casts that PEFT leaves behind
    assert all(torch.equal(before[key], value) for key, value in graph_module.state_dict().items())


def test_a_recipe_of_any_affine_method_is_data_and_of_low_rank_where_the_method_is(
    traced: tuple[str, Any, dict[str, torch.Tensor], Any],
) -> None:
    name, _, _, graph_module = traced
    merges = lora_fx.recipe(graph_module)
    assert pickle.loads(pickle.dumps(merges)) == merges
    tensors = set(graph_module.state_dict()) | set(dict(graph_module.named_buffers()))
    assert all(read in tensors for merge in merges for update in merge.updates for read in update.names)
    assert any(merge.is_dense for merge in merges) == (name in DENSE)
    report = str(lora_fx.fold_report(graph_module, lora_fx.fold(graph_module)))
    assert ("as large as these, and of no low rank" in report) == (name in DENSE)


class InPlace(nn.Module):
    """A linear and GPT-2's Conv1D, in the dtype of a model whose adapters PEFT keeps in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.c = nn.Linear(6, 10), Conv1D(9, 10)
        nn.init.normal_(self.c.bias)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.q(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["adalora", "delora"])
def test_sums_in_place_have_the_dtype_of_what_they_are_written_to_also_through_a_view(
    method: str, dtype: torch.dtype
) -> None:
    adalora = peft.AdaLoraConfig(
        init_r=4, target_r=3, lora_alpha=5, total_step=10, target_modules=["q", "c"], init_lora_weights=False
    )
    delora = peft.DeloraConfig(r=3, delora_lambda=4, target_modules=["q"], init_weights=False)
    model = peft.get_peft_model(InPlace(dtype), adalora if method == "adalora" else delora).eval()
    x = torch.randn(2, 5, 6, dtype=dtype)
    folded = lora_fx.fold(lora_fx.trace(model, (x,), inference=True))
    merged, expected = copy.deepcopy(model).merge_and_unload(), model(x)
    assert folded(x).dtype == expected.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # one rounding of PEFT's merge, one of the fold
    for name in ("q", "c")[: 2 if method == "adalora" else 1]:
        mine = folded.get_parameter(f"base_model.model.{name}.base_layer.weight")
        theirs = merged.get_submodule(name).weight
        assert not torch.equal(theirs, model.get_submodule(f"base_model.model.{name}").base_layer.weight)
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(folded(x).float(), expected.float(), rtol=10 * tolerance, atol=10 * tolerance)


class SharedView(nn.Module):
    """A branch is added in place to a view of a linear's output, which is read once more behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6)
        self.lora_A, self.lora_B = (nn.ModuleDict({"own": nn.Linear(*n, bias=False)}) for n in ((8, 2), (2, 6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.q(x)
        view = output.view(1, *x.shape[:-1], 6)
        view += self.lora_B["own"](self.lora_A["own"](x))
        return view + output  # type: ignore[no-any-return]


def test_a_sum_in_place_into_a_view_of_what_others_read_is_refused() -> None:
    graph_module = lora_fx.trace(SharedView().eval(), (torch.randn(3, 4, 8),), dynamic={}, inference=True)
    with pytest.raises(lora_fx.FoldError, match=r"The node is %add_ : .*aten\.add_\.Tensor"):
        lora_fx.fold(graph_module)


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_a_method_that_is_not_affine_is_refused_by_its_node(name: str) -> None:
    make, operator = NOT_AFFINE[name]
    model, inputs = wrapped(make())
    graph_module = lora_fx.trace(model, inputs, inference=True)
    for call in (lora_fx.fold, lora_fx.unload, lora_fx.recipe):
        with pytest.raises(
            lora_fx.FoldError, match=rf"The node is %\w+ : .*target=torch\.ops\.{operator}\].*peft/tuners"
        ):
            call(graph_module)


class Reshaped(nn.Module):
    """IA³ scales a reshaped output, to which a branch of LoRA is added, in the same places or in others."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.q = shape, nn.Linear(8, 6, bias=False)
        self.lora_A, self.lora_B = (nn.ModuleDict({"own": nn.Linear(*n, bias=False)}) for n in ((8, 2), (2, 6)))
        self.ia3_l = nn.ParameterDict({"own": nn.Parameter(torch.rand(6) + 0.5)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.lora_B["own"](self.lora_A["own"](x))
        update = update.view(self.shape) if len(self.shape) == 2 else update
        return self.q(x).view(self.shape) * self.ia3_l["own"] + update  # type: ignore[no-any-return]


def test_a_scaled_output_keeps_its_positions_or_is_refused() -> None:
    x = torch.randn(3, 4, 8)
    flat = lora_fx.trace(Reshaped(12, 6).eval(), (x,), dynamic={})
    assert close(lora_fx.fold(flat)(x), flat(x))
    spread = lora_fx.trace(Reshaped(3, 1, 4, 6).eval(), (x,), dynamic={})
    with pytest.raises(lora_fx.FoldError, match="adds values of other positions"):
        lora_fx.fold(spread)


class Scaled(nn.Embedding):
    """An embedding whose module scales what it looked up, as Gemma's does."""

    def __init__(self, by: Any) -> None:
        super().__init__(11, 6)
        self.register_buffer("by", by, persistent=False) if isinstance(by, torch.Tensor) else setattr(self, "by", by)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.by


@pytest.mark.parametrize("by", [torch.tensor(2.5), 2.5], ids=["buffer", "number"])
def test_a_scale_of_the_model_behind_a_scaled_output_stays_where_it_is(by: Any) -> None:
    model = Net().eval()
    model.emb = Scaled(by)
    base = lora_fx.trace(model, (IDS,))
    rules = {"defaults": {"variant": "dora", "rank": 2}, "select": [{"target": ["emb"]}]}
    graph_module = lora_fx.rewrite(base, rules, seed=1)
    for name, parameter in graph_module.named_parameters():
        if "lora_" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    assert torch.equal(lora_fx.unload(graph_module)(IDS), base(IDS))
    again = lora_fx.activate(lora_fx.activate(graph_module, {}), {"default": 1.0})
    assert torch.equal(again(IDS), graph_module(IDS))
    folded = lora_fx.fold(graph_module)
    assert close(folded(IDS), graph_module(IDS))
    assert [n.format_node() for n in folded.graph.nodes] == [n.format_node() for n in base.graph.nodes]


def test_a_fold_in_place_gives_the_same_bits() -> None:
    model, inputs = wrapped(AFFINE["dora"]())
    graph_module = lora_fx.trace(model, inputs, inference=True)
    folded = lora_fx.fold(graph_module)
    again = lora_fx.fold(copy.deepcopy(graph_module), inplace=True)
    for key, value in folded.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_two_adapters_of_dora_fold_as_peft_computes_them() -> None:
    model, inputs = wrapped(AFFINE["dora"]())
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q", "k"], use_dora=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    model.eval()
    folded = lora_fx.fold(lora_fx.trace(model, inputs, inference=True))
    assert close(folded(**inputs), model(**inputs))


NOMINATED = [
    "q.lora_magnitude_vector.default.weight",
    "q.lora_B.default.bias",
    "q.vera_lambda_d.default",
    "q.vera_A.default",
    "q.ia3_l.default",
    "q.hada_w1_a.other",
    "lokr_w2.default",
    "q.randlora_lambda.default",
    "q.oft_R.default.weight",
    "q.lora_E.default",
    "q.ranknum.default",
    "emb.token_adapter.trainable_tokens_delta.default",
]
NOT_NOMINATED = [
    "q.ranknum",
    "q.lora_A.weight",
    "oft_R.weight",
    "q.ia3_l.bias",
    "q.vera.default",
    "my_vera_A.default",
    "q.weight",
    "q.road.x",
]


@pytest.mark.parametrize("name", NOMINATED)
def test_the_parameters_of_pefts_methods_nominate_a_branch(name: str) -> None:
    assert is_of_branch(name)


@pytest.mark.parametrize("name", NOT_NOMINATED)
def test_other_names_nominate_none(name: str) -> None:
    assert not is_of_branch(name)


# Properties: any affine branch folds, and gives what it computed.


class DrawnBranch:
    """A graph in float64, of which a site and an expression over it are drawn."""

    def __init__(self, draw: st.DataObject) -> None:
        self.draw, self.root, self.graph = draw, nn.Module(), fx.Graph()
        self.count = 0
        self.torch = torch.Generator().manual_seed(draw.draw(st.integers(0, 99)))
        self.kind = draw.draw(st.sampled_from(["linear", "linear_bias", "matmul_bias", "addmm", "embedding", "conv1d"]))
        self.wide, self.high = draw.draw(st.integers(1, 4)), draw.draw(st.integers(1, 4))
        self.bias: fx.Node | None = None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*given[0], **given[1])
        return node

    def tensor(self, *sizes: int, name: str | None = None) -> fx.Node:
        """A tensor of the branch, or one of the model."""
        self.count += name is None
        name = name or f"lin.lora_A.n{self.count}.weight"
        module = self.root
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        value = torch.randn(*sizes, generator=self.torch, dtype=torch.float64)
        module.register_parameter(leaf, nn.Parameter(value))
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def site(self) -> fx.Node:
        x = self.graph.placeholder("x")
        if self.kind == "embedding":
            x.meta["val"] = torch.tensor([[0, 2], [1, 1]])
        elif self.kind == "conv1d":
            x.meta["val"] = torch.randn(2, self.wide, 5, generator=self.torch, dtype=torch.float64)
        else:
            sizes = (3, self.wide) if self.kind == "addmm" else (2, 3, self.wide)
            x.meta["val"] = torch.randn(*sizes, generator=self.torch, dtype=torch.float64)
        self.x = x
        bias = {} if self.kind in ("linear", "embedding") else {"bias": self.tensor(self.high, name="lin.bias")}
        self.bias = bias.get("bias")
        if self.kind == "embedding":
            return self.call(aten.embedding.default, self.tensor(3, self.high, name="lin.weight"), x)
        if self.kind == "conv1d":
            return self.call(aten.conv1d.default, x, self.tensor(self.high, self.wide, 2, name="lin.weight"), self.bias)
        if self.kind in ("linear", "linear_bias"):
            return self.call(
                aten.linear.default, x, self.tensor(self.high, self.wide, name="lin.weight"), *bias.values()
            )
        weight = self.tensor(self.wide, self.high, name="lin.weight")
        if self.kind == "addmm":
            return self.call(aten.addmm.default, self.bias, x, weight)
        return self.call(aten.add.Tensor, self.call(aten.matmul.default, x, weight), self.bias)

    def vector(self) -> fx.Node:
        """A constant over the features, computed or not, in the place where a product takes it for that."""
        vector = self.tensor(self.high)
        if self.draw.draw(st.booleans()):
            vector = self.call(aten.tanh.default, self.call(aten.mul.Tensor, vector, self.tensor(self.high)))
        return self.call(aten.view.default, vector, [1, -1, 1]) if self.kind == "conv1d" else vector

    def delta(self) -> fx.Node:
        rank = self.draw.draw(st.integers(1, 3))
        if self.kind == "embedding":
            found = self.call(aten.embedding.default, self.tensor(3, rank), self.x)
            return self.call(aten.linear.default, found, self.tensor(self.high, rank))
        if self.kind == "conv1d":
            down = self.call(aten.conv1d.default, self.x, self.tensor(rank, self.wide, 2))
            return self.call(aten.conv1d.default, down, self.tensor(self.high, rank, 1))
        if self.draw.draw(st.booleans()):
            dense = self.call(aten.mul.Tensor, self.tensor(self.high, self.wide), self.tensor(1, self.wide))
            return self.call(aten.linear.default, self.x, dense)
        x = self.x
        if self.draw.draw(st.booleans()):
            x = self.call(aten.mul.Tensor, *self.draw.draw(st.permutations([x, self.tensor(self.wide)])))
        down = self.call(aten.linear.default, x, self.tensor(rank, self.wide))
        if self.draw.draw(st.booleans()):
            down = self.call(aten.mul.Tensor, down, self.tensor(rank))
        return self.call(aten.linear.default, down, self.tensor(self.high, rank))

    def value(self, site: fx.Node, depth: int) -> fx.Node:
        """A value that depends on a factor, affine in the input of the site."""
        ways = ["delta", "scaled output", "shifted output"]
        ways += ["sum", "difference", "scaled", "number", "shifted", "negated", "divided", "from zero"] if depth else []
        way = self.draw.draw(st.sampled_from(ways))
        match way:
            case "delta":
                return self.delta()
            case "scaled output":
                return self.call(aten.mul.Tensor, site, self.vector())
            case "shifted output":
                if self.bias is None:
                    return self.delta()
                return self.call(aten.add.Tensor, site, self.vector())
            case "sum":
                return self.call(aten.add.Tensor, self.value(site, depth - 1), self.value(site, depth - 1))
            case "difference":
                return self.call(aten.sub.Tensor, self.value(site, depth - 1), self.value(site, depth - 1))
            case "scaled":
                return self.call(aten.mul.Tensor, self.vector(), self.value(site, depth - 1))
            case "number":
                return self.call(
                    aten.mul.Tensor, self.value(site, depth - 1), self.draw.draw(st.sampled_from([2.0, -0.5]))
                )
            case "divided":
                if self.kind != "conv1d" and self.draw.draw(st.booleans()):
                    divisor = self.call(aten.mul.Tensor, self.tensor(1), self.tensor(1))
                else:
                    divisor = self.vector()
                divisor = self.call(aten.exp.default, self.call(aten.tanh.default, divisor))
                target = self.draw.draw(st.sampled_from([aten.div.Tensor, aten.mul.Tensor]))
                return self.call(target, self.value(site, depth - 1), divisor)
            case "from zero":
                value = self.value(site, depth - 1)
                return self.call(aten.add.Tensor, self.call(aten.zeros_like.default, value), value)
            case "shifted" if self.bias is not None:
                return self.call(aten.sub.Tensor, self.value(site, depth - 1), self.vector())
            case _:
                return self.call(aten.neg.default, self.value(site, depth - 1))


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_affine_branch_folds_to_what_it_computes(data: st.DataObject) -> None:
    drawn = DrawnBranch(data)
    site = drawn.site()
    end = drawn.call(aten.add.Tensor, site, drawn.value(site, 3))
    drawn.graph.output(drawn.call(aten.tanh.default, end))
    graph_module = fx.GraphModule(drawn.root, drawn.graph)
    given = drawn.x.meta["val"]
    folded = lora_fx.fold(graph_module)
    event(drawn.kind)
    assert torch.allclose(folded(given), graph_module(given), rtol=0, atol=1e-10)
    assert set(folded.state_dict()) <= {"lin.weight", "lin.bias"}
    assert torch.equal(lora_fx.unload(graph_module)(given), torch.tanh(_site_value(drawn, site)))
    again = lora_fx.fold(copy.deepcopy(graph_module), inplace=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in folded.state_dict().items())


def _site_value(drawn: DrawnBranch, site: fx.Node) -> torch.Tensor:
    return site.meta["val"]  # type: ignore[no-any-return]


# Constants.


def test_constants_are_equal_if_they_say_the_same() -> None:
    made = [Constant("aten::mul.Tensor", (Named("a"), Constant("aten::neg", (Named(name),)))) for name in "bbc"]
    assert made[0] == made[1] != made[2]
    assert hash(made[0]) == hash(made[1])
    assert made[2].names == ("a", "c")
    assert repr(made[0]) == "mul(a, b)"
    assert Constant("aten::mul.Tensor", (Named("a"), 1)) != Constant("aten::mul.Tensor", (Named("a"), 1.0))
    assert Constant("aten::mul.Tensor", (Named("a"), Named("b"))) != Constant("aten::mul.Tensor", (Named("a,b"),))


def test_a_constant_is_evaluated_in_float64_and_writes_to_no_tensor() -> None:
    tensors = {"a": torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "i": torch.tensor([1])}
    third = Constant("aten::div.Tensor", (Named("a"), 3))
    written = Constant("aten::index_fill_.int_Scalar", (third, 0, Named("i"), 7.0))
    known: dict[str, torch.Tensor] = {}
    assert torch.equal(written.value(tensors, known), torch.tensor([1 / 3, 7.0], dtype=torch.float64))
    assert torch.equal(third.value(tensors, known), torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    assert torch.equal(tensors["a"], torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
