"""The LoRA configurations of PEFT's own tests, as rows: a model of ``peft_models.py`` and what PEFT's ``LoraConfig`` is told.

Taken from PEFT's tests (0.21): every configuration of their tables and test bodies once, with the models that they are used on.
A configuration of the tables of transformers models is a row for each model. Not rows: tests that need a GPU, a quantised model or the
diffusers library, and those that read another method's configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.lora.config import BdLoraConfig, CordaConfig


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        table: the file of PEFT's tests that has it.
        model: a name of ``peft_models.py``.
        settings: arguments of ``peft.LoraConfig``.
        second: those of a second adapter; by default it has the same.
    """

    table: str
    model: str
    settings: Mapping[str, Any]
    second: Mapping[str, Any] | None = None

    @property
    def variant(self) -> str | None:
        """Return what makes it a variant of LoRA, if something does."""
        for settings in (self.settings, self.second or {}):
            for name, word in VARIANTS.items():
                if settings.get(name):
                    return word
            if (start := settings.get("init_lora_weights")) not in (None, True, False, "gaussian"):
                return str(start).lower().partition("_niter")[0]
        return None

    def __str__(self) -> str:
        second = "" if self.second is None else f", then {_told(self.second)}"
        return f"{self.table}: {self.model}: {_told(self.settings)}{second}"


VARIANTS = {
    "use_dora": "DoRA",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "lora_bias",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer replication",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron",
}
"""Arguments that make a configuration a variant, and its name."""


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in settings.items()) or "nothing"


def _short(value: Any) -> str:
    if not isinstance(value, Mapping) and hasattr(value, "to_dict"):
        return type(value).__name__
    text = "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
    return text if len(text) <= 90 else text[:87] + "…"


def _lora(*targets: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), **settings}


