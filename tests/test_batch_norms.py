"""Batch norms: modules at their own paths, with running statistics that are the graph's own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors, unchanged
from graph_diff import first_difference
from torch import nn

import lora_fx
from lora_fx import huggingface
from lora_fx.adapters.peft_format.directories import read_adapters, write_adapters
from lora_fx.graph.batch_norms import TENSORS, GivenInstanceNorm

RULES = {"select": [{"op": ["conv2d", "linear"], "rank": 2}]}
X = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(3))


class Convolutional(nn.Module):
    """Norms of images and features, one that averages over all batches, one called twice, one of each image alone; and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=0.3)
        self.inner, self.again = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, momentum=None, affine=False)
        self.single = nn.InstanceNorm2d(6, momentum=0.2, affine=True, track_running_stats=True)
        self.drop, self.out, self.last = nn.Dropout(0.3), nn.Linear(6, 4), nn.BatchNorm1d(4, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.norm(self.stem(x)).relu())
        x = self.single(self.again(self.inner(x)))
        return self.last(self.out(self.drop(x.mean((2, 3)))))


def built(training: bool = True) -> Any:
    torch.manual_seed(2)
    model = Convolutional().train(training).requires_grad_(False)
    with torch.no_grad():
        for norm in (model.norm, model.single, model.last):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


@pytest.fixture(scope="module")
def traced() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(built(), (X,))


def test_a_batch_norm_is_a_module_at_its_own_path_that_is_given_its_tensors(traced: Any) -> None:
    nodes = {str(node.target): node for node in traced.graph.find_nodes(op="call_module")}
    kinds = {"norm": nn.BatchNorm2d, "again": nn.BatchNorm2d, "last": nn.BatchNorm1d, "single": GivenInstanceNorm}
    for path, kind in kinds.items():
        assert isinstance(traced.get_submodule(path), kind)
        read = [None if node is None else node.target for node in nodes[path].args[1:]]
        held = [name if hasattr(getattr(built(), path), name) else None for name in TENSORS]
        expected = [
            f"{path}.{name}" if getattr(getattr(built(), path), str(name)) is not None else None for name in held
        ]
        if path == "single":  # which counts nothing
            expected[-1] = None
        assert read == expected
    assert traced.state_dict().keys() == built().state_dict().keys()


def trained_alike(graph: Any, model: Any, steps: int = 3) -> None:
    """Fail unless three batches give equal outputs, and equal statistics afterwards, in both modes."""
    for step in range(steps):
        batch = torch.randn(4 + step, *X.shape[1:])
        outputs = []
        for module in (graph, model):
            torch.manual_seed(step)
            outputs.append(module(batch))
        assert torch.equal(*outputs)
    values = graph.state_dict()
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    graph.eval(), model.eval()
    assert torch.equal(graph(X), model(X))


def test_running_statistics_are_those_of_the_model_after_three_batches_and_the_graphs_own(traced: Any) -> None:
    model = built()
    with unchanged(model), torch.random.fork_rng():
        lora_fx.trace(model, (X,))(X)
    trained_alike(copy.deepcopy(traced), built())
    trained_alike(pickle.loads(pickle.dumps(traced)), built())
    assert traced.norm.num_batches_tracked == 0


def test_a_graph_that_a_pass_returns_has_statistics_of_its_own(traced: Any) -> None:
    graph = lora_fx.rewrite(traced, RULES)
    set_factors(graph)
    before = graph.norm.running_mean.clone()
    merged = lora_fx.fold(graph)
    assert first_difference(merged, traced) is None
    for each in (merged, lora_fx.activate(graph, {}), copy.deepcopy(graph)):
        each.train()(X)
        assert not torch.equal(each.norm.running_mean, before)
    assert torch.equal(graph.norm.running_mean, before)


def test_a_fold_takes_the_statistics_of_the_training_with_it(traced: Any, tmp_path: Path) -> None:
    graph = lora_fx.rewrite(traced, RULES)
    set_factors(graph)
    graph.train()(X), graph(X + 1)
    merged = lora_fx.fold(graph.eval())
    assert merged.norm.num_batches_tracked == 2
    torch.testing.assert_close(merged(X), graph(X), rtol=1e-5, atol=1e-5)
    for name, export in (("m.pt", lora_fx.export.torchscript), ("m.pt2", lora_fx.export.pt2)):
        export(merged, tmp_path / name)  # which compares the file with the graph


