"""Language models of transformers with random configs, in float64 for the most part, quantised in 4 bits for some, beside PEFT's wrapping."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import families
import peft
import quantised
import torch
from hunt.adapters import give_values, set_values
from hunt.check import compare_gradients
from hunt.outcome import Outcome
from hunt.passes import Asked, step
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.folding.checkpoint_plan import fold_checkpoint

CAUSAL = (
    *(
        "gpt2",
        "llama",
        "bloom",
        "opt",
        "gptj",
        "gpt_neox",
        "gpt_neo",
        "falcon",
        "mistral",
        "mixtral",
        "stablelm",
        "phi3",
    ),
    *(
        "gemma2",
        "gemma3_text",
        "qwen2",
        "qwen3",
        "glm4",
        "olmo2",
        "cohere2",
        "codegen",
        "gpt_bigcode",
        "mpt",
        "qwen3_moe",
    ),
)
OTHERS = ("t5", "mt5", "bart", "bert", "roberta", "electra", "deberta-v2", "distilbert", "modernbert")
ENCODER_DECODER = ("t5", "mt5", "bart")
DROPOUTS = ("attention_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout_rate", "dropout", "hidden_dropout")
SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "hidden_act": ("gelu", "silu", "relu"),
    "activation_function": ("gelu", "relu"),
    "feed_forward_proj": ("relu", "gated-gelu"),
    "use_parallel_residual": (True, False),
    "scale_embedding": (True, False),
    **dict.fromkeys(DROPOUTS, (0.0, 0.2)),
}


def drawn_model(seed: int, draw: random.Random) -> tuple[str, Any]:
    """Return a model in eval mode, and its name."""
    name = draw.choice(CAUSAL if draw.random() < 0.7 else OTHERS)
    plain: Any = architectures.build(name) if name in architectures.ARCHITECTURES else families.build(name)
    settings = plain.config.to_dict()
    changed = {key: draw.choice(values) for key, values in SETTINGS.items() if key in settings}
    layers = draw.randint(1, 2)
    if "attention_types" not in settings:  # GPT Neo's says of each layer what it is
        changed |= {key: layers for key in architectures.DEPTHS if key in settings}
        if settings.get("layer_types"):
            changed["layer_types"] = (settings["layer_types"] * layers)[:layers]
    config = type(plain.config).from_dict(settings | changed)
    config._attn_implementation = draw.choice(("sdpa", "eager"))
    torch.manual_seed(seed)
    try:
        model = type(plain)(config).eval()
    except ValueError:  # a class without sdpa
        config._attn_implementation = "eager"
        model = type(plain)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    return name, model


def drawn_config(model: nn.Module, draw: random.Random) -> peft.LoraConfig:
    """Draw PEFT's configuration of an adapter: ends of names, or whole names."""
    linears = [name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D)]
    tables = [name for name, each in model.named_modules() if isinstance(each, nn.Embedding)]
    norms = [name for name, each in model.named_modules() if "norm" in type(each).__name__.lower()]
    head = {"lm_head", "embed_out"}
    inner = [name for name in linears if name.rpartition(".")[2] not in head and not isinstance(model, Conv1D)]
    if draw.random() < 0.5:
        ends = sorted({name.rpartition(".")[2] for name in inner})
        targets = draw.sample(ends, min(len(ends), draw.randint(1, 3)))
    else:
        known = linears + (tables if draw.random() < 0.5 else [])
        targets = draw.sample(known, min(len(known), draw.randint(1, 4)))
    dora = draw.random() < 0.25
    return peft.LoraConfig(
        r=draw.randint(1, 5),
        lora_alpha=draw.randint(1, 9),
        lora_dropout=draw.choice((0.0, 0.0, 0.2)),
        target_modules=targets,
        use_rslora=draw.random() < 0.3,
        use_dora=dora,
        rank_pattern={draw.choice(targets): draw.randint(1, 4)} if draw.random() < 0.3 else {},
        bias=draw.choice(("none", "none", "none", "lora_only", "all")),
        modules_to_save=[draw.choice(norms)] if norms and draw.random() < 0.2 else None,
    )


