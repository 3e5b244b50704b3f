"""Rows G1 to G3: text from a model with an adapter, in every way that is at hand; what input checks and a cache in the trace cost.

    python tools/bench/generation.py                 # a table
    python tools/bench/generation.py --write         # puts it into the guide

Greedy, a batch of one, on one thread. Processor time, which other programs on the machine change less than time on the clock.
onnxruntime-genai runs in an environment of its own, where ``make test-clients`` made one.
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import peft
import torch
import transformers
import typer
from contenders import set_factors
from measuring import alternating
from results import Conditions, Goal, Measured, Result, report, table
from shapes import Llama

sys.path.append(str(Path(__file__).parent.parent))

import guides

import lora_fx
from lora_fx.cli.printing import run_script
from lora_fx.demo_generation import Run, empty_past, generate
from lora_fx.runtime import OnnxSession

SHAPE = Llama(width=512, inner=1408, layers=12, heads=8)
PROMPT, TOKENS, PAST = "A prompt of 16 B", 256, 128
GENAI = Path(__file__).parents[2] / ".venv-clients" / "genai" / "bin" / "python"
PEFT, ORT, PLAIN = "PEFT, eager", "onnxruntime", "no cache, onnxruntime"

Generate = Callable[[], Sequence[int]]


def options() -> onnxruntime.SessionOptions:
    """Return the options of a session on one thread."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = 1
    made.log_severity_level = 3
    return made


def eager(model: Any, count: int) -> Generate:
    """Return what generates by transformers' own loop."""
    ids = torch.tensor([list(PROMPT.encode())])
    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> Sequence[int]:
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return found[0, ids.size(1) :].tolist()

    return run


def looped(run: Run, shapes: Mapping[str, Any], count: int) -> Generate:
    """Return what generates by the loop of the demo."""
    return lambda: generate(run, empty_past(shapes), PROMPT, count, temperature=0).tokens


def without_cache(run: Run, shapes: Mapping[str, Any], count: int) -> Generate:
    """Return what computes all of the prefix for each token."""
    empty = empty_past(shapes)

    def generated() -> Sequence[int]:
        tokens = list(PROMPT.encode())
        for _ in range(count):
            ids = np.array([tokens])
            positions = np.arange(len(tokens))[None]
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
            tokens.append(int(run({**inputs, **empty})["logits"][0, -1].argmax()))
        return tokens[len(PROMPT) :]

    return generated


def of_session(session: onnxruntime.InferenceSession) -> tuple[Run, dict[str, Any]]:
    """Return what runs a session by names, and the shapes of its inputs."""
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(zip(names, session.run(None, dict(inputs)), strict=True))

    return run, {value.name: value.shape for value in session.get_inputs()}


def of_script(path: Path, outputs: Sequence[str]) -> Run:
    """Return what runs a TorchScript file on arrays, named as in an ONNX file."""
    script = torch.jit.load(path)

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        named = {
            name.replace(".", "_"): torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()
        }
        with torch.inference_mode():
            return {name: value.numpy() for name, value in script(**named).items()}

    assert "logits" in outputs
    return run


def built(shape: Llama) -> Any:
    """Return a model that never ends a text."""
    torch.manual_seed(0)
    model: Any = shape.build().eval().requires_grad_(False)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
    return model


