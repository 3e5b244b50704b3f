"""PEFT's methods other than LoRA, by the ``peft_type`` of their configurations: their names, and how an adapter of each is used."""

from __future__ import annotations

from collections.abc import Mapping

_MERGED: Mapping[str, str] = {
    "ADALORA": "AdaLoRA",
    "ADAMSS": "AdaMSS",
    "BEFT": "BEFT",
    "BOFT": "BOFT",
    "BONE": "Bone",
    "C3A": "C3A",
    "DEFT": "DEFT",
    "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT",
    "FROD": "FRoD",
    "GLORA": "GLoRA",
    "GRALORA": "GraLoRA",
    "HIRA": "HiRA",
    "HRA": "HRA",
    "IA3": "IA³",
    "LN_TUNING": "tuning of layer norms",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MISS": "MiSS",
    "OFT": "OFT",
    "OSF": "OSF",
    "PEANUT": "PEANuT",
    "PSOFT": "PSOFT",
    "PVERA": "PVeRA",
    "RANDLORA": "RandLora",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "Super-Tuning",
    "TINYLORA": "TinyLoRA",
    "UNILORA": "Uni-LoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}
"""Methods whose adapters PEFT merges into the weights."""

_APART: Mapping[str, str] = {
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "CARTRIDGE": "Cartridges",
    "CPT": "context-aware prompt tuning",
    "LILY": "Lily",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "POLY": "Polytropon",
    "P_TUNING": "P-tuning",
    "SHADOW": "ShadowPEFT",
    "XLORA": "X-LoRA",
}
"""Methods whose adapters no weight can hold."""


def why_not_applied(peft_type: str) -> str | None:
    """Return why an adapter of a method other than LoRA is refused, and what to do with it; None of a method that is not known."""
    if peft_type in _MERGED:
        use = "merge it with PEFT (PeftModel.from_pretrained(model, directory).merge_and_unload()), and use the result"
        return f"an adapter of {_MERGED[peft_type]}, and lora_fx applies LoRA alone: {use}"
    if peft_type in _APART:
        return f"an adapter of {_APART[peft_type]}, and lora_fx applies LoRA alone: run it with PEFT; no weights can hold it"
    return None
