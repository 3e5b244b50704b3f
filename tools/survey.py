"""Build, trace, rewrite and fold a small model of every architecture of transformers that can be built small, and tabulate.

Examples:
    python tools/survey.py --write
    python tools/survey.py --again
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import json
import math
import multiprocessing as mp
import os
import queue
import re
import resource
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from graph_diff import first_difference  # noqa: E402
from small_models import SHRINKINGS, model_types, small_model  # noqa: E402
from torchvision_operators import define_operator_schemas  # noqa: E402

define_operator_schemas()  # of torchvision, which timm imports

import lora_fx  # noqa: E402
from lora_fx.cli.printing import run_script  # noqa: E402
from lora_fx.graph.graph_module import TracedGraphModule  # noqa: E402
from lora_fx.rules.lookup import load  # noqa: E402
from lora_fx.rules.vocabulary import ROLES  # noqa: E402
from lora_fx.sites.call_sites import sites  # noqa: E402
from lora_fx.sites.roles import purposes  # noqa: E402
from lora_fx.tracing.example_inputs import ExampleInputs, example_inputs, graph_inputs  # noqa: E402
from lora_fx.tracing.input_trials import shapes  # noqa: E402

TABLE = ROOT / "tools" / "survey.md"
LARGEST, SECONDS, MEMORY = 40_000_000, 150, 12 << 30
RENEWED = 40  # types after which a process ends: torch.export keeps something of each
TOLERANCE = 1e-5
HEADER = (
    "| model type | model class | parameters | inputs | traces | equal to eager | roles | rules | folds back | surveyed |",
    "|---|---|---:|---|---|---|---|---|---|---|",
)
COLUMNS = (
    "model_type",
    "model_class",
    "parameters",
    "inputs",
    "traces",
    "equal",
    "roles",
    "rules",
    "folds",
    "surveyed",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one type; ``"yes"`` or the reason why not, and empty where it did not come to that.

    Attributes:
        model_type: as in a config.
        model_class: the class that is taken for it.
        parameters: of the small model.
        inputs: that ``lora_fx`` made for it, with their shapes.
        surveyed: the date.
        built: whether it could be built small.
        traces: whether ``lora_fx.trace`` takes it.
        equal: whether its graph computes what the model computes.
        roles: that its call sites have.
        rules: what ``rules="auto"`` comes to: a file, or roles.
        folds: whether a branch folds away and gives the trace back.
        seconds: that it took.
        place: last line of ours in the traceback of a failure.
    """

    model_type: str
    model_class: str
    parameters: int = 0
    inputs: str = ""
    built: str = ""
    traces: str = ""
    equal: str = ""
    roles: str = ""
    rules: str = ""
    folds: str = ""
    surveyed: str = dataclasses.field(default_factory=lambda: str(datetime.datetime.now(datetime.UTC).date()))
    seconds: float = 0
    place: str = ""

    def failed(self, reason: str, place: str = "") -> Row:
        """Return the row with a reason in the first column that has nothing yet."""
        column = next(name for name in ("built", "traces", "equal", "folds") if not getattr(self, name))
        return dataclasses.replace(self, **{column: reason}, place=place)  # type: ignore[arg-type]

    def __str__(self) -> str:
        shown = dataclasses.replace(self, traces=self.traces or f"cannot be built small: {self.built}")
        cells = (str(getattr(shown, column) or "") for column in COLUMNS)
        return f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"

    @classmethod
    def read(cls, line: str) -> Row:
        """Return the row that a line of the table holds."""
        cells = dict(
            zip(
                COLUMNS,
                (cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")),
                strict=True,
            )
        )
        return cls(
            **{**cells, "parameters": int(cells["parameters"] or 0), "built": "yes" if cells["parameters"] else "no"}
        )

    @property
    def good(self) -> bool:
        """Whether the type traces and folds back."""
        return self.traces.startswith("yes") and self.folds == "yes"


@dataclasses.dataclass(frozen=True)
class Task:
    """A type to survey, in full or for its inputs alone."""

    model_type: str
    model_class: str
    inputs_alone: bool = False


def survey(task: Task) -> Iterator[Row]:
    """Yield the row of one type after each step, so that the last one tells how far it came."""
    row = Row(task.model_type, task.model_class)
    try:
        for step in _steps(row):
            yield (row := step)
            if task.inputs_alone and row.inputs:
                break
    except Exception as error:
        yield row.failed(_reason(error), _place(error))


def _steps(row: Row) -> Iterator[Row]:
    model, inputs = yield from _built(row)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row = dataclasses.replace(row, parameters=parameters, built="yes")
    yield (row := dataclasses.replace(row, inputs=shapes(inputs.kwargs)))
    _eager(model, inputs)
    graph, dynamic = traced(model)
    yield (row := dataclasses.replace(row, traces="yes" if dynamic is None else f"yes, with dynamic={dynamic}"))
    yield (
        row := dataclasses.replace(row, equal=equality(model, graph, inputs, None if dynamic else other_size(inputs)))
    )
    yield (row := dataclasses.replace(row, roles=roles_of(graph)))
    rules, branched = rewritten(graph, model)
    yield (row := dataclasses.replace(row, rules=rules))
    yield dataclasses.replace(row, folds=folding(graph, branched, inputs))


def _built(row: Row) -> Generator[Row, None, tuple[nn.Module, ExampleInputs]]:
    """Return the smallest model of a type that takes its inputs; of those that take none, the first is what the row is about."""
    first: Exception | None = None
    for shrinking in SHRINKINGS:
        try:
            model = small_model(row.model_type, row.model_class, LARGEST, shrinking)
            if not row.built:
                parameters = sum(parameter.numel() for parameter in model.parameters())
                yield (row := dataclasses.replace(row, parameters=parameters, built="yes"))
                first = None
            return model, example_inputs(model, None)
        except Exception as error:
            first = first or error
            if "cannot be made" in str(error):
                break
    assert first is not None
    raise first


def traced(model: nn.Module) -> tuple[TracedGraphModule, dict[str, Any] | None]:
    """Return a trace, and the ``dynamic=`` that it was given if the model fixes a size: what the refusal says to pass."""
    try:
        return lora_fx.trace(model, inference=True), None
    except lora_fx.TraceError as error:
        advice = re.search(r"with dynamic=(\{.*?\})\.", str(error))
        if advice is None:
            raise
        dynamic = ast.literal_eval(advice[1])
    return lora_fx.trace(model, inference=True, dynamic=dynamic), dynamic


def equality(model: nn.Module, graph: TracedGraphModule, inputs: ExampleInputs, other: ExampleInputs | None) -> str:
    """Compare a graph with its model on the example inputs and at another size, which a graph may refuse."""
    found = []
    for words, case in (("", inputs), ("at another size: ", other)):
        if case is None:
            continue
        try:
            expected = _eager(model, case)
        except EagerError:
            if case is inputs:
                raise
            continue  # such as a second image where the text has the tokens of one
        try:
            difference = _difference(expected, _run(graph, case))
        except lora_fx.InputError as error:
            if case is inputs:
                raise
            found.append(f"{words}refused, {_shortened(str(error), 120)}")
            continue
        if difference != 0:
            again = _difference(expected, _eager(model, case))
            found.append(
                f"{words}{difference:.0e}" + (" (eager itself differs from call to call)" if again != 0 else "")
            )
    return "; ".join(found) or "bit-equal"


def roles_of(graph: TracedGraphModule) -> str:
    """Return the roles that the call sites of a graph have, shortly: ``self q k v o · mlp up down · head``."""
    found: dict[str, list[str]] = {}
    roles = {role for purpose in purposes(graph).values() for role in purpose.roles}
    for role in (role for role in ROLES if role in roles):
        kind, _, part = role.partition(".")
        short = {"query": "q", "key": "k", "value": "v", "output": "o"}.get(part, part)
        found.setdefault(kind.removesuffix("_attention"), []).extend([short] if short else [])
    return " · ".join(" ".join((kind, *parts)) for kind, parts in found.items()) or "none"


def rewritten(graph: TracedGraphModule, model: Any) -> tuple[str, TracedGraphModule]:
    """Return which rules ``"auto"`` comes to, and the graph with branches that compute something.

    Where the model has nothing that those rules select, the branch is beside its last linear.
    """
    rules = load("auto", model.config.model_type)
    name = rules.name if rules.name != "auto" else "roles"
    try:
        groups = (site.matrices for site in sites(graph) if site.op.startswith("conv"))
        branched = lora_fx.rewrite(graph, rules=rules, rank=math.lcm(*groups))  # each group has a part of the rank
    except lora_fx.RuleError:
        uses = Counter(site.weight for site in sites(graph))
        single = [site for site in sites(graph) if uses[site.weight] == 1 and site.op != "embedding"]
        linear = [site for site in single if site.op == "linear"] or single
        if not linear:
            raise lora_fx.PlanError("the graph has no call site for a branch.") from None
        name = "none of its sites"
        last = {"target": [linear[-1].module], "rank": linear[-1].matrices}
        branched = lora_fx.rewrite(graph, rules={"select": [last]})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in branched.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return name, branched


def folding(graph: TracedGraphModule, branched: TracedGraphModule, inputs: ExampleInputs) -> str:
    """Fold the branches and compare with what was there before, in numbers and in nodes."""
    folded = lora_fx.fold(branched)
    unlike = first_difference(graph, folded)
    if unlike is not None:
        return f"another graph: {_shortened(unlike)}"
    difference = _difference(_run(branched, inputs), _run(folded, inputs), relative=True)
    return "yes" if difference <= TOLERANCE else f"differs by {difference:.0e}, relatively"


def other_size(inputs: ExampleInputs) -> ExampleInputs | None:
    """Return inputs with one more in the batch and a longer sequence, or None where some input does not say its axes."""
    tensors = {name: value for name, value in inputs.kwargs.items() if isinstance(value, torch.Tensor)}
    if not tensors or any(name not in inputs.axes for name in tensors):
        return None
    # A waveform must grow by more than one frame; text must not, lest the tokens of its image are repeated.
    samples = {axis for name, value in tensors.items() if value.is_floating_point() for axis in inputs.axes[name]}

    def grown(name: str, value: torch.Tensor) -> torch.Tensor:
        for dim, axis in enumerate(inputs.axes[name]):
            size = value.shape[dim]
            more = 0 if axis is None else 1 if axis == "batch" else size // 2 if axis in samples else min(4, size)
            value = value.index_select(dim, torch.tensor([*range(size), *range(size - more, size)]))
        return value

    return dataclasses.replace(
        inputs, kwargs={**inputs.kwargs, **{name: grown(name, t) for name, t in tensors.items()}}
    )


class EagerError(Exception):
    """The model itself does not compute on the inputs."""


def _eager(model: nn.Module, inputs: ExampleInputs) -> Any:
    try:
        return _run(model, inputs)
    except Exception as error:
        raise EagerError(
            f"eager itself fails: {type(error).__name__}: {_shortened(str(error))}{_line(error)}"
        ) from error


def _run(module: nn.Module, inputs: ExampleInputs) -> Any:
    kwargs = graph_inputs(inputs) if isinstance(module, TracedGraphModule) else inputs.kwargs
    torch.manual_seed(0)
    with torch.no_grad():
        return module(*inputs.args, **kwargs)


def _difference(expected: Any, found: Any, *, relative: bool = False) -> float:
    """Return the largest difference between outputs, 0 only if they are the same bit for bit."""
    left, right = (
        [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)] for value in (expected, found)
    )
    if [(t.shape, t.dtype) for t in left] != [(t.shape, t.dtype) for t in right]:
        return float("inf")
    largest = 0.0
    for mine, theirs in zip(left, right, strict=True):
        if torch.equal(mine, theirs) or torch.allclose(mine, theirs, rtol=0, atol=0, equal_nan=True):
            continue
        apart = (mine.to(torch.complex128) - theirs.to(torch.complex128)).abs().nan_to_num(float("inf"))
        same = (mine == theirs) | (
            mine.isnan() & theirs.isnan()
        )  # infinities of one sign among them, which are not apart
        difference = apart.where(~same, 0.0).max().item()
        scale = mine.abs().nan_to_num(0, posinf=0).max().item() if relative else 1
        largest = max(largest, difference / scale if scale else float("inf"))
    return largest


