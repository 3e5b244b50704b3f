"""Draw what rules change in a model: the first changed layer, before and after.

Example:  python tools/visualize.py path/to/model --rules t5 --out graph.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoConfig, AutoModel, PreTrainedModel

import lora_fx


def model_from_config(path: Path) -> PreTrainedModel:
    """Return the model of a transformers directory or config file, without weights."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    architectures: Any = config.architectures or []
    with torch.device("meta"):
        if architectures:
            import transformers

            return getattr(transformers, architectures[0])(config)
        return AutoModel.from_config(config)


def main(
    model: Annotated[Path, typer.Argument(help="A transformers directory, or its config.json; weights are not read.")],
    rules: Annotated[str, typer.Option(help="Built-in rules, 'auto', or a path to a .toml file.")] = "auto",
    out: Annotated[Path, typer.Option(help="The picture: .svg, .png or .dot.")] = Path("graph.svg"),
    overwrite: Annotated[bool, typer.Option(help="Replace an existing picture.")] = False,
) -> None:
    """Draw what rules change in a model: the first changed layer, before and after."""
    console = Console()
    try:
        with console.status("tracing"):
            base = lora_fx.trace(model_from_config(model), inference=True)
            branched = lora_fx.rewrite(base, rules=rules)
        lora_fx.draw(base, branched, out, overwrite=overwrite)
    except lora_fx.LoraFxError as error:
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(str(out), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
