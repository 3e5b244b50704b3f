"""What a person or a script reads of the commands: exit codes, messages in the words of the command line, and plans on a page."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from architectures import build
from conftest import set_factors
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.cli.console import CODES, CODES_HELP

T5 = {"vocab_size": 97, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "decoder_start_token_id": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Llama, an adapter of a T5, and the config of a T5 of twelve layers."""
    made = tmp_path_factory.mktemp("messages")
    build("llama", layers=1).save_pretrained(made / "llama")
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, num_layers=1)).eval()
    graph = lora_fx.rewrite(t5, "t5", rank=2, inference=True)
    set_factors(graph)
    lora_fx.save_adapter(graph, made / "adapter")
    transformers.T5Config(**T5, num_layers=12, architectures=["T5ForConditionalGeneration"]).save_pretrained(
        made / "t5"
    )
    return made


def lora(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["plan", "llama", "--rnk", "4"], "No such option"),
        (2, ["fold", "llama", "adapter"], "name the base, one adapter or more"),
        (2, ["fold", "llama", "adapter", "adapter"], "Was OUT_DIR forgotten?"),
        (2, ["draw", "llama", "--out", "x.foo"], "x.foo: a picture is a file, and one of .dot"),
        (
            2,
            ["export", "llama", "x.pt", "--slots"],
            "x.pt: --slots writes ONNX, and the name says torchscript: call it .onnx",
        ),
        (3, ["plan", "nowhere"], "expected a model directory"),
        (3, ["plan", "llama", "--rules", "lama"], "there are no rules of this name"),
        (
            3,
            ["plan", "llama", "--rules", "q_proj,v_proj"],
            'of this name; names of modules stand in a .toml file: [[select]] target = ["q_proj", "v_proj"]. For any',
        ),
        (
            3,
            ["plan", "llama", "--rules", "adapter"],
            "--rules adapter: there are no rules of this name, and the directory is no .toml",
        ),
        (3, ["plan", "llama", "--rules", "x" * 5000], "there are no rules of this name"),
        (3, ["export", "cut", "out.pt"], "cut/model.safetensors is cut off, or no safetensors file"),
        (3, ["rules", "mine.toml"], "expected a name of rules, got the path of some"),
        (
            3,
            ["inspect", "adapter/adapter_config.json"],
            "adapter_config.json: expected a directory with adapter_config.json, or a safetensors file",
        ),
        (3, ["inspect", "cut.safetensors"], "error: cut.safetensors: is cut off, or no safetensors file"),
        (3, ["export-adapter", "adapter", "taken.svg", "out"], "taken.svg"),
        (3, ["inspect", "llama"], "expected a PEFT adapter"),
        (3, ["fold", "llama", "adapter", "out"], "the adapter was trained on T5"),
        (3, ["draw", "llama", "--module", "model.layers.7"], "no module 'model.layers.7'"),
        (4, ["export", "bert", "out", "-f", "onnx", "--with-cache"], "returns no logits to generate from"),
        (5, ["export", "llama", "llama", "-f", "onnx"], "is read to make the result"),
        (5, ["draw", "llama", "--out", "taken.svg"], "taken.svg exists already"),
    ],
)
def test_exit_codes_tell_a_script_what_to_look_at(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(root)
    (root / "taken.svg").touch()
    (root / "cut.safetensors").touch()
    if "cut" in arguments:
        shutil.copytree(root / "llama", root / "cut")
        (root / "cut" / "model.safetensors").write_bytes(b"cut")
    if "bert" in arguments:
        build("bert", layers=1).save_pretrained(root / "bert")
    assert said in " ".join(lora(*arguments, code=code).replace("│", " ").split())


def test_exit_codes_are_in_every_help_and_in_the_guide() -> None:
    guide = Path(lora_fx.__file__).with_name("README.md").read_text()
    for command in ([], ["plan"], ["fold"], ["export"], ["export-adapter"], ["draw"], ["rules"], ["inspect"], ["demo"]):
        told = CliRunner().invoke(app, [*command, "--help"]).stdout
        assert " ".join(CODES_HELP.split()) in " ".join(told.split())
    for code in ("2", "3", "4", "5"):
        assert f"| {code} |" in guide
    kinds = {
        kind
        for kind in vars(lora_fx.errors).values()
        if isinstance(kind, type) and issubclass(kind, lora_fx.LoraFxError)
    }
    assert {kind for kind in kinds if not kind.__name__.startswith("_")} == CODES.keys()


def test_the_adapter_of_another_model_is_told_in_a_line_with_both_classes(root: Path, tmp_path: Path) -> None:
    told = (
        f"error: {root / 'adapter'}: the adapter was trained on T5ForConditionalGeneration, and this base lacks 26 of the 26 tensors of that, "
        "such as "
    )
    assert lora("fold", root / "llama", root / "adapter", tmp_path / "out", code=3).splitlines()[-1].startswith(told)
    other = shutil.copytree(root / "adapter", tmp_path / "adapter")
    config = json.loads((other / "adapter_config.json").read_text())
    config |= {"auto_mapping": None, "task_type": "SEQ_2_SEQ_LM"}  # as PEFT writes it, which then says no class
    (other / "adapter_config.json").write_text(json.dumps(config))
    said = lora("fold", root / "llama", other, tmp_path / "out", code=3).splitlines()[-1]
    assert "the adapter was trained on another model, of the task SEQ_2_SEQ_LM, and this base lacks 26 of" in said


def test_a_name_that_is_nearly_one_of_rules_is_told_first_and_then_what_goes_for_any_model(root: Path) -> None:
    told = lora("plan", root / "llama", "--rules", "lama", code=3)
    assert told.startswith(
        "error: --rules lama: there are no rules of this name (did you mean 'llama' or 'llama4'?). For any model: auto, all-linear, all-conv, "
        "or a path (.toml, or .json of PEFT); built in: "
    )


def test_slots_and_a_cache_of_an_encoder_decoder_are_told_apart_before_anything_is_read(
    root: Path, tmp_path: Path
) -> None:
    given = ("--slots", "--with-cache", "--rules", "t5", "--format", "onnx")
    told = " ".join(lora("export", root / "t5", tmp_path / "out", *given, code=2).replace("│", " ").split())
    assert (
        "--slots and --with-cache: clients of encoder-decoder models load no adapters. Leave out --slots and fold adapters"
        in told
    )


def test_one_adapter_that_is_given_twice_without_strengths_is_refused_and_not_added_twice(
    root: Path, tmp_path: Path
) -> None:
    adapter, link = root / "adapter", tmp_path / "link"
    link.symlink_to(adapter)
    for other, told in ((adapter, "twice"), (link, f"as {adapter} too")):
        expected = (
            f"{other} is given {told}, and would be added twice: give it once, with --strength 2 if that is meant, "
            "or with a strength each time"
        )
        for command in (
            ("fold", root / "t5", adapter, other, tmp_path / "out"),
            ("export", root / "t5", tmp_path / "out.pt2", "--adapter", adapter, "--adapter", other),
            ("export-adapter", adapter, other, tmp_path / "slots.onnx", tmp_path / "out.onnx_adapter"),
        ):
            printed = lora(*command, code=2).replace("│", "")
            assert "".join(expected.split()) in "".join(printed.split())  # long paths are broken anywhere
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_plan_fits_a_page_and_names_every_site_with_all(root: Path) -> None:
    lines = lora("plan", root / "t5").splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 37
    assert lines[0] == "T5ForConditionalGeneration, named by architectures in the config"
    assert lines[2] == "chosen: t5:select[0], rank 8, scaling 4:"
    assert lines[3].split() == ["encoder.block.0-11.layer.0.SelfAttention.q", "16", "->", "8", "self_attention.query"]
    assert "skipped: no selection names it:" in lines
    squeezed = [" ".join(line.split()) for line in lines]
    assert "decoder.block.0-11.layer.1.EncDecAttention.k 16 -> 8 cross_attention.key" in squeezed
    assert lines[-1] == "72 of 197 sites chosen by rules 't5', 13824 parameters added"
    every = lora("plan", root / "t5", "--all").splitlines()
    assert len(every) == 2 + 2 + 197 + 1
    assert every[-1] == lines[-1]


def test_the_head_of_a_plan_says_which_class_was_built_and_why(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 31,
    }
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    told = " ".join(lora("plan", tmp_path).split())
    assert told.startswith(
        "BertModel, what transformers.AutoModel builds for model type 'bert': the config names no architectures"
    )
    transformers.BertConfig(**sizes, architectures=["MyBert"]).save_pretrained(tmp_path)
    told = " ".join(lora("plan", tmp_path).split())
    assert "for model type 'bert': of architectures ['MyBert'] transformers has none chosen:" in told


def test_reasons_name_the_selection_that_comes_nearest_and_its_predicate_that_refuses(tmp_path: Path) -> None:
    build("llama", layers=2).config.save_pretrained(tmp_path)
    rules = tmp_path / "mine.toml"

    def reasons(text: str) -> list[str]:
        rules.write_text(text)
        return [
            line for line in lora("plan", tmp_path, "--rules", rules).splitlines() if line.startswith("skipped: select")
        ]

    assert reasons('[[select]]\ntarget = ["q_proj"]\nlayers = [1]\n') == [
        "skipped: select[0] names it; its layer is not in [1]:"
    ]
    assert reasons('[[select]]\ntarget = ["q_proj", "up_proj"]\nexclude = ["up_proj"]\n') == [
        "skipped: select[0] names it; exclude has 'up_proj':"
    ]
    said = str(lora_fx.plan(build("llama", layers=2), {"select": [{"target": ["q_proj"], "layers": [1]}]}))
    row = next(line for line in said.splitlines() if "layers.0.self_attn.q_proj" in line)
    assert row.endswith("skipped: select[0] names it; its layer 0 is not in [1]")
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [1]}
    row = next(
        line
        for line in str(lora_fx.plan(build("llama", layers=2), config)).splitlines()
        if "layers.0.self_attn.q_proj" in line
    )
    assert row.endswith("skipped: target_modules names it; its layer 0 is not in layers_to_transform, [1]")