def test_one_image_is_predicted_for_and_not_trained_on(traced: Any) -> None:
    one, model = copy.deepcopy(traced), built()
    assert torch.equal(one.eval()(X[:1]), model.eval()(X[:1]))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        one.train()(X[:1])


def test_batch_norms_in_eval_mode_stay_so_while_the_rest_trains() -> None:
    model = built()
    for norm in (model.norm, model.again, model.single, model.last):
        norm.eval()
    with unchanged(model):
        graph = lora_fx.trace(model, (X,))
    assert graph.training
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph.modules())
    trained_alike(graph, model)


# In PEFT's files, with a model of transformers.


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic")
    torch.manual_seed(4)
    model: Any = transformers.ResNetForImageClassification(config).eval()
    return model.requires_grad_(False)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
NORM = "resnet.embedder.embedder.normalization"


@pytest.fixture(scope="module")
def resnet_graph() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(resnet(), {"pixel_values": IMAGES})


@pytest.fixture(scope="module", params=["kept", "saved"])
def trained_by_peft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of an adapter that PEFT trained for two steps, with a batch norm in modules_to_save or without."""
    config = peft.LoraConfig(
        r=2, target_modules=["convolution"], modules_to_save=[NORM] if request.param == "saved" else None
    )
    model = peft.get_peft_model(resnet(), config).train()
    set_factors(model)
    for _ in range(2):
        model(pixel_values=IMAGES)
    directory = tmp_path_factory.mktemp("peft") / request.param
    model.save_pretrained(directory)
    return directory


def test_an_adapter_of_peft_folds_to_what_peft_makes_of_it(trained_by_peft: Path, resnet_graph: Any) -> None:
    expected = peft.PeftModel.from_pretrained(resnet(), trained_by_peft).eval()
    graph = lora_fx.from_adapter(resnet_graph, trained_by_peft)
    assert torch.equal(graph(pixel_values=IMAGES).logits, expected(pixel_values=IMAGES).logits)
    merged, theirs = lora_fx.fold(graph), expected.merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    moved = trained_by_peft.name == "saved"
    assert bool(merged.state_dict()[f"{NORM}.num_batches_tracked"]) is moved
    assert torch.equal(
        lora_fx.activate(graph, {})(pixel_values=IMAGES).logits, resnet_graph(pixel_values=IMAGES).logits
    )


def test_saved_statistics_come_back_in_both_and_others_are_warned_of(
    resnet_graph: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = {
        "select": [
            {"op": ["conv2d"], "rank": 2},
            {"target": [NORM], "trainable": "all"},
        ]
    }
    graph = lora_fx.rewrite(resnet_graph, rules).train()
    set_factors(graph)
    for _ in range(2):
        graph(pixel_values=IMAGES)
    graph.eval()
    with pytest.warns(
        UserWarning, match=r"moved the running statistics of resnet\..*, and the adapter is saved without"
    ):
        lora_fx.save_adapter(graph, tmp_path / "ours")
    again = lora_fx.from_adapter(resnet_graph, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(resnet(), tmp_path / "ours").eval()
    assert torch.equal(again(pixel_values=IMAGES).logits, theirs(pixel_values=IMAGES).logits)
    with caplog.at_level("WARNING", "lora_fx.adapters"):
        lora_fx.transfer(graph, onto=resnet_graph)
    assert "moved the running statistics of resnet." in caplog.text
    copied = f"{NORM}.trained_copy.default.running_mean"
    assert torch.equal(again.state_dict()[copied], graph.state_dict()[copied])
    assert not torch.equal(graph.state_dict()[copied], graph.state_dict()[f"{NORM}.running_mean"])


def test_statistics_go_back_to_the_model_with_the_merged_weights(resnet_graph: Any) -> None:
    graph = lora_fx.rewrite(resnet_graph, {"select": [{"op": ["conv2d"], "rank": 2}]}).train()
    set_factors(graph)
    graph(pixel_values=IMAGES)
    model, expected = resnet(), graph.eval()(pixel_values=IMAGES).logits
    with unchanged(model), huggingface.folded(model, graph):
        torch.testing.assert_close(model(pixel_values=IMAGES).logits, expected, rtol=1e-4, atol=1e-5)
    huggingface.write_back(model, graph)
    torch.testing.assert_close(model(pixel_values=IMAGES).logits, expected, rtol=1e-4, atol=1e-5)


# Norms that train as a whole: their running statistics belong to the adapter.

WHOLE = {"select": [{"op": ["linear"], "rank": 2}, {"target": ["norm", "single", "last"], "trainable": "all"}]}
ALONE = {"select": [{"op": ["linear"], "rank": 2}]}


@pytest.fixture(scope="module")
def whole() -> Any:
    """A graph that was trained with such an adapter, in eval mode."""
    graph = trained_with(WHOLE)
    for name, tensor in built().again.named_buffers():  # has no parameters that an adapter could train
        graph.again.get_buffer(name).copy_(tensor)
    return graph


def trained_with(rules: Any) -> Any:
    graph = lora_fx.rewrite(built(), rules, example_inputs=(X,))
    set_factors(graph)
    graph.train()
    for step in range(3):
        graph(torch.randn(4, *X.shape[1:], generator=torch.Generator().manual_seed(step)) * 2 + 1)
    return graph.eval()


def test_a_combined_adapter_has_the_statistics_of_its_source(whole: Any) -> None:
    combined = lora_fx.combine(whole, {"default": 1.0}, adapter="sum")
    assert torch.equal(combined(X), whole(X))


@pytest.mark.parametrize("rules", [WHOLE, ALONE], ids=["trained norms", "others"])
def test_a_run_that_is_continued_has_the_statistics_that_it_had(rules: Any, tmp_path: Path) -> None:
    graph, again = trained_with(rules), lora_fx.rewrite(built(), rules, example_inputs=(X,)).eval()
    assert not torch.allclose(again(X), graph(X), atol=1e-3)
    write_adapters(graph, tmp_path)
    read_adapters(again, tmp_path)
    assert torch.equal(again(X), graph(X))


def test_statistics_of_trained_norms_go_back_to_the_model(whole: Any) -> None:
    model = built(training=False)
    merged = lora_fx.fold(whole)
    with huggingface.folded(model, whole):
        assert torch.equal(model(X), merged(X))
    huggingface.write_back(model, whole)
    assert torch.equal(model(X), merged(X))


def test_an_adapter_with_trained_norms_goes_onto_a_graph_for_inference(whole: Any, tmp_path: Path) -> None:
    inference = lora_fx.rewrite(built(), WHOLE, example_inputs=(X,), inference=True).eval()
    assert torch.equal(lora_fx.transfer(whole, onto=inference)(X), whole(X))
    lora_fx.save_adapter(whole, tmp_path / "a")
    loaded = lora_fx.from_adapter(built(), tmp_path / "a", example_inputs=(X,), inference=True).eval()
    assert torch.equal(loaded(X), whole(X))


@pytest.mark.filterwarnings("error:training has moved")
def test_what_a_fold_left_is_the_base_of_the_next_adapter(tmp_path: Path) -> None:
    merged = lora_fx.fold(trained_with(ALONE))
    graph = lora_fx.rewrite(merged, ALONE)
    lora_fx.save_adapter(graph, tmp_path / "a")
    base = built(training=False)
    base.load_state_dict(merged.state_dict())
    loaded = lora_fx.from_adapter(base, tmp_path / "a", example_inputs=(X,))
    assert torch.equal(loaded(X), graph(X))


class Always(nn.Module):
    """Normalises by its batch in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(self.lin(x), self.mean, self.var, training=True)


@pytest.mark.parametrize("inference", [True, False])
def test_a_norm_that_trains_in_both_modes_is_refused(inference: bool) -> None:
    model, x = Always().eval(), torch.randn(3, 5)
    with unchanged(model), pytest.raises(lora_fx.TraceError, match=r"the model writes to mean, var while it computes"):
        lora_fx.trace(model, (x,), inference=inference)


def test_a_norm_with_two_names_is_traced() -> None:
    model = built()
    model.alias = model.norm
    graph = lora_fx.trace(model, (X,))
    for module in (graph, model):
        torch.manual_seed(1)
        module(X)
    assert torch.equal(graph.norm.running_mean, model.norm.running_mean)


def test_a_norm_without_a_counter_takes_the_state_of_its_model() -> None:
    class Counterless(Always):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.batch_norm(self.lin(x), self.mean, self.var, training=self.training)

    model = Counterless()
    graph = lora_fx.trace(model, (torch.randn(3, 5),))
    model(torch.randn(6, 5))
    graph.load_state_dict(model.state_dict())
    assert torch.equal(graph.mean, model.mean)