def batch(name: str, rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """Return token ids, with padding behind."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if name in ENCODER_DECODER:
        made["decoder_input_ids"] = torch.randint(3, 90, (rows, 4), generator=generator)
    return made


class LanguageModelHunt:
    """One seed."""

    def __init__(self, seed: int, *, exports: bool, four_bits: bool) -> None:
        self.seed, self.draw, self.exports, self.four_bits = seed, random.Random(seed + 10**6), exports, four_bits
        self.outcome = Outcome(seed)
        self.inference = self.draw.random() < 0.5
        made = self._quantised() if four_bits else self._dense()
        self.name, self.model, self.fresh = made
        self.tolerance = 1e-5 if self.four_bits else 2e-6

    def _dense(self) -> tuple[str, Any, Callable[[], Any]]:
        name, model = drawn_model(self.seed, self.draw)
        try:
            model = model.double()
            model(**batch(name))
            dtype = "float64"
        except RuntimeError:
            model, dtype = model.float(), "float32"
        self.outcome.kinds = [name, dtype, model.config._attn_implementation]
        return name, model, lambda: copy.deepcopy(model)

    def _quantised(self) -> tuple[str, Any, Callable[[], Any]]:
        name = self.draw.choice(("llama", "llama-1", "gpt2", "t5"))
        scheme = self.draw.choice(("nf4", "nf4:double", "fp4"))
        self._place = tempfile.TemporaryDirectory()
        path = quantised.saved(name, torch.float32, Path(self._place.name))
        self.outcome.kinds = [name, scheme]
        model = quantised.loaded(name, path, scheme, torch.float32)
        return name, model, lambda: quantised.loaded(name, path, scheme, torch.float32)

    def _call(self, graph: Any, **more: Any) -> Any:
        result = graph(**batch(self.name), **more)
        if isinstance(result, dict):  # a ModelOutput, or what TorchScript makes of it
            return result["logits"] if "logits" in result else next(iter(result.values()))
        return result[0]

    def run(self) -> Outcome:
        """Take the model the whole way."""
        outcome, base, graph, branched = self.outcome, None, None, None
        config = drawn_config(self.model, self.draw)
        outcome.kinds += [
            str(said)
            for said in ("dora" * config.use_dora, "rslora" * config.use_rslora, f"bias {config.bias}")
            if said not in ("", "bias none")
        ]
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        with outcome.asking("trace"):
            base = lora_fx.trace(self.model, inference=self.inference)
            if not self.four_bits:  # bitsandbytes rounds the scales of a model that is called in eval mode
                with torch.no_grad():
                    outcome.near("trace", self._call(base.eval()), self._call(self.model.eval()), self.tolerance)
        if base is None:
            return outcome
        with outcome.asking("rewrite"), torch.no_grad():
            graph = lora_fx.rewrite(base, config)
            set_values(graph, self.seed, "default")
            branched = self._call(graph.eval())
        if graph is None or branched is None:
            return outcome
        asked = Asked(
            outcome,
            self.draw,
            base,
            graph,
            self._call,
            branched,
            self.tolerance,
            lambda: lora_fx.trace(self.fresh(), inference=not self.inference),
        )
        wrapped = self._beside_peft(asked, config)
        asked.passes(
            ["nest", *self.draw.sample(("deepcopy", "pickle", "flatten", "fuse", "transfer", "off and on"), 2)]
        )
        with tempfile.TemporaryDirectory() as place:
            self._files(asked, Path(place))
        folded = asked.folds(None if self.four_bits else self.model, strict=False)
        if folded is not None and self.exports and self.draw.random() < 0.3:
            asked.exported(self.draw.choice((folded, graph)), batch(self.name))
        if self.name in CAUSAL and not self.four_bits and wrapped is not None and self.draw.random() < 0.6:
            self._cached(config, wrapped)
        same = all(torch.equal(value, before[name]) for name, value in self.model.state_dict().items())
        outcome.add("the model stays", "equal" if same else "wrong")
        return outcome

    def _beside_peft(self, asked: Asked, config: peft.LoraConfig) -> Any:
        outcome = self.outcome
        if any(name.endswith("embed_positions") for name in config.target_modules or ()):
            outcome.add(
                "PEFT", "not compared", "PEFT looks up what the module is called with, a mask, and not positions"
            )
            return None
        try:
            wrapped: Any = peft.get_peft_model(self.fresh(), copy.deepcopy(config))
        except Exception as error:
            outcome.add("PEFT", "not compared", f"PEFT: {type(error).__name__}: {error}")
            return None
        with outcome.asking("PEFT"), torch.no_grad():
            give_values(wrapped, asked.graph)
            if not self.four_bits:
                asked.compare("PEFT", wrapped.eval())
        if self.inference:
            return wrapped
        theirs = step(wrapped, self._call)
        with outcome.asking("training"):
            loss, gradients = step(asked.graph, self._call)
            outcome.near("training", loss, theirs[0], self.tolerance)
            compare_gradients(outcome, gradients, theirs[1], self.tolerance * 10)
        with outcome.asking("training, nested"):
            nested = lora_fx.nest(copy.deepcopy(asked.graph))
            loss, gradients = step(nested, self._call)
            outcome.near("training, nested", loss, theirs[0], self.tolerance)
            compare_gradients(outcome, gradients, theirs[1], self.tolerance * 10)
        return wrapped

    def _files(self, asked: Asked, place: Path) -> None:
        """Save and load in both directions, and fold a checkpoint on disk."""
        if not asked.saved(place / "a") or self.four_bits:
            return
        with self.outcome.asking("loaded by PEFT"):
            asked.compare("loaded by PEFT", peft.PeftModel.from_pretrained(self.fresh(), str(place / "a")).eval())
        if self.draw.random() < 0.4:
            with self.outcome.asking("fold on disk"):
                self.model.save_pretrained(place / "base")
                fold_checkpoint(place / "base", [(place / "a", 1.0)], place / "out")
                merged = type(self.model).from_pretrained(place / "out", dtype=self.model.dtype).eval()
                asked.compare("fold on disk", merged)

    def _cached(self, config: peft.LoraConfig, wrapped: Any) -> None:
        """Compare the tokens and logits of generation with a cache, by a branched and a folded graph."""
        outcome, graph = self.outcome, None
        inputs = {key: value.flip(1) for key, value in batch(self.name).items()}  # padding in front
        settings = {
            **{"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False},
            **{"output_logits": True, "return_dict_in_generate": True},
        }
        outcome.kinds.append("cached")
        with outcome.asking("cache"):
            graph = lora_fx.rewrite(self.model, config, cache=True, inference=True)
            set_values(graph, self.seed, "default")
        if graph is None:
            return
        wanted = wrapped.generate(**inputs, **settings)
        for what, make in {"cache": lambda: graph, "cache, fold": lambda: lora_fx.fold(graph, unshare=True)}.items():
            with outcome.asking(what):
                found = lora_fx.generation.generator(make()).generate(**inputs, **settings)
                outcome.near(what, found.logits, wanted.logits, self.tolerance)
                if not torch.equal(found.sequences, wanted.sequences):
                    outcome.add(what, "wrong", "other tokens")
