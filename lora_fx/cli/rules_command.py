"""``lora-fx rules``: the built-in rules, and the text of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lora_fx.cli.console import help_end, reported
from lora_fx.cli.options import RulesDirectories

if TYPE_CHECKING:
    from lora_fx.rules.rule_file import Selection

HELP_END = help_end("lora-fx rules", "lora-fx rules llama", "lora-fx rules llama > mine.toml")


def rules(
    name: Annotated[str | None, typer.Argument(help="Name of rules, or one of their model types.")] = None,
    rules_dir: RulesDirectories = None,
) -> None:
    """List the built-in rules with the model types that they are for, or print the file of one, to start from."""
    from lora_fx.rules.lookup import available, file_of
    from lora_fx.text_table import new_table, text_lines

    with reported():
        if name is not None:
            print(file_of(name, rules_dir or ()).read_text(encoding="utf-8"), end="")
            return
        table = new_table()
        for heading in ("rules", "model types", "targets"):
            table.add_column(heading, no_wrap=True, overflow="ignore")
        for ruleset in available(rules_dir or ()):
            targets = dict.fromkeys(
                name for selection in ruleset.select for name in selection.target or (_kind(selection),)
            )
            table.add_row(ruleset.name, ", ".join(ruleset.model_types), ", ".join(targets))
        print("\n".join(text_lines(table)))
        print(
            'beside them: "auto" (by the model type; else queries and values by their role), "all-linear" and "all-conv"'
        )


def _kind(selection: Selection) -> str:
    if selection.regex is not None:
        return f"regex {selection.regex}"
    return "by role" if selection.role else "by operator" if selection.op else "by layer or width"
