"""``lora-fx fold``: adapters merged into a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_fx.cli.console import errors, help_end, reported
from lora_fx.cli.options import (
    ExampleInputsFile,
    IgnoredConfigKeys,
    ModelClass,
    Stacks,
    Strengths,
    Strict,
    inputs,
    stacks_of,
    strengths_of,
)
from lora_fx.cli.printing import remark

if TYPE_CHECKING:  # torch and transformers are slow to import, and `--help` needs neither
    from lora_fx.folding.checkpoint_write import CheckpointReport

HELP_END = help_end(
    "lora-fx fold base adapter merged",
    "lora-fx fold base adapter merged --dry-run",
    "lora-fx fold base style facts merged --strength 1 --strength 0.5 --verify",
)

OverwriteDirectory = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace OUT_DIR, all at once, if it holds nothing but an earlier result; never a directory that is read.",
    ),
]


Quantised = Annotated[
    str | None,
    typer.Option(
        "--quantised",
        metavar="SCHEME",
        help="How BASE_DIR was quantised where the adapters were trained: nf4, nf4:double, fp4, int8, int4:64, … They are added to the "
        "values that its weights have then. A checkpoint of bitsandbytes, GPTQ or AWQ needs no option.",
    ),
]
NotQuantised = Annotated[
    list[str] | None,
    typer.Option(
        "--not-quantised",
        metavar="MODULE",
        help="Module that was not quantised, as llm_int8_skip_modules names it, in place of those that transformers skips. May be repeated.",
    ),
]
LoadedIn = Annotated[
    str | None,
    typer.Option(
        "--loaded-in",
        metavar="DTYPE",
        help="The dtype into which the model was loaded before it was quantised, bfloat16 for example: codes of rounded weights are others. "
        "By default as the adapters' files say, or else BASE_DIR's own.",
    ),
]


def fold(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="BASE_DIR ADAPTER_DIR... OUT_DIR",
            help="A transformers checkpoint (config.json and safetensors files), PEFT adapters, and the directory to be made.",
            show_default=False,
        ),
    ],
    strength: Strengths = None,
    overwrite: OverwriteDirectory = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every changed tensor again and compare it with the exact result.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Print what the fold changed in every weight.")] = False,
    example_inputs: ExampleInputsFile = None,
    strict: Strict = True,
    stacks: Stacks = None,
    ignore_config_key: IgnoredConfigKeys = None,
    model_class: ModelClass = None,
    quantised: Quantised = None,
    not_quantised: NotQuantised = None,
    loaded_in: LoadedIn = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes without writing them.")] = False,
) -> None:
    """Merge adapters into a checkpoint on disk, one tensor in memory at a time.

    Adapters that were trained beside quantised weights are added to these as they are when dense, which is what they fit: see --quantised.

    All else in BASE_DIR is copied byte by byte; config, tokenizer, code, index, shards and their order stay. Not copied, and
    named, are other forms of the old weights (pytorch_model.bin, GGUF, onnx/, …) and training states.

    The result is written beside OUT_DIR and moved into place; after an interrupt, run the command again.
    """
    _check_options(directories, reads_again=report or verify, dry_run=dry_run, quantised=(quantised, not_quantised))
    base, *adapters, out = directories
    strengths, layouts = strengths_of(adapters, strength), stacks_of(adapters, stacks)

    from tqdm.auto import tqdm

    from lora_fx.files.target import DirectoryKind, Target
    from lora_fx.folding.checkpoint_plan import plan_checkpoint_fold

    with reported():
        _check_out_is_given(out)
        if not dry_run:
            any_directory = DirectoryKind("a folded checkpoint", lambda _: True)  # what it holds is known later
            Target(out, overwrite, inputs(base, *adapters, example_inputs), any_directory).check()
        with errors.status("opening the checkpoint") as status:
            planned = plan_checkpoint_fold(
                base,
                list(zip(adapters, strengths, strict=True)),
                strict=strict,
                stacks=layouts,
                ignore_config_keys=ignore_config_key or (),
                model_class=model_class,
                example_inputs=example_inputs,
                quantised=quantised,
                not_quantised=not_quantised,
                loaded_in=loaded_in,
                step=status.update,
            )
        if dry_run:
            print(str(planned))
            print(f"nothing was written; without --dry-run the result goes to {out}")
            return
        with tqdm(total=planned.checkpoint.size, desc="folding", unit="B", unit_scale=True) as bar:
            written = planned.write(out, overwrite=overwrite, verify=verify, report=report, progress=bar.update)
    _tell_written(written, out, planned.lines, report=report)


def _check_options(
    directories: Sequence[Path], *, reads_again: bool, dry_run: bool, quantised: tuple[str | None, list[str] | None]
) -> None:
    if len(directories) < 3:
        raise typer.BadParameter("name the base, one adapter or more, and the directory to be made")
    if dry_run and reads_again:
        raise typer.BadParameter(
            "--report and --verify look at what was written, and --dry-run writes nothing: leave out one of them"
        )
    if quantised[1] and quantised[0] is None:
        raise typer.BadParameter("--not-quantised goes with --quantised: name the scheme too")


def _check_out_is_given(out: Path) -> None:
    """Refuse an adapter in the place of the result."""
    if (out / "adapter_config.json").is_file():
        raise typer.BadParameter(
            f"{out} is an adapter directory, and the last directory is the one to be made. Was OUT_DIR forgotten? "
            "lora-fx fold BASE_DIR ADAPTER_DIR... OUT_DIR"
        )


def _tell_written(written: CheckpointReport, out: Path, lines: Sequence[str], *, report: bool) -> None:
    """Print the outcome of a fold on disk: what changed, verification, skipped files, bytes."""
    from lora_fx.folding.checkpoint_files import skipped_lines
    from lora_fx.folding.report import FoldReport

    if report:
        remark(str(FoldReport(written.weights)))
    for line in lines:
        remark(line)
    if written.misrounded is not None:
        remark(
            f"verified: at most {written.misrounded:.1e} of the elements of a weight are not the exact result rounded once"
        )
    for line in skipped_lines(written.skipped):
        remark(line)
    remark(f"{out}: {written.merged_bytes / 1e6:.1f} MB merged, {written.copied_bytes / 1e6:.1f} MB copied")
