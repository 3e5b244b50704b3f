"""What acts, and what trains: the contract of several adapters on one graph, kept by every function."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import set_factors, unchanged
from graph_diff import first_difference
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lora_fx
from lora_fx.adapters.peft_format.directories import read_adapters, write_adapters

X = torch.linspace(-1, 1, 21).reshape(3, 7)
BODY = {"defaults": {"rank": 2, "alpha": 3, "dropout": 0.1}, "select": [{"target": ["body"]}]}
BOTH = {"select": [{"target": ["body", "mid"], "rank": 3, "alpha": 4}]}
HEAD = {"select": [{"target": ["mid"], "rank": 3, "alpha": 4}, {"target": ["head"], "trainable": "all"}]}


class Net(nn.Module):
    """Three projections of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.body(x)).tanh())  # type: ignore[no-any-return]


def net() -> nn.Module:
    torch.manual_seed(5)
    return Net().eval()


@pytest.fixture(scope="module")
def base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(net(), (X,))


def with_b(base: lora_fx.TracedGraphModule, rules: Any = BOTH) -> lora_fx.TracedGraphModule:
    """Return a graph with the adapter a, which acts, and b, which was added later."""
    graph = lora_fx.rewrite(lora_fx.rewrite(base, BODY, adapter="a"), rules, adapter="b")
    set_factors(graph)
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if "trained_copy" in name:
                parameter.add_(0.25)
    return graph


def states(graph: nn.Module) -> list[str]:
    return [str(state) for state in lora_fx.parameter_summary(graph).adapters]


def nodes(graph: Any) -> list[str]:
    return [node.format_node() for node in graph.graph.nodes]


def training(graph: nn.Module) -> set[str]:
    """Return the adapters of which parameters require a gradient."""
    return {name.split(".")[2] for name, p in graph.named_parameters() if p.requires_grad}


def test_the_first_adapter_acts_and_the_next_waits(base: Any, caplog: Any) -> None:
    first = lora_fx.rewrite(base, BODY, adapter="a", seed=1)
    assert states(first) == ["a (acts, trains)"]
    assert caplog.messages == []
    second = lora_fx.rewrite(first, BOTH, adapter="b", seed=2)
    assert states(second) == ["a (acts, trains)", "b (does not act, would train)"]
    assert caplog.messages == [
        "adapter 'b' is in the graph beside 'a' and does not act yet: lora_fx.activate(graph, {\"b\": 1.0}) makes it act alone, "
        '{"a": 1, "b": 1} together.'
    ]
    assert training(second) == {"a"}
    assert nodes(second) == nodes(first)
    set_factors(second)
    assert torch.equal(second(X), lora_fx.activate(second, {"a": 1.0})(X))


def test_what_is_loaded_is_frozen_unless_it_is_to_train(base: Any, tmp_path: Path) -> None:
    lora_fx.save_adapter(with_b(base), tmp_path / "a", "a")
    loaded = lora_fx.load_adapter(base, tmp_path / "a", "a")
    assert states(loaded) == ["a (acts, frozen)"]
    assert states(lora_fx.load_adapter(base, tmp_path / "a", "a", trainable=True)) == ["a (acts, trains)"]
    assert states(lora_fx.from_adapter(net(), tmp_path / "a", example_inputs=(X,))) == ["default (acts, frozen)"]
    trains = lora_fx.from_adapter(net(), tmp_path / "a", example_inputs=(X,), trainable=True)
    assert states(trains) == ["default (acts, trains)"]
    mine = with_b(base)
    for trainable, a in ((None, "trains"), (True, "trains"), (False, "frozen")):
        with unchanged(mine):
            again = lora_fx.load_adapter(mine, tmp_path / "a", "a", trainable=trainable)
        assert states(again) == [f"a (acts, {a})", "b (does not act, would train)"]
        assert states(lora_fx.load_adapter(loaded, tmp_path / "a", "a", trainable=trainable)) == [
            f"a (acts, {'trains' if trainable else 'frozen'})"
        ]
        third = lora_fx.load_adapter(mine, tmp_path / "a", "c", trainable=trainable)
        assert states(third)[2] == f"c (does not act, {'would train' if trainable else 'frozen'})"
        assert states(lora_fx.activate(third, {"c": 1.0}))[2] == f"c (acts, {'trains' if trainable else 'frozen'})"
    lora_fx.save_adapter(mine, tmp_path / "b", "b")
    waiting = lora_fx.load_adapter(mine, tmp_path / "b", "b", trainable=False)
    assert states(waiting) == ["a (acts, trains)", "b (does not act, frozen)"]
    assert states(lora_fx.activate(waiting, {"b": 1.0}))[1] == "b (acts, frozen)"


