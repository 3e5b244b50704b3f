"""Write the JSON Schema of rule files, by which editors complete and check them.

Example:  python tools/make_schema.py --write
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from lora_fx.cli.printing import run_script
from lora_fx.rules.prefix_table import PREFIXES
from lora_fx.rules.rule_file import PREDICATES, RuleFile

SCHEMA = Path(__file__).parent.parent / "rules" / "schema.json"


class _OfToml(GenerateJsonSchema):
    """TOML has no null: a key that may be null is one that may be left out."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        made = super().default_schema(schema)
        return {key: value for key, value in made.items() if (key, value) != ("default", None)}

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def schema() -> str:
    """Return the schema as the text of a file."""
    made = RuleFile.model_json_schema(schema_generator=_OfToml)
    made["$defs"]["Selection"]["anyOf"] = [{"required": [key]} for key in PREDICATES]
    for table in PREFIXES:
        made["properties"][table]["maxItems"] = 1
    made["anyOf"] = [{"required": [key], "properties": {key: {"minItems": 1}}} for key in ("select", *PREFIXES)]
    head = {"$schema": GenerateJsonSchema.schema_dialect, "title": "lora_fx rules"}
    return json.dumps(head | made | {"title": head["title"]}, indent=2, ensure_ascii=False) + "\n"


def main(
    write: Annotated[bool, typer.Option("--write", help=f"Write {SCHEMA.name} beside the built-in rules.")] = False,
) -> None:
    """Print the JSON Schema of rule files, or write it where editors find it."""
    if write:
        SCHEMA.write_text(schema(), encoding="utf-8")
    else:
        print(schema(), end="")


if __name__ == "__main__":
    run_script(main)
