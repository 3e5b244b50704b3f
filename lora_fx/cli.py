"""The command line: ``lora-fx``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lora_fx.errors import LoraFxError

if TYPE_CHECKING:  # torch and transformers are slow to import, and `--help` needs neither
    import lora_fx
    from lora_fx.folding.checkpoint_write import CheckpointReport

app = typer.Typer(
    help="LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, fold them back into its weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


Rules = Annotated[str, typer.Option(help="Name of built-in rules, auto, all-linear, or the path of a .toml file.")]
RulesDirectories = Annotated[
    list[Path] | None,
    typer.Option(help="Directory of further rule files, searched first. May be repeated; see also LORA_FX_RULES."),
]
Rank = Annotated[int | None, typer.Option(help="Replaces the default rank of the rules.")]
Strengths = Annotated[
    list[float] | None,
    typer.Option(help="Factor of an adapter's scaling, once for each, in their order. By default all are 1."),
]
ExampleInputsFile = Annotated[
    Path | None,
    typer.Option(
        "--example-inputs",
        metavar="FILE.safetensors",
        help="Inputs to trace with that the config does not describe: tensors by input name.",
    ),
]
Strict = Annotated[bool, typer.Option(help="Refuse a base other than the one that an adapter names as its own.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


@app.callback()
def main() -> None:
    """LoRA as graph surgery."""


@app.command(epilog="Example:  lora-fx demo --out demo-output")
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results; those of a former run are replaced.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 60,
) -> None:
    """Rewrite a pretrained MiniLM, fine-tune it on Python's own documentation, fold it, and write it out."""
    from lora_fx.demo import demo as run  # transformers and torch are slow to import, and `--help` needs neither

    with _reported():
        run(out, console, steps=steps)


