"""The command line: ``lora-fx``."""

import typer

from lora_fx.cli import demo_command, draw_command, export_commands, fold_command, plan_command
from lora_fx.cli.printing import PrintableGroup

app = typer.Typer(
    cls=PrintableGroup,
    help="LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, fold them back into its weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=demo_command.EXAMPLES)(demo_command.demo)
app.command(epilog=plan_command.EXAMPLES)(plan_command.plan)
app.command(epilog=draw_command.EXAMPLES)(draw_command.draw)
app.command(epilog=fold_command.EXAMPLES)(fold_command.fold)
app.command(epilog=export_commands.EXAMPLES)(export_commands.export)
app.command("export-adapter", epilog=export_commands.ADAPTER_EXAMPLES)(export_commands.export_adapter)


@app.callback()
def main() -> None:
    """LoRA as graph surgery."""
