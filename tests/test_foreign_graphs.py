"""Models that were changed before they came here: wrapped by PEFT, exported and saved as ``.pt2``, traced by torch.fx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, VOCABULARY, branched, build, inputs, model, rows, run
from conftest import set_factors, unchanged
from made import X, agrees, module
from test_peft_equality import wrap
from torch import fx, nn
from torch.nn import functional

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZE = (3, 11, 5)


def saved(exported: torch.export.ExportedProgram, path: Path) -> torch.export.ExportedProgram:
    """Return a program as it comes back from a file."""
    torch.export.save(exported, path / "program.pt2")
    return torch.export.load(path / "program.pt2")


def exported(name: str, graph_module: nn.Module) -> torch.export.ExportedProgram:
    """Return a graph that was exported again, with batch and sequence as dynamic as it allows."""
    kwargs = inputs(name, 2, 7, 5)
    auto = torch.export.Dim.AUTO
    return torch.export.export(graph_module, (), kwargs, dynamic_shapes={key: {0: auto, 1: auto} for key in kwargs})


def names(module: nn.Module) -> list[list[str]]:
    """Return the names of every parameter, those of a tied one together."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


@pytest.mark.parametrize("name", rows(ARCHITECTURES, ("gpt2", "blip-2")))
def test_a_model_that_peft_wraps_traces_with_inputs_from_its_config_bit_for_bit(name: str) -> None:
    wrapped = wrap(name, model(name), dropout=0.1).eval()
    set_factors(wrapped)
    trained = {n: p.requires_grad for n, p in wrapped.named_parameters()}
    graph = lora_fx.trace(wrapped, inference=True)
    assert {n: p.requires_grad for n, p in wrapped.named_parameters()} == trained
    assert names(graph) == names(wrapped)
    mine, theirs = run(name, graph, *SIZE), run(name, wrapped, *SIZE)
    assert type(mine) is type(theirs)
    assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        pytest.param(row.values[0], dropout, marks=row.marks)
        for dropout, representatives in ((0.0, ()), (0.1, ("gpt2",)))
        for row in rows(("t5", "gpt2", "llama", "bert"), representatives)
    ],
)
def test_a_model_that_peft_wraps_traces_in_both_modes_with_the_dropout_of_its_branches(
    name: str, dropout: float
) -> None:
    wrapped = wrap(name, model(name), dropout=dropout).train()
    set_factors(wrapped)
    graph = lora_fx.trace(wrapped)
    assert graph.training
    for training in (True, False):
        outputs = []
        for each in (graph.train(training), wrapped.train(training)):
            torch.manual_seed(3)
            outputs.append(run(name, each, *SIZE)[0])
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "task"), [("layoutlm", "FEATURE_EXTRACTION"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_a_wrapper_whose_forward_names_other_inputs_gets_those_of_the_model(name: str, task: str) -> None:
    config = peft.LoraConfig(task_type=task, target_modules=list(ARCHITECTURES[name].target_modules))
    wrapped = peft.get_peft_model(build(name, layers=1), config).eval()
    set_factors(wrapped)
    graph = lora_fx.trace(wrapped, inference=True)
    assert torch.equal(run(name, graph, *SIZE)[0], run(name, wrapped, *SIZE)[0])


def test_experts_that_peft_adapts_by_parameter_trace_in_both_modes() -> None:
    """PEFT registers a parametrization for the length of each call, which begins with a write of the weight to itself."""
    base = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)).eval()
    set_factors(wrapped)
    with unchanged(wrapped):
        graph = lora_fx.trace(wrapped)
    given = inputs("llama", *SIZE)
    assert torch.equal(graph(**given)[0], wrapped(**given, use_cache=False)[0])


@pytest.mark.parametrize("name", rows(("t5", "gpt2", "llama", "bert"), ("gpt2",)))
def test_a_branched_graph_comes_back_from_a_pt2_with_the_names_ties_and_numbers_it_had(
    name: str, tmp_path: Path
) -> None:
    graph = branched(name, dropout=0.1).eval()
    set_factors(graph)
    again = lora_fx.trace(saved(exported(name, graph), tmp_path), inference=True)
    assert sorted(map(sorted, names(again))) == sorted(map(sorted, names(graph)))
    assert set(again.state_dict()) == set(graph.state_dict())
    assert not again.training
    mine, theirs = run(name, again, *SIZE), run(name, graph, *SIZE)
    assert type(mine) is type(theirs)
    assert torch.equal(mine[0], theirs[0])


def test_what_guards_a_program_guards_its_graph(tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=9), 1: None}}
    program = torch.export.export(module(lambda self, x: self.lin(x)), (), {"x": X}, dynamic_shapes=shapes)
    graph = lora_fx.trace(saved(program, tmp_path), inference=True)
    assert not any("guard" in name for name, _ in graph.named_modules())
    assert torch.equal(graph(X[:2]), program.module()(x=X[:2]))
    with pytest.raises(lora_fx.InputError, match="size 10 in dimension 0"):
        graph(torch.ones(10, 4))


def test_the_module_of_a_program_is_left_as_it_was(tmp_path: Path) -> None:
    tied = nn.Linear(4, 4)
    tied.weight = (model := module(lambda self, x: self.tied(self.lin(x)), tied=tied)).lin.weight
    loaded = saved(torch.export.export(model, (X,)), tmp_path).module()
    with unchanged(loaded):
        graph = lora_fx.trace(loaded, (X,), inference=True)
    assert ["lin.weight", "tied.weight"] in names(graph)
    assert torch.equal(graph(X), model(X))


def test_a_program_cannot_be_traced_for_training() -> None:
    program = torch.export.export(module(lambda self, x: self.lin(x)), (X,))
    holder = module(lambda self, x: self.part(self.lin(self.drop(x))), drop=nn.Dropout(0.5), part=program.module())
    for made in (program, program.module(), holder):
        with pytest.raises(lora_fx.TraceError, match=r"exported program, which has no train.*inference=True"):
            lora_fx.trace(made, (X,))
    assert torch.equal(lora_fx.trace(program, inference=True)(X), program.module()(X))
    expected = program.module()(holder.lin(X))
    assert torch.equal(lora_fx.trace(holder, (X,), inference=True)(X), expected)


def test_a_graph_of_torch_fx_traces_in_both_modes() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.lin(self.drop(x))) @ self.matrix

    made = module(forward, drop=nn.Dropout(0.5), matrix=nn.Parameter(torch.randn(4, 3)))
    graph = agrees(fx.symbolic_trace(made))
    assert {str(node.target) for node in graph.graph.nodes if node.op == "call_function"} >= {"aten.linear.default"}
    assert names(graph) == names(made)
    assert [type(part).__name__ for _, part in graph.named_modules() if not list(part.children())].count("Linear") == 0


def test_a_graph_takes_its_keyword_inputs_in_any_order_and_may_leave_some_out() -> None:
    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor | None = None, y: torch.Tensor | None = None) -> Any:
        del mask
        return self.lin(x) - 2 * y

    made = module(forward)
    graph = lora_fx.trace(fx.symbolic_trace(made), {"y": X, "x": X + 1})
    assert torch.equal(graph(y=X, x=X + 1), made(X + 1, None, X))
