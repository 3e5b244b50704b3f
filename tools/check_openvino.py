"""OpenVINO on exported files: largest differences to the graph at other sizes than the trace's, for each format that it reads.

    .venv-peers/bin/python tools/check_openvino.py            # the environment of `make test-peers`; prints a table
    .venv-peers/bin/python tools/check_openvino.py bert t5

Models of the tests, folded. Differences are parts of the largest value of an output.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import lora_fx
from lora_fx.cli.printing import run_script

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

Inputs = Mapping[str, torch.Tensor]


def readers() -> dict[str, Callable[[Path, Inputs], Any]]:
    """Return, for each format, what makes a model of OpenVINO of a written file and of inputs as the graph takes them."""
    import openvino

    kinds = {torch.int64: openvino.Type.i64, torch.float32: openvino.Type.f32}

    def of_script(path: Path, inputs: Inputs) -> Any:
        # TorchScript states neither the ranks nor the dtypes of its inputs.
        known = [(openvino.PartialShape([-1] * each.dim()), kinds[each.dtype]) for each in inputs.values()]
        return openvino.convert_model(path, input=known)

    return {
        "onnx": lambda path, _: openvino.convert_model(path),
        "pt2": lambda path, _: openvino.convert_model(torch.export.load(path)),
        "torchscript": of_script,
    }


def difference(model: Any, graph: lora_fx.TracedGraphModule, inputs: Inputs) -> float:
    """Return the largest difference of the first output, as a part of its largest value."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled([tensor.numpy() for tensor in inputs.values()])[0])
    with torch.no_grad():
        expected = next(iter(graph(**inputs).values()))
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models of the tests; bert and llama by default.")] = None,
) -> None:
    """Print the largest differences of OpenVINO to folded graphs, by model and format."""
    import architectures
    from conftest import set_factors

    formats = readers()
    print(f"| model | {' | '.join(formats)} |\n{'|---' * (1 + len(formats))}|", flush=True)
    for name in names or ("bert", "llama"):
        traced = lora_fx.trace(architectures.model(name), inference=True)
        branched = lora_fx.rewrite(traced, rules=architectures.ARCHITECTURES[name].rules, rank=4, alpha=6)
        set_factors(branched, scale=0.1)
        folded, cells = lora_fx.fold(branched), []
        given = architectures.inputs(name, 3, 11)
        with tempfile.TemporaryDirectory() as directory:
            for format, read in formats.items():
                path = Path(directory) / f"{format}.pt2"
                written = getattr(lora_fx.export, format)(folded, path, verify=False)
                inputs = {key: given[key] for key in written.inputs}
                cells.append(f"{difference(read(path, inputs), folded, inputs):.0e}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