def _regex(target: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": target, **settings}


def _parameters(*names: str, **settings: Any) -> dict[str, Any]:
    return {"target_parameters": list(names), **settings}


def _rows(table: str, model: str, configurations: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(table, model, settings) for settings in configurations]


def _pairs(table: str, model: str, pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Row]:
    return [Row(table, model, first, second) for first, second in pairs]


_RANDOM: Mapping[str, Any] = {"init_lora_weights": False}
_TOKENS = {"trainable_token_indices": {"emb": [0, 1, 2]}, **_RANDOM}
_OTHER_TOKENS = {"trainable_token_indices": {"emb": [3, 4, 5, 6]}, **_RANDOM}


def _custom_models() -> list[Row]:
    table = "custom_models"
    velora = [("lin0",), ("lin0", "lin1"), ("lin0",)]
    starts = ["random", "batch_average", "batch_average_once"]
    deep = {f"layers.{i}.lin{j}": 16 // (i + 1) for i in range(4) for j in range(2)}
    doubled = {name: 2 * rank for name, rank in deep.items()}
    everywhere = [_lora("emb"), _lora("conv1d"), _lora("emb", "conv1d")]
    return [
        *_rows(
            table,
            "mlp",
            [
                _regex("lin0"),
                _lora("lin0"),
                _lora("lin1"),
                _lora("lin0", "lin1"),
                _lora("lin0", modules_to_save=["lin1"]),
                _lora("lin0", lora_alpha=4, lora_dropout=0.1),
                _lora("lin0", use_dora=True),
                _lora("lin0", "lin1", use_dora=True),
                _lora("lin0", kasa_config=peft.KasaConfig(), r=4),
                _lora("lin0", init_lora_weights="mica", r=4),
                _regex("lin1", use_dora=True, lora_alpha=32),
                *(
                    _lora(*names, velora_config=peft.VeloraConfig(num_groups=2, init_type=start))
                    for names, start in zip(velora, starts, strict=True)
                ),
                _lora("lin0", "lin1", lora_bias=True, lora_alpha=32),
                _lora("lin0", target_parameters=["lin1.weight"]),
                _lora("lin0", monteclora_config=peft.MontecloraConfig(num_samples=2)),
                _lora("lin0", "lin1", r=8, lora_alpha=16, monteclora_config=peft.MontecloraConfig(num_samples=4)),
                _lora("lin0", "lin1", use_bdlora=BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False)),
                _lora(
                    "lin0", "lin1", use_bdlora=BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False)
                ),
                _lora(
                    "lin0",
                    "lin1",
                    use_bdlora=BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
                ),
                _lora("lin0", r=16, **_RANDOM),
                _lora("lin0", modules_to_save=["lin1"], **_RANDOM),
                _lora("lin0", use_dora=True, **_RANDOM),
                _lora("lin0", r=8, lora_alpha=16, lora_dropout=0.0, bias="none", **_RANDOM),
            ],
        ),
        *_pairs(
            table,
            "mlp",
            [
                (_lora("lin0", **_RANDOM), _lora("lin0", **_RANDOM)),
                (_lora("lin0", **_RANDOM), _lora("lin1", **_RANDOM)),
                (_parameters("lin0.weight", **_RANDOM), _parameters("lin0.weight", **_RANDOM)),
                (_parameters("lin0.weight", **_RANDOM), _parameters("lin1.weight", **_RANDOM)),
                (_lora("lin0", r=2, **_RANDOM), _lora("lin0", r=4, **_RANDOM)),
                (_lora("lin0", modules_to_save=["lin1"]), _lora("lin0")),
                (
                    _lora("lin0", "lin1", r=8, rank_pattern={"lin0": 2}),
                    _lora("lin0", "lin1", r=8, rank_pattern={"lin0": 16}),
                ),
                (
                    _lora("lin0", r=8, lora_alpha=16, **_RANDOM),
                    _lora("lin0", r=8, lora_alpha=32, **_RANDOM),
                ),
                (
                    _lora("lin0", "lin1", r=8, lora_alpha=8, **_RANDOM),
                    _lora(
                        "lin0",
                        "lin1",
                        r=8,
                        lora_alpha=8,
                        rank_pattern={"lin0": 4},
                        alpha_pattern={"lin0": 4},
                        **_RANDOM,
                    ),
                ),
                (_lora("lin0", **_RANDOM), _lora("lin0", "lin1", **_RANDOM)),
                (_lora("lin0", **_RANDOM), _lora("lin0", use_dora=True, **_RANDOM)),
            ],
        ),
        *_rows(
            table,
            "embedding",
            [
                *everywhere,
                *({**each, "use_dora": True} for each in everywhere),
                _lora("conv1d", trainable_token_indices={"emb": [0, 10]}),
                _lora("conv1d", trainable_token_indices={"emb": [0, 1, 2]}),
                _lora("lin0", trainable_token_indices={"emb": [0]}),
                _lora("lin0", "emb", **_RANDOM),
                _regex("^emb", **_RANDOM),
                _lora("emb", "conv1d", modules_to_save=["lin0"], **_RANDOM),
            ],
        ),
        *_pairs(
            table,
            "embedding",
            [
                (_lora("lin0", **_TOKENS), _lora("lin0", **_OTHER_TOKENS)),
                (_lora("lin0", **_TOKENS), _lora("conv1d", **_OTHER_TOKENS)),
                (_lora("lin0"), _lora("lin0", trainable_token_indices={"emb": [0]})),
                (_lora("emb", "conv1d", **_RANDOM), _lora("emb", "conv1d", r=16, **_RANDOM)),
            ],
        ),
        *_rows(
            table,
            "embedding of transformers",
            [_lora("lin0", "embed_tokens", **_RANDOM), _regex("^embed_tokens", **_RANDOM)],
        ),
        *_rows(table, "embedding with sibling", [_lora("embed_tokens", **_RANDOM)]),
        *_rows(table, "conv1d", [_lora("conv1d"), _lora("conv1d", use_dora=True)]),
        *(
            row
            for kind in ("conv2d", "conv3d")
            for row in _rows(
                table,
                kind,
                [
                    _lora(kind),
                    _lora(kind, "lin0"),
                    _lora(kind, use_dora=True),
                    _lora(kind, "lin0", use_dora=True),
                    _lora(kind, lora_bias=True, lora_alpha=32),
                ],
            )
        ),
        *_pairs(table, "conv2d", [(_lora("conv2d", **_RANDOM), _lora("conv2d", r=16, **_RANDOM))]),
        *(
            row
            for groups in ("eight", "two")
            for row in _rows(table, f"conv2d, {groups} groups", [_lora("conv2d"), _lora("conv2d", use_dora=True)])
        ),
        *_rows(table, "attention", [_lora("mha"), _lora("mha", "lin0")]),
        *_pairs(table, "attention", [(_lora("mha", **_RANDOM), _lora("mha", r=16, **_RANDOM))]),
        *_rows(table, "parameters", [_parameters("lin0.weight")]),
        *_rows(table, "mlp without bias", [_lora("lin0", "lin1", lora_bias=True)]),
        *_rows(
            table,
            "deep mlp",
            [_lora("lin0", "lin1", r=4, lora_alpha=8, rank_pattern=deep, alpha_pattern=doubled, **_RANDOM)],
        ),
        *_rows(table, "mlp with gru", [_lora("lin0", modules_to_save=["gru"], **_RANDOM), _lora("gru")]),
        *_rows(table, "bert classifier", [{"task_type": "SEQ_CLS"}]),
        *_rows(table, "llama", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}]),
        *_rows(table, "gpt2", [{"task_type": "CAUSAL_LM", "use_dora": True}]),
        *_pairs(
            table,
            "opt",
            [({"task_type": "CAUSAL_LM", **_RANDOM}, {"task_type": "CAUSAL_LM", "r": 16, **_RANDOM})],
        ),
    ]


