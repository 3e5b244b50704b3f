"""The wheel, installed where there is no source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_an_installed_wheel_carries_its_rules_and_the_readme(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    assert metadata.partition("\n\n")[2].strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
    )
    # The dependencies are those of this environment; its own editable lora_fx is not found through a plain path entry.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    code = """
        from pathlib import Path
        import lora_fx
        from lora_fx.rules.lookup import builtin, directory
        from transformers import T5Config, T5ForConditionalGeneration
        model = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=40, d_kv=12, d_ff=72, num_layers=1, num_heads=4))
        graph_module = lora_fx.rewrite(model, rules="t5")
        print(Path(lora_fx.__file__).parent, directory(), len(builtin()), lora_fx.parameter_summary(graph_module).trainable, sep="\\n")
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    run = subprocess.run(
        [python, "-I", "-c", textwrap.dedent(code)], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    package, rules, count, trainable = run.stdout.splitlines()[-4:]
    assert package == str(site / "lora_fx")
    assert rules == str(site / "lora_fx" / "_rules")
    assert int(count) == len(list((ROOT / "rules").glob("*.toml")))
    assert int(trainable) == 3 * 2 * 8 * (40 + 48)
