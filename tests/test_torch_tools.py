"""torch's own tools on graphs: they work, or say in one sentence what works."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.(jit|ao).*:DeprecationWarning")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(5, 4), nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.first(x).relu()))


class ByName(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x=x)


@pytest.fixture(scope="module")
def graph() -> lora_fx.TracedGraphModule:
    torch.manual_seed(2)
    made = lora_fx.rewrite(Model(), {"select": [{"target": ["first"], "rank": 2}]}, example_inputs=(torch.randn(3, 5),))
    return made.eval()


def test_torch_jit_script_compiles_what_the_export_writes(graph: lora_fx.TracedGraphModule) -> None:
    script, x = torch.jit.script(graph), torch.randn(7, 5)
    assert torch.equal(script(x)["output"], graph(x))
    with pytest.raises(torch.jit.Error, match="has 3 dimensions, expected 2"):
        script(torch.randn(2, 7, 5))


def test_torch_jit_script_of_a_graph_in_training_mode_says_to_call_eval_first(graph: lora_fx.TracedGraphModule) -> None:
    training = copy.deepcopy(graph).train()
    for module in (training, nn.Sequential(training)):
        with pytest.raises(
            lora_fx.ExportError, match=r"expected a graph in evaluation mode.*Call eval\(\) on it first\."
        ):
            torch.jit.script(module)


def test_a_module_around_a_graph_is_scripted(graph: lora_fx.TracedGraphModule) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = graph

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)["output"] * 2

    x = torch.randn(7, 5)
    assert torch.equal(torch.jit.script(Around())(x), graph(x) * 2)


def test_torch_jit_trace_follows_a_graph(graph: lora_fx.TracedGraphModule) -> None:
    script, x = torch.jit.trace(graph, (torch.randn(3, 5),)), torch.randn(7, 5)
    assert torch.equal(script(x), graph(x))


def test_symbolic_trace_is_told_that_it_is_a_graph_already(graph: lora_fx.TracedGraphModule) -> None:
    with pytest.raises(
        lora_fx.TraceError, match=r"is a graph of torch\.fx already.*copy\.deepcopy\(graph\).*torch\.export\.export"
    ):
        fx.symbolic_trace(graph)
    for around in (nn.Sequential(graph, nn.Linear(3, 3)), ByName(graph)):
        with pytest.raises(lora_fx.TraceError, match=r"is a graph of torch\.fx already"):
            fx.symbolic_trace(around)
    x = torch.randn(7, 5)
    exported = torch.export.export(graph, (x,)).module()
    assert torch.equal(exported(x), graph(x))


def test_quantize_dynamic_is_refused_where_it_would_change_nothing(graph: lora_fx.TracedGraphModule) -> None:
    with pytest.raises(
        lora_fx.LoraFxError, match=r"a graph calls operators, so that nothing would be quantised.*lora_fx\.export\.onnx"
    ):
        torch.ao.quantization.quantize_dynamic(graph, {nn.Linear})
    assert not hasattr(graph, "qconfig")
