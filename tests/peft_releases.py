"""What each release of PEFT wrote into ``adapter_config.json`` for a plain LoRA, as its ``LoraConfig.save_pretrained`` does."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

GONE = "no longer written"

CHANGES: dict[str, dict[str, Any]] = {
    "0.1.0": {
        "base_model_name_or_path": "base", "bias": "none", "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True,
        "lora_alpha": 5, "lora_dropout": None, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 3,
        "target_modules": ["first", "last"], "task_type": "CAUSAL_LM",
    },
    "0.2.0": {},
    "0.3.0": {"enable_lora": GONE, "init_lora_weights": True, "merge_weights": GONE},
    "0.4.0": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "lora_dropout": 0.0, "revision": None},
    "0.5.0": {},
    "0.6.0": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.6.1": {}, "0.6.2": {},
    "0.7.0": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.7.1": {},
    "0.8.0": {"use_rslora": False},
    "0.8.1": {}, "0.8.2": {},
    "0.9.0": {"use_dora": False},
    "0.10.0": {"layer_replication": None},
    "0.11.0": {}, "0.11.1": {}, "0.12.0": {}, "0.13.0": {}, "0.13.1": {}, "0.13.2": {},
    "0.14.0": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15.0": {"corda_config": None, "trainable_token_indices": None},
    "0.15.1": {}, "0.15.2": {},
    "0.16.0": {"qalora_group_size": 16, "use_qalora": False},
    "0.17.0": {"target_parameters": None},
    "0.17.1": {},
    "0.18.0": {
        "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0",
    },
    "0.18.1": {"peft_version": "0.18.1"},
    "0.19.0": {"lora_ga_config": None, "peft_version": "0.19.0", "use_bdlora": None},
    "0.19.1": {"peft_version": "0.19.1"},
    "0.20.0": {"monteclora_config": None, "peft_version": "0.20.0", "velora_config": None},
    "0.21.0": {"kasa_config": None, "peft_version": "0.21.0"},
    "0.21.1": {"peft_version": "0.21.1"},
    "0.21.2": {"peft_version": "0.21.2"},
}  # fmt: skip
"""Release → keys that it was the first to write so, with their values."""


def _changed(before: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**before, **change}.items() if value != GONE}


RELEASES: dict[str, dict[str, Any]] = dict(zip(CHANGES, accumulate(CHANGES.values(), _changed), strict=True))
"""Release → the configuration that it writes."""