def test_activate_keeps_the_others_and_brings_them_back(base: Any) -> None:
    both = with_b(base)
    with unchanged(both):
        only_b = lora_fx.activate(both, {"b": 0.5})
        none = lora_fx.activate(both, {})
    assert states(only_b) == ["a (does not act, would train)", "b (acts at strength 0.5, trains)"]
    assert states(none) == ["a (does not act, would train)", "b (does not act, would train)"]
    assert training(none) == set()
    assert nodes(none) == nodes(base)
    assert torch.equal(none(X), base(X))
    assert states(lora_fx.activate(none, {"a": 1.0})) == states(both)
    assert states(lora_fx.rewrite(none, BODY, adapter="c"))[2] == "c (does not act, would train)"
    assert states(lora_fx.trace(only_b)) == states(only_b)
    back = lora_fx.activate(only_b, {"a": 1.0})
    assert first_difference(back, both) is None
    assert torch.equal(back(X), both(X))
    assert {name: p.data_ptr() for name, p in back.named_parameters()} == {
        name: p.data_ptr() for name, p in both.named_parameters()
    }
    assert lora_fx.activate(only_b, {}).training is only_b.training


def test_what_was_frozen_by_hand_stays_so(base: Any) -> None:
    graph = with_b(base)
    graph.get_parameter("body.lora_A.a.weight").requires_grad_(False)
    graph.get_parameter("head.bias").requires_grad_(True)
    back = lora_fx.activate(lora_fx.activate(graph, {"b": 1.0}), {"a": 1.0})
    assert {name for name, p in back.named_parameters() if p.requires_grad} == {"body.lora_B.a.weight", "head.bias"}


def test_an_inference_graph_trains_nothing_and_remembers_what_would(base: Any) -> None:
    inference = lora_fx.trace(net(), (X,), inference=True)
    moved = lora_fx.transfer(with_b(base), onto=inference)
    assert training(moved) == set()
    assert states(lora_fx.transfer(moved, onto=base)) == ["a (acts, trains)", "b (does not act, would train)"]
    assert states(lora_fx.activate(moved, {"b": 1.0}))[1] == "b (acts, frozen)"


def saved(graph: Any) -> Any:
    return pickle.loads(pickle.dumps(graph))


@pytest.mark.parametrize(
    "kept", [copy.deepcopy, saved, lora_fx.fuse, lambda graph: lora_fx.transfer(graph, onto=lora_fx.unload(graph))]
)
def test_copies_and_passes_keep_what_does_not_act(base: Any, kept: Callable[[Any], Any]) -> None:
    graph = lora_fx.activate(with_b(base), {"b": 0.5})
    with unchanged(graph):
        other = kept(graph)
    assert states(other) == states(graph)
    assert training(other) == {"b"}
    assert torch.allclose(other(X), graph(X), atol=1e-6)
    back, wanted = (lora_fx.activate(each, {"a": 2.0}) for each in (other, graph))
    assert torch.allclose(back(X), wanted(X), atol=1e-6)
    assert not torch.allclose(back(X), graph(X), atol=1e-3)


def test_a_graph_on_the_meta_device_keeps_them_too(base: Any) -> None:
    with torch.device("meta"):
        empty = Net()
    graph = lora_fx.rewrite(
        lora_fx.rewrite(lora_fx.trace(empty, (X.to("meta"),)), BODY, adapter="a"), HEAD, adapter="b"
    )
    filled = lora_fx.materialize(graph, net().state_dict(), seed=0)
    assert states(filled) == ["a (acts, trains)", "b (does not act, would train)"]
    assert torch.equal(lora_fx.activate(filled, {"b": 1.0})(X), base(X))  # B is zero, and the copies are the head's


def test_of_a_program_that_was_saved_what_no_node_reads_does_not_act(base: Any) -> None:
    graph = with_b(base, HEAD).eval()
    loaded = lora_fx.trace(
        torch.export.export(graph, (X,)), inference=True
    )  # the record is lost, and the tensors are there
    assert states(loaded) == ["a (acts, frozen)", "b (does not act, frozen)"]
    assert states(lora_fx.rewrite(loaded, BODY, adapter="c"))[2] == "c (acts, frozen)"  # the first that it knows
    assert torch.allclose(lora_fx.fold(loaded)(X), graph(X), atol=1e-6)
    assert list(lora_fx.fold(loaded).state_dict()) == list(net().state_dict())