def contenders(shape: Llama, count: int, place: Path) -> tuple[dict[str, Generate], Path]:
    """Return what generates in each way, and the directory of the folded model."""
    model = built(shape)
    branched = lora_fx.rewrite(model, "all-linear", rank=16, alpha=32, cache=True)
    set_factors(branched)
    lora_fx.save_adapter(branched.eval(), place / "adapter")
    folded = lora_fx.fold(branched)
    merged = copy.deepcopy(model)
    merged.load_state_dict({name: folded.state_dict()[name] for name in merged.state_dict()})
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), place / "adapter").eval()
    lora_fx.export.generation(folded, place / "folded", verify=False)
    lora_fx.export.generation(branched, place / "slots", slots=True, verify=False)
    lora_fx.export.onnx_adapter(branched, place / "adapter.onnx_adapter")
    script = lora_fx.export.torchscript(folded, place / "model.pt", verify=False)
    run, shapes = of_session(onnxruntime.InferenceSession(place / "folded" / "model.onnx", options()))
    slots = OnnxSession(place / "slots" / "model.onnx", options=options())
    slots.load("tuned", place / "adapter.onnx_adapter")
    return {
        PEFT: eager(wrapped, count),
        "folded, eager": eager(merged, count),
        "folded, TorchScript": looped(of_script(place / "model.pt", script.outputs), shapes, count),
        f"folded, {ORT}": looped(run, shapes, count),
        f"slots, {ORT}": looped(partial(slots.run, adapter="tuned"), shapes, count),
        PLAIN: without_cache(run, shapes, count),
    }, place / "folded"


