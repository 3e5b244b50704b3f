"""The words of rule files: operators, roles, and the parts of a fused projection. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

Op = Literal["linear", "conv1d", "conv2d", "conv3d", "embedding", "expert"]
"""Kind of a call site: a product with a matrix in either layout, a convolution, a look-up, a product with stacked matrices."""

Layout = Literal["out_in", "in_out"]
"""Whether a weight is ``(out, in)``, as in ``nn.Linear``, or ``(in, out)``, as in GPT-2's ``Conv1D``."""

Role = Literal[
    "self_attention.query",
    "self_attention.key",
    "self_attention.value",
    "self_attention.output",
    "cross_attention.query",
    "cross_attention.key",
    "cross_attention.value",
    "cross_attention.output",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "expert.gate",
    "expert.up",
    "expert.down",
    "router",
    "embedding",
    "head",
    "lm_head",
]
"""Role of a call site, as the dataflow tells."""

RoleName = Literal[
    Role,
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
]
"""A role as a rule names it: also a role of attention without telling self from cross."""

Part = Literal["query", "key", "value", "gate", "up"]
"""A part of the output features of a fused projection."""

Scaling = Literal["standard", "rslora"]
"""alpha / rank (LoRA, arXiv 2106.09685), or alpha / √rank (rsLoRA, arXiv 2312.03732)."""

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "mica"]
"""How the factors start; ``"pissa_niter_16"`` and the like too.

kaiming, gaussian: A uniform with a = √5, or normal with standard deviation 1 / rank; B zero.
orthogonal: both random, in orthogonal spaces, so that their product is zero but for rounding.
pissa (arXiv 2404.02948), olora (arXiv 2406.01775): parts of the weight, and the branch computes beside what is left of it.
mica (arXiv 2604.01694): B has singular vectors of the weight and never trains; A is zero.
"""

Start = str
"""How the factors of a branch start: an ``Init``, ``"pissa_niter_<n>"``, ``"random"``: both factors (``init_lora_weights=False``), or ``"given"``."""

NITER = re.compile(r"pissa_niter_[1-9][0-9]{0,2}")
"""PiSSA by a randomised decomposition of so many steps."""


def splits_weight(start: Start) -> bool:
    """Tell whether a start takes the product of its factors out of the weight; ``"given"`` ones whose product is not zero do."""
    return start in ("pissa", "olora", "given") or NITER.fullmatch(start) is not None


Variant = Literal["lora", "dora"]
"""Kind of a branch: LoRA (arXiv 2106.09685), or DoRA (arXiv 2402.09353), which has a magnitude for each output feature besides."""

AttentionPlace = Literal["self_attention", "encoder", "cross_attention"]
"""Where an attention is in a model: of a model with an encoder and a decoder, self-attention is that of the decoder."""

PrefixRole = Literal["self_attention", "peft", "encoder", "cross_attention"]
"""Which attentions get learned keys and values, and which: layer i those numbered 2i and 2i + 1, or with "peft" those that PEFT's file means.

They differ in encoder-decoder models: of the 2L that PEFT's file has, L the number of layers of the encoder, layer i of the decoder
reads 4i and 4i + 1 modulo 2L, since PEFT throws those for cross-attention away. Its file has none for encoders and cross-attention.
"""

PrefixPositions = Literal["peft", "unchanged"]
"""Positions of the text behind a prefix: shifted by it, as PEFT has them behind a past, or those that the text has without one."""

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
"""A task, as PEFT names it."""

TASK_HEADS: Mapping[TaskType, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The tasks for which PEFT trains a head, and the ends of the names of the modules that it takes for one."""

# How other tools spell our keys: an unknown key is an error, and these get a better hint than spelling distance can give.
FOREIGN_KEYS: Mapping[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "scaling",
    "init_lora_weights": "init",
    "target_modules": "target",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "modules_to_save": "trainable",
    "use_dora": "variant",
    "lora_bias": "bias",
    "alora_invocation_tokens": "invocation_tokens",
}

OPS: tuple[Op, ...] = get_args(Op)
ROLES: tuple[Role, ...] = get_args(Role)
PARTS: tuple[Part, ...] = get_args(Part)


def role_is(role: Role, name: RoleName) -> bool:
    """Tell whether a rule's name means a role: ``attention.query`` means the query of self-attention and of cross-attention."""
    kind, _, part = role.partition(".")
    return role == name or (kind.endswith("_attention") and name == f"attention.{part}")
