"""``lora-fx export`` and ``lora-fx export-adapter``: files for other runtimes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_fx.cli.console import errors, help_end, reported
from lora_fx.cli.options import (
    ExampleInputsFile,
    IgnoredConfigKeys,
    ModelClass,
    Overwrite,
    RulesDirectories,
    Stacks,
    Strengths,
    Strict,
    inputs,
    stacks_of,
    strengths_of,
)
from lora_fx.cli.printing import remark
from lora_fx.errors import ExportError, LoraFxError
from lora_fx.files.bounded import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:  # torch and transformers are slow to import, and `--help` needs neither
    from lora_fx.adapters.peft_format.opening import AdapterFiles
    from lora_fx.graph.graph_module import TracedGraphModule
    from lora_fx.tracing.transformers_models import ModelChoice

HELP_END = help_end(
    "lora-fx export path/to/model model.onnx",
    "lora-fx export base merged.pt --adapter style --adapter facts",
    "lora-fx export base half.onnx --adapter style --strength 0.5",
    "lora-fx export base branched.pt2 --adapter style --branched",
    "lora-fx export base slots.onnx --slots --rules t5",
    "lora-fx export base directory --adapter style --format onnx --with-cache",
    "lora-fx export base model.pte --adapter style --max-size batch=1 --max-size sequence=128",
)
ADAPTER_HELP_END = help_end(
    "lora-fx export-adapter adapter slots.onnx adapter.onnx_adapter",
    "lora-fx export-adapter style facts slots.onnx both.onnx_adapter",
)


class ExportFormat(StrEnum):
    """File formats of ``lora-fx export``."""

    torchscript = "torchscript"
    onnx = "onnx"
    pt2 = "pt2"
    aoti = "aoti"
    executorch = "executorch"


class Dtype(StrEnum):
    """Dtypes that weights are loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelDirectory = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A transformers model: config.json and safetensors files.")
]
ExportFormatOption = Annotated[
    ExportFormat | None,
    typer.Option(
        "--format",
        "-f",
        help="What to write. By default as OUT ends: .onnx, .pt (TorchScript), .pt2, .pte (ExecuTorch); with --slots, onnx. aoti, "
        "whose names end in .pt2 too, is never the default: machine code that torch compiles for this processor.",
    ),
]
ExportAdapters = Annotated[
    list[Path] | None,
    typer.Option(
        help="Directory of a PEFT adapter, or a file of diffusers' or kohya's form, which is folded in. May be repeated."
    ),
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
    typer.Option(
        help="With --slots: name of built-in rules, auto, all-linear, all-conv, or the path of a .toml file or of a PEFT configuration (.json)."
    ),
]
WithCache = Annotated[
    bool,
    typer.Option(
        "--with-cache",
        help="Let the model take and return its key-value cache, for generation. As ONNX, OUT is then a directory, with the configs and "
        "the tokenizer beside the model, as onnxruntime-genai and optimum load it.",
    ),
]
WeightsDtype = Annotated[
    Dtype, typer.Option(help="Of the weights; auto is that of the files. onnxruntime's CPU kernels want float32.")
]
VerifyFile = Annotated[
    bool, typer.Option(help="Load the written file and compare it with the graph before it is moved to OUT.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0, help="Largest difference allowed, as a part of an output's largest value. By default by precision."
    ),
]

Opset = Annotated[
    int | None,
    typer.Option(
        min=17, help="With ONNX: version of its operators. By default the newest that runtimes of the last year take."
    ),
]

MaxSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--max-size",
        metavar="AXIS=SIZE",
        help="With ExecuTorch: largest size of an axis, such as batch=8. May be repeated: each axis without a bound needs one.",
    ),
]