def test_fold_drops_what_does_not_act_and_says_so(base: Any, caplog: Any) -> None:
    graph = with_b(base, HEAD)
    caplog.clear()
    caplog.set_level(logging.INFO, "lora_fx.folding")
    with unchanged(graph):
        merged = lora_fx.fold(graph)
    assert caplog.messages == ["fold drops what does not act: 'b'."]
    assert list(merged.state_dict()) == list(net().state_dict())
    assert torch.allclose(merged(X), graph(X), atol=1e-6)
    assert torch.equal(merged.get_parameter("head.weight"), base.get_parameter("head.weight"))
    lora_fx.verify(graph, merged, (X,))
    assert len(lora_fx.fold_report(graph, merged)) == 1
    caplog.clear()
    chosen = lora_fx.fold(graph, {"b": 1.0})
    assert caplog.messages == ["fold drops what does not act: 'a'."]
    assert torch.allclose(chosen(X), lora_fx.activate(graph, {"b": 1.0})(X), atol=1e-6)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert torch.equal(lora_fx.unload(graph)(X), base(X))
    assert list(lora_fx.unload(graph).state_dict()) == list(net().state_dict())
    assert lora_fx.recipe(graph) == lora_fx.recipe(lora_fx.activate(graph, {"a": 1.0}))


def test_one_that_does_not_act_is_saved_as_it_is(base: Any, tmp_path: Path) -> None:
    graph = with_b(base, HEAD)
    lora_fx.save_adapter(graph, tmp_path / "b", "b")
    lora_fx.save_adapter(lora_fx.activate(lora_fx.activate(graph, {"b": 0.25}), {}), tmp_path / "rests", "b")
    for directory in ("b", "rests"):
        loaded = lora_fx.load_adapter(base, tmp_path / directory, "b")
        assert torch.equal(loaded(X), lora_fx.activate(graph, {"b": 1.0})(X))


def test_combine_lets_one_act_in_place_of_its_sources(base: Any) -> None:
    graph = lora_fx.rewrite(with_b(base), BODY, adapter="c", seed=1)
    with unchanged(graph):
        combined = lora_fx.combine(graph, {"b": 0.5, "c": 2.0}, adapter="mix")
    assert states(combined) == [
        "a (acts, trains)", "b (does not act, would train)", "c (does not act, would train)", "mix (acts, trains)",
    ]  # fmt: skip
    wanted = lora_fx.activate(graph, {"a": 1.0, "b": 0.5, "c": 2.0})
    assert torch.allclose(combined(X), wanted(X), atol=1e-6)
    assert torch.equal(lora_fx.activate(combined, {"a": 1.0})(X), graph(X))
    replaced = lora_fx.combine(graph, {"a": 1.0}, adapter="alone")
    assert states(replaced)[0] == "a (does not act, would train)"


def test_a_strength_scales_branches_and_takes_copies_whole(base: Any, caplog: Any) -> None:
    graph = with_b(base, HEAD)
    caplog.clear()
    half = lora_fx.activate(graph, {"b": 0.5})
    assert caplog.messages == [
        "adapter 'b' acts at strength 0.5, which scales its branches; its trained copies of head.weight, head.bias are taken whole."
    ]
    model = net()
    with torch.no_grad():
        a, b = (graph.get_parameter(f"mid.lora_{factor}.b.weight") for factor in "AB")
        model.mid.weight += 0.5 * 4 / 3 * b @ a
        for leaf in ("weight", "bias"):
            getattr(model.head, leaf).copy_(graph.get_parameter(f"head.trained_copy.b.{leaf}"))
    assert torch.allclose(half(X), model(X), atol=1e-6)
    assert torch.allclose(lora_fx.fold(graph, {"b": 0.5})(X), model(X), atol=1e-6)


