"""Draw a model's graph, and what rules change in it; the same as ``lora-fx draw``.

Example:  python tools/visualize.py path/to/model --rules t5 --out graph.html
"""

from __future__ import annotations

import typer

from lora_fx.cli.draw_command import EXAMPLES, draw

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(epilog=EXAMPLES)(draw)

if __name__ == "__main__":
    app()
