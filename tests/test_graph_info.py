"""The record that a graph carries of itself: read through one accessor, kept by copies, absent from foreign graphs."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import lora_fx
from lora_fx.graph.info import GraphInfo, info_of, known_info
from lora_fx.graph.records import Origin

SOURCES = Path(lora_fx.__file__).parent
RULES = {"select": [{"target": ["0"]}, {"target": ["1"]}], "defaults": {"rank": 2, "alpha": 4.0, "dropout": 0.0}}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))


def saved(graph: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(graph, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_foreign_graph_is_refused_in_one_sentence() -> None:
    graph = fx.symbolic_trace(model())
    assert known_info(graph) == GraphInfo()
    with pytest.raises(
        lora_fx.PlanError, match=r"^expected a graph that lora_fx made, got a \S+ without its record: make"
    ) as caught:
        info_of(graph)
    assert str(caught.value).count("\n") == 0
    with pytest.raises(lora_fx.PlanError, match="without its record"):
        lora_fx.fold_report(graph, graph)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph)), saved])
def test_copies_keep_the_record(copied: Callable[[Any], Any]) -> None:
    graph = lora_fx.rewrite(model(), RULES, example_inputs=(torch.randn(2, 3),), inference=True)
    info, other = info_of(graph), info_of(copied(graph))
    assert other.adapters == info.adapters
    assert list(info.adapters["default"].branches) == ["0", "1"]
    assert isinstance(other.adapters["default"].origin, Origin)
    assert other.inference is True
    assert other.examples is not None
    assert info.examples is not None
    for name, tensor in info.examples.tensors.items():
        assert torch.equal(other.examples.tensors[name], tensor)


def test_the_record_is_read_in_one_file() -> None:
    keyed = {path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py") if '"lora_fx"' in path.read_text()}
    assert {"graph/info.py", "graph/provenance.py"} <= keyed
    for name in keyed - {"graph/info.py"}:
        assert 'meta["lora_fx"]' not in (SOURCES / name).read_text()
        assert 'meta.get("lora_fx"' not in (SOURCES / name).read_text()
