"""DoRA and biases of B: PEFT's bits in training and evaluation, files in both directions, folds in memory and on disk."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from architectures import ARCHITECTURES, few, model, rows, run, traced
from conftest import unchanged
from graph_diff import first_difference
from made import Convolved, Layers
from torch import nn

import lora_fx
from lora_fx.adapters.peft_format.contents import overview_of
from lora_fx.adapters.peft_format.opening import read_adapter
from lora_fx.errors import PlanError
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.graph.adapter_names import is_factor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


IDS = torch.tensor([[3, 0, 10, 4, 1], [2, 2, 9, 7, 5]])
DORA, BIAS = {"use_dora": True}, {"lora_bias": True}
ALL, BIASED = ["emb", "q", "k", "c"], ["q", "c"]


def signal(dims: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 6 * 5**dims).view(2, 3, *[5] * dims)


Case = tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]
CASES: Mapping[str, Case] = {
    "dora": (Layers, IDS, {**DORA, "target_modules": ALL}),
    "dora, dropout": (Layers, IDS, {**DORA, "target_modules": ALL, "lora_dropout": 0.3, "use_rslora": True}),
    "dora, both random": (Layers, IDS, {**DORA, "target_modules": ALL, "init_lora_weights": False}),
    "dora, bf16": (lambda: Layers().bfloat16(), IDS, {**DORA, "target_modules": ALL}),
    "dora, bf16, dropout": (lambda: Layers().bfloat16(), IDS, {**DORA, "target_modules": ALL, "lora_dropout": 0.3}),
    "dora, conv1d": (lambda: Convolved(1), signal(1), {**DORA, "target_modules": ["wide", "point"]}),
    "dora, conv2d, dropout": (
        lambda: Convolved(2), signal(2), {**DORA, "target_modules": ["wide", "point"], "lora_dropout": 0.3},
    ),
    "dora, conv3d": (lambda: Convolved(3), signal(3), {**DORA, "target_modules": ["wide", "point"]}),
    "bias": (Layers, IDS, {**BIAS, "target_modules": BIASED, "lora_dropout": 0.3}),
    "bias, both random": (Layers, IDS, {**BIAS, "target_modules": BIASED, "init_lora_weights": False}),
    "bias, bf16": (lambda: Layers().bfloat16(), IDS, {**BIAS, "target_modules": BIASED}),
    "bias, conv2d": (lambda: Convolved(2), signal(2), {**BIAS, "target_modules": ["wide"]}),
}  # fmt: skip


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains by the names that it has in a graph."""
    found = {name.removeprefix("base_model.model."): p for name, p in module.named_parameters() if p.requires_grad}
    return {
        name.replace("lora_embedding_A.default", "lora_A.default.weight").replace(
            "lora_embedding_B.default", "lora_B.default.weight"
        ): p
        for name, p in found.items()
    }


def set_parameters(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(parameters(module).items()):
        value = torch.randn(parameter.shape, generator=generator) * 0.3 + ("magnitude" in name)
        parameter.data.copy_(value)


def both(case: Case) -> tuple[Any, lora_fx.TracedGraphModule]:
    """Return a model that PEFT wrapped, and the graph, with equal seeds."""
    make, x, settings = case
    config = peft.LoraConfig(r=3, lora_alpha=5, **settings)
    base, other = make(), make()
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(base, config)
    torch.manual_seed(5)
    return wrapped, lora_fx.rewrite(other, rules=config, example_inputs=(x,))


@pytest.mark.parametrize(
    "name",
    few(CASES, ("dora", "dora, dropout", "dora, conv2d, dropout", "dora, bf16", "bias", "bias, conv2d")),
)
def test_parameters_outputs_and_gradients_are_bit_equal_to_peft(name: str, tmp_path: Path) -> None:
    make, x, _ = CASES[name]
    wrapped, graph_module = both(CASES[name])
    mine, theirs = parameters(graph_module), parameters(wrapped)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in theirs)
    assert lora_fx.parameter_summary(graph_module).trainable == sum(p.numel() for p in theirs.values())
    for module in (wrapped, graph_module):
        set_parameters(module)
    for training in (True, False):
        outputs = []
        for module in (wrapped, graph_module):
            module.train(training).zero_grad()
            torch.manual_seed(3)
            outputs.append(module(x))
            outputs[-1].float().square().sum().backward()
        assert torch.equal(*outputs)
        assert all(torch.equal(mine[key].grad, theirs[key].grad) for key in theirs)  # type: ignore[arg-type]
    expected = graph_module(x)
    lora_fx.save_adapter(graph_module, tmp_path / "mine")
    wrapped.save_pretrained(tmp_path / "theirs")
    assert torch.equal(peft.PeftModel.from_pretrained(make(), tmp_path / "mine").eval()(x), expected)
    assert torch.equal(lora_fx.from_adapter(make(), tmp_path / "theirs", example_inputs=(x,)).eval()(x), expected)
    with unchanged(graph_module):
        folded = lora_fx.fold(graph_module)
    if expected.dtype == torch.float32:
        assert torch.allclose(folded(x), expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))
    base = lora_fx.trace(make(), (x,))
    assert first_difference(base, folded) is None
    assert first_difference(base, lora_fx.unload(graph_module)) is None
    assert folded.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("name", rows(ARCHITECTURES, ("gpt2", "llama")))
