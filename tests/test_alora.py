"""Activated LoRA: branches that act from their invocation tokens on, with PEFT's bits; folds refuse them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from architectures import ARCHITECTURES, model, rows, traced
from conftest import set_factors, unchanged
from graph_diff import first_difference
from quantised import ALPHA, MODELS, RANK, gradients, loaded, saved
from torch import nn

import lora_fx
from lora_fx.adapters.peft_format.opening import read_adapter
from lora_fx.export import onnx, pt2, torchscript
from lora_fx.export.compare import compare
from lora_fx.export.prepare import prepare
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.graph.adapter_names import is_of_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

TOKENS = (1, 2, 1)
CAUSAL = ("llama", "gpt2", "bloom", "opt", "gptj", "mistral", "qwen2", "phi3", "falcon", "gpt-neox", "mixtral")


def config(name: str, **more: Any) -> peft.LoraConfig:
    architecture = ARCHITECTURES[name]
    return peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(architecture.target_modules),
        fan_in_fan_out=architecture.fan_in_fan_out,
        alora_invocation_tokens=list(TOKENS),
        task_type="CAUSAL_LM",
        **more,
    )


def both(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, lora_fx.TracedGraphModule]:
    """Return PEFT's model and a graph, of equal random factors."""
    base = copy.deepcopy(model(name)).to(dtype)
    wrapped = peft.get_peft_model(base, config(name, **more))
    onto = traced(name) if dtype == torch.float32 else lora_fx.trace(copy.deepcopy(model(name)).to(dtype))
    graph = lora_fx.rewrite(onto, rules=config(name, **more))
    theirs = {name.removeprefix("base_model.model."): p for name, p in wrapped.named_parameters()}
    torch.manual_seed(3)
    for key, parameter in factors(graph).items():
        parameter.data.normal_(std=0.3)
        theirs[key].data.copy_(parameter.data)
    return wrapped, graph


def factors(module: nn.Module) -> dict[str, nn.Parameter]:
    named = ((name.removeprefix("base_model.model."), p) for name, p in module.named_parameters())
    return {name: p for name, p in named if is_of_adapter(name)}


def batch(*given: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(given)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


BATCH = batch(
    [9, 1, 2, 1, 8, 7, 6, 5, 4],  # in the middle
    [1, 2, 1, 9, 9, 1, 2, 1, 3],  # twice: the last one counts
    [5, 1, 2, 5, 2, 1, 8, 1, 2],  # parts of it alone, one cut off at the end
    [1, 2, 1, 2, 1, 2, 1, 7, 7],  # overlapping
    [4, 4, 4, 4, 4, 4, 1, 2, 1],  # at the end
)


def logits(module: Any, given: Mapping[str, torch.Tensor] = BATCH) -> torch.Tensor:
    return module(**given, **({} if isinstance(module, lora_fx.TracedGraphModule) else {"use_cache": False})).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def llama() -> tuple[Any, lora_fx.TracedGraphModule]:
    return both("llama", lora_dropout=0.3)


@pytest.mark.parametrize("name", rows((name for name in CAUSAL if name in ARCHITECTURES), ("gpt2",)))
def test_logits_have_pefts_bits_on_this_architecture(name: str) -> None:
    wrapped, graph = both(name)
    with torch.no_grad():
        found = logits(graph.eval())
        assert torch.equal(found, logits(wrapped.eval()))
        base = logits(lora_fx.activate(graph, {}).eval())
    acts = (found != base).any(-1) & BATCH["attention_mask"].bool()  # padding may attend to all
    assert acts.sum(1).tolist() == [8, 4, 0, 5, 3]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.matrix)], ids=str)
def test_logits_and_gradients_have_pefts_bits_in_training_and_evaluation(dtype: torch.dtype, request: Any) -> None:
    pair = request.getfixturevalue("llama") if dtype == torch.float32 else both("llama", dtype, lora_dropout=0.3)
    for training in (True, False):
        outputs = []
        for module in pair:
            module.train(training).zero_grad()
            torch.manual_seed(4)
            outputs.append(logits(module))
            outputs[-1].float().square().mean().backward()
        assert torch.equal(*outputs)
        mine, theirs = factors(pair[1]), factors(pair[0])
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key].grad, theirs[key].grad) for key in mine)  # type: ignore[arg-type]