DECODERS = ("opt", "gpt2", "gptj", "llama", "qwen2", "gemma3")
CLASSIFIERS = ("bert classifier", "roberta classifier", "llama classifier")
SEQUENCE_TO_SEQUENCE = ("t5", "bart")
ENCODERS = ("bert", "roberta encoder", "deberta", "deberta-v2")


def _transformers() -> list[Row]:
    rows = []
    for table, models, task in (
        ("decoder_models", DECODERS, "CAUSAL_LM"),
        ("seq_classifier", CLASSIFIERS, "SEQ_CLS"),
        ("encoder_decoder_models", SEQUENCE_TO_SEQUENCE, "SEQ_2_SEQ_LM"),
        ("feature_extraction_models", ENCODERS, "FEATURE_EXTRACTION"),
    ):
        common = {"task_type": task, "r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
        variants: list[dict[str, Any]] = [{}, {"trainable_token_indices": [0, 1, 3]}]
        if task == "CAUSAL_LM":
            variants += [{"alora_invocation_tokens": [1]}, {"alora_invocation_tokens": [1000]}]
        for model, variant in itertools.product(models, variants):
            rows.append(Row(table, model, {**common, **variant}))
    replicated = _lora(
        "down_proj", "up_proj", task_type="CAUSAL_LM", lora_dropout=0.0, layer_replication=[[0, 1], [0, 2], [1, 2]]
    )
    embedded = [_lora("embed_tokens", **_RANDOM), _lora("embed_tokens", use_dora=True, **_RANDOM)]
    whole = {"task_type": "TOKEN_CLS", "inference_mode": False, "r": 16, "lora_alpha": 16, "lora_dropout": 0.1}
    return [
        *rows,
        *_rows("decoder_models", "llama", [replicated, _regex(r".*\.embed_tokens", **_RANDOM)]),
        *_rows("decoder_models", "opt", [_lora("lin0", "embed_tokens", **_RANDOM)]),
        *_rows("decoder_models", "gemma3", embedded),
        *_rows("encoder_decoder_models", "roberta classifier", [{**whole, "bias": "all"}]),
        *_rows("vision_models", "resnet", [_lora("convolution", modules_to_save=["classifier", "normalization"])]),
    ]


def _target_parameters() -> list[Row]:
    table, rows = "target_parameters", []
    for model, experts in (("llama4", "feed_forward.experts"), ("gpt-oss", "mlp.experts")):
        down, up = f"{experts}.down_proj", f"{experts}.gate_up_proj"
        common = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0}
        rows += _rows(
            table,
            model,
            [
                _parameters(down, target_modules=[], **common),
                _parameters(f"0.{up}", f"1.{down}", target_modules=[], **common),
                _parameters(down, up, r=8, lora_alpha=32, bias="none", **common),
                _parameters(down, target_modules=["q_proj", "v_proj"], **common),
            ],
        )
    up = "feed_forward.experts.gate_up_proj"
    return [
        *rows,
        *_rows(
            table,
            "llama4",
            [
                _parameters(
                    up,
                    r=8,
                    lora_alpha=32,
                    target_modules=["q_proj", "v_proj"],
                    rank_pattern={"experts.gate_up_proj": 2},
                    **_RANDOM,
                ),
                _parameters(up, "feed_forward.experts.down_proj", **_RANDOM),
            ],
        ),
        *_rows(table, "gpt-oss", [_parameters("0.mlp.experts.gate_up_proj", target_modules=[])]),
        *_rows(
            table,
            "llama",
            [_lora("gate_proj", **_RANDOM), _parameters("gate_proj.weight", target_modules=[], **_RANDOM)],
        ),
        *_pairs(
            table,
            "parametrized",
            [
                (
                    _parameters("lin.weight", r=2, lora_alpha=6, **_RANDOM),
                    _parameters("lin.other_weight", r=2, lora_alpha=6, **_RANDOM),
                )
            ],
        ),
        *_rows(table, "parameter of the top", [_parameters("param")]),
    ]