def test_dora_on_this_architecture_is_bit_equal_to_peft_and_folds(name: str) -> None:
    architecture = ARCHITECTURES[name]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.3,
        use_dora=True,
        target_modules=list(architecture.target_modules),
        fan_in_fan_out=architecture.fan_in_fan_out,
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model(name)), config)
    graph_module = lora_fx.rewrite(traced(name), rules=config)
    for module in (wrapped, graph_module):
        set_parameters(module)
    mine, theirs = parameters(graph_module), parameters(wrapped)
    assert mine.keys() == theirs.keys()
    for training in (True, False):
        outputs = []
        for module in (wrapped, graph_module):
            torch.manual_seed(3)
            module.train(training).zero_grad()
            outputs.append(run(name, module, 3, 11, 5)[0])
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().mean().backward()
        for key, parameter in theirs.items():
            assert (mine[key].grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), key  # type: ignore[operator, union-attr]
    with torch.no_grad():
        expected, found = (run(name, each, 3, 11, 5)[0] for each in (graph_module, lora_fx.fold(graph_module)))
    assert float((found - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["dora, dropout", "bias"])
def test_thirty_steps_of_training_end_at_pefts_bits(name: str) -> None:
    wrapped, graph_module = both(CASES[name])
    x = CASES[name][1]
    for module in (wrapped, graph_module):
        optimizer = torch.optim.AdamW(parameters(module).values(), lr=0.01)
        torch.manual_seed(2)
        for _ in range(30):
            optimizer.zero_grad()
            (module.train()(x) - 1).square().mean().backward()
            optimizer.step()
    mine, theirs = parameters(graph_module), parameters(wrapped)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.fixture
def graph_module() -> lora_fx.TracedGraphModule:
    _, made = both(CASES["dora, dropout"])
    set_parameters(made)
    return made.eval()


PASSES: Mapping[str, Callable[[Any], Any]] = {
    "fuse": lora_fx.fuse,
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
    "activate": lambda graph: lora_fx.activate(lora_fx.activate(graph, {}), {"default": 1.0}),
    "transfer": lambda graph: lora_fx.transfer(graph, onto=lora_fx.trace(Layers(), (IDS,))),
    "materialize": lambda graph: lora_fx.materialize(
        lora_fx.rewrite(Layers().to("meta"), CONFIG, example_inputs=(IDS,)), graph.state_dict()
    ),
}
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, **CASES["dora, dropout"][2]}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_keeps_dora(name: str, graph_module: lora_fx.TracedGraphModule) -> None:
    with unchanged(graph_module):
        other = PASSES[name](graph_module).eval()
    assert torch.equal(other(IDS), graph_module(IDS))
    assert torch.equal(lora_fx.fold(other)(IDS), lora_fx.fold(graph_module)(IDS))
    torch.manual_seed(1)
    dropped = graph_module.train()(IDS)
    torch.manual_seed(1)
    assert torch.equal(other.train()(IDS), dropped)


def test_magnitudes_that_a_state_dict_lacks_are_those_of_the_weights() -> None:
    graph_module = lora_fx.rewrite(Layers().to("meta"), CONFIG, example_inputs=(IDS,))
    given = lora_fx.materialize(graph_module, Layers().state_dict(), seed=5)
    wanted = lora_fx.rewrite(Layers(), CONFIG, example_inputs=(IDS,), seed=5)
    assert all(torch.equal(p, parameters(wanted)[key]) for key, p in parameters(given).items())


