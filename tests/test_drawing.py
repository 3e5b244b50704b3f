"""The description of graphs: what it finds different, what it takes for alike, and that it says so without any layout."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from architectures import ARCHITECTURES, EACH, FOUR, branched, build, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from transformers_releases import drawn_as_looked_at

import lora_fx
from lora_fx.drawing.describe import read_names
from lora_fx.drawing.describe.align import aligned
from lora_fx.drawing.draw import FORMATS, describe, describe_graph, within
from lora_fx.drawing.render.dot import dot
from lora_fx.graph.graph_module import TracedGraphModule, assemble, copy_graph, state_of

aten = torch.ops.aten
GOLDEN = Path(__file__).parent / "golden"


class Layer(nn.Module):
    """A small residual layer with a constant of its own."""

    def __init__(self, factor: float = 2.0, slope: float = 0.1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.act = nn.LeakyReLU(slope)
        self.register_buffer("factor", torch.full((6,), factor), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x * self.factor))) * mask


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(4, 6), nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        mask = mask.sigmoid()
        for layer in self.layers:
            x = layer(x, mask)
        return x.tanh()


INPUTS = {"x": torch.randn(3, 5, 4), "mask": torch.randn(3, 5, 6)}


def trace(model: nn.Module) -> TracedGraphModule:
    return lora_fx.trace(model, dict(INPUTS), inference=True)


def edited(
    graph_module: TracedGraphModule, edit: Callable[[fx.Graph, dict[str, fx.Node]], object]
) -> TracedGraphModule:
    """Return a copy of a graph, after an edit of it."""
    graph, _ = copy_graph(graph_module.graph)
    edit(graph, {node.name: node for node in graph.nodes})
    graph.lint()
    return assemble(graph, state_of(graph_module), meta=graph_module.meta, training=False, trainable=frozenset())


def differing(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the operators that differ, by name, with what became of them."""
    return {node["name"]: node["status"] for node in description["nodes"] if node["status"] != "same"}


def named(description: Mapping[str, Any], kind: str) -> list[str]:
    return [group["name"] for group in description["groups"] if group["kind"] == kind]