def export(
    model: ModelDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to be made; with --with-cache, a directory.")],
    format: ExportFormatOption = None,
    adapter: ExportAdapters = None,
    strength: Strengths = None,
    branched: Branched = False,
    slots: Slots = False,
    with_cache: WithCache = False,
    rules: SlotRules = None,
    rules_dir: RulesDirectories = None,
    dtype: WeightsDtype = Dtype.auto,
    example_inputs: ExampleInputsFile = None,
    overwrite: Overwrite = False,
    verify: VerifyFile = True,
    tolerance: Tolerance = None,
    strict: Strict = True,
    stacks: Stacks = None,
    ignore_config_key: IgnoredConfigKeys = None,
    model_class: ModelClass = None,
    opset: Opset = None,
    max_size: MaxSizes = None,
) -> None:
    """Write a model for another runtime: TorchScript, ONNX, torch.export's pt2, AOTInductor, or ExecuTorch, with dynamic batch and sequence.

    The written file is run at the sizes of the trace and at others, and the largest difference is printed.
    """
    adapters = adapter or []
    strengths, layouts = strengths_of(adapters, strength), stacks_of(adapters, stacks)
    _check_options(model, adapters, strength, rules, example_inputs, branched, slots, with_cache)
    chosen_format = _export_format(format, out, slots=slots, opset=opset)
    max_sizes = _max_sizes(max_size, chosen_format) if max_size else None
    is_directory = with_cache and chosen_format is ExportFormat.onnx

    import lora_fx
    from lora_fx.adapters.peft_format.base_class import base_class
    from lora_fx.adapters.peft_format.opening import read_adapter
    from lora_fx.export.generation_directory import KIND
    from lora_fx.files.target import Target
    from lora_fx.graph.joined_graphs import through
    from lora_fx.rules.lookup import load

    with reported():
        reads = inputs(model, *adapters, example_inputs, *(rules_dir or ()), rules)
        Target(out, overwrite, reads, KIND if is_directory else None).check()
        with errors.status("loading the model") as status:
            pairs = zip(adapters, layouts, strict=True)
            opened = [read_adapter(directory, layout, ignore_config_key or ()) for directory, layout in pairs]
            choice = base_class(model, opened, model_class)
            prefix = next((each.prefix.traced for each in opened if each.prefix and not with_cache), False)
            graph, model_type = _loaded_graph(model, dtype, choice, example_inputs, with_cache, prefix, status.update)
            graph = through(graph, partial(_with_adapters, opened=opened, strict=strict, step=status.update))
            if slots and (rules or not adapters):
                graph = lora_fx.rewrite(graph, load(rules or "auto", model_type, rules_dir or ()))
            if adapters and not slots:
                chosen = {f"adapter_{number}": factor for number, factor in enumerate(strengths)}
                status.update("folding")
                graph = lora_fx.activate(graph, chosen) if branched else lora_fx.fold(graph, chosen)
        write = getattr(lora_fx.export, "generation" if is_directory else chosen_format.value)
        tokenizer = model if is_directory else None
        more = _given(slots=slots or None, tokenizer=tokenizer, opset=opset, max_sizes=max_sizes)
        with errors.status(f"writing {out}"):
            exported = write(graph, out, overwrite=overwrite, verify=verify, tolerance=tolerance, **more)
    remark(str(exported))


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None: some formats alone have these."""
    return {name: value for name, value in options.items() if value is not None}


def _with_adapters(
    graph: TracedGraphModule, *, opened: Sequence[AdapterFiles], strict: bool, step: Callable[[str], object]
) -> TracedGraphModule:
    """Return a graph with the adapters of these directories, called by their numbers."""
    from lora_fx.adapters.peft_format.save_load import with_adapter

    for number, files in enumerate(opened):
        step(f"adding {files.directory}")
        graph = with_adapter(graph, files, f"adapter_{number}", trainable=None, strict=strict)
    return graph


def _loaded_graph(
    model: Path,
    dtype: Dtype,
    choice: ModelChoice | None,
    example_inputs: Path | None,
    with_cache: bool,
    prefix: bool | Literal["prompt"],
    step: Callable[[str], object],
) -> tuple[Any, str | None]:
    """Return the graph of the model in a directory, or the graphs of one with an encoder, a decoder and a cache; and its model type."""
    import torch

    import lora_fx
    from lora_fx.tracing.example_inputs import read_example_inputs
    from lora_fx.tracing.transformers_models import load_model

    loaded = load_model(model, None if dtype is Dtype.auto else getattr(torch, dtype.value), choice)
    step(f"tracing {type(loaded).__name__}")
    inputs = None if example_inputs is None else read_example_inputs(example_inputs, loaded)
    graph = lora_fx.trace(loaded, inputs, inference=True, cache=with_cache, prefix=prefix)
    return graph, getattr(loaded.config, "model_type", None)


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
    ignore_config_key: IgnoredConfigKeys = None,
) -> None:
    """Write an adapter for a model with slots, in onnxruntime's adapter format. Of the model, only the ONNX file is needed."""
    if len(paths) < 3:
        raise typer.BadParameter("name one adapter or more, the ONNX model with slots, and the file to be made")
    *adapters, model, out = paths
    pairs = list(zip(adapters, strengths_of(adapters, strength), strict=True))

    from lora_fx.export.onnx_adapter_file import from_peft, read_slots
    from lora_fx.files.target import Target

    with reported():
        if not model.is_file():
            raise LoraFxError(f"{model}: expected an ONNX model with slots, which lora-fx export --slots writes.")
        try:
            table = read_slots(model)
        except ExportError as error:  # of an input, where an export has one of its output
            raise LoraFxError(str(error)) from error
        target = Target(out, overwrite, (model, *adapters))
        target.check()
        exported = from_peft(pairs, table, target, strict=strict, ignore_config_keys=ignore_config_key or ())
    remark(str(exported))