def test_dora_is_drawn_and_exported(graph_module: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    lora_fx.draw(lora_fx.unload(graph_module), graph_module, tmp_path / "graph.html")
    lora_fx.export.torchscript(graph_module, tmp_path / "dora.pt")
    (written,) = torch.jit.load(str(tmp_path / "dora.pt"))(IDS).values()
    assert torch.allclose(written, graph_module(IDS), rtol=0, atol=1e-6)


FORMS: Mapping[str, Callable[[Any, Path], Callable[[torch.Tensor], torch.Tensor]]] = {
    "torchscript": lambda graph, path: _torchscript(graph, path.with_suffix(".pt")),
    "pt2": lambda graph, path: _pt2(graph, path.with_suffix(".pt2")),
    "onnx": lambda graph, path: _onnx(graph, path.with_suffix(".onnx")),
}


def _torchscript(graph: Any, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    lora_fx.export.torchscript(graph, path)
    return lambda x: next(iter(torch.jit.load(str(path))(x).values()))


def _pt2(graph: Any, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    lora_fx.export.pt2(graph, path)
    module = torch.export.load(path).module()
    return lambda x: next(iter(module(x=x).values()))


def _onnx(graph: Any, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    lora_fx.export.onnx(graph, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.matrix
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["dora, dropout", "bias"])
def test_branched_and_folded_graphs_are_written_in_every_form(name: str, form: str, tmp_path: Path) -> None:
    _, graph_module = both(CASES[name])
    set_parameters(graph_module)
    expected, more = graph_module.eval()(IDS), torch.tensor([[1, 9, 0]])
    for kind, graph in (("branched", graph_module), ("folded", lora_fx.fold(graph_module))):
        written = FORMS[form](graph, tmp_path / kind)
        for x, wanted in ((IDS, expected), (more, graph_module(more))):
            assert torch.allclose(written(x), wanted, rtol=0, atol=2e-6), kind


@pytest.mark.matrix
@pytest.mark.parametrize("settings", [DORA, BIAS], ids=["dora", "bias"])
def test_a_graph_with_a_cache_generates_what_peft_does(settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **settings)
    wrapped = peft.get_peft_model(copy.deepcopy(model("llama")), config).eval()
    cached = lora_fx.rewrite(model("llama"), config, cache=True, inference=True)
    for module in (wrapped, cached):
        set_parameters_of(module)
    ids = torch.tensor([[5, 9, 2, 11]])
    theirs = wrapped.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached.generate(input_ids=ids, max_new_tokens=5, do_sample=False), theirs)


def set_parameters_of(module: nn.Module) -> None:
    """Give the adapter of a model or a graph other values, whether they train or not."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    set_parameters(module)
    module.requires_grad_(False)


@pytest.fixture
def biased() -> lora_fx.TracedGraphModule:
    _, made = both(CASES["bias"])
    set_parameters(made)
    return made.eval()


@pytest.mark.parametrize("name", ["fuse", "pickle", "activate", "transfer"])
def test_a_pass_keeps_a_bias_of_b(name: str, biased: lora_fx.TracedGraphModule) -> None:
    other = PASSES[name](biased).eval()
    assert torch.equal(other(IDS), biased(IDS))
    assert torch.equal(lora_fx.fold(other)(IDS), lora_fx.fold(biased)(IDS))


def test_a_bias_of_b_is_scaled_with_its_branch_combined_and_has_no_slot(
    biased: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    half = lora_fx.activate(biased, {"default": 0.5})
    assert torch.allclose(lora_fx.fold(half)(IDS), half(IDS), rtol=0, atol=1e-6)
    plain = lora_fx.activate(biased, {})
    assert not torch.allclose(half(IDS), plain(IDS))
    two = lora_fx.rewrite(
        biased, {"defaults": {"rank": 2}, "select": [{"target": ["q", "k"]}]}, adapter="other", seed=1
    )
    with pytest.raises(PlanError, match="cannot be combined: it is one whose B has a bias"):
        lora_fx.combine(two, {"default": 1.0, "other": 0.5}, adapter="both")
    together = lora_fx.activate(two, {"default": 1.0, "other": 0.5})
    assert torch.allclose(lora_fx.fold(together)(IDS), together(IDS), rtol=0, atol=1e-6)
    lora_fx.save_adapter(biased, tmp_path / "adapter")
    lora_fx.export.onnx(
        lora_fx.rewrite(Layers(), ["q", "c"], example_inputs=(IDS,)).eval(), tmp_path / "slots.onnx", slots=True
    )
    with pytest.raises(lora_fx.AdapterError, match=r"lora_bias: a bias in B has no slot"):
        lora_fx.export.onnx_adapter_from_peft(
            tmp_path / "adapter", tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter"
        )


SHARED = {"select": [{"target": ["q", "r"], "calls": "each"}]}


class Twice(nn.Module):
    """A layer that is called twice, with a LoRA branch of the model's own if so wished."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.q, self.r = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        if own:
            self.lora_A, self.lora_B = (nn.ModuleDict({"own": nn.Linear(*n, bias=False)}) for n in ((5, 2), (2, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.q(x)
        if hasattr(self, "lora_A"):
            once = once + self.lora_B["own"](self.lora_A["own"](x))
        return self.r(torch.tanh(self.q(torch.tanh(once))))  # type: ignore[no-any-return]


def refuses(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=match):
        call()


def test_what_dora_cannot_do_is_refused(graph_module: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    two = lora_fx.rewrite(graph_module, CONFIG, adapter="b")
    refuses("would both act at 'emb', and one of them is DoRA's", lambda: lora_fx.activate(two, {"default": 1, "b": 1}))
    refuses("cannot have the strength 0.5: it is DoRA's", lambda: lora_fx.activate(two, {"default": 0.5}))
    refuses("cannot be combined: it is DoRA's", lambda: lora_fx.combine(two, {"default": 1.0, "b": 1.0}, adapter="c"))
    refuses("has DoRA at 'q'. Fold it", lambda: lora_fx.export.onnx_adapter(graph_module, tmp_path / "slots"))
    lora = lora_fx.rewrite(Layers(), {"select": [{"target": ["q"]}]}, example_inputs=(IDS,), rank=3, alpha=5)
    differing = lora_fx.rewrite(
        lora_fx.trace(Layers(), (IDS,)), {"select": [{"target": ["q"], "variant": "dora"}]}, rank=3, alpha=5
    )
    lora_fx.save_adapter(differing, tmp_path / "a")
    refuses("DoRA, rank 3", lambda: lora_fx.load_adapter(lora, tmp_path / "a"))


def test_dora_is_alone_at_every_call_of_a_layer() -> None:
    x, dora = torch.ones(3, 5), {"defaults": {"variant": "dora"}, "select": [{"target": ["q", "r"]}]}
    one = lora_fx.rewrite(Twice(), SHARED, example_inputs=(x,), rank=2)
    two = lora_fx.rewrite(one, dora, adapter="b", rank=2)
    refuses("would both act at 'q.*one of them is DoRA's", lambda: lora_fx.activate(two, {"default": 1, "b": 1}))
    own = lora_fx.trace(Twice(own=True), (x,))
    refuses("DoRA at 'q.*came with a branch of its own", lambda: lora_fx.rewrite(own, dora, rank=2))


@pytest.mark.parametrize("settings", [{"variant": "dora"}, {"bias": True}], ids=["dora", "bias"])
def test_given_factors_beside_dora_are_refused_and_beside_a_bias_start_as_the_model(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    a, b = torch.linspace(-1, 1, 18).view(3, 6), torch.linspace(1, -2, 30).view(10, 3)
    rules, base = {"select": [{"target": ["q"], "rank": 3, **settings}]}, lora_fx.trace(Layers(), (IDS,))
    if "variant" in settings:
        refuses(
            "'q' can get no branch with DoRA: it starts from",
            lambda: lora_fx.rewrite(base, rules, start=lambda _: (a, b)),
        )
        plain = lora_fx.rewrite(base, rules, start=lambda _: (a, 0 * b))
        assert torch.allclose(plain(IDS), base(IDS), rtol=0, atol=1e-6)
        return
    graph_module = lora_fx.rewrite(base, rules, start=lambda _: (a, b))
    assert torch.allclose(graph_module(IDS), base(IDS), rtol=0, atol=1e-5)
    set_parameters(graph_module)
    assert torch.allclose(lora_fx.fold(graph_module)(IDS), graph_module(IDS), rtol=0, atol=1e-5)
    lora_fx.save_adapter(graph_module, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(Layers(), tmp_path / "a")
    assert torch.allclose(theirs(IDS), graph_module(IDS), rtol=0, atol=1e-5)


UNFIT: Mapping[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any], str]] = {
    "bias beside an embedding": (Layers, IDS, {"target": ["emb"], "bias": True}, "PEFT has none beside an embedding"),
    "bias of dora": (Layers, IDS, {"target": ["q"], "bias": True, "variant": "dora"}, "DoRA has none"),
    "gaussian bias": (Layers, IDS, {"target": ["q"], "bias": True, "init": "gaussian"}, "it starts as 'gaussian'"),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2)), torch.ones(1, 4, 5), {"op": ["conv1d"], "variant": "dora"},
        "its convolution has groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_site_that_can_get_no_such_branch_is_named(name: str) -> None:
    make, x, selection, reason = UNFIT[name]
    refuses(
        f"can get no branch with .*{reason}",
        lambda: lora_fx.rewrite(make(), {"select": [selection]}, example_inputs=(x,)),
    )


def test_rules_say_which_kind_of_branch() -> None:
    rules = {
        "defaults": {"rank": 3, "variant": "dora"},
        "select": [{"target": ["q"]}, {"target": ["k"], "variant": "lora"}],
    }
    graph_module = lora_fx.rewrite(Layers(), rules, example_inputs=(IDS,))
    more = {name for name in parameters(graph_module) if not is_factor(name)}
    assert more == {"q.lora_magnitude_vector.default.weight"}
    refuses(
        "some of its branches have DoRA and others not", lambda: lora_fx.save_adapter(graph_module, Path("nowhere"))
    )
    refuses(
        r"variant: expected 'lora' or 'dora', found 'dorra'",
        lambda: lora_fx.plan(Layers(), {"select": [{"target": ["q"], "variant": "dorra"}]}, example_inputs=(IDS,)),
    )
    refuses(
        r"bias: expected true or false \(of a bias in B",
        lambda: lora_fx.plan(Layers(), {"select": [{"target": ["q"], "bias": "all"}]}, example_inputs=(IDS,)),
    )


@pytest.mark.parametrize("settings", few([DORA, BIAS], [DORA]), ids=["dora", "bias"])
def test_a_fold_on_disk_is_that_in_memory_and_inspect_says_the_kind(settings: dict[str, Any], tmp_path: Path) -> None:
    base = copy.deepcopy(model("gpt2"))
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **settings)
    graph_module = lora_fx.rewrite(base, rules=config)
    set_parameters(graph_module)
    lora_fx.save_adapter(graph_module, tmp_path / "adapter")
    fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out", verify=True, report=True)
    merged, written = lora_fx.fold(graph_module).state_dict(), type(base).from_pretrained(tmp_path / "out").state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(merged[name], value) for name, value in written.items())
    if settings is DORA:
        with pytest.raises(lora_fx.PlanError, match=r"adapter '.*adapter' cannot have the strength 0\.5: it is DoRA's"):
            fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 0.5)], tmp_path / "half")
        assert not (tmp_path / "half").exists()
    kind = {"use_dora": "LoRA with magnitudes (DoRA)", "lora_bias": "LoRA with biases in B"}[next(iter(settings))]
    assert overview_of(read_adapter(tmp_path / "adapter")).data["kind"] == kind


@pytest.mark.parametrize("settings", [{"variant": "dora"}, {"bias": True}], ids=["dora", "bias"])
def test_a_graph_that_was_pickled_takes_them_as_the_graph_does(settings: dict[str, Any]) -> None:
    graph = lora_fx.trace(Layers(), (IDS,))
    rules = {"defaults": {"rank": 3, "alpha": 5, **settings}, "select": [{"target": ["q", "c"]}]}
    graphs = [lora_fx.rewrite(each, rules, seed=7) for each in (graph, pickle.loads(pickle.dumps(graph)))]
    for each in graphs:
        with torch.no_grad():
            for index, (name, value) in enumerate(each.named_parameters()):
                if is_factor(name):
                    value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) / 4)
    assert torch.equal(graphs[0](IDS), graphs[1](IDS))
    assert torch.equal(lora_fx.fold(graphs[0])(IDS), lora_fx.fold(graphs[1])(IDS))
    assert not torch.equal(graphs[0](IDS), graph(IDS))
