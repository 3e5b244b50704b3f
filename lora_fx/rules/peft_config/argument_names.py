"""Arguments by the names that PEFT gives them, answered by what they are called here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lora_fx.errors import PlanError
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.other_keys import VARIANTS

P = ParamSpec("P")
T = TypeVar("T")

_HERE = {
    "r": "rank=",
    "lora_alpha": "alpha=",
    "lora_dropout": "dropout=",
    "adapter_name": "adapter=",
    "target_modules": 'rules=["q_proj", "v_proj"]',
    "peft_config": "rules=",
    "lora_config": "rules=",
    "modules_to_save": 'a [[select]] with trainable = "all" in the rules',
    "use_rslora": 'scaling = "rslora" in the rules',
    "init_lora_weights": 'init = "gaussian" or "kaiming" in the rules',
    "bias": 'a [[select]] with trainable = "bias" in the rules',
    "exclude_modules": "exclude = […] in the rules",
    "layers_to_transform": "layers = […] in the rules",
    "rank_pattern": "rank = … of a [[select]] in the rules",
    "alpha_pattern": "alpha = … of a [[select]] in the rules",
    "inference_mode": "inference=True of rewrite",
}
"""PEFT's names → what they are called here."""


def refusing_peft_names(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, which refuses arguments with the names that PEFT gives them by the names that they have here."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        own = function.__annotations__
        theirs = [name for name in kwargs if name not in own and (name in _HERE or name in _peft_keys())]
        if theirs:
            told = ", ".join(f"{name}= ({_HERE[name]} here)" if name in _HERE else f"{name}=" for name in theirs)
            example = next((name for name in theirs if name in _peft_keys()), "…")
            config = "LoraConfig(…)" if example == "…" else f"LoraConfig({example}=…, …)"
            raise PlanError(f"{function.__name__} takes no {told}; or pass the whole configuration: rules={config}.")
        return function(*args, **kwargs)

    return call


@functools.cache
def _peft_keys() -> frozenset[str]:
    """Return the names of all arguments of a ``LoraConfig``, as far as they are known."""
    return frozenset({*AdapterConfig.model_fields, *VARIANTS})