def node_of(description: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    (node,) = (node for node in description["nodes"] if node["name"] == name)
    return node


@pytest.mark.parametrize("name", FOUR)
def test_a_fold_leaves_nothing_different_and_a_rewrite_adds_branches_alone(name: str) -> None:
    base, graph = traced(name), branched(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = describe(base, lora_fx.fold(graph), show="fold")
        rewritten = describe(base, graph)
        drawn = [FORMATS[name](rewritten) for name in ("html", "svg", "text")]
    assert all(drawn)
    assert folded["changes"] == []
    assert {status: folded["counts"][status] for status in ("added", "removed", "rewired", "changed")} == dict.fromkeys(
        ("added", "removed", "rewired", "changed"), 0
    )
    assert folded["counts"]["nodes"] == describe_graph(base)["counts"]["nodes"]
    stamped = [n.name for n in graph.graph.nodes if n.op != "get_attr" and (n.meta.get("custom") or {}).get("lora_fx")]
    assert {n for n, status in differing(rewritten).items() if status == "added"} == set(stamped)
    assert set(differing(rewritten).values()) == {"added", "rewired"}
    plan = lora_fx.plan(base, ARCHITECTURES[name].rules)
    assert rewritten["counts"]["branches"] == sum(len(chosen.branches) for chosen in plan.chosen)
    assert {site["name"] for site in rewritten["sites"] if site["state"] == "branch"} == {
        c.site.name for c in plan.chosen
    }
    assert {site["name"] for site in folded["sites"] if site["state"] == "merged"} == {c.site.name for c in plan.chosen}
    assert json.loads(json.dumps(rewritten)) == rewritten


@pytest.mark.parametrize("name", EACH)
def test_every_group_is_wired_by_itself(name: str) -> None:
    description = describe(traced(name), branched(name))
    nodes, groups = description["nodes"], description["groups"]
    inside: dict[str, set[str]] = {}
    for index in reversed(range(len(groups))):
        items = groups[index]["items"]
        inside[f"g{index}"] = {n for item in items for n in (inside[item] if item[0] == "g" else {item})}
    assert inside["g0"] == {f"n{index}" for index in range(len(nodes))}
    for index, group in enumerate(groups):
        if index:
            assert f"g{index}" in groups[int(group["parent"][1:])]["items"]
        within = [inside[item] if item[0] == "g" else {item} for item in group["items"]]
        wanted = {
            (a, b)
            for b, readers in enumerate(within)
            for a, sources in enumerate(within)
            if a != b and any(source in sources for n in readers for source in nodes[int(n[1:])].get("inputs", ()))
        }
        drawn = {(a, b) for a, b, status in group["edges"] if status != "removed"}
        stubbed = {
            (a, b) for stub in group["stubs"] for b in stub["to"] for a, s in enumerate(within) if stub["source"] in s
        }
        assert drawn | stubbed == wanted
        for b, readers in enumerate(within):
            outside = {s for n in readers for s in nodes[int(n[1:])].get("inputs", ()) if s not in inside[f"g{index}"]}
            stubs = {stub["source"] for stub in group["stubs"] if b in stub["to"]}
            assert stubs - {s for a in within for s in a} <= outside
            if group["items"][b][0] == "n":  # an operator shows all that it reads
                assert outside <= stubs


def test_what_differs_is_told_argument_by_argument() -> None:
    base = trace(Stack(Layer(), Layer()))

    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["leaky_relu"].args = (nodes["leaky_relu"].args[0], 0.25)
        nodes["mul_2"].replace_input_with(nodes["add"], nodes["linear"])
        with graph.inserting_before(nodes["tanh"]):
            sign = graph.call_function(aten.sign.default, (nodes["tanh"].args[0],))
        sign.meta = dict(nodes["tanh"].meta)
        nodes["tanh"].replace_input_with(nodes["tanh"].args[0], sign)

    names = [node.name for node in base.graph.nodes]
    assert {"leaky_relu", "mul_2", "add", "linear", "tanh"} <= set(names), names
    description = describe(base, edited(base, edit))
    assert differing(description) == {
        "leaky_relu": "changed",
        "mul_2": "rewired",
        "tanh": "rewired",
        "sign_default": "added",
    }
    assert node_of(description, "leaky_relu")["differences"] == [
        {"what": "argument 1", "before": "0.1", "after": "0.25"}
    ]
    assert node_of(description, "mul_2")["differences"] == [{"what": "argument 0", "before": "add", "after": "linear"}]
    back = describe(edited(base, edit), base)
    assert differing(back) == {
        "leaky_relu": "changed",
        "mul_2": "rewired",
        "tanh": "rewired",
        "sign_default": "removed",
    }
    by_id = {f"n{index}": node["name"] for index, node in enumerate(back["nodes"])}
    assert [by_id[source] for source in node_of(back, "tanh")["former"]] == ["sign_default"]


def test_another_shape_and_another_weight_are_changes() -> None:
    wide = Layer()
    wide.up, wide.down = nn.Linear(6, 12), nn.Linear(12, 6)
    description = describe(trace(Stack(Layer())), trace(Stack(wide)))
    changed = differing(description)
    assert set(changed.values()) == {"changed"}
    told = {d["what"] for node in description["nodes"] for d in node.get("differences", ())}
    assert told == {"weight", "value"}
    rules = {"select": [{"target": ["up"]}, {"target": ["down"], "trainable": "bias"}]}
    base = trace(Stack(Layer()))
    trained = describe(base, lora_fx.rewrite(base, rules=rules, rank=2))
    (down,) = (node for node in trained["nodes"] if node["status"] == "changed")
    assert down["differences"] == [
        {
            "what": "weight",
            "before": "layers.0.down.bias float32 [6]",
            "after": "layers.0.down.trained_copy.default.bias float32 [6]",
        }
    ]


def test_operators_of_one_kind_are_told_apart_by_their_lines() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = x.sin() * 2
            x = x.sin() * 3
            return x * mask[..., :4]

    base = trace(Twice())

    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        with graph.inserting_after(nodes["x"]):
            first = graph.call_function(aten.sin.default, (nodes["x"],))
        first.meta = {key: value for key, value in nodes["sin"].meta.items() if key != "stack_trace"}
        nodes["sin"].replace_input_with(nodes["x"], first)

    after = edited(base, edit)
    assert differing(describe(base, after)) == {"sin_default": "added", "sin": "rewired"}


@functools.cache
def two_layers() -> lora_fx.TracedGraphModule:
    return trace(Stack(Layer(), Layer()))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_as_many_operators_are_added_as_were_inserted(data: st.DataObject) -> None:
    base = two_layers()
    drawn = [
        n.name for n in base.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) and n.op == "call_function"
    ]
    places = data.draw(st.lists(st.sampled_from(drawn), unique=True, max_size=5))
    readers: set[str] = set()

    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        for name in places:
            node = nodes[name]
            with graph.inserting_after(node):
                new = graph.call_function(aten.sign.default, (node,))
            new.meta = {"val": node.meta["val"], "nn_module_stack": node.meta["nn_module_stack"]}
            for user in list(node.users):
                if user is not new:
                    user.replace_input_with(node, new)
                    readers.add(user.name)

    after = edited(base, edit)
    found = describe(base, after)["counts"]
    assert (found["added"], found["removed"], found["rewired"], found["changed"]) == (len(places), 0, len(readers), 0)
    back = describe(after, base)["counts"]
    assert (back["added"], back["removed"], back["rewired"], back["changed"]) == (0, len(places), len(readers), 0)


def test_layers_that_are_alike_are_one_group_and_outliers_split_it() -> None:
    def names(*layers: nn.Module) -> list[str]:
        return [
            description["groups"][int(item[1:])]["name"]
            for description in [describe_graph(trace(Stack(*layers)))]
            for item in description["groups"][0]["items"]
            if item[0] == "g"
        ]

    assert names(Layer(), Layer(), Layer(), Layer()) == ["layers.0–3 ×4"]
    assert names(Layer(), Layer(), Layer(slope=0.3), Layer(), Layer()) == ["layers.0–1 ×2", "layers.2", "layers.3–4 ×2"]
    assert names(Layer(), Layer(factor=3.0), Layer()) == ["layers.0", "layers.1", "layers.2"]  # a constant of the code

    class Other(Layer):
        pass

    assert names(Layer(), Layer(), Other()) == ["layers.0–1 ×2", "layers.2"]


def test_layers_whose_output_is_read_by_others_are_not_alike() -> None:
    class Residual(Stack):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x, seen = self.embed(x), []
            for layer in self.layers:
                x = layer(x, mask)
                seen.append(x)
            return x + seen[0]

    assert named(describe_graph(trace(Residual(*(Layer() for _ in range(4))))), "repeat") == ["layers.1–3 ×3"]


def test_layers_that_changed_from_something_else_are_not_alike() -> None:
    after = trace(Stack(Layer(slope=0.3), Layer(slope=0.3)))
    assert named(describe(trace(Stack(Layer(slope=0.1), Layer(slope=0.2))), after), "repeat") == []
    assert named(describe(trace(Stack(Layer(slope=0.1), Layer(slope=0.1))), after), "repeat") == ["layers.0–1 ×2"]


def test_layers_that_read_from_elsewhere_are_not_alike() -> None:
    class Skipping(Stack):
        def __init__(self, skipping: int) -> None:
            super().__init__(*(Layer() for _ in range(6)))
            self.skipping = skipping

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = first = self.embed(x)
            for index, layer in enumerate(self.layers):
                x = layer(x, first if index == self.skipping else mask if index < 5 else mask.sigmoid())
            return x

    assert named(describe_graph(trace(Skipping(3))), "repeat") == ["layers.0–2 ×3"]
    assert named(describe_graph(trace(Skipping(0))), "repeat") == ["layers.1–4 ×4"]


def test_a_layer_that_is_read_from_elsewhere_too_is_not_alike() -> None:
    class Tapped(Layer):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            inner = self.up(x * self.factor)
            return x + self.down(self.act(inner)) * mask, inner

    class Tapping(Stack):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            kept = x.new_zeros(())
            for index, layer in enumerate(self.layers):
                x, inner = layer(x, mask)
                kept = inner.sum() if index == 2 else kept
            return x + kept

    layers = [Tapped() for _ in range(5)]
    assert named(describe_graph(trace(Tapping(*layers))), "repeat") == ["layers.0–1 ×2", "layers.3–4 ×2"]


def test_calls_of_one_layer_are_one_group() -> None:
    description = describe_graph(families.traced("albert"))
    (name,) = named(description, "repeat")
    assert name == "albert_layer_groups.0@1–3 ×3"


def test_layers_with_and_without_branches_or_of_another_rank_are_parted() -> None:
    base = trace(Stack(*(Layer() for _ in range(6))))
    rules = {"select": [{"target": ["up"], "layers": ["0-1"]}, {"target": ["up"], "layers": ["2-3"], "rank": 3}]}
    description = describe(base, lora_fx.rewrite(base, rules=rules, rank=2))
    assert {group["name"]: group.get("note") for group in description["groups"] if group["kind"] == "repeat"} == {
        "layers.0–1 ×2": "LoRA ×2, rank 2",
        "layers.2–3 ×2": "LoRA ×2, rank 3",
        "layers.4–5 ×2": None,
    }
    (matrix,) = description["coverage"]
    assert matrix["columns"] == ["up", "down"]
    ranks = [[description["sites"][cell]["ranks"] for cell in row["cells"]] for row in matrix["rows"]]
    assert ranks == [[[2], []]] * 2 + [[[3], []]] * 2 + [[[], []]] * 2
    skipped = description["sites"][matrix["rows"][5]["cells"][1]]
    assert (skipped["state"], skipped["reason"]) == ("none", "no selection names it")
    assert [description["sites"][index]["name"] for index in description["elsewhere"]] == ["embed"]


def test_layers_that_alternate_are_one_by_their_period() -> None:
    slopes = (0.1, 0.1, 0.3) * 3 + (0.1,)
    base = trace(Stack(*(Layer(slope=slope) for slope in slopes)))
    description = describe(base, lora_fx.rewrite(base, rules={"select": [{"target": ["up"]}]}, rank=2))
    (repeat,) = (group for group in description["groups"] if group["kind"] == "repeat")
    assert (repeat["name"], repeat["copies"], repeat["note"]) == ("layers.0–8 ×9 by 3", 3, "LoRA ×9, rank 2")
    assert [description["groups"][int(item[1:])]["name"] for item in repeat["items"]] == [
        "layers.0–2",
        "layers.3–5",
        "layers.6–8",
    ]
    assert "layers.0–8 ×9 by 3" in FORMATS["text"](description)
    other = trace(Stack(*(Layer(slope=slope) for slope in (0.1, 0.3, 0.1, 0.3, 0.3, 0.1))))
    assert named(describe_graph(other), "repeat") == ["layers.0–3 ×4 by 2"]


def test_axes_of_ones_own_module_have_the_names_of_its_repr() -> None:
    base = trace(Stack(Layer()))
    inputs = [node["value"] for node in describe_graph(base)["nodes"] if node["kind"] == "input"]
    assert "x (batch, x_1, 4), mask (batch, x_1, 6)" in repr(base)
    assert inputs == ["float32 [batch, x_1, 4]", "float32 [batch, x_1, 6]"]


class Handing(Layer):
    """A layer that may hand on what it made of the mask: the last that does has nobody to hand it to."""

    def __init__(self, *, hands: bool) -> None:
        super().__init__(slope=0.1 if hands else 0.3)
        self.hands = hands

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        mask = mask.relu() if self.hands else mask
        return super().forward(x, mask), mask


class HandingStack(Stack):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x, mask = layer(x, mask)
        return x.tanh()


@pytest.mark.parametrize(
    ("handing", "repeats"),
    [
        ("1111", ["layers.0–3 ×4"]),
        ("110110", ["layers.0–5 ×6 by 3"]),
        ("101010", ["layers.0–5 ×6 by 2"]),
        ("101101", ["layers.0–5 ×6 by 3"]),
    ],
)
def test_the_last_layer_that_hands_a_value_on_is_like_those_before_it(handing: str, repeats: list[str]) -> None:
    """So it is in Llama 4, whose layers hand on the frequencies of positions, but for every fourth."""
    description = describe_graph(trace(HandingStack(*(Handing(hands=each == "1") for each in handing))))
    assert named(description, "repeat") == repeats


def test_inputs_of_a_module_are_called_as_in_the_code_of_the_model() -> None:
    base = trace(Stack(Layer(), Layer(2.0, 0.3)))
    description = describe(base, lora_fx.rewrite(base, rules={"select": [{"target": ["down"]}]}, rank=2))
    (up,) = (node for node in description["nodes"] if node.get("path") == "layers.1.up")
    assert list(up.get("called", {}).values()) == []  # self.up(x * self.factor) has no name for it
    (inner,) = (group for group in description["groups"] if group.get("path") == "layers.1.down")
    outside = {description["nodes"][int(stub["source"][1:])]["label"]: stub.get("called") for stub in inner["stubs"]}
    assert outside == {"act · leaky_relu": None}
    t5 = describe_graph(traced("t5"))
    attention = next(
        group for group in t5["groups"] if str(group.get("path")).endswith("block.1.layer.0.SelfAttention")
    )
    assert "hidden_states" in {stub.get("called") for stub in attention["stubs"]}
    drawn = dot(within(t5, attention["path"]))
    assert 'label="hidden_states"' in drawn
    assert 'label="current_states"' in drawn


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("y = self.q(states)", "states"),
        ("cos = cos.unsqueeze(axis)", "cos"),
        ("x = x.view(shape)", "x"),
        ("x = x.view(shape).transpose(1, 2)", ""),
        ("y = torch.relu(x)", "x"),
        ("y = F.gelu(x) + h.view(shape)", ""),
        ("mask = create_mask(", ""),
    ],
)
def test_the_name_of_a_value_is_taken_from_a_line_alone_that_leaves_no_doubt(line: str, name: str) -> None:
    assert read_names._name_in(line, "q") == name


