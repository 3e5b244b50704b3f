"""Stamped layers: the graph is that of a full trace, node by node, or the trace is in full and says why."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import architectures
import families
import peft
import pytest
import torch
import transformers
from architectures import rows
from conftest import unchanged
from graph_diff import first_difference
from torch import nn
from transformers import PreTrainedConfig

import lora_fx
from lora_fx.graph.info import info_of

LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)

STAMPED: Mapping[str, int] = {
    "t5": 8,
    "gpt2": 3,
    "llama": 3,
    "bert": 3,
    "mt5": 11,
    "bart": 8,
    "bloom": 3,
    "blip-2": 6,
    "blip-2-t5": 13,
    "opt": 3,
    "gptj": 3,
    "gpt_neox": 3,
    "gpt_neo": 6,
    "roberta": 3,
    "xlm-roberta": 3,
    "electra": 3,
    "deberta-v2": 3,
    "layoutlm": 3,
}
"""Architectures of the mapping, with more layers → the layers that are stamped."""

TIMES: Mapping[str, int] = {"t5": 3, "mt5": 3, "blip-2-t5": 3, "gpt_neo": 4}
"""By how much the layers are multiplied where twice as many are not four of one kind."""

IN_FULL: Mapping[str, str] = {
    "deberta": "computes sizes from values",
    "chatglm": "a layer computes with its position among the layers",
}
"""Those that are traced in full, and why."""

MORE: Mapping[str, int] = {
    "gemma2": 3,
    "gemma3_text": 3,
    "gpt_oss": 3,
    "mixtral": 5,
    "whisper": 8,
    "vit": 3,
}
"""The same for families whose layers are of several kinds, route to experts, or see images and sounds."""


ONE_MODE = ("t5",)
"""Those that are traced for inference alone, since mT5, of the same layers, is traced for training."""

WITH_WEIGHTS = ("bloom", "gpt_neo")
"""Those whose training is not traced on the meta device: they have gradients, and constants, that are compared."""


@pytest.fixture(autouse=True)
def _code_of_any_origin_is_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fx.tracing.trace.foreign_part", lambda _model, _replaced: None)


def deepened(model: nn.Module, device: str = "meta", times: int = 2) -> nn.Module:
    """Return a model with several times the layers, kinds of layers in the same order again."""
    config = copy.deepcopy(model.config)
    _deepen(config, times)
    with torch.device(device):
        return type(model)(config).eval()


def _deepen(config: PreTrainedConfig, times: int) -> None:
    names = {type(config).attribute_map.get(name, name) for name in LAYERS}
    counts = {name: value for name, value in vars(config).items() if name in names and isinstance(value, int)}
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _deepen(value, times)
        elif name == "attention_types":
            setattr(config, name, [[kinds, count * times] for kinds, count in value])
        elif name in ("layer_types", "attention_layers") and value is not None:
            setattr(config, name, list(value) * times)
    for name, value in counts.items():
        setattr(config, name, value * times)


def traced_both(
    model: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any
) -> tuple[lora_fx.TracedGraphModule, lora_fx.TracedGraphModule, str]:
    """Return two traces, the second in full, and what was said of the first."""
    caplog.set_level(logging.INFO, "lora_fx.tracing")
    caplog.clear()
    first = lora_fx.trace(model, *args, **settings)
    said = caplog.records[-1].getMessage()
    with monkeypatch.context() as patched:
        patched.setattr("lora_fx.tracing.trace.layer_classes", lambda _model: [])
        return first, lora_fx.trace(model, *args, **settings), said


def assert_equal(graph_module: lora_fx.TracedGraphModule, other: lora_fx.TracedGraphModule) -> None:
    """Compare operators, arguments, names, metadata, state, checks of the inputs, and what both say of themselves."""
    assert first_difference(graph_module, other) is None
    for node, twin in zip(graph_module.graph.nodes, other.graph.nodes, strict=True):
        assert _recorded(node) == _recorded(twin), node.name
    assert list(graph_module.state_dict()) == list(other.state_dict())
    assert str(graph_module) == str(other)
    mine, theirs = (dict(vars(info_of(module))) for module in (graph_module, other))
    examples = mine.pop("examples"), theirs.pop("examples")
    assert str(mine) == str(theirs)
    assert examples[0].axes == examples[1].axes
    tensors = [{name: _like(tensor) for name, tensor in each.tensors.items()} for each in examples]
    assert tensors[0] == tensors[1]


def _recorded(node: torch.fx.Node) -> dict[str, Any]:
    """Return the metadata of a node, fake tensors as what they are like."""
    return {**node.meta, "val": torch.utils._pytree.tree_map(_like, node.meta.get("val"))}


def _like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, str(value.device), str(tuple(value.shape)), str(value.stride()), value.requires_grad
    return str(value)


@pytest.mark.parametrize("name", rows(STAMPED, ("llama",)))
def test_stamped_is_the_full_trace_node_by_node(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deepened(architectures.model(name), "cpu" if name in WITH_WEIGHTS else "meta", TIMES.get(name, 2))
    stamped, full, said = traced_both(model, caplog, monkeypatch, inference=name in ONE_MODE)
    assert said == f"{type(model).__name__} is traced with {STAMPED[name]} layers stamped"
    assert_equal(stamped, full)


@pytest.mark.parametrize("name", rows(MORE, ("mixtral",)))
def test_layers_of_several_kinds_are_stamped_each_by_their_own(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deepened(families.model(name))
    stamped, full, said = traced_both(model, caplog, monkeypatch, inference=True)
    assert said == f"{type(model).__name__} is traced with {MORE[name]} layers stamped"
    assert_equal(stamped, full)


@pytest.mark.parametrize("name", rows(IN_FULL, IN_FULL))
def test_what_is_not_stamped_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lora_fx.tracing")
    lora_fx.trace(deepened(architectures.model(name)), inference=True)
    assert IN_FULL[name] in caplog.records[-1].getMessage()
    assert "is traced in full" in caplog.records[-1].getMessage()


def test_conditions_that_each_layer_may_put_otherwise_are_those_of_a_full_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lora_fx.tracing")
    lora_fx.trace(deepened(families.model("mpt")), inference=True)
    assert "may say in other words what sizes" in caplog.records[-1].getMessage()


def test_every_architecture_is_in_one_of_the_tables() -> None:
    assert {*STAMPED, *IN_FULL} == set(architectures.ARCHITECTURES)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", pytest.param("BertForMaskedLM", marks=pytest.mark.matrix)])
def test_a_graph_with_a_loss_is_stamped_too(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deepened(architectures.model("llama" if kind.startswith("Llama") else "bert")).config
    model = getattr(transformers, kind)(config).eval()
    stamped, full, said = traced_both(model, caplog, monkeypatch, labels=True)
    assert said == f"{kind} is traced with 3 layers stamped"
    assert_equal(stamped, full)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", "output_hidden_states"),
        pytest.param("llama", "output_attentions", marks=pytest.mark.matrix),
        pytest.param("mixtral", "output_router_logits", marks=pytest.mark.matrix),
    ],
)
def test_what_is_collected_from_inside_of_layers_is_traced_in_full(
    name: str, wanted: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = architectures.model(name) if name in architectures.ARCHITECTURES else families.model(name)
    config = deepened(source).config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = type(source)(config).eval()
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long, device="meta"), "use_cache": False, wanted: True}
    first, full, said = traced_both(model, caplog, monkeypatch, inputs, inference=True)
    assert "is traced in full" in said
    assert_equal(first, full)


# Small stacks.

WIDTH = 6


class Layer(nn.Module):
    """One of several equal ones. What it does beside a linear is up to its class."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.linear(x))


