"""``lora-fx inspect``, ``rules`` and ``--version``: answers that need no model."""

from __future__ import annotations

import json
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


class Net(nn.Module):
    """Layers of projections of distinct widths, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(7, 7), "v": nn.Linear(7, 7)}) for _ in range(3))
        self.head = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["v"](layer["q"](x))  # type: ignore[index]
        return self.head(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q", "v"], modules_to_save=["head"], rank_pattern={"q": 2},
        base_model_name_or_path="net",
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(Net(), config).save_pretrained(directory)
    return directory


def test_an_adapter_says_what_it_is(adapter: Path) -> None:
    elements = 3 * (2 * 14 + 4 * 14) + 7 * 4 + 4
    lines = run("inspect", adapter).splitlines()
    assert lines == [
        f"{adapter}:",
        "  kind             LoRA",
        f"  written by       PEFT {peft.__version__}",
        "  class of base    Net",
        "  branches         6",
        "  rank             2, 4",
        "  alpha            8",
        "  scaling          2, 4",
        "  dropout          0.1",
        "  modules          layers.*.q (3), layers.*.v (3)",
        "  trained whole    head.bias, head.weight",
        "  tensors          14",
        f"  elements         {elements}",
        f"  bytes            {4 * elements:,}",
        "  dtype            float32",
        "  checks its base  no, its file has no fingerprint of the base",
    ]
    data = json.loads(run("inspect", adapter, "--json"))
    assert (data["rank"], data["branches"], data["elements"]) == ([2, 4], 6, elements)


def test_an_adapter_of_lora_fx_names_its_rules_and_its_base(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(Net().eval(), ["q"], rank=3, example_inputs=(torch.ones(2, 7),))
    lora_fx.save_adapter(graph, tmp_path / "a")
    told = run("inspect", tmp_path / "a")
    assert "  rules            custom" in told.splitlines()
    assert "  checks its base  yes, its file has a fingerprint of the base" in told.splitlines()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"peft_type": "IA3"}, "IA³"),
        ({"peft_type": "P_TUNING"}, "P-tuning"),
        ({"peft_type": "PREFIX_TUNING"}, "num_virtual_tokens: required, and missing"),
        ({"peft_type": "LORA", "r": "four"}, "r: expected"),
    ],
)
def test_another_method_or_a_broken_config_is_one_message(tmp_path: Path, document: Any, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    assert message in run("inspect", tmp_path, code=3)


def test_texts_of_strangers_stay_on_their_line(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "evil\x1b[31m\n  rank  1"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert "  base             evil\\x1b[31m\\n  rank  1" in run("inspect", tmp_path / "a").splitlines()


def test_rules_are_listed_and_each_is_shown_as_its_file(tmp_path: Path) -> None:
    listed = run("rules")
    row = next(line for line in listed.splitlines() if line.split()[:1] == ["llama"])
    assert "q_proj, v_proj" in row
    assert '"auto"' in listed.splitlines()[-1]
    assert tomllib.loads(run("rules", "llama"))["select"][0]["target"] == ["q_proj", "v_proj"]
    (tmp_path / "mine.toml").write_text('model_types = ["mine_2"]\n[[select]]\ntarget = ["q"]\n')
    assert run("rules", "mine_2", "--rules-dir", tmp_path) == (tmp_path / "mine.toml").read_text()
    assert any(line.split()[:1] == ["mine"] for line in run("rules", "--rules-dir", tmp_path).splitlines())


def test_a_name_that_is_nearly_one_of_rules_is_told() -> None:
    told = run("rules", "lama", code=3)
    assert "there are no rules of this name (did you mean 'llama'" in told
    assert "For any model: auto, all-linear, all-conv, or a path (.toml" in told
    for name in ("auto", "all-linear", "all-conv"):
        assert "these follow from the model, and have no file" in run("rules", name, code=3)


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version") == f"lora-fx {version('lora_fx')}\n"