def _reason(error: Exception) -> str:
    if isinstance(error, EagerError | lora_fx.LoraFxError):
        return _shortened(str(error), 300)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    message = lines[-1] if "Validation" in type(error).__name__ else lines[0]
    return f"{type(error).__name__}: {_shortened(message)}"


def _shortened(message: str, length: int = 200) -> str:
    message = re.sub(r"\S*/(site-packages|lora_fx)/", "", " ".join(message.split()))
    return message if len(message) <= length else message[: length - 1] + "…"


def _frames(error: BaseException) -> list[tuple[str, int]]:
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames


def _line(error: BaseException) -> str:
    """Return the last line of transformers in a traceback."""
    found = [f"{Path(file).name}:{line}" for file, line in _frames(error) if "/transformers/models/" in file]
    return f" ({found[-1]})" if found else ""


def _place(error: BaseException) -> str:
    """Return the last line of lora_fx in a traceback, and the last line of all."""
    frames = [f"{Path(file).name}:{line}" for file, line in _frames(error)]
    ours = [f"{Path(file).name}:{line}" for file, line in _frames(error) if "/lora_fx/" in file]
    return f"{ours[-1] if ours else 'not in lora_fx'} → {frames[-1]}"


def _work(connection: Connection, memory: int) -> None:
    """Survey types in a process of their own until there are none, sending every row as far as it came."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno()
    )  # torch.export prints whole graphs, into the progress bar
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    while (task := connection.recv()) is not None:
        for row in survey(task):
            connection.send(row)
        connection.send(None)


class _Worker:
    """A process that is started anew after a crash or when it takes too long."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None
        self._count = 0

    def row(self, task: Task) -> Row:
        row = Row(task.model_type, task.model_class)
        if self._count == RENEWED:
            self.stop()
        if self._process is None:
            self._start()
        self._count += 1
        self._connection.send(task)
        start = self._seconds()
        while True:
            try:
                while not self._connection.poll(5):
                    if self._seconds() > start + SECONDS:
                        raise TimeoutError
                received = self._connection.recv()
            except TimeoutError:
                row = row.failed(f"takes more than {SECONDS} s")
                self.stop(kill=True)
                return dataclasses.replace(row, seconds=SECONDS)
            except (EOFError, ConnectionResetError):
                self._process.join()
                row = row.failed(f"the process ended with code {self._process.exitcode}")
                self.stop(kill=True)
                break
            if received is None:
                break
            row = received
        return dataclasses.replace(row, seconds=round(max(0.0, self._seconds() - start), 1))

    def _seconds(self) -> float:
        """Return the time that the process has computed, however busy the machine is."""
        if self._process is None:
            return 0.0
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, MEMORY), daemon=True)
        self._process.start()
        theirs.close()
        self._count = 0

    def stop(self, *, kill: bool = False) -> None:
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._connection.send(None)
        self._process.join()
        self._process = None