class Stack(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module] = Layer, count: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(index) for index in range(count)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


Both = Callable[..., tuple[lora_fx.TracedGraphModule, str]]


@pytest.fixture
def both(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Both:
    """Trace a small stack in both ways, and return the graph and what was said, after comparing them."""

    def trace(model: nn.Module, *inputs: torch.Tensor, **settings: Any) -> tuple[lora_fx.TracedGraphModule, str]:
        given = inputs or (torch.randn(2, 5, WIDTH),)
        with unchanged(model):
            first, full, said = traced_both(model, caplog, monkeypatch, given, **settings)
        assert_equal(first, full)
        return first, said

    return trace


def test_a_small_stack_is_stamped_and_computes_what_the_model_computes(both: Both) -> None:
    model = Stack()
    graph_module, said = both(model)
    assert said == "Stack is traced with 3 layers stamped"
    x = torch.randn(3, 4, WIDTH)
    assert torch.equal(graph_module.eval()(x), model.eval()(x))


class UsesIndex(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.index + 1)


class TriesToUseIndex(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            scale = float(self.index)
        except Exception:  # as careless code does
            scale = 7.0
        return super().forward(x) * scale


class AsksForIndex(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if isinstance(self.index, int) else 3)


class Attribute:
    """Of which nothing is known but that it is an object with slots."""

    __slots__ = ("value",)


class HoldsObject(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.held = Attribute()


class Differs(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.dropout.p = 0.1 + index / 10


class Hooked(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.linear.register_forward_hook(lambda _module, _args, output: output * 2)


COLLECTED: list[torch.Tensor] = []


class Collects(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        COLLECTED.append(self.linear(x))
        return x + COLLECTED[-1]


class CollectingStack(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        COLLECTED.clear()
        return super().forward(x) + sum(each.mean() for each in COLLECTED)


class ReturnsView(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.linear(x))[:, :, :]


class Tied(Stack):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers[1:]:
            layer.linear.weight = self.layers[0].linear.weight


class DropsForNothing(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.dropout(y)
        return x + y


class DropsByFunction(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.dropout(self.linear(x), 0.1, self.training)


class StackOfDropout(Stack):
    """Named like a dropout: what its layers drop is called as this module is."""


class CallsTwice(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return x


class CallsBackwards(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class LeavesOut(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x) if index != 3 else x
        return x


class LooksInside(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(layer.linear.weight.sum() for layer in self.layers)


class SetsScale(Layer):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class ChangesLayers(Stack):
    def __init__(self) -> None:
        super().__init__(SetsScale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            vars(layer)["scale"] = (float(index),)[0] * 1.0 if index else None
            layer.scale = float(index)
            x = layer(x)
            del layer.scale
        return x


class GivesAnother(Stack):
    """The second half of the layers gets another kind of input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x[:, :1] if index == 2 else x)
        return x


@pytest.mark.parametrize(
    ("model", "why"),
    [
        pytest.param(Stack(UsesIndex), "computes with its position", marks=pytest.mark.matrix),
        (Stack(AsksForIndex), "computes with its position"),
        (Stack(TriesToUseIndex), "changes or uses its 'index'"),
        pytest.param(Stack(HoldsObject), "no 4 equal layers", marks=pytest.mark.matrix),
        pytest.param(Stack(Differs), "no 4 equal layers", marks=pytest.mark.matrix),
        pytest.param(Stack(Hooked), "no 4 equal layers", marks=pytest.mark.matrix),
        (Stack(count=3), "no 4 equal layers"),
        pytest.param(Tied(), "no 4 equal layers", marks=pytest.mark.matrix),
        pytest.param(CollectingStack(Collects), "which does not return it", marks=pytest.mark.matrix),
        pytest.param(Stack(DropsForNothing), "nothing reads what", marks=pytest.mark.matrix),
        pytest.param(
            nn.Sequential(StackOfDropout(DropsByFunction)), "which is outside of it", marks=pytest.mark.matrix
        ),
        pytest.param(CallsTwice(), "several times", marks=pytest.mark.matrix),
        (CallsBackwards(), "before"),
        (LeavesOut(), "is not called"),
        pytest.param(LooksInside(), "linear", marks=pytest.mark.matrix),
        (ChangesLayers(), "was changed before it was called"),
        (GivesAnother(), "called with different arguments"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_hazards_are_traced_in_full(model: nn.Module, why: str, both: Both) -> None:
    _, said = both(model)
    assert "is traced in full" in said
    assert why in said


class DropsToo(Stack):
    """With a dropout of its own, whose name in a graph is like those of operators in the layers."""

    def __init__(self) -> None:
        super().__init__(DropsByFunction)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(super().forward(self.dropout(x)))


class WritesToItsInput(Layer):
    def forward(self, x: torch.Tensor) -> None:
        x.add_(self.dropout(self.linear.bias))


class StackOnOneTensor(Stack):
    def __init__(self) -> None:
        super().__init__(WritesToItsInput)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        for layer in self.layers:
            layer(x)
        return self.head(x)


class ReturnsMore(Layer):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return x + self.dropout(y), y.exp()


class LeavesResults(Stack):
    def __init__(self) -> None:
        super().__init__(ReturnsMore)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(DropsToo(), marks=pytest.mark.matrix),
        StackOnOneTensor(),
        pytest.param(LeavesResults(), marks=pytest.mark.matrix),
        StackOfDropout(DropsByFunction),
    ],
    ids=lambda model: type(model).__name__,
)
def test_modes_are_one_in_a_template_before_it_is_stamped(model: nn.Module, both: Both) -> None:
    graph_module, said = both(model)
    assert "layers stamped" in said
    assert sum(isinstance(module, nn.Dropout) for module in graph_module.modules()) >= len(model.layers)


def _parametrized(index: int) -> nn.Module:
    layer = Layer(index)
    nn.utils.parametrizations.weight_norm(layer.linear)
    return layer


def test_parametrized_layers_and_graphs_are_traced_in_full(both: Both) -> None:
    for model in (Stack(_parametrized), torch.fx.symbolic_trace(Stack())):
        _, said = both(model)
        assert "no 4 equal layers" in said


def test_a_model_that_peft_wraps_is_traced_in_full(caplog: pytest.LogCaptureFixture) -> None:
    # Each of its layers holds the name of the module that it takes the place of.
    caplog.set_level(logging.INFO, "lora_fx.tracing")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(deepened(architectures.model("llama")), settings).eval()
    lora_fx.trace(model, inference=True)
    assert "no 4 equal layers" in caplog.records[-1].getMessage()


class WritesToBuffer(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(x)


def test_an_error_of_the_model_is_that_of_the_full_trace() -> None:
    model, inputs = Stack(WritesToBuffer), (torch.randn(2, 5, WIDTH),)
    with (
        unchanged(model),
        pytest.raises(
            lora_fx.TraceError,
            match=r"the model writes to layers.0.calls, layers.1.calls, layers.2.calls, layers.3.calls",
        ),
    ):
        lora_fx.trace(model, inputs)


COUNTED = [0]


class Counts(Layer):
    """Computes with how many layers have been called, which no trace of one layer sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        COUNTED[0] += 1
        return super().forward(x) * (1 + COUNTED[0] % 5)


def test_hidden_state_of_python_is_found_by_running_the_graph(both: Both) -> None:
    _, said = both(Stack(Counts), inference=True)
    assert "is traced in full: the graph of Stack computes something else" in said


class Raises(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        raise ValueError("as it does")


def test_a_model_that_raises_is_as_it_was() -> None:
    model, inputs = Raises(), (torch.randn(2, 5, WIDTH),)
    layers = list(model.layers)
    with unchanged(model), pytest.raises(lora_fx.TraceError, match="as it does"):
        lora_fx.trace(model, inputs)
    assert all(layer is before for layer, before in zip(model.layers, layers, strict=True))
    assert not any(vars(module).get("forward") or module._forward_hooks for module in model.modules())
    assert [layer.index for layer in model.layers] == [0, 1, 2, 3, 4]


# Random stacks.


class RandomLayer(nn.Module):
    """Operators chosen by a seed: in place, shared inputs, branches without gradients, several results, constants, sizes."""

    def __init__(self, index: int, seed: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.seed = seed
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=bool(seed % 2))
        self.register_buffer("scale", torch.ones(WIDTH), persistent=bool(seed % 3))

    def forward(self, x: torch.Tensor, shared: torch.Tensor, extra: Any) -> tuple[torch.Tensor, Any]:
        choose = random.Random(self.seed)
        for _ in range(4):
            x = choose.choice(_STEPS)(self, x, shared, extra)
        return x, choose.choice([extra, {"kept": shared}["kept"], None, 3])


_STEPS: tuple[Callable[..., torch.Tensor], ...] = (
    lambda layer, x, shared, extra: x + layer.first(x.to(torch.float32)),
    lambda layer, x, shared, extra: x * torch.tensor(0.5) + shared.to(torch.float32),
    lambda layer, x, shared, extra: (x + 1).add_(layer.second(x)),
    lambda layer, x, shared, extra: x.view(x.size(0) * x.size(1), WIDTH).mul(layer.scale).view(x.shape),
    lambda layer, x, shared, extra: x + nn.functional.dropout(x, 0.3, layer.training),
    lambda layer, x, shared, extra: x - _mean(x),
    lambda layer, x, shared, extra: x + torch.arange(x.size(1), device=x.device)[:, None] * layer.scale,
    lambda layer, x, shared, extra: torch.cat([x, shared], dim=1)[:, : x.size(1)].contiguous(),
)


@torch.no_grad()
def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


class RandomStack(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        kinds = [choose.randrange(1000) for _ in range(choose.choice([1, 2]))]
        self.layers = nn.ModuleList([RandomLayer(index, kinds[index % len(kinds)]) for index in range(6 * len(kinds))])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared, extra = x.sin(), None
        for layer in self.layers:
            x, _ = layer(x, shared, extra)
        return self.head(x + shared)


@pytest.mark.parametrize(
    "seed", [seed if seed < 2 else pytest.param(seed, marks=pytest.mark.matrix) for seed in range(12)]
)
def test_random_stacks_are_stamped_as_they_are_traced_in_full(seed: int, both: Both) -> None:
    _, said = both(RandomStack(seed))
    assert "layers stamped" in said or "returns views" in said


def test_models_of_other_origin_are_traced_in_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    caplog.set_level(logging.INFO, "lora_fx")
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    lora_fx.trace(model, (torch.randn(3, 4),))
    assert "layers stamped" in caplog.text
    caplog.clear()
    model[2] = type("Own", (nn.Linear,), {})(4, 4)
    lora_fx.trace(model, (torch.randn(3, 4),))
    assert "the code of '2' (test_stamping.Own) is neither torch's nor transformers'" in caplog.text
    caplog.clear()
    model[2] = nn.Linear(4, 4)
    model[2].forward = lambda x: x + 1
    lora_fx.trace(model, (torch.randn(3, 4),))
    assert "is neither torch's nor transformers'" in caplog.text