@app.command(
    epilog="Examples:  lora-fx plan path/to/model   ·   lora-fx plan config.json --rules all-linear --rank 16 --json   ·   "
    "lora-fx plan path/to/model --rules mine.toml   ·   lora-fx plan config.json --example-inputs inputs.safetensors"
)
def plan(
    model: Annotated[Path, typer.Argument(help="Model directory or config.json; weights are not needed and not read.")],
    rules: Rules = "auto",
    rules_dir: RulesDirectories = None,
    rank: Rank = None,
    alpha: Annotated[
        float | None, typer.Option(help="Replaces the default alpha of the rules; a branch is scaled by alpha / rank.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Replaces the default dropout of the rules.")] = None,
    example_inputs: ExampleInputsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show every call site of a model: its shape, operator and role, and whether rules give it a branch, and why."""
    from lora_fx.planning.plan import as_data, as_text
    from lora_fx.planning.planner import plan as make_plan
    from lora_fx.rules.lookup import load
    from lora_fx.tracing.example_inputs import read_example_inputs
    from lora_fx.tracing.transformers_models import empty_model

    with _reported():
        with errors.status("reading the config"):
            empty = empty_model(model)
        ruleset = load(rules, getattr(empty.config, "model_type", None), rules_dir or ())
        with errors.status(f"tracing {type(empty).__name__}"):
            inputs = None if example_inputs is None else read_example_inputs(example_inputs, empty)
            made = make_plan(empty, ruleset, example_inputs=inputs, rank=rank, alpha=alpha, dropout=dropout)
    typer.echo(json.dumps(as_data(made), indent=2) if as_json else as_text(made))


class DrawFormat(StrEnum):
    """File formats of ``lora-fx draw``."""

    html = "html"
    svg = "svg"
    png = "png"
    dot = "dot"
    json = "json"
    text = "text"


class Show(StrEnum):
    """Views of ``lora-fx draw``: a graph alone, or two as one."""

    before = "before"
    after = "after"
    diff = "diff"
    fold = "fold"


DRAW_EXAMPLES = (
    "Examples:  lora-fx draw path/to/model --rules t5 --out graph.html   ·   lora-fx draw config.json   ·   "
    "lora-fx draw config.json --rules all-linear --show fold --out graph.svg"
)


@app.command(epilog=DRAW_EXAMPLES)
def draw(
    model: Annotated[Path, typer.Argument(help="Model directory or config.json; weights are not needed and not read.")],
    rules: Rules = "auto",
    rules_dir: RulesDirectories = None,
    rank: Rank = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to be made. Without one, text, json and dot are printed.")
    ] = None,
    format: Annotated[
        DrawFormat | None,
        typer.Option("--format", "-f", help="What to write. By default as the name of OUT ends, else text."),
    ] = None,
    show: Annotated[
        Show,
        typer.Option(
            help="The model before the rules, after them, the difference, or the difference that folding leaves: none."
        ),
    ] = Show.diff,
    module: Annotated[str, typer.Option(help="Path of the module to draw, by default the whole model.")] = "",
    example_inputs: ExampleInputsFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw a model's graph, and the changes that rules make in it.

    html is a page to look around in, which needs no network. text shows which projections of which layers get a branch.
    """
    from lora_fx.drawing.draw import FORMATS, describe_model, format_of, in_words, save, within
    from lora_fx.files.atomic import check_file

    with _reported():
        name = format.value if format is not None else "text" if out is None else format_of(out)
        if out is None and name in ("html", "svg", "png"):
            raise typer.BadParameter(f"--out names the file that the {name} is written to")
        if out is not None:
            check_file(out, overwrite=overwrite)
        with errors.status("reading the model") as status:
            description = describe_model(
                model,
                rules,
                show.value,
                directories=rules_dir or (),
                rank=rank,
                example_inputs=example_inputs,
                step=status.update,
            )
            description = within(description, module)
            if out is not None:
                status.update(f"writing {out}")
                save(description, out, name, overwrite=overwrite)
    if out is None:
        content = FORMATS[name](description)
        assert isinstance(content, str)
        typer.echo(content)
    else:
        typer.echo(f"{out}: {in_words(description)}")


@app.command(
    epilog="Examples:  lora-fx fold base-model adapter merged   ·   lora-fx fold base-model style facts merged --strength 1 "
    "--strength 0.5 --verify --report   ·   lora-fx fold base-model adapter merged --dry-run"
)
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT_DIR if it exists, all at once.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every changed tensor again and compare it with the exact result.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Print what the fold changed in every weight.")] = False,
    example_inputs: ExampleInputsFile = None,
    strict: Strict = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes without writing them.")] = False,
) -> None:
    """Merge adapters into a checkpoint on disk, one tensor in memory at a time.

    All else is copied byte by byte; config, tokenizer, index, shards and their order stay.

    The result is written beside OUT_DIR and moved into place; after an interrupt, run the command again.
    """
    if len(directories) < 3:
        raise typer.BadParameter("name the base, one adapter or more, and the directory to be made")
    base, *adapters, out = directories
    strengths = _strengths(adapters, strength)

    from tqdm.auto import tqdm

    from lora_fx.files.atomic import check_free
    from lora_fx.folding.checkpoint_plan import plan_checkpoint_fold

    with _reported():
        if not dry_run:
            check_free(out, overwrite=overwrite)
        with errors.status("opening the checkpoint") as status:
            pairs = list(zip(adapters, strengths, strict=True))
            planned = plan_checkpoint_fold(
                base, pairs, strict=strict, example_inputs=example_inputs, step=status.update
            )
        if dry_run:
            typer.echo(str(planned))
            typer.echo(f"nothing was written; without --dry-run the result goes to {out}")
            return
        with tqdm(total=planned.checkpoint.size, desc="folding", unit="B", unit_scale=True) as bar:
            written = planned.write(out, overwrite=overwrite, verify=verify, report=report, progress=bar.update)
    if report:
        from lora_fx.folding.report import FoldReport

        typer.echo(str(FoldReport(written.weights)))
    _tell_written(written, out)


