"""Three ways to merge an adapter that was trained on 4 bits, and how far each is from what was trained.

    python tools/quantised_merging.py                  # a table, in a minute
    python tools/quantised_merging.py --write          # puts it into lora_fx/folding/README.md

A small Llama with random weights is loaded in NF4, and an adapter at all linears is trained beside it. Each row is the largest
difference of logits to the graph as it was trained, as a part of the largest logit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import guides
import torch
import transformers
import typer
from rich.console import Console
from tqdm import tqdm

import lora_fx
from lora_fx.cli.printing import run_script

DTYPES = (torch.float32, torch.bfloat16)
STEPS = 30


def model() -> Any:
    """Return a Llama whose widths are whole blocks of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.06,
    )
    return transformers.LlamaForCausalLM(config)


def batch(steps: int) -> Mapping[str, torch.Tensor]:
    """Return tokens to be learned by heart."""
    ids = torch.randint(3, 257, (4, 24), generator=torch.Generator().manual_seed(steps))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def trained(base: Any) -> lora_fx.TracedGraphModule:
    """Return the graph of a quantised model with an adapter that was trained for some steps."""
    graph = lora_fx.rewrite(base, "all-linear", rank=4, alpha=8, seed=0).train()
    inputs = batch(0)
    optimizer = torch.optim.AdamW([each for each in graph.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = graph(**inputs).logits.float()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()).backward()
        optimizer.step()
    return graph.eval()


def merged(dtype: torch.dtype, place: Path) -> dict[str, float]:
    """Return how far each way to merge is from the graph as it was trained."""
    original = model().to(dtype)
    original.save_pretrained(place / "base")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        place / "base", quantization_config=settings, device_map="cpu", dtype=dtype
    )
    graph = trained(loaded.train())
    lora_fx.save_adapter(graph, place / "adapter")
    naive = lora_fx.from_adapter(original.eval(), place / "adapter", strict=False)
    graphs = {
        "`fold(graph)`, `lora-fx fold --quantised nf4`: into the values that the codes stand for": lora_fx.fold(graph),
        '`fold(graph, quantised="requantise")`, and PEFT\'s `merge_and_unload`: quantised again': lora_fx.fold(
            graph, quantised="requantise"
        ),
        "into the original weights, as most do": lora_fx.fold(naive),
        "no adapter at all": lora_fx.unload(graph),
    }
    with torch.no_grad():
        expected = graph(**batch(0)).logits.float()
        return {
            name: float((each.eval()(**batch(0)).logits.float() - expected).abs().max() / expected.abs().max())
            for name, each in graphs.items()
        }


def main(write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False) -> None:
    """Measure three ways to merge."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for dtype in tqdm(DTYPES, leave=False, disable=None):
        with tempfile.TemporaryDirectory() as place:
            found[dtype] = merged(dtype, Path(place))
    names = [str(dtype).removeprefix("torch.") for dtype in found]
    lines = [f"| merged | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for name in next(iter(found.values())):
        lines.append(f"| {name} | {' | '.join(f'{each[name]:.1g}' for each in found.values())} |")
    text = "\n".join(lines)
    Console().print(text, markup=False, soft_wrap=True)
    if write:
        guides.write("tools/quantised_merging.py", text)


if __name__ == "__main__":
    run_script(main)
