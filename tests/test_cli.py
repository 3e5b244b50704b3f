"""``lora-fx plan``: from a config alone, and what a person reads."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from lora_fx.cli import app

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_a_directory_without_weights_is_planned(directory: Path) -> None:
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    lines = run(directory, "--all")[0].splitlines()[2:]
    assert lines[-1] == "6 of 23 sites chosen by rules 'llama', 3840 parameters added"
    column = lines[0].index("decision")
    assert {line[column:].split(":")[0] for line in lines[2:-1]} == {"chosen", "skipped"}
    query = next(line for line in lines if "layers.1.self_attn.q_proj" in line)
    assert query.split() == [
        "model.layers.1.self_attn.q_proj",
        "linear",
        "48",
        "48",
        "self_attention.query",
        "8",
        "768",
        "chosen:",
        "llama:select[0]",
    ]


def test_json_says_the_same_and_more(directory: Path) -> None:
    data = json.loads(run(directory / "config.json", "--json", "--rules", "all-linear", "--rank", 4, "--alpha", 6)[0])
    assert (data["rules"], data["chosen"], len(data["sites"])) == ("all-linear", 21, 23)
    down = next(site for site in data["sites"] if site["site"] == "model.layers.2.mlp.down_proj")
    assert down["roles"] == ["mlp.down"]
    assert (down["in_features"], down["out_features"], down["layout"]) == (80, 48, "out_in")
    assert down["branches"] == [
        {
            "owner": "model.layers.2.mlp.down_proj",
            "part": None,
            "rank": 4,
            "alpha": 6.0,
            "scale": 1.5,
            "dropout": 0.1,
            "scaling": "standard",
            "init": "kaiming",
            "variant": "lora",
            "bias": False,
            "invocation_tokens": [],
        }
    ]
    assert data["parameters"] == sum(site["parameters"] for site in data["sites"] if site["chosen"])


def test_rules_of_ones_own_are_found_by_directory_and_by_variable(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text('[[select]]\ntarget = ["o_proj"]\nlayers = ["1-"]\n')
    expected = "2 of 23 sites chosen by rules 'mine'"
    assert expected in run(directory, "--rules", "mine", "--rules-dir", tmp_path)[0]
    assert expected in run(directory, "--rules", tmp_path / "mine.toml")[0]
    monkeypatch.setenv("LORA_FX_RULES", str(tmp_path))
    assert expected in run(directory, "--rules", "mine")[0]


def test_errors_are_one_message_and_a_status(directory: Path, tmp_path: Path) -> None:
    assert "--rules lama" in run(directory, "--rules", "lama", code=3)[1]
    assert "did you mean 'llama'" in run(directory, "--rules", "lama", code=3)[1]
    assert "Nothing is downloaded" in run("meta-llama/Llama-3", code=3)[1]
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "cannot read this config" in run(tmp_path, code=3)[1].replace("\n", " ")
    (tmp_path / "config.json").write_text("[1, 2]")
    assert "cannot read this config" in run(tmp_path, code=3)[1].replace("\n", " ")
    (tmp_path / "broken.toml").write_text("[[select]]\ntarget = 'q'\nr = 4\n")
    _, said = run(directory, "--rules", tmp_path / "broken.toml", code=3)
    assert "line 2: select[0].target: expected a list, e.g. [\"q\"], found 'q'" in said
    assert "line 3: select[0].r: unknown key (did you mean 'rank'?)" in said
    assert "Traceback" not in said


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "architectures": ["Path"]}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert "cannot read this config" in run(tmp_path, code=3)[1].replace("\n", " ")
    assert not (tmp_path / "ran").exists()


def test_help_waits_for_no_torch() -> None:
    code = """
        import sys
        import lora_fx.cli
        try:
            lora_fx.cli.app(["fold", "--help"])
        finally:
            print(sorted({"torch", "transformers", "onnx"} & set(sys.modules)))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "before",
    [
        "",
        pytest.param(
            "import lora_fx.folding.report, lora_fx.folding.fold, lora_fx.export.onnx_file", marks=pytest.mark.matrix
        ),
    ],
)
def test_each_name_of_the_package_is_what_it_says_whatever_was_imported_before(before: str) -> None:
    code = f"""
        {before}
        import lora_fx
        modules = [name for name in lora_fx.__all__ if type(getattr(lora_fx, name)).__name__ == "module"]
        assert modules == ["export", "generation", "huggingface", "parallel"], modules
        assert set(lora_fx.__all__) <= set(dir(lora_fx))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_help_has_examples() -> None:
    for command in ("plan", "rules", "inspect", "draw", "fold", "export", "export-adapter", "demo"):
        told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).stdout
        examples = [line.strip() for line in told.splitlines() if line.strip().startswith(f"lora-fx {command} ")]
        assert len(examples) >= 2, command  # one a line, so that they can be copied
        assert not any("·" in line or line.count("lora-fx") > 1 for line in examples)
    assert "lora-fx export base slots.onnx --slots --rules t5" in CliRunner().invoke(app, ["export", "--help"]).stdout