def walk(tasks: Iterable[Task], jobs: int) -> Iterator[Row]:
    """Survey types, ``jobs`` at a time, and yield their rows as they come."""
    workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    everyone = [_Worker() for _ in range(jobs)]
    for worker in everyone:
        workers.put(worker)

    def one(task: Task) -> Row:
        worker = workers.get()
        try:
            return worker.row(task)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(one, task) for task in tasks]):
                yield future.result()
        finally:
            for worker in everyone:
                worker.stop()


def summary(rows: list[Row]) -> str:
    """Return the line below the table."""
    built, traced, equal, folded = (
        sum(getattr(row, column).split(",")[0] == good for row in rows)
        for column, good in (("built", "yes"), ("traces", "yes"), ("equal", "bit-equal"), ("folds", "yes"))
    )
    return f"{len(rows)} types tried, {built} built, {traced} trace, {equal} bit-equal, {folded} fold back"


def table(rows: Mapping[str, Row]) -> str:
    """Return the table, with what is said above and below it."""
    head = (
        "# Survey of transformers\n\n"
        f"Made with torch {torch.__version__} and transformers {transformers.__version__}, by `python tools/survey.py --write` for all "
        "types, and by `python tools/survey.py --again` since then for the ones that did not trace and fold back: the last column is the "
        "date of each row, and rows without inputs are older than that column. Every model is small, and its weights are random. With "
        "`dynamic=`, the type was traced for the sizes of its inputs alone in the dimensions that are not named.\n"
    )
    ordered = [rows[model_type] for model_type in sorted(rows)]
    return "\n".join([head, *HEADER, *map(str, ordered), "", f"{summary(ordered)}.", ""])


