"""A coverage-guided fuzzer over the readers of files that strangers give, by atheris.

make fuzz                                            # every reader for a minute, in an environment of its own
.venv-fuzz/bin/python tests/fuzz config --seconds 600
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("rules", "config", "tensors", "pickle", "index", "header", "inputs")
"""Of the readers, which are imported under the eyes of the fuzzer alone."""

sys.path.append(str(Path(__file__).parent.parent))


def fuzz(reader: str, seconds: int) -> None:
    """Fuzz one reader in this process, which ends with 77 or 70 where something was found, after the input in hexadecimal digits."""
    import atheris

    with atheris.instrument_imports(include=["lora_fx"]):
        from fuzz.readers import check
        from fuzz.seeds import valid

    with tempfile.TemporaryDirectory() as scratch:
        corpus, directory = Path(scratch, "corpus"), Path(scratch, "directory")
        corpus.mkdir()
        directory.mkdir()
        for number, data in enumerate(valid()[reader]):
            (corpus / str(number)).write_bytes(data)
        limits = [
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=4096",
            "-max_len=4096",
            "-print_final_stats=1",
        ]
        atheris.Setup(
            [sys.argv[0], *limits, f"-artifact_prefix={scratch}/", str(corpus)],
            lambda data: check(reader, data, directory) and None,
        )
        atheris.Fuzz()


def main() -> None:
    arguments = sys.argv[1:]
    seconds = int(arguments.pop(arguments.index("--seconds") + 1)) if "--seconds" in arguments else 60
    named = [each for each in arguments if each != "--seconds"]
    if len(named) == 1:
        fuzz(named[0], seconds)
    failed = [
        reader
        for reader in named or NAMES
        if subprocess.run([sys.executable, __file__, reader, "--seconds", str(seconds)], check=False).returncode
    ]
    sys.exit(f"found something: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