def test_every_place_of_the_invocation_is_the_one_that_peft_finds(llama: tuple[Any, lora_fx.TracedGraphModule]) -> None:
    torch.manual_seed(5)
    for rows_of, length in ((40, 9), (3, 3), (4, 2), (2, 1), (1, 12)):
        given = batch(*torch.randint(3, (rows_of, length)).tolist())
        with torch.no_grad():
            assert torch.equal(*(logits(module.eval(), given) for module in llama))


def test_files_go_both_ways_and_the_config_says_the_tokens(
    llama: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path
) -> None:
    wrapped, graph = (module.eval() for module in llama)
    lora_fx.save_adapter(graph, tmp_path / "mine")
    wrapped.save_pretrained(tmp_path / "theirs")
    said = peft.LoraConfig.from_pretrained(tmp_path / "mine")
    assert said.alora_invocation_tokens == list(TOKENS)
    assert read_adapter(tmp_path / "theirs").config.alora_invocation_tokens == TOKENS
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model("llama")), tmp_path / "mine")
    loaded.peft_config["default"].task_type = "CAUSAL_LM"
    with torch.no_grad():
        expected = logits(graph)
        assert torch.equal(logits(loaded.eval()), expected)
        assert torch.equal(logits(lora_fx.load_adapter(traced("llama"), tmp_path / "theirs").eval()), expected)


def test_copies_and_passes_compute_the_same_and_unload_gives_the_trace_back(
    llama: tuple[Any, lora_fx.TracedGraphModule],
) -> None:
    graph = llama[1].eval()
    with torch.no_grad(), unchanged(graph):
        expected = logits(graph)
        rest = lora_fx.activate(graph, {})
        made = {
            "copied": copy.deepcopy(graph),
            "pickled": pickle.loads(pickle.dumps(graph)),
            "pickled at rest": lora_fx.activate(pickle.loads(pickle.dumps(rest)), {"default": 1.0}),
            "nested": lora_fx.nest(graph),
            "fused": lora_fx.fuse(graph),
            "transferred": lora_fx.transfer(graph, onto=traced("llama")),
        }
        for what, module in made.items():
            assert torch.equal(logits(module.eval()), expected), what
        assert first_difference(traced("llama"), lora_fx.unload(graph)) is None
        assert first_difference(lora_fx.activate(rest, {"default": 1.0}), graph) is None


def test_another_adapter_beside_it_acts_on_all_tokens_and_folds_alone(
    llama: tuple[Any, lora_fx.TracedGraphModule],
) -> None:
    graph = lora_fx.rewrite(llama[1], rules=["q_proj", "down_proj"], adapter="b", rank=4)
    for key, parameter in factors(graph).items():
        if ".b." in key:
            parameter.data.normal_(std=0.3)
    together, alone = (lora_fx.activate(graph, each).eval() for each in ({"default": 1.0, "b": 1.0}, {"b": 1.0}))
    with torch.no_grad():
        found, only = logits(together), logits(alone)
        assert torch.equal(found[2], only[2])
        assert not torch.allclose(found[0], only[0], atol=1e-3)
        assert torch.allclose(logits(lora_fx.fold(graph, {"b": 1.0})), only, atol=1e-5)
    with pytest.raises(lora_fx.FoldError, match=r"adapter 'default' cannot be folded: at 'model.layers.0.self_attn"):
        lora_fx.fold(together)


def test_rows_of_a_mixed_batch_have_the_invocation_of_their_adapter_as_in_peft() -> None:
    settings = {
        "a": config("llama"),
        "b": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "c": peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[9], task_type="CAUSAL_LM"),
    }
    graph = traced("llama")
    wrapped: Any = None
    for adapter, each in settings.items():
        graph = lora_fx.rewrite(graph, rules=each, adapter=adapter)
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model("llama")), each, adapter)
        else:
            wrapped.add_adapter(adapter, each)
    theirs = factors(wrapped)
    torch.manual_seed(3)
    for key, parameter in factors(graph).items():
        parameter.data.normal_(std=0.3)
        theirs[key].data.copy_(parameter.data)
    by_row = lora_fx.activate_by_row(graph.eval())
    with torch.no_grad():
        for names in (["a", "c", "b", "a", "__base__"], ["c", "a", "a", "c", "b"], ["a"] * 5):
            found = by_row(**BATCH, adapter_names=names).logits
            assert torch.equal(found, wrapped.eval()(**BATCH, adapter_names=names, use_cache=False).logits)