def known_rows() -> dict[str, Row]:
    """Return the rows of the table as it is."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    found = [Row.read(line) for line in lines if line.startswith("| ") and line not in HEADER]
    return {row.model_type: row for row in found}


def main(
    write: Annotated[bool, typer.Option(help="Write the table to tools/survey.md instead of printing it.")] = False,
    again: Annotated[
        bool,
        typer.Option(
            help="Retake the rows of tools/survey.md that do not trace and fold back, and write each into the table as it comes. "
            "Of the other rows the inputs alone are made again."
        ),
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="Survey these model types alone.")] = None,
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the rows here, as JSON lines.")] = None,
) -> None:
    """Build, trace, rewrite and fold a small model of every architecture of transformers, and tabulate."""
    types = {each: name for each, name in model_types().items() if not only or each in only}
    rows = known_rows() if again else {}
    settled = frozenset(model_type for model_type, row in rows.items() if row.good)
    tasks = [Task(*each, inputs_alone=each[0] in settled) for each in types.items()]
    tasks.sort(key=lambda task: task.inputs_alone)
    progress = tqdm(walk(tasks, jobs), total=len(tasks), disable=not sys.stderr.isatty())
    with Path(json_path or os.devnull).open("w", encoding="utf-8") as lines:  # line by line: a walk takes long
        for row in progress:
            print(json.dumps(dataclasses.asdict(row)), file=lines, flush=True)
            known = rows.get(row.model_type)
            rows[row.model_type] = dataclasses.replace(known, inputs=row.inputs) if known and known.good else row
            if again:
                TABLE.write_text(table(rows), encoding="utf-8")
    if write:
        TABLE.write_text(table(rows), encoding="utf-8")
    elif not again:
        print(table(rows))


if __name__ == "__main__":
    run_script(main)