def test_a_closed_branch_stands_beside_its_site_and_both_go_into_the_sum() -> None:
    base = trace(Stack(Layer()))
    description = describe(base, lora_fx.rewrite(base, rules={"select": [{"target": ["up"]}]}, rank=2))
    (module,) = (group for group in description["groups"] if group.get("path") == "layers.0.up")
    kinds = [
        description["groups"][int(item[1:])]["kind"]
        if item.startswith("g")
        else description["nodes"][int(item[1:])]["label"]
        for item in module["items"]
    ]
    assert sorted(kinds) == ["add", "branch", "linear"]
    edges = {(kinds[source], kinds[to]) for source, to, _ in module["edges"]}
    assert edges == {("linear", "add"), ("branch", "add")}
    assert description["changes"][0] == module["items"][kinds.index("branch")]
    assert len(description["changes"]) == 2  # the branch with its sum, and what reads the sum


def test_a_whole_model_beyond_a_page_has_its_layers_closed_and_says_so() -> None:
    base = trace(Stack(*(Layer(slope=0.1 + index / 100) for index in range(12))))
    description = describe(base, lora_fx.rewrite(base, rules={"select": [{"target": ["up", "down"]}]}, rank=2))
    drawn = dot(description)
    assert "Beyond a page: the layers are closed. Of a module: module=&#x27;layers.0&#x27;, --module layers.0." in drawn
    assert "LoRA default" not in drawn
    assert drawn.count("LoRA ×2, rank 2") == 12
    part = dot(within(description, "layers.3"))
    assert "Beyond a page" not in part
    assert part.count("LoRA default") == 2


