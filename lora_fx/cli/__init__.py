"""The command line: ``lora-fx``."""

from importlib.metadata import version
from typing import Annotated

import typer

from lora_fx.cli import (
    demo_command,
    draw_command,
    export_commands,
    fold_command,
    inspect_command,
    plan_command,
    rules_command,
)
from lora_fx.cli.console import CODES_HELP
from lora_fx.cli.printing import PrintableGroup

app = typer.Typer(
    cls=PrintableGroup,
    help="LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, fold them back into its weights.",
    epilog=CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=demo_command.HELP_END)(demo_command.demo)
app.command(epilog=plan_command.HELP_END)(plan_command.plan)
app.command(epilog=rules_command.HELP_END)(rules_command.rules)
app.command(epilog=inspect_command.HELP_END)(inspect_command.inspect)
app.command(epilog=draw_command.HELP_END)(draw_command.draw)
app.command(epilog=fold_command.HELP_END)(fold_command.fold)
app.command(epilog=export_commands.HELP_END)(export_commands.export)
app.command("export-adapter", epilog=export_commands.ADAPTER_HELP_END)(export_commands.export_adapter)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lora-fx {version('lora_fx')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA as graph surgery."""