def _check_options(
    model: Path,
    adapters: Sequence[Path],
    strengths: Sequence[float] | None,
    rules: str | None,
    example_inputs: Path | None,
    branched: bool,
    slots: bool,
    with_cache: bool,
) -> None:
    """Raise typer's error for options that mean nothing together."""
    if branched and not adapters:
        raise typer.BadParameter("--branched leaves adapters as branches, and there is none: name one by --adapter")
    if slots and (branched or strengths):
        raise typer.BadParameter(_NO_SLOTS)
    if rules is not None and not slots:
        raise typer.BadParameter("--rules choose the sites of --slots, which was not given")
    if with_cache and slots and _is_encoder_decoder(model):
        raise typer.BadParameter(
            "--slots and --with-cache: clients of encoder-decoder models load no adapters. Leave out --slots and fold adapters in by --adapter, "
            "or leave out --with-cache"
        )
    if with_cache and example_inputs is not None:
        raise typer.BadParameter("--with-cache makes its own inputs: leave out --example-inputs")


def _max_sizes(given: Sequence[str], format: ExportFormat) -> dict[str, int]:
    """Return the largest sizes of axes, by name."""
    if format is not ExportFormat.executorch:
        raise typer.BadParameter(f"--max-size is for ExecuTorch, and OUT is to be {format.value}")
    sizes: dict[str, int] = {}
    for each in given:
        axis, equals, size = each.rpartition("=")
        if not (axis and equals and size.isascii() and size.isdecimal() and len(size) < 10):
            raise typer.BadParameter(f"--max-size {each}: expected an axis and its largest size, such as batch=8")
        if axis in sizes:
            raise typer.BadParameter(f"--max-size names {axis} twice")
        sizes[axis] = int(size)
    return sizes


def _is_encoder_decoder(model: Path) -> bool:
    """Tell whether the config in a directory says so; False where there is none, or none that can be read."""
    try:
        config = json.loads(read_bounded(model / "config.json", CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("is_encoder_decoder") is True


_NO_SLOTS = "--slots writes ONNX, without any adapter: leave out --format, --branched and --strength"


_FORMATS = {
    ".onnx": ExportFormat.onnx,
    ".pt": ExportFormat.torchscript,
    ".pt2": ExportFormat.pt2,
    ".pte": ExportFormat.executorch,
}


def _export_format(format: ExportFormat | None, out: Path, *, slots: bool, opset: int | None) -> ExportFormat:
    named = _FORMATS.get(out.suffix)
    if slots:
        if format not in (None, ExportFormat.onnx):
            raise typer.BadParameter(_NO_SLOTS)
        if format is None and named is not None and named is not ExportFormat.onnx:
            raise typer.BadParameter(
                f"{out}: --slots writes ONNX, and the name says {named.value}: call it .onnx, or give --format onnx"
            )
        return ExportFormat.onnx
    chosen = format or named
    if chosen is None:
        raise typer.BadParameter(
            f"{out}: its name says no format (.onnx, .pt for TorchScript, .pt2, .pte for ExecuTorch): name a format by --format, torchscript, onnx, "
            "pt2, aoti or executorch"
        )
    if opset is not None and chosen is not ExportFormat.onnx:
        raise typer.BadParameter(f"--opset is the version of ONNX's operators, and OUT is to be {chosen.value}")
    if format in (ExportFormat.pt2, ExportFormat.aoti) and out.suffix != ".pt2":
        raise typer.BadParameter(f"{out}: torch loads files of {format.value} whose names end in .pt2")
    if chosen is ExportFormat.executorch and out.suffix != ".pte":
        raise typer.BadParameter(f"{out}: names of ExecuTorch's programs end in .pte")
    return chosen
