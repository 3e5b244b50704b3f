"""``lora-fx inspect``: what an adapter directory is, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.console import help_end, reported
from lora_fx.cli.options import IgnoredConfigKeys

HELP_END = help_end("lora-fx inspect path/to/adapter", "lora-fx inspect path/to/adapter --json")


def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER_DIR",
            help="Directory of a PEFT adapter, or a file of diffusers or kohya; its tensors are not read.",
        ),
    ],
    ignore_config_key: IgnoredConfigKeys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Say what an adapter is: kind, base, task, ranks, scaling, modules, size. No model is needed."""
    from lora_fx.adapters.peft_format.contents import overview_of
    from lora_fx.adapters.peft_format.opening import read_adapter

    with reported():
        found = overview_of(read_adapter(adapter, ignore_config_keys=ignore_config_key or ()))
    print(json.dumps({"directory": found.source, **found.data}, indent=2) if as_json else str(found))
