"""The demo of generation: one ONNX file with a key-value cache, and two adapters that it is served with.

A small language model learns the bytes of Python's own reference (``pydoc_data.topics``). One adapter then learns the source code of the
standard library, another the reference in upper case. onnxruntime continues one prompt without an adapter, and with either.
"""

from __future__ import annotations

import ast
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from torch.nn import functional as F  # noqa: N812
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from lora_fx.adapters.peft_format.save_load import save_adapter
from lora_fx.adapters.transfer import transfer
from lora_fx.errors import LoraFxError
from lora_fx.export import generation, onnx_adapter_from_peft
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.rewriting import rewrite
from lora_fx.tracing.trace import trace

SEED = 0
STEPS, ADAPTER_STEPS = 800, 120
BATCH, SEQUENCE = 8, 128
LEARNING_RATE, ADAPTER_LEARNING_RATE = 4e-3, 1e-2
RANK = 16
PROMPT = "class "
TOKENS = 240
TEMPERATURE = 0.6
SOURCE_BYTES = 1_500_000


def demo(out: Path, console: Console, *, steps: int = STEPS) -> None:
    """Train, export and generate, and print the texts.

    Args:
        out: directory for the results; those of a former run are replaced.
        console: where to print.
        steps: number of training steps of the base; an adapter trains for 120, or fewer if these are.
    """
    from lora_fx.runtime import OnnxSession  # which needs onnxruntime

    torch.manual_seed(SEED)
    started = time.perf_counter()
    reference = read_reference()
    texts = {"code": read_source(), "upper": reference.upper()}
    model = LlamaForCausalLM(CONFIG)
    console.print(f"A Llama with {model.num_parameters() / 1e6:.1f} million random weights, one token for each byte")
    train(model, reference, steps, LEARNING_RATE, "the reference")
    model.eval()

    with console.status("tracing"):
        base, cached = trace(model), trace(model, cache=True, inference=True)
    for name, text in texts.items():
        branched = rewrite(base, "all-linear", rank=RANK, alpha=2 * RANK, seed=SEED)
        train(branched, text, min(steps, ADAPTER_STEPS), ADAPTER_LEARNING_RATE, f"adapter {name}")
        save_adapter(branched.eval(), out / name, overwrite=True)
    directory, files = out / "generation", {name: out / f"{name}.onnx_adapter" for name in texts}
    with console.status("exporting"):
        generation(transfer(branched, onto=cached), directory, slots=True, overwrite=True)  # it has the sites of both
        for name, file in files.items():
            onnx_adapter_from_peft(out / name, directory / "model.onnx", file, overwrite=True)

    session = OnnxSession(directory / "model.onnx")
    for name, file in files.items():
        session.load(name, file)
    empty = empty_past({value.name: value.shape for value in session.session.get_inputs()})
    for active in (None, *files):
        made = generate(partial(session.run, adapter=active), empty, PROMPT)
        told = "without an adapter" if active is None else f"with the adapter {active}"
        console.print(f"\n[bold]{told}[/bold]: {made.tokens_per_second:.0f} tokens/s by onnxruntime, with a cache")
        console.print(Padding(Text.assemble((PROMPT, "bold"), made.text), (0, 4)))
    written = {"for onnxruntime-genai and optimum": directory, **{f"adapter {name}": files[name] for name in files}}
    console.print("\n" + "\n".join(f"{name}: {path}" for name, path in written.items()), soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s in all")


CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=336,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    initializer_range=0.06,  # few steps: transformers' 0.02 takes a third of them to leave behind
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def read_reference() -> str:
    """Return all topics of Python's reference."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

    return "\n\n".join(topics[topic] for topic in sorted(topics))


def read_source() -> str:
    """Return modules of the standard library without comments and docstrings, which are English as the reference is.

    Raises:
        LoraFxError: this Python has no source code.
    """
    directory = Path(sysconfig.get_path("stdlib"))
    made: list[str] = []
    for path in sorted(directory.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node) is not None:
                node.body = body[1:] or [ast.Pass()]
        made.append(ast.unparse(tree))
        if sum(map(len, made)) > SOURCE_BYTES:
            break
    if not made:
        raise LoraFxError(f"expected source code of the standard library in {directory}, got no .py file there.")
    return "\n\n".join(made)


_WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def train(module: torch.nn.Module, text: str, steps: int, learning_rate: float, name: str) -> None:
    """Train what requires a gradient to predict each byte of a text from those before it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decay = 0.0 if isinstance(module, TracedGraphModule) else 0.1
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 15, steps)
    module.train()
    progress = tqdm(_batches(text, steps), total=steps, desc=f"training {name}", unit="step")
    for tokens in progress:
        ids = tokens[:, :-1]
        logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _batches(text: str, steps: int) -> Iterator[torch.Tensor]:
    """Yield tokens ``(BATCH, SEQUENCE + 1)`` from random places."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    windows = data.unfold(0, SEQUENCE + 1, 1)
    chooser = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (BATCH,), generator=chooser)]


Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Generated:
    """A continuation of a prompt.

    Attributes:
        tokens: without those of the prompt.
        seconds: that it took.
    """

    tokens: tuple[int, ...]
    seconds: float

    @property
    def text(self) -> str:
        """The tokens as bytes of UTF-8."""
        return bytes(self.tokens).decode(errors="replace")

    @property
    def tokens_per_second(self) -> float:
        """Speed, that of the prompt included."""
        return len(self.tokens) / self.seconds


def empty_past(shapes: Mapping[str, list[int | str]]) -> dict[str, Any]:
    """Return the past before the first token, of a batch of one.

    Args:
        shapes: of the inputs of an ONNX model, as onnxruntime tells them; those of the past are (batch, heads, length, size).
    """
    sizes = {name: (shape[1], shape[3]) for name, shape in shapes.items() if name.startswith("past_key_values.")}
    return {name: np.zeros((1, heads, 0, size), np.float32) for name, (heads, size) in sizes.items()}


def generate(
    run: Run, past: Mapping[str, Any], prompt: str, count: int = TOKENS, temperature: float = TEMPERATURE
) -> Generated:
    """Continue a prompt by a model with a cache: all of the prompt at once, then a token at a time.

    Args:
        run: name → array of the inputs, to those of the outputs.
        past: see :func:`empty_past`.
        prompt: text whose bytes are tokens.
        count: number of tokens.
        temperature: of the distribution that tokens are drawn from; 0 takes the most likely.
    """
    chooser = np.random.default_rng(SEED)
    now, length, tokens = np.array([list(prompt.encode())]), 0, list[int]()
    started = time.perf_counter()
    for _ in range(count):
        end = length + now.shape[1]
        inputs = {
            "input_ids": now,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(length, end)[None],
        }
        outputs = run({**inputs, **past})
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        tokens.append(_chosen(outputs["logits"][0, -1], temperature, chooser))
        now, length = np.array([tokens[-1:]]), end
    return Generated(tuple(tokens), time.perf_counter() - started)


def _chosen(logits: Any, temperature: float, chooser: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return int(chooser.choice(len(weights), p=weights / weights.sum()))