def _initialization() -> list[Row]:
    table = "initialization"
    parts = ("linear", "embed", "conv2d")
    converted: list[dict[str, Any]] = [
        {"r": 8},
        {"r": 8, "rank_pattern": {"linear": 32}},
        {"alpha_pattern": {"linear": 5}},
        {"r": 8, "use_rslora": True},
    ]
    overlapping: list[dict[str, Any]] = [
        {"use_rslora": True, "rank_pattern": {"linear": 8}},
        {"use_rslora": True, "alpha_pattern": {"linear": 8}},
        {"use_rslora": True, "rank_pattern": {"linear": 8}, "alpha_pattern": {"linear": 8}},
    ]
    patterns = {
        "rank_pattern": {"embed": 9, "conv2d": 16},
        "alpha_pattern": {"linear": 11, "conv2d": 13},
        "lora_alpha": 17,
        "r": 25,
    }
    return [
        *_rows(
            table,
            "parts",
            [
                *(_lora(part, init_lora_weights=start) for part in parts for start in (True, "gaussian", False)),
                *(
                    _lora("linear", init_lora_weights=start)
                    for start in ("orthogonal", "pissa_niter_16", "pissa_niter_3")
                ),
                _lora("linear", init_lora_weights="orthogonal", r=7),
                _lora(*parts, lora_alpha=3, r=16, use_rslora=False),
                _lora(*parts, lora_alpha=3, r=16, use_rslora=True),
                _lora(*parts, **patterns, use_rslora=False),
                _lora(*parts, **patterns, use_rslora=True),
                *(
                    _lora("linear", init_lora_weights=start, **settings)
                    for start in ("pissa", "olora")
                    for settings in (*converted, *overlapping)
                ),
                _lora("linear", init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")),
                _lora("linear", init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")),
                _lora("linear", init_lora_weights="mica", r=8),
                _lora("embed", init_lora_weights="mica", r=3),
                _lora("linear", init_lora_weights="mica", r=300),
                _lora("linear", init_lora_weights="eva"),
                _lora("linear", init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
                _lora("linear", init_lora_weights="lora_ga"),
                _lora("linear", eva_config=peft.EvaConfig()),
                _lora("linear", use_dora=True),
                _lora("linear", use_dora=True, **_RANDOM),
                _lora("linear", "conv2d", bias="none"),
                _lora("linear", "conv2d", bias="all"),
                _lora("linear", "conv2d", bias="lora_only"),
                _lora("linear", "conv2d", bias="invalid"),
                _lora("linear", "conv2d", lora_bias=True),
                _lora("embed", lora_bias=True),
                _lora("linear", modules_to_save=["foobar"]),
                _lora("embed", trainable_token_indices={"foobar": [1, 2, 3]}),
                _lora("linear", target_parameters=["linear.weight"]),
                _parameters("linear.weight", target_modules=["foobar"]),
                _parameters("foobar.weight", target_modules=["linear"]),
                _parameters("linear.weight", target_modules=[]),
                _parameters("linear", target_modules=[]),
                _parameters("foobar.weight", target_modules=None),
                _lora("linear", bias="all"),
            ],
        ),
        *_pairs(
            table,
            "parts",
            [
                (_lora("linear", bias="all"), _lora("linear", bias="lora_only")),
                (_lora("linear", bias="all"), _lora("linear")),
                (
                    _parameters("linear.weight", target_modules=[]),
                    _parameters("linear.weight", target_modules=[]),
                ),
                (_parameters("linear.weight", target_modules=[]), _parameters("embed.weight", target_modules=[])),
                (_lora("linear"), _lora("linear", init_lora_weights="pissa")),
                (_lora("linear"), _lora("linear", init_lora_weights="olora")),
            ],
        ),
        *_rows(table, "parts without bias", [_lora("linear", lora_bias=True), _lora("conv2d", lora_bias=True)]),
        *_rows(
            table,
            "paths",
            [_lora("baz", lora_alpha=1, r=8, rank_pattern={"baz": 8}, alpha_pattern={"1.baz": 2})],
        ),
        *_rows(table, "paths", [_lora("baz", lora_alpha=1, r=8, alpha_pattern={"1.baz": 2})]),
        *(
            row
            for r in (8, 2, 1)
            for row in _rows(table, "conv2d, two groups", [_lora("conv2d", r=r), _lora("conv2d", r=r, use_dora=True)])
        ),
        *_rows(table, "attention", [_lora("mha", **_RANDOM), _lora("mha", use_dora=True)]),
        *_rows(table, "attention, widths of key and value", [_lora("mha")]),
        *_rows(table, "mamba", [_lora("out_proj", "conv1d", task_type="CAUSAL_LM")]),
        *_rows(
            table,
            "mlp without bias",
            [
                _lora("lin0"),
                _lora("lin0", "lin1"),
                _lora("lin0", "lin1", **_RANDOM),
                *(_lora("lin0", "lin1", r=r) for r in (6, 10)),
                _lora("lin0", "lin1", r=6, rank_pattern={"lin1": 10}),
                _lora("lin0", "lin1", init_lora_weights=True, r=4, lora_alpha=8, kasa_config=peft.KasaConfig()),
                _lora("lin0", "lin1", r=8, lora_bias=True),
            ],
        ),
        *_pairs(
            table,
            "mlp without bias",
            [
                (
                    _lora("lin0", "lin1", r=a, lora_alpha=a, **_RANDOM),
                    _lora("lin0", r=b, lora_alpha=b, **_RANDOM),
                )
                for a, b in ((7, 13), (13, 7))
            ],
        ),
        *(
            row
            for model, ranks in (("conv2d alone", (7, 13)), ("conv2d alone, two groups", (2, 4)))
            for row in _pairs(
                table,
                model,
                [(_lora("conv", r=a, **_RANDOM), _lora("conv", r=b, **_RANDOM)) for a, b in (ranks, ranks[::-1])],
            )
        ),
        *_rows(
            table,
            "conv2d alone",
            [_lora("conv", r=8), _lora("conv", r=8, **_RANDOM), _lora("conv", r=8, lora_bias=True)],
        ),
        *_rows(
            table,
            "layers",
            [
                _lora("k_proj", r=8, lora_alpha=16),
                _lora("k_proj", r=8, lora_alpha=16, use_rslora=True),
                _lora(
                    "k_proj",
                    r=8,
                    lora_alpha=8,
                    rank_pattern={"layers.1.self_attn.k_proj": 16, "layers.2.self_attn.k_proj": 32},
                    alpha_pattern={"layers.2.self_attn.k_proj": 4, "layers.3.self_attn.k_proj": 16},
                ),
            ],
        ),
        *_pairs(table, "layers", [(_lora("k_proj", r=8, lora_alpha=16), _lora("k_proj", r=16, lora_alpha=8))]),
        *_rows(
            table,
            "opt",
            [
                _regex("all-linear", **_RANDOM),
                _regex("all-linear", task_type="CAUSAL_LM"),
                {},
                _lora("k_proj", "q_proj"),
            ],
        ),
        *_weight_tying(),
    ]


def _weight_tying() -> list[Row]:
    table, ends = "initialization", (["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"])
    saved = [_lora("linear", modules_to_save=names) for names in ends]
    targeted = [_lora("linear", *names) for names in ends]
    regexes = [_regex(text) for text in (".*embed_tokens$", ".*lm_head$", ".*(embed_tokens|lm_head)$")]
    together = {"ensure_weight_tying": True}
    return [
        *_rows(
            table,
            "tied",
            [
                *({**each, **together} for each in (*saved, _lora("linear"), *targeted, *regexes)),
                _regex("all-linear", **together),
                *(saved),
                *(targeted),
                {"trainable_token_indices": {"lm_head": [0], "embed_tokens": [0]}},
            ],
        ),
        *_rows(table, "untied", [{**each, **together} for each in (*saved, *targeted)]),
        *_rows(
            table,
            "seq2seq tied",
            [
                {**each, **together}
                for each in (*saved, *targeted, _lora("linear"), _lora("encoder.linear"), _lora("decoder.linear"))
            ],
        ),
    ]


def _tuners_utils() -> list[Row]:
    table = "tuners_utils"
    by_layer = [
        *(({"layers_to_transform": layers, "layers_pattern": ["bar"]}) for layers in ([1], [0], [2], [0, 1, 2])),
        *(({"layers_to_transform": [1], "layers_pattern": pattern}) for pattern in ([], "", None)),
        *(({"layers_to_transform": [0], "layers_pattern": pattern}) for pattern in ([], "", None)),
        {"layers_to_transform": [1], "layers_pattern": ["foo"]},
        {"layers_to_transform": [1], "layers_pattern": ["baz"]},
    ]
    heads = ([1], [0], [2], [0, 1, 2])
    names = [{"foo": 16}, {"^foo": 16}, {"^module.foo": 16}, {"module.module.foo": 16}, {"^module.module.foo": 16}]
    names += [
        {"module.foo": 16},
        {"^module.foo": 16, "^module.module.foo": 24},
        {"^foo": 16, "^module.foo": 24},
        {"^foo": 16, "module.module.foo": 24},
        {"^foo": 16, "^module.module.foo": 24},
        {"^foo": 16, "^module.foo": 24, "^module.module.foo": 32},
        {"^module.module.foo": 32, "^module.foo": 24, "^foo": 16},
    ]
    return [
        *_rows(table, "words", [_lora(*each) for each in ((), ("foo",), ("bar",), ("foo", "bar"))]),
        *_rows(table, "words", [_regex(text) for text in ("foo", ".*oo", "fo.*", ".*bar.*", ".*oba.*")]),
        *_rows(table, "paths", [_lora("baz", **each) for each in by_layer]),
        *_rows(
            table,
            "paths",
            [_lora("baz", "spam", layers_to_transform=each, layers_pattern=["bar"]) for each in ([1], [0, 1, 2])],
        ),
        *_rows(table, "paths", [_lora("q_proj"), _lora("q_proj", "v_proj")]),
        *_rows(table, "paths", [_lora("q_proj", layers_to_transform=each, layers_pattern=["h"]) for each in heads]),
        *_rows(
            table,
            "paths",
            [
                _lora("q_proj", "v_proj", layers_to_transform=[0, 1, 2], layers_pattern=["h"]),
                _lora("weight", layers_to_transform=[1], layers_pattern=["blocks"]),
            ],
        ),
        *_rows(
            table,
            "experts as modules",
            [
                _lora("q_proj", "up_proj", layers_pattern=pattern, layers_to_transform=[1], r=2, lora_alpha=4)
                for pattern in (None, "layers", ["h", "layers"])
            ],
        ),
        *_rows(table, "bloom", [{}, {"task_type": "CAUSAL_LM"}]),
        *_rows(
            table,
            "bloom",
            [{"task_type": "CAUSAL_LM", "exclude_modules": "transformer.h.1.self_attention.query_key_value"}],
        ),
        *(row for model in ("llama", "gpt2", "t5", "gpt_neox") for row in _rows(table, model, [_regex("all-linear")])),
        *_pairs(table, "llama", [(_regex("all-linear"), _regex("all-linear"))]),
        *_rows(
            table,
            "llama",
            [
                _lora("k_proj"),
                _regex(".*(q_proj|v_proj)$"),
                {},
                _parameters("v_proj.weight", target_modules=[], task_type="CAUSAL_LM"),
                _lora("q_proj", "v_proj", **_RANDOM),
            ],
        ),
        *_rows(table, "llama classifier", [_regex("all-linear", task_type="SEQ_CLS")]),
        *_rows(
            table,
            "mlp",
            [
                _regex("lin.*"),
                _parameters("lin0.weight"),
                _parameters("lin0.weight", "lin1.weight"),
                _regex("lin.*", exclude_modules="lin0"),
                _lora("lin0", "lin1", exclude_modules="lin0"),
                _lora("lin0", "lin1", exclude_modules=["lin0"]),
                _lora("lin0", "lin1", "relu", "drop", "sm", exclude_modules=["lin0", "lin1", "relu", "drop", "sm"]),
                _lora("non_existent_module"),
                _lora("non_existent_module", modules_to_save=["lin1"]),
                _lora("lin0", "non_existent_module", exclude_modules=["lin0"]),
                _lora("lin1", exclude_modules=["non_existent_module"]),
                _parameters("lin0.weight", target_modules=["lin1"]),
            ],
        ),
        *_pairs(table, "mlp", [(_lora("lin0"), _lora("lin1"))]),
        *_pairs(table, "several kinds", [(_lora("lin0", "conv1", "emb0"), _lora("lin0", "lin1", r=16))]),
        *_rows(table, "tied", [_lora("model.embed_tokens")]),
        *_rows(
            table,
            "nested",
            [
                _regex("all-linear"),
                _regex("all-linear", rank_pattern={"bla": 4, "oof": 6}, alpha_pattern={"baz": 3}),
                *(_regex("all-linear", rank_pattern=each) for each in names),
                *(
                    _regex("all-linear", alpha_pattern={key: 64 // value for key, value in each.items()})
                    for each in names
                ),
            ],
        ),
    ]


def _others() -> list[Row]:
    layernorm = "0.post_attention_layernorm"
    named = {
        "names with baz": ("foo_linear", "foo_baz", "baz_foo", "foo_baz_foo", "baz_foo_baz"),
        "names with lora": ("foo_linear", "foo_lora", "lora_foo", "foo_lora_foo", "lora_foo_lora"),
        "names with weight": ("foo_linear", "foo_weight", "weight_foo", "foo_weight_foo", "weight_foo_weight"),
    }
    biased = ("foo_linear", "foo_bias", "bias_foo", "foo_bias_foo", "bias_foo_bias")
    rows_of = r".*\.[0]\.self_attn\.v_proj|.*\.[1]\.self_attn\.k_proj"
    tokens = {"embed_tokens": [0, 1, 3]}
    return [
        *_pairs(
            "other",
            "llama",
            [
                (
                    _regex("all-linear", modules_to_save=[layernorm]),
                    _regex("all-linear", modules_to_save=["1.post_attention_layernorm"]),
                )
            ],
        ),
        *_rows(
            "other",
            "heads",
            [_lora("lin", modules_to_save=["classifier", "classifier2", "classifier3", "classifier4"])],
        ),
        *_rows("other", "llama classifier", [_lora("score", task_type="SEQ_CLS")]),
        *_rows(
            "other",
            "llama classifier",
            [_lora("embed_tokens", task_type="SEQ_CLS", trainable_token_indices=[0, 1])],
        ),
        *_rows("other", "mlp", [_lora("lin0", modules_to_save=["lin0"])]),
        *_rows(
            "low_level_api",
            "parts",
            [
                _lora("linear", lora_alpha=16, lora_dropout=0.1, r=64, bias="none"),
                _lora(
                    "linear", lora_alpha=16, lora_dropout=0.1, r=64, bias="none", modules_to_save=["embed", "conv2d"]
                ),
            ],
        ),
        *_rows(
            "low_level_api",
            "llama",
            [_regex(rows_of), _parameters("q_proj.weight", "v_proj.weight", target_modules=[])],
        ),
        *_rows("low_level_api", "llama", [_lora("v_proj", modules_to_save=["lm_head"])]),
        *(row for model, names in named.items() for row in _rows("low_level_api", model, [_lora(*names, **_RANDOM)])),
        *_rows("low_level_api", "names with bias", [_lora(*biased, bias="lora_only", **_RANDOM)]),
        *_pairs(
            "low_level_api",
            "opt",
            [(_lora("q_proj", "v_proj", r=4, lora_alpha=2), _lora("k_proj", "out_proj", r=8, lora_alpha=4))],
        ),
        *_rows("low_level_api", "opt", [_regex("all-linear", r=4, lora_alpha=2)]),
        *_rows(
            "trainable_tokens",
            "llama",
            [
                _regex("all-linear", trainable_token_indices=tokens),
                _regex("all-linear", trainable_token_indices=tokens, modules_to_save=["embed_tokens"]),
                _lora("q_proj", trainable_token_indices=tokens),
            ],
        ),
        *_rows(
            "trainable_tokens",
            "tied",
            [
                _lora("linear", trainable_token_indices=[1, 2, 3], ensure_weight_tying=True),
                _lora("linear", trainable_token_indices={"lm_head": [1, 2], "embed_tokens": [3, 4]}),
            ],
        ),
        *_rows(
            "config",
            "bert",
            [_lora("query", "value", layers_to_transform=[0], layers_pattern="layer"), _lora("query", "value")],
        ),
        *_rows("config", "bert", [_lora("query", "value", layers_pattern="layer")]),
        *_rows("arrow", "gpt2", [_lora("c_attn", r=4, fan_in_fan_out=True, **_RANDOM)]),
        *_rows(
            "lora_variants",
            "parts",
            [_lora("linear", "embed", "conv2d", use_dora=True), _lora("linear", alora_invocation_tokens=[1])],
        ),
        *_rows("lora_variants", "parts", [_lora("linear", kasa_config=peft.KasaConfig(), r=4)]),
        *_rows(
            "lorafa",
            "mlp",
            [
                _lora("lin0", "lin1", r=8, lora_alpha=24, use_rslora=True),
                _lora("lin0", "lin1", r=8, lora_alpha=24, bias="all"),
                _lora("lin0", "lin1", r=4, lora_alpha=24, rank_pattern={"lin0": 8}),
            ],
        ),
        *_rows("loraplus", "embedding", [_lora("emb", "lin0"), _lora("emb", "conv1d", "lin0")]),
    ]


ROWS: tuple[Row, ...] = tuple(
    {
        str(row): row
        for part in (_custom_models, _transformers, _target_parameters, _initialization, _tuners_utils, _others)
        for row in part()
    }.values()
)
"""Every configuration once."""
