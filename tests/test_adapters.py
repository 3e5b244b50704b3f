"""Adapters go to PEFT's files and come back as they were, for every architecture and everything that a config can say."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, FOUR, model, rows, run, traced
from conftest import all_acting, set_factors, unchanged
from safetensors.torch import load_file
from torch import nn

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Could not find a config file")

SIZE = (3, 11, 5)


def randomized(module: nn.Module, seed: int = 3) -> None:
    """Give every parameter that trains values of its own; B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def saved_module(name: str) -> str:
    """Return the last module that can train as a whole: not adapted, not tied, and in use."""
    base = traced(name)
    names = dict(base.named_parameters(remove_duplicate=False))
    tied = {key for key, p in names.items() for other, q in names.items() if p is q and key != other}
    read = {str(node.target) for node in base.graph.find_nodes(op="get_attr")}
    targets = ARCHITECTURES[name].target_modules
    modules = [key.rpartition(".")[0] for key in names if key in read and key not in tied]
    return next(
        m
        for m in reversed(modules)
        if not any(part in targets for part in m.split(".")) and all(k in read for k in names if k.startswith(f"{m}."))
    )


def configs(name: str) -> Mapping[str, dict[str, Any]]:
    """Return what a config can say: other ranks and alphas by patterns, then all the rest."""
    targets = ARCHITECTURES[name].target_modules
    layer, other, *_ = (m for m in traced_modules(name) if m.rpartition(".")[2] in targets)
    return {
        "patterns": {"rank_pattern": {layer: 3, f"^{other}": 5}, "alpha_pattern": {layer: 11}},
        "rslora, bias of targets, module": {
            "use_rslora": True,
            "bias": "lora_only",
            "modules_to_save": [saved_module(name)],
            "init_lora_weights": "gaussian",
        },
        "all biases, one layer": {"bias": "all", "target_modules": [layer]},
    }


def traced_modules(name: str) -> list[str]:
    return [key.removesuffix(".weight") for key in dict(traced(name).named_parameters()) if key.endswith(".weight")]


def wrapped(name: str, **settings: Any) -> Any:
    architecture = ARCHITECTURES[name]
    said = {"target_modules": list(architecture.target_modules), "fan_in_fan_out": architecture.fan_in_fan_out}
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **said, **settings})
    made = peft.get_peft_model(copy.deepcopy(model(name)), config)
    randomized(made)
    return made.eval()


def loaded_by_peft(name: str, directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model(name)), str(directory)).eval()


def meaning(wrapping: Any) -> dict[str, Any]:
    """Return what PEFT made of a config: per module rank and scaling, and which parameters its adapter has."""
    layers = {
        key: (dict(module.r), dict(module.scaling))
        for key, module in wrapping.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    copies = {key.replace("modules_to_save.default.", "") for key in wrapping.state_dict() if "modules_to_save" in key}
    factors = {key for key in wrapping.state_dict() if ".lora_" in key}
    return {"layers": layers, "factors": factors, "copies": copies}


def same(left: Any, right: Any) -> bool:
    return torch.equal(left[0], right[0])


def files_equal(left: Path, right: Path) -> None:
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (left, right))
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype, key
        assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(row.values[0], variant, marks=row.marks)
        for variant, representatives in enumerate((("t5", "gpt2", "llama", "bert"), ("t5", "gpt2", "bert"), ("gpt2",)))
        for row in rows(ARCHITECTURES, representatives)
    ],
)
def test_what_peft_wrote_comes_back_to_peft_as_it_was(name: str, variant: int, tmp_path: Path) -> None:
    settings = list(configs(name).values())[variant]
    theirs = wrapped(name, **settings)
    theirs.save_pretrained(str(tmp_path / "peft"))
    with unchanged(traced(name)):
        mine = lora_fx.from_adapter(traced(name), tmp_path / "peft")
    assert same(run(name, mine.eval(), *SIZE), run(name, theirs, *SIZE))
    assert not same(run(name, mine, *SIZE), run(name, model(name), *SIZE))
    with unchanged(mine):
        lora_fx.save_adapter(mine, tmp_path / "ours")
    files_equal(tmp_path / "ours", tmp_path / "peft")
    again = loaded_by_peft(name, tmp_path / "ours")
    assert meaning(again) == meaning(theirs)
    assert same(run(name, again, *SIZE), run(name, theirs, *SIZE))
    written, expected = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft"))
    assert written.keys() == expected.keys()
    derived = {"target_modules", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "bias", "modules_to_save"}
    assert written["peft_version"] == "0.21.2"  # whose format it is, whichever PEFT is installed
    derived |= {"peft_version"}
    assert {k: v for k, v in written.items() if k not in derived} == {
        k: v for k, v in expected.items() if k not in derived
    }