def test_two_heads_wait_for_each_other(base: Any) -> None:
    graph = lora_fx.rewrite(with_b(base, HEAD), HEAD, adapter="c", seed=3)
    with torch.no_grad():
        graph.get_parameter("head.trained_copy.c.bias").add_(1.0)
    assert torch.equal(graph.get_parameter("head.trained_copy.c.weight"), base.get_parameter("head.weight"))
    b, c = (lora_fx.activate(graph, {name: 1.0}) for name in "bc")
    assert not torch.allclose(b(X), c(X), atol=1e-2)
    for call in (lora_fx.activate, lora_fx.fold, lora_fx.recipe):
        with pytest.raises(lora_fx.PlanError, match="a graph computes with one copy of a parameter") as refused:
            call(graph, {"b": 1.0, "c": 1.0})  # type: ignore[operator]
        assert str(refused.value) == (
            "adapter 'c' has trained copies of head.bias, head.weight, and so has 'b', which acts: a graph computes with one copy of a "
            'parameter. Let one of them act at a time: lora_fx.activate(graph, {"c": 1.0}).'
        )
    head_acts = lora_fx.rewrite(b, HEAD, adapter="d", seed=3)  # planned beside a copy that is read
    assert states(head_acts)[3] == "d (does not act, would train)"
    assert torch.equal(lora_fx.activate(head_acts, {"d": 1.0})(X), base(X))


def test_repr_and_summary_say_what_acts(base: Any) -> None:
    graph = lora_fx.activate(with_b(base), {"b": 0.5})
    found = [str(state) for state in graph.adapters]
    assert found == ["a (does not act, would train)", "b (acts at strength 0.5, trains)"]
    for line, told in zip(repr(graph).splitlines()[2:4], found, strict=True):
        assert told in line
    assert str(lora_fx.parameter_summary(graph)).splitlines()[1] == f"adapters: {', '.join(found)}"
    assert "adapters" not in repr(base)
    alone = lora_fx.rewrite(base, BODY)
    assert "adapters    default (acts, trains): rank" in repr(alone)
    assert len(str(lora_fx.parameter_summary(alone)).splitlines()) == 1


def test_transfer_carries_all_and_which_of_them_act(base: Any, caplog: Any) -> None:
    graph, onto = lora_fx.activate(with_b(base), {"b": 0.5}), lora_fx.trace(net(), (X,))
    other = lora_fx.rewrite(lora_fx.rewrite(onto, BODY, adapter="a"), BODY, adapter="own")
    with unchanged(graph), unchanged(other):
        moved = lora_fx.transfer(graph, onto=other)
    assert states(moved) == [
        "a (does not act, would train)",
        "own (does not act, would train)",
        "b (acts at strength 0.5, trains)",
    ]
    assert torch.equal(moved(X), graph(X))
    merged = lora_fx.fold(graph)
    caplog.clear()
    rest = lora_fx.transfer(lora_fx.activate(graph, {"a": 1.0}), onto=merged)
    assert caplog.messages == ["adapter 'b' is folded into the weights already, and is not transferred."]
    assert states(rest) == ["a (acts, trains)"]
    assert torch.allclose(rest(X), lora_fx.activate(graph, {"a": 1.0, "b": 0.5})(X), atol=1e-6)
    with pytest.raises(
        lora_fx.PlanError, match=r"adapter 'b' is folded into the weights of the graph .* would count twice"
    ):
        lora_fx.transfer(graph, onto=merged)
    anew = lora_fx.rewrite(merged, BOTH, adapter="b", seed=1)  # another adapter of the same name, on the merged base
    assert states(lora_fx.transfer(anew, onto=merged)) == ["b (acts, trains)"]


def test_checkpoints_of_a_trainer_hold_those_that_do_not_act(base: Any, tmp_path: Path) -> None:
    graph = lora_fx.activate(with_b(base), {"a": 0.5})
    write_adapters(graph, tmp_path)
    other = lora_fx.activate(with_b(base), {"a": 0.5})
    set_factors(other, seed=3)
    read_adapters(other, tmp_path)
    assert states(other) == states(graph)
    assert all(torch.equal(value, graph.state_dict()[key]) for key, value in other.state_dict().items())


def rows_of_the_guide() -> list[tuple[str, str, str]]:
    """Return step, result here and result in PEFT of the table in the guide."""
    guide = (Path(lora_fx.__file__).parent / "adapters" / "README.md").read_text()
    table = guide.partition("| step | here | PEFT |\n|---|---|---|\n")[2].partition("\n\n")[0]
    steps = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()]
    return [(step[0], step[1], step[2]) for step in steps]