def test_what_cannot_hold_a_branch_that_depends_on_the_input_says_so(
    llama: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path
) -> None:
    graph = llama[1].eval()
    expected = r"a branch acts from its invocation tokens on \(aLoRA\), so that what it adds depends on the input"
    for refused in (lora_fx.fold, lora_fx.recipe, lambda each: each.merge_and_unload(), lambda each: each.generate()):
        with pytest.raises(lora_fx.FoldError, match=expected):
            refused(graph)  # type: ignore[operator]
    model("llama").save_pretrained(tmp_path / "base")
    lora_fx.save_adapter(graph, tmp_path / "adapter")
    with pytest.raises(lora_fx.FoldError, match=expected) as caught:
        fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert str(caught.value).endswith("Keep the graph as it is, or let other adapters act.")
    with pytest.raises(lora_fx.PlanError, match="cannot be combined: it is one with invocation tokens"):
        lora_fx.combine(graph, {"default": 1.0}, adapter="z")
    for form in ("kohya", "diffusers"):
        with pytest.raises(lora_fx.AdapterError, match="invocation tokens, from which the branches act on"):
            lora_fx.save_adapter(graph, tmp_path / form, format=form)  # type: ignore[arg-type]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q = nn.Embedding(11, 6), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(self.emb(x))  # type: ignore[no-any-return]


class Named(Layers):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.q(self.emb(input_ids))  # type: ignore[no-any-return]


OF_LAYERS = {"defaults": {"invocation_tokens": TOKENS, "rank": 2}, "select": [{"target": ["q"]}]}


def test_graphs_and_sites_without_tokens_to_find_are_refused() -> None:
    ids = torch.tensor([[3, 0, 1, 2, 1], [1, 2, 1, 7, 5]])
    with pytest.raises(lora_fx.PlanError, match=r"expected a graph with the input 'input_ids' .* got one with x"):
        lora_fx.rewrite(Layers(), rules=OF_LAYERS, example_inputs=(ids,))
    graph = lora_fx.rewrite(Named(), rules=OF_LAYERS, example_inputs=(ids,))
    for parameter in factors(graph).values():
        parameter.data.normal_()
    changed = (graph(ids) != lora_fx.activate(graph, {})(ids)).any(-1)
    assert changed.tolist() == [[False, False, True, True, True], [True] * 5]
    base = lora_fx.unload(graph)
    for select, message in (
        ({"target": ["emb"]}, "'emb' can get no branch with invocation tokens: PEFT has none beside an embedding"),
        ({"target": ["q"], "variant": "dora"}, "'q' can get no branch with invocation tokens: DoRA has none"),
        ({"target": ["q"], "init": "pissa"}, "'q' can get no branch with invocation tokens: it starts from the weight"),
    ):
        with pytest.raises(lora_fx.PlanError, match=message):
            lora_fx.rewrite(base, rules={**OF_LAYERS, "select": [select]})


@pytest.mark.parametrize(
    "row",
    rows(
        (
            "gpt2: float32 around bfloat16",
            "llama-1: float32 around bfloat16",
            "gpt2: bfloat16 of float32",
            "gpt2: bfloat16 around float32",
        ),
        ("gpt2: float32 around bfloat16",),
    ),
)
def test_layers_in_4_bits_that_compute_in_another_dtype_have_pefts_bits(row: str, tmp_path: Path) -> None:
    """Gradients too, but where values of bfloat16 are computed with in float32: see test_quantised_models."""
    name, case = row.split(": ")
    dtype = torch.float32 if case == "bfloat16 of float32" else torch.bfloat16
    computed = torch.float32 if case == "bfloat16 around float32" else torch.bfloat16
    path, models = saved(name, dtype, tmp_path / "base"), []
    for _ in range(2):
        each = loaded(name, path, "nf4", dtype, computed)
        if case == "float32 around bfloat16":
            each = peft.prepare_model_for_kbit_training(each, use_gradient_checkpointing=False).train()
        models.append(each)
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=MODELS[name][1],
        alora_invocation_tokens=list(TOKENS),
        task_type="CAUSAL_LM",
    )
    wrapped, graph = peft.get_peft_model(models[0], settings).train(), lora_fx.rewrite(models[1], settings)
    set_factors(wrapped)
    set_factors(graph)
    expected, found = logits(wrapped), logits(graph)
    assert torch.equal(found, expected)
    if computed == torch.bfloat16:
        wanted, mine = gradients(wrapped, expected), gradients(graph, found)
        assert wanted.keys() == mine.keys()
        assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
    base = logits(lora_fx.activate(graph, {}))
    assert (found != base).any(-1)[1:].sum(1).tolist() == [4, 0, 5, 3]
    assert torch.equal(logits(lora_fx.unload(graph)), base)
    with pytest.raises(lora_fx.FoldError, match="a branch acts from its invocation tokens on"):
        lora_fx.fold(graph)