def test_layers_on_the_meta_device_are_told_apart_by_what_their_code_computes() -> None:
    model = build("gpt_neo")  # every second layer has a mask of its own, in a buffer
    with torch.device("meta"):
        empty = type(model)(model.config)
    for each in (model, empty):
        assert named(describe_graph(lora_fx.trace(each, inference=True)), "repeat") == []


def test_a_branch_is_one_unit_with_its_settings() -> None:
    base = traced("gpt2")
    rules = {"select": [{"target": ["c_attn"], "features": ["query", "value"], "rank": 4, "alpha": 6}]}
    description = describe(base, lora_fx.rewrite(base, rules=rules, rank=2))
    branches = [group for group in description["groups"] if group["kind"] == "branch"]
    assert len(branches) == description["counts"]["branches"] == 4
    assert [branch["note"] for branch in branches[:2]] == [
        "rank 4, alpha 6, scaling 1.5, query",
        "rank 4, alpha 6, scaling 1.5, value",
    ]
    first = branches[0]
    parts = [description["nodes"][int(item[1:])]["part"] for item in first["items"]]
    assert parts == ["A", "B", "scale", "pad", "place"]  # the sum stands beside it, as the site does
    assert first["branch"]["site"] == "transformer.h.0.attn.c_attn"
    assert description["groups"][int(first["parent"][1:])]["path"] == "transformer.h.0.attn.c_attn"
    assert [change for change in description["changes"] if change[0] == "g"] == [
        f"g{index}" for index, group in enumerate(description["groups"]) if group["kind"] == "branch"
    ]
    assert {site["ranks"] == [4, 4] for site in description["sites"] if site["state"] == "branch"} == {True}