def by_genai(directory: Path, end: int, count: int, repetitions: int) -> tuple[list[float], list[int]] | None:
    """Return the seconds of each repetition and the tokens, by onnxruntime-genai in a process of its own; None where there is none.

    Args:
        directory: of the model.
        end: a token that is not in the text; it wants one that ends texts.
        count: of tokens.
        repetitions: of the text.
    """
    if not GENAI.exists():
        return None
    path = directory / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    config["model"]["eos_token_id"] = end
    path.write_text(json.dumps(config))
    command = [str(GENAI), str(Path(__file__).with_name("generation_genai.py")), str(directory), str(count)]
    command += [str(repetitions), *map(str, PROMPT.encode())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["tokens"]


def measured(shape: Llama, count: int, repetitions: int, place: Path) -> tuple[Result, Path]:
    """Measure row G1, and return the directory of the folded model too."""
    runs, directory = contenders(shape, count, place)
    once = {PLAIN: runs.pop(PLAIN)}
    tokens = {name: run() for name, run in runs.items()}  # which warms up
    times = alternating(runs, repetitions, warm_up=0, clock=processor_time, says="G1")
    start = time.process_time()
    tokens[PLAIN] = once[PLAIN]()
    times[PLAIN] = (time.process_time() - start,)
    notes = ["Tokens a second: {}", f"Medians of {repetitions} repetitions, without a cache once"]
    unused = next(token for token in itertools.count() if token not in tokens[PEFT])
    if (genai := by_genai(directory, unused, count, repetitions)) is not None:
        times["folded, onnxruntime-genai"], tokens["folded, onnxruntime-genai"] = tuple(genai[0]), genai[1]
    else:
        notes.append("onnxruntime-genai was not there: make test-clients installs it")
    same = {name: agreement(found, tokens[PEFT]) for name, found in tokens.items()}
    if min(same.values()) < min(16, count):
        raise SystemExit(f"the texts are not the same, and there is nothing to time: {same}")
    told = [f"{name} {number}" for name, number in same.items() if number < count]
    notes.append(
        f"All wrote the same {count} tokens"
        if not told
        else f"As many tokens are PEFT's as: {', '.join(told)}; else all"
    )
    found = tuple(Measured(name, each, against="" if name == PEFT else PEFT) for name, each in times.items())
    notes[0] = notes[0].format(", ".join(f"{each.name} {count / each.median:.1f}" for each in found))
    words = (
        f"{count} new tokens after a prompt of {len(PROMPT)}, Llama, width {shape.width}, inner {shape.inner}, {shape.layers} layers, "
        "all-linear, r=16, with a cache, processor time"
    )
    goals = (Goal(f"folded, {ORT}", "speed", 2.0, PEFT),)
    conditions = Conditions.present(("torch", "transformers", "peft", "onnxruntime"))
    return Result("G1", words, found, goals, conditions, tuple(notes)), directory


def agreement(found: Sequence[int], expected: Sequence[int]) -> int:
    """Return how many of the first tokens are equal."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(found, expected, strict=True)))


def processor_time(_device: str) -> float:
    """Return the processor time of this process."""
    return time.process_time()


def without_checks(path: Path, out: Path) -> None:
    """Copy an ONNX model without the checks of its inputs, see ``lora_fx/export/onnx_input_checks.py``."""
    model = onnx.load(path)
    made = {name: node for node in model.graph.node for name in node.output}
    inputs = {value.name for value in model.graph.input}
    guard = next(node for node in model.graph.node if node.op_type == "Expand" and node.input[0] in inputs)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == guard.output[0]:
                node.input[index] = guard.input[0]
    kept, wanted = set[int](), [value.name for value in model.graph.output]
    while wanted:
        node = made.get(wanted.pop())
        if node is not None and id(node) not in kept:
            kept.add(id(node))
            wanted += node.input
    nodes = [node for node in model.graph.node if id(node) in kept]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out)


def checked_step(directory: Path, past: int, repetitions: int) -> Result:
    """Measure row G2: a decode step of a model with checks of its inputs, and of the same without."""
    without_checks(directory / "model.onnx", directory / "unchecked.onnx")
    names = {"with checks": "model.onnx", "without checks": "unchecked.onnx"}
    sessions = {
        name: of_session(onnxruntime.InferenceSession(directory / file, options())) for name, file in names.items()
    }
    generator = np.random.default_rng(0)
    shapes = next(shapes for _, shapes in sessions.values())
    inputs: dict[str, Any] = {
        "input_ids": np.array([[5]]),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.array([[past]]),
    }
    for name, empty in empty_past(shapes).items():
        inputs[name] = generator.standard_normal((1, empty.shape[1], past, empty.shape[3])).astype(np.float32)
    logits = [run(inputs)["logits"] for run, _ in sessions.values()]
    if not (logits[0] == logits[1]).all():
        raise SystemExit("the model without checks computes something else, and there is nothing to time")
    steps = {name: partial(run, inputs) for name, (run, _) in sessions.items()}
    times = alternating(steps, repetitions, warm_up=5, clock=processor_time, says="G2")
    counts = ", ".join(f"{len(onnx.load(directory / file).graph.node)} nodes {name}" for name, file in names.items())
    return Result(
        "G2",
        f"A token of G1's folded model in onnxruntime, past of {past}",
        tuple(Measured(name, times[name]) for name in names),
        (Goal("with checks", "time", 1.05, "without checks"),),
        Conditions.present(("torch", "onnxruntime")),
        (counts, f"Medians of {repetitions} repetitions"),
    )


def rewritten(shape: Llama, repetitions: int) -> Result:
    """Measure row G3: trace and rewrite, with a cache and without."""
    model = built(shape)
    steps = {
        f"cache={cache}": partial(lora_fx.rewrite, model, "llama", rank=16, cache=cache) for cache in (False, True)
    }
    times = alternating(steps, repetitions, warm_up=1, clock=processor_time, says="G3")
    return Result(
        "G3",
        "Trace and rewrite (q and v) of G1's model",
        tuple(Measured(name, times[name]) for name in steps),
        (Goal("cache=True", "time", 1.5, "cache=False"),),
        Conditions.present(),
        (f"Processor time, medians of {repetitions} repetitions",),
    )


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
) -> None:
    """Measure generation."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    shape, count, repetitions = (SHAPE.tiny(), 4, 1) if tiny else (SHAPE, TOKENS, 3)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        first, directory = measured(shape, count, repetitions, Path(place))
        found = [first, checked_step(directory, PAST, 3 if tiny else 60), rewritten(shape, repetitions)]
    report(found, json)
    if write:
        guides.write("tools/bench/generation.py", table(found))


EXAMPLES = "Example:  python tools/bench/generation.py --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
