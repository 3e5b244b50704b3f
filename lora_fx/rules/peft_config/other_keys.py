"""Keys of PEFT's configurations that lora_fx does not apply: variants of LoRA, and keys without effect on the result.

Made from the configurations that PEFT 0.1 to 0.21 write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_fx.errors import option
from lora_fx.rules.validation import plain, shown

UNUSED: Mapping[str, Any] = {
    **dict.fromkeys(
        (
            "arrow_config",
            "corda_config",
            "eva_config",
            "kasa_config",
            "lora_ga_config",
            "megatron_config",
            "monteclora_config",
            "use_bdlora",
            "velora_config",
        )
    ),
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_qalora": False,
}
"""Those that PEFT 0.21 writes, with their values where they are unused."""

VARIANTS: Mapping[str, str] = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal,",
    "megatron_config": "Megatron's parallel layers",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base weights,",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "enable_lora": "LoRA on parts of a fused projection in the form of PEFT 0.1 and 0.2",
}
"""Options that lora_fx cannot apply, by their names for people."""

_FOLDABLE = frozenset({"kasa_config", "monteclora_config", "use_qalora", "velora_config"})
"""Of these, the ones that are affine in evaluation, so that a trace of PEFT's model folds."""

WITHOUT_EFFECT = frozenset(
    {
        "merge_weights",  # PEFT 0.1 and 0.2: whether .eval() merges
        "megatron_core",  # with megatron_config
        "qalora_group_size",  # with use_qalora
        "runtime_config",  # where factors lie, and how they are loaded
        # Settings of starts, which init_lora_weights chooses; one that changes the base is refused there.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
    }
)
"""Keys that say nothing by themselves of what the adapter computes, whatever their values."""


def is_off(value: Any) -> bool:
    """Tell whether a value switches an option off: null, false, 0, or an empty string, list or object."""
    return value in (None, False, "", [], {})  # False equals 0 and 0.0


def is_without_effect(key: str, value: Any) -> bool:
    """Tell whether a key that lora_fx does not apply says nothing of what the adapter computes."""
    return is_off(value) or key in WITHOUT_EFFECT


def way_of(key: str) -> str:
    """Return advice to fold a trace of PEFT's model with a variant, where that works."""
    fold = "lora_fx.fold(lora_fx.trace(peft_model, inference=True))"
    return f", or fold a trace of PEFT's model: {fold}" if key in _FOLDABLE else ""


def problem_of_key(key: str, value: Any, ignored: Collection[str]) -> str | None:
    """Return why a key that lora_fx does not apply is refused, or None.

    Args:
        key: not one of those that are applied.
        value: that it has in the file.
        ignored: keys of which somebody knows that they have no effect on the result.
    """
    if is_without_effect(key, value):
        return None
    merge = "Merge the adapter with PEFT, and use the result"
    if key in VARIANTS:
        told = ", and cannot be ignored, since the result depends on it" if key in ignored else ""
        return f"{plain(key)}: {VARIANTS[key]} is not supported{told}: found {shown(value)}. {merge}{way_of(key)}"
    if key in ignored:
        return None
    name = plain(key)
    return (
        f"{name}: unknown key, on which the result may depend: found {shown(value)}. If it does not, pass "
        f"{option(f'ignore_config_keys=[{name!r}]', f'--ignore-config-key {name}')}. {merge} otherwise"
    )