def test_branches_of_others_count_too() -> None:
    config = peft.LoraConfig(r=5, target_modules=["query", "value"])
    wrapped = peft.get_peft_model(build("bert"), config).eval()
    graph = lora_fx.trace(wrapped, inference=True)
    found = {site["name"].rpartition(".layer.")[2]: site["ranks"] for site in describe_graph(graph)["sites"]}
    assert {name for name, ranks in found.items() if ranks == [5]} == {
        f"{layer}.attention.self.{which}.base_layer" for layer in range(2) for which in ("query", "value")
    }


def test_what_does_not_fold_is_drawn_all_the_same() -> None:
    base = trace(Stack(Layer()))
    graph = lora_fx.rewrite(base, rules={"select": [{"target": ["up"]}]}, rank=2)
    scale = next(n for n in graph.graph.nodes if n.meta.get("custom", {}).get("lora_fx", {}).get("part") == "scale")
    with graph.graph.inserting_after(scale):
        bent = graph.graph.call_function(aten.relu.default, (scale,))
    scale.replace_all_uses_with(bent, delete_user_cb=lambda user: user is not bent)
    with pytest.raises(lora_fx.FoldError):
        lora_fx.fold(graph)
    description = describe(base, graph)
    assert [site["ranks"] for site in description["sites"] if site["state"] == "branch"] == [[2]]
    assert differing(description)["relu_default"] == "added"


