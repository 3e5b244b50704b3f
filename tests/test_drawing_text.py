"""The difference of two graphs as text."""

from __future__ import annotations

from typing import Any

from test_drawing_static import Described, decoder, projection

from lora_fx.drawing.render.text import text, visible


def sited(made: Described, ranks: dict[str, list[int] | None], layers: list[str], **more: Any) -> dict[str, Any]:
    """Return a description whose layers have these sites, ``None`` where the last of them lacks it."""
    sites = [
        {"name": f"layers.{layer}.{name}", "op": "linear", "in": 4, "out": 4, "ranks": rank or [], "state": "none"}
        for layer in layers
        for name, rank in ranks.items()
    ]
    rows = [
        {
            "layer": layer,
            "cells": [
                None if rank is None and layer == layers[-1] else index * len(ranks) + column
                for column, rank in enumerate(ranks.values())
            ],
        }
        for index, layer in enumerate(layers)
    ]
    return made.description(sites=sites, coverage=[{"stack": "layers", "columns": list(ranks), "rows": rows}], **more)


def test_the_whole_text_of_a_small_graph() -> None:
    made = Described("Small")
    value = made.node("input", kind="input")
    for index in range(2):
        if index == 0:
            made.begin("layers.0–1 ×2", "repeat", type="Layer", copies=2, note="LoRA ×2, rank 8")
        made.begin(f"layers.{index}", type="Layer")
        value = made.node("view", projection(made, "query", value, 8), status="rewired", path=f"layers.{index}")
        made.end()
    made.end()
    differences = [{"what": "argument 2", "before": "0", "after": "1"}]
    made.node("softmax", value, status="changed", differences=differences)
    elsewhere = {"name": "head", "op": "linear", "in": 4, "out": 9, "ranks": [], "state": "none", "reason": "no rule"}
    described = sited(made, {"attention.query": [8], "attention.key": [], "mlp.up": None}, ["0", "1"])
    described["sites"].append(elsewhere)
    described["elsewhere"] = [6]
    assert text(described) == GOLDEN


GOLDEN = """\
Small: traced → rewritten by llama
14 operators: 8 added, 2 rewired, 1 changed, 3 unchanged; 2 branches

 module               class    operators   changes    branches
 ────────────────────────────────────────────────────────────────────────────────
 Small                Small    14          +8 ⇄2 ~1
   layers.0–1 ×2      Layer    12          +8 ⇄2      LoRA ×2, rank 8
     query            Linear   5           +4         LoRA, rank 8
       LoRA default            4           +4         rank 8, alpha 16, scaling 2

layers
 layer   query   key   up
 ────────────────────────
 0       8       ·     ·
 1       8       ·

sites elsewhere
 site   operator   in   out   rank   decision
 ────────────────────────────────────────────
 head   linear     4    9     ·      no rule

other changes
 operator       kind                   module     alike   difference
 ──────────────────────────────────────────────────────────────────────────
 ⇄ view_6       aten.view.default      layers.0   ×2
 ~ softmax_13   aten.softmax.default                      argument 2: 0 → 1
"""


def test_a_graph_without_changes_says_so_and_is_short() -> None:
    written = text(decoder(32, ()))
    assert "1004 operators: nothing differs\n" in written
    assert "layers.0–31 ×32" in written
    assert "input_layernorm" not in written
    assert len(written.splitlines()) < 14


def test_equal_rows_of_a_stack_that_follow_each_other_are_one() -> None:
    made = Described()
    made.node("relu")
    written = text(sited(made, {"attention.query": [8], "attention.key": [], "mlp.up": None}, list("0123")))
    assert [line.split() for line in written.splitlines() if line.startswith((" 0", " 3", " layer"))] == [
        ["layer", "query", "key", "up"],
        ["0–2", "8", "·", "·"],
        ["3", "8", "·"],
    ]


def test_ranks_of_several_branches_and_merged_sites_are_told() -> None:
    made = Described()
    made.node("relu")
    described = sited(made, {"query": [8, 4], "key": []}, ["0"])
    described["sites"][1]["state"] = "merged"
    assert [line.split() for line in text(described).splitlines() if line.startswith(" 0")] == [["0", "8+4", "merged"]]


def test_columns_are_named_by_what_tells_them_apart() -> None:
    made = Described()
    made.node("relu")
    written = text(
        sited(made, {"layer.0.SelfAttention.q": [8], "layer.1.EncDecAttention.q": [8], "layer.2.wi": []}, ["0"])
    )
    assert [line.split() for line in written.splitlines() if line.startswith(" layer")] == [
        ["layer", "SelfAttention.q", "EncDecAttention.q", "wi"]
    ]


def test_columns_beyond_a_screen_are_counted() -> None:
    made = Described()
    made.node("relu")
    written = text(sited(made, {f"experts.{index}.up": [8] for index in range(64)}, ["0"]))
    assert "… and 40 more columns" in written
    assert max(map(len, written.splitlines())) < 400


def test_changes_are_listed_up_to_fifty() -> None:
    made = Described()
    for _ in range(73):
        made.node("relu", status="changed")
    written = text(made.description())
    assert written.count("~ relu_") == 50
    assert written.endswith("… and 23 more\n")


def test_changes_of_the_copies_of_a_repeat_are_one_line() -> None:
    written = text(decoder(32))
    assert [line.split()[-1] for line in written.splitlines() if "⇄ view" in line] == ["×32", "×32"]


def test_groups_beyond_a_few_screens_are_counted() -> None:
    made = Described()
    for index in range(5000):
        made.begin(f"blocks.{index}", type="Block")
        made.node("relu")
        made.end()
    written = text(made.description())
    assert len(written.splitlines()) < 310
    assert "… and 4,701 more groups" in written


def test_names_are_no_markup_and_hide_nothing() -> None:
    name = "[bold red]x[/] :smile: \x1b[31m\n\u202eend"
    made = Described(name)
    made.begin(name, type=name, note=name)
    differences = [{"what": name, "before": name, "after": name}]
    made.node("relu", name=name, op=name, path=name, status="changed", differences=differences)
    made.end()
    described = sited(made, {name: [8]}, [name], before=name, after=name)
    described["sites"].append({"name": name, "op": name, "ranks": [], "state": "none", "reason": name})
    described["elsewhere"] = [1]
    written = text(described)
    assert written.count("[bold red]x[/] :smile: \\x1b[31m\\n\\u202eend") >= 12
    assert all(each.isprintable() for each in written.replace("\n", ""))


def test_same_description_same_text() -> None:
    assert text(decoder(3)) == text(decoder(3))


def test_a_long_name_is_cut_where_it_is_shown() -> None:
    assert visible("x" * 100) == "x" * 59 + "…"
    assert visible("\n" * 59, 60) == "\\n" * 29 + "\\…"
    assert visible("short") == "short"
