from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from architectures import build

import lora_fx


def test_the_changed_layer_is_drawn_before_and_after(tmp_path: Path) -> None:
    model = build("bert")
    before, after = lora_fx.trace(model), lora_fx.rewrite(model, rules="bert")
    lora_fx.draw(before, after, tmp_path / "graph.svg")
    text = "".join(ElementTree.parse(tmp_path / "graph.svg").getroot().itertext())
    assert "before: encoder.layer.0" in text
    assert "after: encoder.layer.0" in text
    assert text.count("+ linear") == 4
    assert text.count("attention.self.query.lora_A.default.weight") == 1
    assert "layer.1" not in text
    lora_fx.draw(before, after, tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_nothing_is_marked_where_nothing_changed(tmp_path: Path) -> None:
    model = build("bert")
    lora_fx.draw(lora_fx.trace(model), lora_fx.fold(lora_fx.rewrite(model, rules="bert")), tmp_path / "graph.dot")
    text = (tmp_path / "graph.dot").read_text()
    assert "before: the whole graph" in text
    assert "+ " not in text


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    graph = lora_fx.trace(build("bert"))
    with pytest.raises(lora_fx.ExportError, match=r"graph.pdf: a picture is one of \.svg, \.png, \.dot"):
        lora_fx.draw(graph, graph, tmp_path / "graph.pdf")