def test_graphs_without_metadata_are_compared_in_order() -> None:
    base = trace(Stack(Layer(), Layer()))
    bare = edited(base, lambda graph, _: [node.meta.clear() for node in graph.nodes])
    assert differing(describe(base, bare)) == {}
    restored = pickle.loads(pickle.dumps(lora_fx.rewrite(base, rules={"select": [{"target": ["up"]}]}, rank=2)))
    counts = describe(bare, restored)["counts"]
    assert (counts["added"], counts["removed"], counts["rewired"], counts["changed"]) == (8, 0, 2, 0)


def test_many_operators_in_one_module_are_parted_into_steps() -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(1000):
        value = graph.call_function(aten.sin.default, (value,))
    graph.output(value)
    description = describe_graph(fx.GraphModule(nn.Module(), graph))
    assert max(len(group["items"]) for group in description["groups"]) <= 120
    assert named(description, "steps")[:2] == ["steps 1–60", "steps 61–120"]


def test_files_are_named_without_the_part_of_the_path_that_differs_between_machines() -> None:
    lines = describe_graph(traced("bert"))["lines"]
    assert any(line.startswith("transformers/models/bert/modeling_bert.py:") for line in lines)
    assert not any("site-packages" in line for line in lines)


_TWICE = """
import hashlib
from architectures import build
import lora_fx
from lora_fx.drawing.describe import read_names
from lora_fx.drawing.draw import FORMATS, describe
base = lora_fx.trace(build("llama", layers=1), inference=True)
description = describe(base, lora_fx.rewrite(base, rules="llama", inference=True))
for name in ("html", "svg", "dot", "json", "text"):
    content = FORMATS[name](description)
    print(name, hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest())
"""


