"""The lower bounds of ``pyproject.toml`` as constraints for pip: the releases that ``make test-lowest`` installs.

``python tools/lowest_releases.py > constraints-of-that-environment``.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from lora_fx.cli.printing import run_script

# Older releases of torch come from PyPI with CUDA alone. 2.13.0 is the first whose build for a CPU can be installed by its name.
INSTALLABLE = {"torch": "2.13.0"}
EXTRAS = ("onnx", "draw", "demo", "dev")
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[\w,-]+\])?((?P<bound>>=|==)(?P<release>[\w.]+)(,<[\w.]+)?)?")


def constraints(project: Path) -> dict[str, str]:
    """Return the lowest release of each requirement of a ``pyproject.toml``; stubs for mypy and the project itself have none.

    Raises:
        ValueError: a requirement is written otherwise than ``name[extras]>=release``, with ``,<release`` or not, or ``==release``.
    """
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    lowest = {}
    for requirement in [
        *table["dependencies"],
        *(each for extra in EXTRAS for each in table["optional-dependencies"][extra]),
    ]:
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{project}: {requirement!r} is not NAME>=RELEASE[,<RELEASE] or NAME==RELEASE")
        if match["release"]:
            lowest[match["name"]] = INSTALLABLE.get(match["name"], match["release"])
    return lowest


def main() -> None:
    """Print the lowest releases that ``pyproject.toml`` allows, as constraints for pip."""
    for name, release in constraints(Path(__file__).parents[1] / "pyproject.toml").items():
        print(f"{name}=={release}")


if __name__ == "__main__":
    run_script(main)