def _tell_written(written: CheckpointReport, out: Path) -> None:
    """Print the outcome of a fold on disk: verification, files left out, bytes."""
    if written.misrounded is not None:
        typer.echo(
            f"verified: at most {written.misrounded:.1e} of the elements of a weight are not the exact result rounded once"
        )
    if written.skipped:
        typer.echo(f"not copied: {', '.join(written.skipped)}")
    typer.echo(f"{out}: {written.merged_bytes / 1e6:.1f} MB merged, {written.copied_bytes / 1e6:.1f} MB copied")


class ExportFormat(StrEnum):
    """File formats of ``lora-fx export``."""

    torchscript = "torchscript"
    onnx = "onnx"
    pt2 = "pt2"


class Dtype(StrEnum):
    """Dtypes that weights are loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ExportFormatOption = Annotated[
    ExportFormat | None, typer.Option("--format", "-f", help="What to write; with --slots, onnx.")
]
ExportAdapters = Annotated[
    list[Path] | None, typer.Option(help="Directory of a PEFT adapter, which is folded in. May be repeated.")
]
Branched = Annotated[
    bool, typer.Option("--branched", help="Leave adapters as branches beside their weights; do not fold them.")
]
Slots = Annotated[
    bool,
    typer.Option(
        "--slots",
        help="Write the base as ONNX, with a slot for any adapter at each site that --rules choose or an --adapter has; "
        "see export-adapter.",
    ),
]
SlotRules = Annotated[
    str | None,
    typer.Option(help="With --slots: name of built-in rules, auto, all-linear, or the path of a .toml file."),
]
WeightsDtype = Annotated[
    Dtype, typer.Option(help="Of the weights; auto is that of the files. onnxruntime's CPU kernels want float32.")
]
VerifyFile = Annotated[
    bool, typer.Option(help="Load the written file and compare it with the graph before it is moved to OUT.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Largest difference allowed, as a part of an output's largest value. By default by precision."),
]


@app.command(
    epilog="Examples:  lora-fx export model --format onnx model.onnx   ·   lora-fx export base --adapter style --adapter facts "
    "--strength 1 --strength 0.5 --format torchscript model.pt   ·   lora-fx export base --adapter style --branched --format pt2 model.pt2   ·   "
    "lora-fx export base --slots --rules t5 slots.onnx"
)
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="A transformers model: config.json and safetensors files.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to be made.")],
    format: ExportFormatOption = None,
    adapter: ExportAdapters = None,
    strength: Strengths = None,
    branched: Branched = False,
    slots: Slots = False,
    rules: SlotRules = None,
    rules_dir: RulesDirectories = None,
    dtype: WeightsDtype = Dtype.auto,
    example_inputs: ExampleInputsFile = None,
    overwrite: Overwrite = False,
    verify: VerifyFile = True,
    tolerance: Tolerance = None,
    strict: Strict = True,
) -> None:
    """Write a model for another runtime: TorchScript, ONNX, or torch.export's pt2, with dynamic batch and sequence.

    The written file is run at the sizes of the trace and at others, and the largest difference is printed.
    """
    adapters = adapter or []
    strengths = _strengths(adapters, strength)
    if branched and not adapters:
        raise typer.BadParameter("--branched leaves adapters as branches, and there is none: name one by --adapter")
    if slots and (branched or strength):
        raise typer.BadParameter(_NO_SLOTS)
    if rules is not None and not slots:
        raise typer.BadParameter("--rules choose the sites of --slots, which was not given")
    chosen_format = _export_format(format, out, slots=slots)

    import lora_fx
    from lora_fx.files.atomic import check_file
    from lora_fx.rules.lookup import load

    with _reported():
        check_file(out, overwrite=overwrite)
        with errors.status("loading the model") as status:
            graph, model_type = _loaded_graph(model, dtype, example_inputs, status.update)
            for number, directory in enumerate(adapters):
                status.update(f"adding {directory}")
                graph = lora_fx.load_adapter(graph, directory, f"adapter_{number}", strict=strict)
            if slots and (rules or not adapters):
                graph = lora_fx.rewrite(graph, load(rules or "auto", model_type, rules_dir or ()))
            if adapters and not slots:
                chosen = {f"adapter_{number}": factor for number, factor in enumerate(strengths)}
                status.update("folding")
                graph = lora_fx.activate(graph, chosen) if branched else lora_fx.fold(graph, chosen)
        write = getattr(lora_fx.export, chosen_format.value)
        slotted = {"slots": True} if slots else {}  # an option of onnx alone
        exported = write(graph, out, overwrite=overwrite, verify=verify, tolerance=tolerance, **slotted)
    typer.echo(str(exported))


def _loaded_graph(
    model: Path, dtype: Dtype, example_inputs: Path | None, step: Callable[[str], object]
) -> tuple[lora_fx.TracedGraphModule, str | None]:
    """Return the graph of the model in a directory, and its model type."""
    import torch

    import lora_fx
    from lora_fx.tracing.example_inputs import read_example_inputs
    from lora_fx.tracing.transformers_models import load_model

    loaded = load_model(model, None if dtype is Dtype.auto else getattr(torch, dtype.value))
    step(f"tracing {type(loaded).__name__}")
    inputs = None if example_inputs is None else read_example_inputs(example_inputs, loaded)
    return lora_fx.trace(loaded, inputs, inference=True), getattr(loaded.config, "model_type", None)


@app.command(
    "export-adapter",
    epilog="Examples:  lora-fx export-adapter adapter slots.onnx adapter.onnx_adapter   ·   lora-fx export-adapter style facts slots.onnx "
    "both.onnx_adapter --strength 1 --strength 0.5",
)
def export_adapter(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PEFT_DIR... MODEL.onnx OUT",
            help="PEFT adapters, which become one; a model that export --slots wrote; and the file to be made.",
            show_default=False,
        ),
    ],
    strength: Strengths = None,
    overwrite: Overwrite = False,
    strict: Strict = True,
) -> None:
    """Write an adapter for a model with slots, in onnxruntime's adapter format. Of the model, only the ONNX file is needed."""
    if len(paths) < 3:
        raise typer.BadParameter("name one adapter or more, the ONNX model with slots, and the file to be made")
    *adapters, model, out = paths
    pairs = list(zip(adapters, _strengths(adapters, strength), strict=True))

    import lora_fx

    with _reported():
        exported = lora_fx.export.onnx_adapter_from_peft(pairs, model, out, strict=strict, overwrite=overwrite)
    typer.echo(str(exported))


_NO_SLOTS = "--slots writes ONNX, without any adapter: leave out --format, --branched and --strength"


def _export_format(format: ExportFormat | None, out: Path, *, slots: bool) -> ExportFormat:
    if slots:
        if format not in (None, ExportFormat.onnx):
            raise typer.BadParameter(_NO_SLOTS)
        return ExportFormat.onnx
    if format is None:
        raise typer.BadParameter("name a format by --format: torchscript, onnx or pt2")
    if format is ExportFormat.pt2 and out.suffix != ".pt2":
        raise typer.BadParameter(f"{out}: torch.export loads files whose names end in .pt2")
    return format


def _strengths(adapters: list[Path], given: list[float] | None) -> list[float]:
    strengths = given or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise typer.BadParameter(
            f"{len(adapters)} adapters, and {len(strengths)} strengths: give one for each, or none"
        )
    return strengths


@contextmanager
def _reported() -> Iterator[None]:
    """Report a LoraFxError as one message, without a traceback, and exit with 1."""
    try:
        yield
    except LoraFxError as error:
        errors.print("[bold red]error:[/bold red]", end=" ")
        errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1) from error