def test_two_processes_write_the_same_bytes() -> None:
    """This one, and one with other hashes of strings."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(
        [sys.executable, "-c", _TWICE], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert len(other.splitlines()) == 5
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(_TWICE, {})
    assert said.getvalue() == other


def outline(description: Mapping[str, Any]) -> str:
    """Return a description as lines that a person can compare; of layers that are alike only the first."""
    marks = {"same": " ", "added": "+", "removed": "-", "rewired": "*", "changed": "~"}
    nodes, groups = description["nodes"], description["groups"]
    lines = [f"{description['title']} {description['counts']}", f"changes {len(description['changes'])}"]

    def tell(name: str, depth: int) -> None:
        group = groups[int(name[1:])]
        start = "  " * depth
        lines.append(
            f"{start}[{group['kind']} {group['name']}] {group.get('type', '')} {group.get('note', '')}".rstrip()
        )
        for item in group["items"][: 1 if group["kind"] == "repeat" else None]:
            if item[0] == "g":
                tell(item, depth + 1)
                continue
            node = nodes[int(item[1:])]
            read = ", ".join(nodes[int(source[1:])]["name"] for source in node.get("inputs", ()))
            weights = "".join(f" {weight['short']}" for weight in node.get("weights", ()))
            lines.append(
                f"{start} {marks[node['status']]} {node['name']}: {node['label']}({read}){weights} {node.get('value', '')}"
            )
        lines.append(f"{start}   edges {group['edges']}")
        stubs = [f"{nodes[int(s['source'][1:])]['name']}→{s['to']}{'*' * ('shared' in s)}" for s in group["stubs"]]
        lines.append(f"{start}   stubs {', '.join(stubs)}")

    tell("g0", 0)
    for matrix in description["coverage"]:
        lines.append(f"{matrix['stack']}: {', '.join(matrix['columns'])}")
        for row in matrix["rows"]:
            cells = ["" if cell is None else description["sites"][cell]["ranks"] for cell in row["cells"]]
            lines.append(f"  {row['layer']}: {cells}")
    lines.append(f"elsewhere {[description['sites'][index]['name'] for index in description['elsewhere']]}")
    return "\n".join(lines) + "\n"


GOLDENS = ("t5", "gpt2", "llama")


def drawn(name: str) -> Mapping[str, Any]:
    base = lora_fx.trace(build(name), inference=True)
    return describe(base, lora_fx.rewrite(base, rules=ARCHITECTURES[name].rules, seed=0))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=drawn_as_looked_at) if name == "llama" else name for name in GOLDENS]
)
def test_the_description_is_the_one_that_was_looked_at(name: str) -> None:
    """Made anew by ``python tests/test_drawing.py``: look at what git says has changed."""
    assert outline(drawn(name)) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["html", "svg", "png", "dot", "json", "txt"])
def test_each_format_is_written_where_it_is_asked_for(suffix: str, tmp_path: Path) -> None:
    base, graph = traced("bert"), branched("bert")
    path = tmp_path / f"graph.{suffix}"
    lora_fx.draw(base, graph, path)
    content = path.read_bytes()
    if suffix == "png":
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
    else:
        assert re.search(r"layer\.0–1 ×2".encode(), content) or b"layer.0\\u20131 \\u00d72" in content
    with pytest.raises(lora_fx.LoraFxError, match="exists already"):
        lora_fx.draw(base, graph, path)
    lora_fx.draw(base, graph, path, show="before", overwrite=True)
    assert path.read_bytes() != content
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_one_module_is_drawn_alone(tmp_path: Path) -> None:
    base, graph = traced("bert"), branched("bert")
    lora_fx.draw(base, graph, tmp_path / "graph.dot", module="encoder.layer.1.attention.self")
    picture = (tmp_path / "graph.dot").read_text(encoding="utf-8")
    assert "BertModel · encoder.layer.1.attention.self" in picture
    assert "query" in picture
    assert "intermediate" not in picture
    assert "+ 10 added" in picture
    lora_fx.draw(base, graph, tmp_path / "graph.txt", module="encoder.layer.1.attention.self")
    assert "25 operators: 10 added, 2 rewired, 13 unchanged; 2 branches" in (tmp_path / "graph.txt").read_text(
        encoding="utf-8"
    )
    with pytest.raises(lora_fx.LoraFxError, match=r"no module 'encoder.layer.7' .*did you mean 'encoder.layer"):
        lora_fx.draw(base, graph, tmp_path / "other.dot", module="encoder.layer.7")
    assert not (tmp_path / "other.dot").exists()


def test_a_wrapper_changes_nothing_but_what_it_adds() -> None:
    config = peft.LoraConfig(r=5, target_modules=["query", "value"])
    wrapped = lora_fx.trace(peft.get_peft_model(build("bert"), config).eval(), inference=True)
    description = describe(lora_fx.trace(build("bert"), inference=True), wrapped)
    counts = description["counts"]
    assert (counts["added"], counts["removed"], counts["rewired"], counts["changed"]) == (
        20,
        0,
        4,
        0,
    )  # A, B, scale, add and a cast of four branches


def test_a_branch_of_another_part_is_another_branch() -> None:
    def rewritten(*parts: str) -> TracedGraphModule:
        rules = {"select": [{"target": ["c_attn"], "features": list(parts), "rank": 4}]}
        return lora_fx.rewrite(traced("gpt2"), rules=rules)

    counts = describe(rewritten("value"), rewritten("query", "value"))["counts"]
    assert (counts["added"], counts["removed"], counts["changed"]) == (12, 0, 0)
    counts = describe(rewritten("query"), rewritten("value"))["counts"]
    assert (counts["added"], counts["removed"], counts["changed"], counts["branches"]) == (12, 12, 0, 2)


def test_the_order_in_which_weights_are_read_is_seen() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x @ torch.cat([self.a, self.a, self.b]).T * mask

    base = trace(Joined())

    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["cat"].args = ([nodes["a"], nodes["b"], nodes["b"]],)

    assert differing(describe(base, edited(base, edit))) == {"cat": "changed"}


def test_another_constant_of_the_code_is_a_change() -> None:
    assert differing(describe(trace(Stack(Layer())), trace(Stack(Layer(factor=3.0))))) == {"mul": "changed"}


def test_operators_without_a_module_are_where_their_neighbours_are() -> None:
    base = trace(Stack(Layer()))

    def edit(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        with graph.inserting_after(nodes["leaky_relu"]):
            new = graph.call_function(aten.sign.default, (nodes["leaky_relu"],))
        nodes["leaky_relu"].replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    description = describe(base, edited(base, edit))
    assert description["groups"][int(node_of(description, "sign_default")["group"][1:])]["path"] == "layers.0"


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    graph: Any = traced("bert")
    with pytest.raises(lora_fx.ExportError, match="expected graphs to draw, got a BertModel: trace it first"):
        lora_fx.draw(build("bert"), graph, tmp_path / "graph.txt")  # type: ignore[arg-type]
    with pytest.raises(lora_fx.ExportError, match="show: expected 'before', 'after' or 'diff', got 'fold'"):
        lora_fx.draw(graph, graph, tmp_path / "graph.txt", show="fold")  # type: ignore[arg-type]
    (tmp_path / "graph.txt").mkdir()
    (tmp_path / "graph.txt" / "precious").write_text("kept")
    with pytest.raises(lora_fx.LoraFxError, match="is a directory, and a file is not written in place of one"):
        lora_fx.draw(graph, graph, tmp_path / "graph.txt", overwrite=True)
    assert (tmp_path / "graph.txt" / "precious").read_text() == "kept"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_an_alignment_is_in_order_and_misses_little(old: list[int], new: list[int]) -> None:
    pairs = sorted(aligned(old, new))
    assert all(old[a] == new[b] for a, b in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    if old == new:
        assert len(pairs) == len(old)
    if len(new) > 2:
        assert len(list(aligned(new, [*new[:2], 9, *new[2:]]))) == len(new)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    graph = traced("bert")
    with pytest.raises(
        lora_fx.ExportError,
        match=r"graph.pdf: a picture is a file, and one of \.dot, \.html, \.json, \.png, \.svg, \.txt",
    ):
        lora_fx.draw(graph, graph, tmp_path / "graph.pdf")
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in GOLDENS:
        (GOLDEN / f"{each}.txt").write_text(outline(drawn(each)), encoding="utf-8")