RULES: list[dict[str, Any]] = [{}, {"scaling": "rslora"}]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(row.values[0], variant, marks=row.marks)
        for variant, representatives in enumerate(
            (("t5", "llama", "deberta", "chatglm", "blip-2"), ("gpt2", "bert", "bloom", "deberta-v2"))
        )
        for row in rows(ARCHITECTURES, representatives)
    ],
)
def test_what_was_rewritten_here_comes_back_from_peft_as_it_was(name: str, variant: int, tmp_path: Path) -> None:
    targets = list(ARCHITECTURES[name].target_modules)
    select: list[dict[str, Any]] = [
        {"target": targets, "alternatives": True, "rank": 3, "alpha": 7.5},
        {"target": targets, "alternatives": True, "layers": [1], "rank": 5, "alpha": 4, "override": True},
    ]
    if variant:
        select += [
            {"target": [saved_module(name)], "trainable": "all"},
            {"target": targets, "alternatives": True, "trainable": "bias", "optional": True},
        ]
    mine = lora_fx.rewrite(traced(name), {"defaults": RULES[variant], "select": select}).eval()
    randomized(mine)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    theirs = loaded_by_peft(name, tmp_path / "ours")
    assert same(run(name, theirs, *SIZE), run(name, mine, *SIZE))
    theirs.save_pretrained(str(tmp_path / "peft"))
    files_equal(tmp_path / "ours", tmp_path / "peft")
    back = lora_fx.from_adapter(traced(name), tmp_path / "peft")
    assert same(run(name, back.eval(), *SIZE), run(name, mine, *SIZE))
    found, expected = back.state_dict(), mine.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    onto = lora_fx.rewrite(traced(name), {"defaults": RULES[variant], "select": select}).eval()
    with unchanged(onto):
        filled = lora_fx.load_adapter(onto, tmp_path / "ours")
    assert same(run(name, filled, *SIZE), run(name, mine, *SIZE))
    assert not same(run(name, onto, *SIZE), run(name, mine, *SIZE))


@pytest.mark.parametrize("name", FOUR)
def test_a_second_adapter_of_another_rank_works_beside_the_first_as_in_peft(name: str, tmp_path: Path) -> None:
    theirs = wrapped(name)
    target = next(
        leaf for m in traced_modules(name) if (leaf := m.rpartition(".")[2]) in ARCHITECTURES[name].target_modules
    )
    second = peft.LoraConfig(
        r=7, lora_alpha=5, target_modules=[target], use_rslora=True,
        fan_in_fan_out=ARCHITECTURES[name].fan_in_fan_out,
    )  # fmt: skip
    theirs.add_adapter("second", second)
    set_factors(theirs)
    theirs.base_model.set_adapter(["default", "second"])
    theirs.save_pretrained(str(tmp_path))
    first = lora_fx.from_adapter(traced(name), tmp_path)
    both = lora_fx.load_adapter(first, tmp_path / "second", "second")
    both = all_acting(both).eval()
    assert same(run(name, both, *SIZE), run(name, theirs.eval(), *SIZE))
    theirs.base_model.set_adapter(["second"])
    assert same(run(name, lora_fx.activate(both, {"second": 1.0}), *SIZE), run(name, theirs.eval(), *SIZE))
    lora_fx.save_adapter(both, tmp_path / "again", "second")
    files_equal(tmp_path / "again", tmp_path / "second")
