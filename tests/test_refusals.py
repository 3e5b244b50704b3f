"""Never a silently wrong number: what a trace does not carry over is refused, and says where."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from made import X, agrees, module, refused
from torch import nn
from torch.nn import functional

import lora_fx

# Dropout.


def test_dropout_that_is_always_on_stays_on() -> None:
    monte_carlo = module(lambda self, x: functional.dropout(self.lin(x), 0.5, training=True))
    agrees(monte_carlo)
    agrees(monte_carlo, inference=True)


def test_dropout_that_is_always_off_stays_off() -> None:
    graph = agrees(module(lambda self, x: functional.dropout(self.lin(x), 0.5, training=False)))
    assert not any("dropout" in str(node.target) for node in graph.graph.nodes)


def test_dropout_beside_dropout_that_is_always_on_follows_the_mode() -> None:
    agrees(module(lambda self, x: functional.dropout(self.lin(self.drop(x)), 0.5, training=True), drop=nn.Dropout(0.3)))


def test_dropout_in_evaluation_alone_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(self.lin(x), 0.5, training=not self.training)

    refused(module(forward), r"something else in training than in evaluation.*test_refusals\.py:\d+")


def test_a_module_that_stays_in_evaluation_does_so_in_the_graph() -> None:
    class Frozen(nn.Dropout):
        def train(self, mode: bool = True) -> Frozen:
            del mode
            return super().train(False)

    agrees(module(lambda self, x: self.drop(self.lin(x)), drop=Frozen(0.5).train()).eval())


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_in_two_modes_is_refused(inference: bool) -> None:
    model = module(lambda self, x: self.lin(self.drop(x)), drop=nn.Dropout(0.5))
    model.drop.eval()
    refused(model, r"in train mode, and in eval mode is drop\. Call model\.train\(\) or", inference=inference)


def test_dropout_hides_no_parameter_and_no_buffer() -> None:
    class ScaledDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.dropout(x, 0.5, training=self.training) * self.scale

    agrees(module(lambda self, x: self.drop(self.lin(x)), drop=ScaledDropout()))
    beside = module(
        lambda self, x: functional.dropout(self.lin(x), 0.5, training=self.training) * self.dropout,
        dropout=torch.full((4,), 2.0),
    )
    assert "dropout" in dict(agrees(beside).named_buffers())


# What differs between the modes.


def test_a_constant_that_depends_on_the_mode_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * torch.tensor([0.5 if self.training else 1.0])  # type: ignore[no-any-return]

    model = module(forward)
    refused(model, r"constant that has another value in training.*test_refusals\.py:\d+.*inference=True")
    agrees(model, inference=True)


def test_a_parameter_that_is_read_in_training_alone_is_so_in_the_graph() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) + self.w.contiguous() if self.training else self.lin(x)

    agrees(module(forward, w=nn.Parameter(torch.ones(4))))
    agrees(
        module(
            lambda self, x: self.lin(x) + functional.dropout(self.w, 0.5, True) if self.training else self.lin(x),
            w=nn.Parameter(torch.ones(4)),
        )
    )


# What a trace bakes in: the graph is run beside the model.


@pytest.mark.parametrize(
    "is_so",
    [
        lambda x: type(x) is torch.Tensor,
        lambda x: not torch.compiler.is_compiling(),
        lambda x: torch.is_grad_enabled(),
        lambda x: x.requires_grad,
        lambda x: x.is_contiguous(),
    ],
    ids=["class", "compiling", "grad mode", "requires grad", "layout"],
)
def test_python_that_asks_for_what_a_trace_does_not_have_is_refused(is_so: Callable[[torch.Tensor], bool]) -> None:
    refused(module(lambda self, x: self.lin(x) * (3 if is_so(x) else 2)), "computes something else than the model")


def test_python_that_asks_whether_it_is_traced_in_training_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        scale = 3 if self.training and not torch.compiler.is_compiling() else 2
        return functional.dropout(self.lin(x), 0.5, self.training) * scale

    refused(module(forward), "computes something else than the model on the example inputs in training")


def test_a_size_in_a_string_is_refused() -> None:
    refused(module(lambda self, x: (self.lin(x), f"{x.size(0)} rows")), "cannot be traced|computes something else")


def test_an_attribute_that_counts_is_refused_and_put_back() -> None:
    def count(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.lin(x) * self.calls

    model = module(count, calls=3)
    refused(model, r"changes its own calls while it computes")
    assert model.calls == 3

    def count_in_a_list(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.log["calls"] = len(self.log)
        return self.lin(x) * self.log["calls"]

    model = module(count_in_a_list, log={})
    refused(model, r"changes its own log\.calls while it computes")
    assert model.log == {}


def test_a_flag_that_is_set_once_is_put_back_and_a_first_call_is_refused() -> None:
    def prepare(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.prepared = True
        return self.lin(x)

    model = module(prepare, prepared=False)
    lora_fx.trace(model, (X,))
    assert model.prepared is False

    def first(self: Any, x: torch.Tensor) -> torch.Tensor:
        scale = 3 if not self.prepared else 2
        self.prepared = True
        return self.lin(x) * scale

    refused(module(first, prepared=False), "computes something else than the model")


@pytest.mark.parametrize(("source", "draw"), [("random", random.random), ("numpy.random", numpy.random.rand)])
def test_random_numbers_that_are_not_torchs_are_refused(source: str, draw: Callable[[], float]) -> None:
    states = random.getstate(), numpy.random.get_state()[1].tobytes()
    refused(module(lambda self, x: self.lin(x) * draw()), f"draws random numbers from {source}")
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == states


@pytest.mark.parametrize("source", [random, numpy.random], ids=["python", "numpy"])
def test_a_random_number_that_decides_nothing_is_no_reason_for_a_refusal(source: Any) -> None:
    def layers(self: Any, x: torch.Tensor) -> torch.Tensor:
        drawn, other = source.uniform(0, 1), source.random()
        return x if self.training and (drawn < self.layerdrop or other < self.layerdrop) else self.lin(x)

    agrees(module(layers, layerdrop=0.0))
    states = random.getstate(), numpy.random.get_state()[1].tobytes()
    lora_fx.trace(module(layers, layerdrop=0.0), (X,))
    # The number 1 itself is one that may be drawn.
    refused(module(layers, layerdrop=1.0), f"draws random numbers from {source.__name__}")
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == states


@pytest.mark.parametrize("use", [float, lambda drawn: drawn < 0.5, bool, lambda drawn: drawn == 0.5])
def test_a_random_number_that_decides_something_is_refused(use: Callable[[Any], float]) -> None:
    model = module(lambda self, x: self.lin(x) * (0.5 + use(random.random())))
    refused(model, "draws random numbers from random", inference=True)


def test_a_cache_holds_no_fake_tensor_after_a_trace() -> None:
    class Table:
        value: torch.Tensor | None = None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.table.value is None:
            self.table.value = torch.arange(4.0) * 2
        if "two" not in self.cache:
            self.cache["two"] = torch.full((4,), 2.0)
        return self.lin(x) * self.table.value + self.cache["two"]

    model = module(forward, table=Table(), cache={})
    agrees(model)
    fresh = module(forward, table=Table(), cache={})
    lora_fx.trace(fresh, (X,))
    assert fresh.table.value is None
    assert fresh.cache == {}


def test_buffers_that_are_written_to_out_of_sight_stay() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls.add_(1)
        return self.lin(x)

    model = module(forward, calls=torch.zeros(()))
    lora_fx.trace(model, (X,))
    assert model.calls == 0


# What is written to.


@pytest.mark.parametrize("view", ["chunk", "split", "unbind", "type_as", "dropout"])
def test_writes_through_views_are_seen(view: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        part = {
            "chunk": lambda: self.buf.chunk(2)[1],
            "split": lambda: self.buf.split(2)[0],
            "unbind": lambda: self.buf.unbind(0)[0],
            "type_as": lambda: self.buf.type_as(x),
            "dropout": lambda: functional.dropout(self.buf, 0.5, False),
        }[view]()
        part.add_(1)
        return self.lin(x) + self.buf.sum()

    refused(module(forward, buf=torch.zeros(4, 4)), "the model writes to buf while it computes")


def test_an_embedding_with_a_max_norm_says_what_computes_the_same() -> None:
    model = nn.Sequential(nn.Embedding(11, 6, max_norm=1.5, norm_type=1.0), nn.Linear(6, 5)).eval()
    ids, table = torch.tensor([[1, 2, 3], [4, 1, 10]]), model[0]
    assert isinstance(table, nn.Embedding)
    with torch.no_grad():
        expected = copy.deepcopy(model)(ids)
    with pytest.raises(lora_fx.TraceError) as caught:
        lora_fx.trace(model, (ids,))
    assert str(caught.value) == (
        "the model writes to 0.weight while it computes, and a graph would write to the model's own. The embedding 0 has a "
        "max_norm: give its rows that norm once, torch.embedding_renorm_(weight, torch.arange(len(weight)), max_norm, "
        "norm_type) under torch.no_grad(), and set its max_norm to None. It computes the same then."
    )
    with torch.no_grad():
        torch.embedding_renorm_(table.weight, torch.arange(11), 1.5, 1.0)
    table.max_norm = None
    assert torch.equal(lora_fx.trace(model, (ids,), inference=True)(ids), expected)


# Size 1.


def test_size_one_is_covered_only_with_evidence() -> None:
    for scale in (
        lambda self, x, y: y * 5 if x.size(0) == 1 and x.size(1) == 1 else y,
        lambda self, x, y: y + x.sum() if x.size(0) == 1 else y,
        lambda self, x, y: y * 5 if self.training and x.size(0) == 1 else y,
    ):
        model = module(lambda self, x, scale=scale: scale(self, x, x * 2))
        graph = lora_fx.trace(model, (torch.zeros(3, 4),), dynamic={"x": (0, 1)})
        for training in (False, True):
            for size in ((1, 1), (1, 3), (2, 1)):
                x = torch.randn(size)
                try:
                    found = graph.train(training)(x)
                except lora_fx.InputError:
                    continue
                assert torch.equal(found, model.train(training)(x))


def test_size_one_is_covered_in_models_that_draw_random_numbers() -> None:
    graph = lora_fx.trace(module(lambda self, x: self.lin(x + torch.rand_like(x))), (X,))
    assert graph(X[:1]).shape == (1, 4)


# Guards.


def test_guards_with_division_are_checked_or_refused() -> None:
    model = module(lambda self, x: self.lin(x) * (3 if x.size(0) / 2 > 2.5 else 2))
    graph = None
    try:
        graph = lora_fx.trace(model, (X,), dynamic={"x": (0,)})
    except lora_fx.TraceError as error:
        assert "bound this trace by" in str(error)  # noqa: PT017
    for rows in (2, 3, 5, 6, 9):
        x = torch.randn(rows, 4)
        if graph is not None:
            try:
                assert torch.equal(graph(x), model(x))
            except lora_fx.InputError:
                assert rows > 5
    refused(
        module(lambda self, x: self.lin(x) * (3 if round(x.size(0) / 3) > 2 else 2)),
        "bound this trace by .*round",
        dynamic={"x": (0,)},
    )


def test_models_with_variadic_arguments_are_traced() -> None:
    def forward(self: Any, *args: torch.Tensor) -> torch.Tensor:
        first, second = args
        return self.lin(first) * 3 if second.size(0) <= 8 else self.lin(first)

    model = module(forward)
    graph = lora_fx.trace(model, (X, torch.randn(5)))
    assert torch.equal(graph(X, torch.randn(7)), model(X, torch.randn(7)))
    with pytest.raises(lora_fx.InputError):
        graph(X, torch.randn(9))


# What is passed in.


Pair = collections.namedtuple("Pair", "a b")


def test_keywords_may_come_in_any_order() -> None:
    model = module(lambda self, a, b: self.lin(a) * (2 if b.size(0) <= 8 else 1))
    graph = lora_fx.trace(model, {"b": torch.randn(5), "a": X})
    larger = torch.randn(11, 4)
    assert torch.equal(graph(larger, torch.randn(7)), model(larger, torch.randn(7)))
    with pytest.raises(lora_fx.InputError, match="'b' has size 9 in dimension 0"):
        graph(b=torch.randn(9), a=X)


def test_named_tuples_are_inputs() -> None:
    model = module(lambda self, pair: self.lin(pair.a) + pair.b)
    graph = lora_fx.trace(model, (Pair(X, X * 2),))
    larger = Pair(torch.randn(6, 4), torch.randn(6, 4))
    assert torch.equal(graph(larger), model(larger))


@pytest.mark.parametrize(
    ("inputs", "dynamic", "match"),
    [
        ([X], None, r"expected a mapping .*, or a tuple .*, got a list"),
        (X, None, "example_inputs: expected a mapping .*, got a Tensor"),
        ((X, X), None, r"forward cannot be called with these example_inputs: too many positional.*It takes \(x\)"),
        ((), None, "missing a required argument: 'x'"),
        ({"y": X}, None, "missing a required argument: 'x'"),
        ((X,), {"x": 0}, r"dynamic= for 'x': .*got 0\."),
        ((X,), {"x": (5,)}, r"dynamic= for 'x': .*its 2 dimensions \(0 to 1\), got \(5,\)"),
        ((X,), {"x": (-2,)}, r"dynamic= for 'x': .*got \(-2,\)"),
        ((X,), {"y": (0,)}, r"dynamic= names 'y', expected one of the inputs: x"),
    ],
)
def test_inputs_that_are_not_what_they_should_be_are_refused(inputs: Any, dynamic: Any, match: str) -> None:
    refused(module(lambda self, x: self.lin(x)), match, inputs=inputs, dynamic=dynamic)


def test_what_is_no_module_of_its_own_is_refused() -> None:
    for other in (lambda x: x, torch.jit.script(nn.Linear(4, 4))):
        with pytest.raises(lora_fx.TraceError, match=r"expected a torch\.nn\.Module in Python"):
            lora_fx.trace(other, (X,))  # type: ignore[arg-type]
    with torch.inference_mode():
        model = module(lambda self, x: self.lin(x))
    with pytest.raises(lora_fx.TraceError, match=r"made under torch\.inference_mode"):
        lora_fx.trace(model, (X,))
    exported = torch.export.export(module(lambda self, x: self.lin(x)), (X,)).module()
    with pytest.raises(lora_fx.TraceError, match=r"no train and eval mode.*trace the module that it was made from"):
        lora_fx.trace(exported, (X,))


def test_one_tensor_for_two_inputs_is_two_inputs() -> None:
    model = module(lambda self, x, a, b: self.lin(x) * a + b)
    graph_module = lora_fx.trace(model, {"x": X, "a": X, "b": X})
    other = (torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4))
    assert torch.equal(graph_module(*other), model(*other))


def test_a_condition_on_sizes_that_torch_cannot_solve_is_told_with_the_argument_that_fixes_them() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:  # as AlexNet
        x = functional.conv2d(x, self.kernel, stride=4, padding=2)
        for _ in range(3):
            x = functional.max_pool2d(x, 3, 2)
        return self.lin(functional.adaptive_avg_pool2d(x, (2, 2)).flatten(1))

    torch.manual_seed(3)
    model, x = module(forward, kernel=nn.Parameter(torch.randn(1, 2, 11, 11))), torch.randn(3, 2, 64, 64)
    told = r"code sets a condition on them that torch\.export cannot solve\..*any batch with dynamic=\{'x': \(0,\)\}"
    refused(model.eval(), told, (x,))
    graph = lora_fx.trace(model, (x,), dynamic={"x": (0,)}, inference=True)
    assert torch.equal(graph(x[:2]), model(x[:2]))


def test_a_model_that_adds_to_the_mapping_that_it_is_given_is_traced() -> None:
    def forward(self: Any, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # as sentence-transformers
        features.update(embedding=self.lin(features["x"]))
        return features

    model = module(forward).eval()
    given = {"x": X}
    graph = lora_fx.trace(model, (given,))
    assert set(given) == {"x"}
    for found in (graph({"x": X}), graph.train()({"x": X[:2]})):
        assert torch.equal(found["embedding"], model({"x": found["x"]})["embedding"])