ARGUMENT = re.compile(
    r"\b(overwrite|strict|verify|tolerance|example_inputs|stacks|opset|ignore_config_keys|model_class|slots|rank|rules|directories)="
)
PYTHON_ALONE = {  # no command reaches these: training, graphs in hand, and directories that huggingface writes
    "trainer.py", "methods.py", "huggingface.py", "rewriting.py", "demo.py", "training/parameters.py", "folding/transformers_directory.py",
    "graph/omitted.py", "graph/graph_module.py", "cli/draw_command.py", "export/generation_directory.py", "planning/cautions.py",
    "adapters/combine.py", "rules/peft_config/argument_names.py",
}  # fmt: skip


def test_messages_that_commands_can_print_name_options_by_their_flags() -> None:
    package = Path(lora_fx.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        if str(path.relative_to(package)) in PYTHON_ALONE:
            continue
        tree = ast.parse(path.read_text())
        told = {id(inner) for call in ast.walk(tree) if _is_option(call) for inner in ast.walk(call)}
        raised = [each for each in ast.walk(tree) if isinstance(each, ast.Raise) or _adds_problem(each)]
        for node in {id(inner): inner for each in raised for inner in ast.walk(each)}.values():
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                found += [f"{path.name}:{node.lineno}: {node.value}"] if ARGUMENT.search(node.value) else []
    assert found == []


def _is_option(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "option"


def _adds_problem(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append"


def test_the_words_of_python_stay_in_python(root: Path) -> None:
    with pytest.raises(
        lora_fx.LoraFxError, match=r"exists already. Choose another name, or replace it: overwrite=True\.$"
    ):
        lora_fx.save_adapter(
            lora_fx.rewrite(torch.nn.Linear(3, 4), ["*"], example_inputs=(torch.ones(2, 3),)), root / "adapter"
        )