def test_a_graph_that_was_pickled_gets_the_branches_that_the_graph_gets(
    llama: tuple[Any, lora_fx.TracedGraphModule],
) -> None:
    late = lora_fx.rewrite(pickle.loads(pickle.dumps(traced("llama"))), rules=config("llama", lora_dropout=0.3))
    assert first_difference(llama[1].train(), late.train()) is None
    values = dict(llama[1].named_parameters())
    for key, parameter in factors(late).items():
        parameter.data.copy_(values[key])
    with torch.no_grad():
        assert torch.equal(logits(late.eval()), logits(llama[1].eval()))


OTHER_SIZES = (
    batch([5, 6, 7, 8], [3, 3, 3, 3]),  # none
    batch([3, 1, 2, 1, 9, 1, 2, 1, 5, 4, 6]),  # several in one row
    batch([4, 1, 2, 1], [1, 2, 1, 9], [1, 2, 2, 1]),  # at the end, at the beginning
    batch([1, 2], [2, 1]),  # shorter than the invocation
)


def test_an_exported_file_finds_the_invocation(llama: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path) -> None:
    graph = llama[1].eval()
    torchscript(graph, tmp_path / "x.pt")
    run = torch.jit.load(tmp_path / "x.pt")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for given in (BATCH, *OTHER_SIZES):
            assert torch.equal(run(*given.values())["logits"], logits(graph, given))


@pytest.mark.matrix
def test_a_torch_program_finds_the_invocation(llama: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path) -> None:
    graph = llama[1].eval()
    pt2(graph, tmp_path / "x.pt2")
    run = torch.export.load(tmp_path / "x.pt2").module()
    with torch.no_grad():
        for given in (BATCH, *OTHER_SIZES):
            assert torch.equal(run(**given)["logits"], logits(graph, given))


def test_a_file_is_compared_with_its_graph_where_the_branches_act_too() -> None:
    ids = torch.tensor([[3, 0, 7, 4, 9], [5, 2, 8, 7, 5]])  # without the invocation
    graph = lora_fx.rewrite(Named(), rules=OF_LAYERS, example_inputs=(ids,)).eval()
    for parameter in factors(graph).values():
        parameter.data.normal_()
    own, base = (prepare(each, None) for each in (graph, lora_fx.activate(graph, {})))
    with torch.no_grad():
        assert len(compare(own, own.run, None)) == len(compare(base, base.run, None)) + 1
        with pytest.raises(lora_fx.VerifyError, match="differs from the graph at"):
            compare(own, base.run, None)


def test_an_onnx_model_of_one_layer_finds_the_invocation(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(Named(), rules=OF_LAYERS, example_inputs=(BATCH["input_ids"],)).eval()
    for parameter in factors(graph).values():
        parameter.data.normal_()
    onnx(graph, tmp_path / "x.onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    with torch.no_grad():
        for ids in (each["input_ids"] for each in (BATCH, *OTHER_SIZES)):
            (found,) = session.run(None, {"input_ids": ids.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), graph(ids), rtol=0, atol=1e-5)
    assert not torch.allclose(graph(BATCH["input_ids"]), lora_fx.activate(graph, {})(BATCH["input_ids"]), atol=1e-2)


@pytest.mark.matrix
def test_an_onnx_model_finds_the_invocation(llama: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path) -> None:
    graph = llama[1].eval()
    onnx(graph, tmp_path / "x.onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    rest = lora_fx.activate(graph, {}).eval()
    with torch.no_grad():
        for given in (BATCH, *OTHER_SIZES):
            (values,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
            found, expected, base = torch.from_numpy(values), logits(graph, given), logits(rest, given)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            acts = (expected - base).abs().amax(-1) > 1e-3
            assert torch.equal(acts, (found - base).abs().amax(-1) > 1e-3)
            assert given is not BATCH or acts.any()
