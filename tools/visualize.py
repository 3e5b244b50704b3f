"""Draw a model's graph, and what rules change in it; the same as ``lora-fx draw``.

Example:  python tools/visualize.py path/to/model --rules t5 --out graph.html
"""

from __future__ import annotations

from lora_fx.cli.draw_command import HELP_END, draw
from lora_fx.cli.printing import run_script

if __name__ == "__main__":
    run_script(draw, epilog=HELP_END)
