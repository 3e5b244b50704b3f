from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import check_architectures
import check_exports
import guides
import pytest
from architectures import ARCHITECTURES
from typer.testing import CliRunner

from lora_fx.cli import app

ROOT = Path(__file__).parent.parent
NAMES = [str(path.parent.relative_to(ROOT)) for path in guides.GUIDES]  # the folders that a guide stands in
MAX_README_BYTES = 15_000


def text_of(folder: str) -> str:
    return (ROOT / folder / "README.md").read_text(encoding="utf-8")


def blocks(language: str, folder: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(folder), flags=re.DOTALL | re.MULTILINE)


def test_the_readme_is_short_and_has_a_link_to_every_guide() -> None:
    assert len(text_of(".").encode()) <= MAX_README_BYTES
    assert set(NAMES) == {
        ".",
        "rules",
        "lora_fx",
        "lora_fx/adapters",
        "lora_fx/drawing",
        "lora_fx/export",
        "lora_fx/folding",
        "lora_fx/tracing",
        "lora_fx/training",
        "tests",
        "tools/bench",
    }
    for folder in NAMES[1:]:
        assert f"]({folder}/README.md)" in text_of("."), folder


@pytest.mark.parametrize("folder", NAMES)
def test_every_link_leads_somewhere(folder: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text_of(folder)):
        path = (ROOT / folder / target).resolve() if target else ROOT / folder / "README.md"
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", [name for name in NAMES if blocks("python", name)])
def test_the_code_runs_and_prints_what_it_says(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of one guide run one after another; comments right after a ``print`` are what it prints."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("toml", folder):
        if name := re.match(r"# (\w+\.toml): ", block):  # a file that the code reads
            Path(name[1]).write_text(block, encoding="utf-8")
    names: dict[str, Any] = {}
    for block in blocks("python", folder):
        capsys.readouterr()
        exec(compile(block, f"{folder}/README.md", "exec"), names)
        printed = capsys.readouterr().out
        for comment in re.findall(r"^(?:print\(.*|\))\n((?:# .*\n)+)", block, flags=re.MULTILINE):
            for line in comment.splitlines():
                assert line.removeprefix("# ") in printed


def test_the_rule_file_shown_is_the_one_there_is() -> None:
    assert blocks("toml", "rules")[0] == (ROOT / "rules" / "t5.toml").read_text(encoding="utf-8")


def table(tool: str = "check_architectures") -> dict[str, list[str]]:
    rows = re.search(
        rf"<!-- made by tools/{tool}\.py -->\n(.*?)\n(?:\n|<!-- end -->)", text_of("tests"), flags=re.DOTALL
    )
    assert rows is not None
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def test_the_table_has_every_architecture_and_no_promise_is_missed() -> None:
    assert list(table()) == list(ARCHITECTURES)
    for _, sites, logits, gradients, training, fold, graph in table().values():
        assert int(sites) > 0
        assert logits == training == "bit-equal"
        assert gradients == "bit-equal" or float(gradients) < 1e-5
        assert float(fold) < 2e-5
        assert graph == "the trace"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("gpt2", "bloom")]
)
def test_the_table_is_what_its_command_prints(name: str) -> None:
    found = [cell.strip() for cell in check_architectures.check(name).strip("|").split("|")]
    rounded = {3, 5}  # the gradients of BLOOM and the fold, which differ from machine to machine in their last bit
    assert [cell for i, cell in enumerate(found[1:]) if i not in rounded] == [
        cell for i, cell in enumerate(table()[name]) if i not in rounded
    ]


def test_every_format_takes_every_architecture_of_the_mapping() -> None:
    rows = table("check_exports")
    assert list(rows) == [*ARCHITECTURES, "qwen3", "gemma3_text", "mixtral", "phi3", "whisper", "vit"]
    for name, cells in rows.items():
        torchscript, onnx, pt2, half = cells[:2], cells[2:4], cells[4:6], cells[6]
        assert set(pt2) == {"bit-equal"}, name
        assert all(cell == "bit-equal" or float(cell) < 1e-6 for cell in torchscript), name
        assert all(float(cell) < 4e-6 for cell in onnx), name
        assert not half or float(half) < 2e-2, name


@pytest.mark.xdist_group("bert")
def test_the_table_of_exports_is_what_its_command_prints() -> None:
    _, found, refused = check_exports.check("bert", ("TorchScript", "ONNX"))
    expected = dict(zip(check_exports.COLUMNS, table("check_exports")["bert"], strict=True))
    assert not refused
    assert expected.keys() - found.keys() == {"pt2, branched", "pt2, folded"}
    for column, cell in found.items():
        if expected[column] == "bit-equal" or column == check_exports.INT8:
            assert cell == expected[column]
        else:
            assert float(cell) < 10 * float(expected[column])


def test_rows_of_the_table_of_exports_that_are_not_made_again_stay_as_they_are() -> None:
    promised, _ = check_exports.names()
    assert check_exports.tables(check_exports.present(), promised) == guides.made("tools/check_exports.py")


@pytest.mark.parametrize("folder", NAMES)
def test_every_file_it_names_is_there(folder: str) -> None:
    for name in re.findall(r"`(\w+\.py)`", text_of(folder)):
        assert list((ROOT / "lora_fx").rglob(name)), name
    for command in re.findall(r"(?:pytest|python) ((?:tests|tools)/[\w/]+\.py)", text_of(folder)):
        assert (ROOT / command).is_file(), command


PICTURES = ROOT / "tools" / "pictures"


def commands() -> list[list[str]]:
    """Return the arguments of the commands that make the pictures, as the guide names them."""
    return [
        line.split()[1:]
        for line in "\n".join(blocks("sh", "lora_fx/drawing")).splitlines()
        if line.startswith("lora-fx draw")
    ]


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("command", commands(), ids=lambda command: command[-1])
def test_the_pictures_are_what_their_commands_make(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    *arguments, name = command
    made = tmp_path / name
    assert CliRunner().invoke(app, [*arguments, str(made)]).exit_code == 0
    there, here = (ElementTree.parse(path).getroot() for path in (PICTURES / name, made))
    assert [text.strip() for text in there.itertext() if text.strip()] == [
        t.strip() for t in here.itertext() if t.strip()
    ]
    assert f"(../../{PICTURES.relative_to(ROOT)}/{name})" in text_of("lora_fx/drawing")


@pytest.mark.usefixtures("traced_once")
def test_the_matrix_is_what_its_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = re.search(
        r"<!-- made by tools/visualize\.py -->\n```\n(.*?)```\n<!-- end -->",
        text_of("lora_fx/drawing"),
        flags=re.DOTALL,
    )
    assert shown is not None
    printed = CliRunner().invoke(app, ["draw", "tools/pictures/t5.json"]).stdout
    assert shown[1] in printed
    assert shown[1].startswith("encoder.block\n")