def in_peft(model: Any) -> str:
    """Return which adapters of a PEFT model act, and which have parameters that require a gradient."""
    active, layers = model.active_adapters, [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    told = []
    for name in model.peft_config:
        trains = any(p.requires_grad for key, p in model.named_parameters() if f".{name}." in key)
        acts = name in active and not layers[0].disable_adapters
        told.append(f"{name} ({'acts' if acts else 'does not act'}, {'trains' if trains else 'frozen'})")
    return ", ".join(told)


def test_the_table_of_the_guide_is_what_happens_here_and_in_peft(base: Any, tmp_path: Path) -> None:
    graph = with_b(base)
    for name in "ab":
        lora_fx.save_adapter(graph, tmp_path / name, name)
    loaded = lora_fx.from_adapter(base, tmp_path / "a", "a")
    trains = lora_fx.from_adapter(base, tmp_path / "a", "a", trainable=True)
    here = [
        lora_fx.rewrite(base, BODY, adapter="a"),
        graph,
        lora_fx.activate(graph, {"b": 1.0}),
        lora_fx.activate(graph, {}),
        lora_fx.combine(graph, {"a": 1.0, "b": 0.5}, adapter="ab"),
        loaded,
        trains,
        lora_fx.load_adapter(trains, tmp_path / "b", "b"),
        lora_fx.load_adapter(trains, tmp_path / "b", "b", trainable=True),
        lora_fx.activate(lora_fx.load_adapter(loaded, tmp_path / "b", "b"), {"b": 1.0}),
    ]

    def made(step: int) -> str:
        of_a = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["body"])
        if step < 5:
            model = peft.get_peft_model(net(), of_a, adapter_name="a")
            if step:
                model.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=4, target_modules=["body", "mid"]))
            if step == 2:
                model.set_adapter("b")
            if step == 4:
                model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "ab", combination_type="cat")
            with model.disable_adapter() if step == 3 else contextlib.nullcontext():
                return in_peft(model)
        model = peft.PeftModel.from_pretrained(net(), tmp_path / "a", "a", is_trainable=step in (6, 7, 8))
        if step > 6:
            model.load_adapter(tmp_path / "b", "b", is_trainable=step == 8)
        if step == 9:
            model.set_adapter("b")
        return in_peft(model)

    rows = rows_of_the_guide()
    assert len(rows) == len(here) + 1
    for number, (row, found) in enumerate(zip(rows, here, strict=False)):
        assert row[1:] == (", ".join(states(found)), made(number)), row[0]


def test_exports_leave_out_what_does_not_act(base: Any, tmp_path: Path) -> None:
    graph = lora_fx.activate(with_b(base, HEAD), {"a": 1.0}).eval()
    lora_fx.export.torchscript(graph, tmp_path / "net.ts")
    script = torch.jit.load(tmp_path / "net.ts")
    names = [name for name, _ in script.named_parameters()] + [name for name, _ in script.named_buffers()]
    assert names
    assert not any(".b." in name for name in names)
    lora_fx.export.pt2(graph, tmp_path / "net.pt2")
    assert not any(".b." in name for name in torch.export.load(tmp_path / "net.pt2").state_dict)


def test_an_adapter_without_a_record_cannot_be_kept_and_is_not_dropped(base: Any) -> None:
    graph = with_b(base)
    lost = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    with pytest.raises(lora_fx.PlanError, match="its record was lost"):
        lora_fx.activate(lost, {})


def test_adapters_act_in_the_order_in_which_they_were_added(base: Any) -> None:
    """Which is that of their sums, and not the order of their first parameters."""
    late = {"select": [{"target": ["mid"], "rank": 2, "alpha": 3}]}
    graph = lora_fx.rewrite(lora_fx.rewrite(base, late, adapter="a"), BOTH, adapter="b")
    set_factors(graph)
    both = lora_fx.activate(graph, {"b": 1.0, "a": 1.0})
    assert [state.split()[0] for state in states(both)] == ["a", "b"]
    reads = [str(node.target) for node in both.graph.nodes if "mid.lora_A" in str(node.target)]
    adds = [n.args[1] for n in both.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    factors = [str(each.args[0].args[1].target) for each in adds]
    assert sorted(reads) == ["mid.lora_A.a.weight", "mid.lora_A.b.weight"]
    assert factors == ["body.lora_B.b.weight", "mid.lora_B.a.weight", "mid.lora_B.b.weight"]
    assert nodes(lora_fx.activate(lora_fx.activate(both, {}), {"a": 1.0, "b": 1.0})) == nodes(both)
    assert nodes(lora_fx.transfer(both, onto=base)) == nodes(both)
