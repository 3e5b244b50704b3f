"""diffusers' ``pytorch_lora_weights.safetensors``: what its pipelines (``save_lora_weights``) and models (``save_lora_adapter``) write.

    unet.<module>.lora_A.weight, unet.<module>.lora_B.weight    a pipeline's; transformer., text_encoder., …
    <module>.lora_A.weight, …                                   a model's
    <module>.alpha                                              a number of some writers; the scaling is alpha / rank, without one 1
    <module>.lora.down.weight, <module>.lora_linear_layer.up.weight,
    <attention>.processor.to_q_lora.down.weight                 of earlier releases

The metadata's ``lora_adapter_metadata`` is the PEFT configuration as JSON; its keys have the prefix of their component too. Modules are
those of the keys, and of the configuration only what else it says counts, as in diffusers' ``load_lora_adapter`` (0.42).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_fx.adapters.peft_format.foreign_formats.foreign_file import MAX_NAMED, ForeignFile, branches_in, pairs
from lora_fx.adapters.peft_format.keys import PREFIX
from lora_fx.adapters.peft_format.tensors import AdapterTensor
from lora_fx.errors import AdapterError, printable, shortened
from lora_fx.rules.peft_config.config import AdapterConfig, config_in
from lora_fx.rules.rule_file import Setting
from lora_fx.rules.validation import shown

METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = (
    *("unet", "transformer", "transformer_2", "controlnet", "prior"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
"""Names of the models of a pipeline that may have an adapter."""


def read_diffusers(
    path: Path, metadata: Mapping[str, str], entries: Mapping[str, AdapterTensor], ignored: Collection[str] = ()
) -> ForeignFile:
    """Read a file of diffusers' form.

    Args:
        path: of the file.
        metadata: texts in it.
        entries: its tensors.
        ignored: keys of the configuration in the metadata that have no effect on the result.

    Raises:
        AdapterError: it is malformed, or of an unsupported kind; all problems are named.
    """
    factors: dict[str, dict[str, dict[str, AdapterTensor]]] = {}
    alphas: dict[str, dict[str, AdapterTensor]] = {}
    problems = []
    for key, tensor in entries.items():
        prefix, name = _split(key)
        if (found := _FACTOR.fullmatch(name)) is not None:
            module = _module_of(found, is_text=prefix.startswith("text_encoder"))
            kind = "A" if found["kind"] in ("lora_A", "down") else "B"
            pair = factors.setdefault(prefix, {}).setdefault(module, {})
            if kind in pair:
                problems.append(f"{printable(key)}: a second {kind} of {module!r}")
            pair[kind] = tensor
        elif name.endswith(".alpha"):
            alphas.setdefault(prefix, {})[name.removesuffix(".alpha")] = tensor
        else:
            problems.append(f"{printable(key)}: {_why_not(name)}")
    problems += [f"{prefix or 'no prefix'}: alphas without factors" for prefix in alphas.keys() - factors.keys()]
    if problems:
        raise AdapterError(str(path), shortened(problems, MAX_NAMED, "keys"))
    configs = _configs(path, metadata, factors, ignored)
    components = {}
    for prefix, by_module in factors.items():
        settings = _settings(path, configs[prefix], by_module) if prefix in configs else {}
        components[prefix] = pairs(path, by_module, alphas.get(prefix, {}), settings)
    return ForeignFile("diffusers", path, metadata, components, _spellings, ".")


def to_diffusers(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], model_class: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of an adapter in PEFT's words by diffusers' keys, and the metadata.

    Args:
        config: of the adapter.
        tensors: by PEFT's keys.
        model_class: module and name of the model's class, by which the prefix is chosen.

    Raises:
        AdapterError: it has more than A and B of linear layers and convolutions.
    """
    branches_in(config, tensors, "diffusers")
    component = component_of(model_class)
    prefix = f"{component}." if component else ""
    said = {f"{prefix}{key}": value for key, value in json.loads(config.to_json()).items()}
    named = {f"{prefix}{published_path(key.removeprefix(PREFIX), model_class)}": each for key, each in tensors.items()}
    return named, {METADATA_KEY: json.dumps(said, indent=2, sort_keys=True)}


def component_of(model_class: str) -> str:
    """Return what diffusers' pipelines call a model of a class (``"diffusers.models…:UNet2DConditionModel"``); empty if unknown."""
    module, _, name = model_class.partition(":")
    if module.startswith("diffusers."):
        return "unet" if name.startswith("UNet") else "transformer" if "Transformer" in name else ""
    return "text_encoder" if module.startswith("transformers.") and name in _TEXT_ENCODERS else ""


def published_path(path: str, model_class: str) -> str:
    """Return the path of a module by which files for pipelines name it: that of CLIP's text models before transformers 5 dropped a part.

    diffusers (0.42, ``_load_lora_into_text_encoder``) takes the part off again where the model of its transformers has none.
    """
    is_clips = component_of(model_class) == "text_encoder" and model_class.partition(":")[2].startswith("CLIP")
    return f"text_model.{path}" if is_clips and not path.startswith(("text_model.", "text_projection")) else path


_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel")


def _split(key: str) -> tuple[str, str]:
    """Return the prefix of a key, if it is the name of a pipeline's model, and the rest."""
    first, _, rest = key.partition(".")
    return (first, rest) if first in COMPONENTS else ("", key)


def _module_of(found: re.Match[str], *, is_text: bool) -> str:
    """Return the module that a key means, by the names of today."""
    module = found["module"].replace(".processor", "")
    if found["projection"] is None:
        return module
    return f"{module}.{_PROJECTIONS_OF_TEXT[found['projection']] if is_text else found['projection'].replace('out', 'out.0')}"


_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<projection>to_[qkv]|to_out)_lora\.|lora\.|lora_linear_layer\.|(?=lora_[AB]\.))(?P<kind>down|up|lora_A|lora_B)\.weight"
)
_PROJECTIONS_OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _why_not(name: str) -> str:
    if "lora_magnitude_vector" in name or name.endswith("dora_scale"):
        return "a magnitude of DoRA, which is not supported in this form"
    if ".lokr_" in name or ".hada_" in name:
        return "a factor of LoKr or LoHa, which are not supported"
    if name.endswith((".lora_A.bias", ".lora_B.bias", ".lora.up.bias")):
        return "a bias of a factor (lora_bias), which is not supported"
    return "expected <module>.lora_A.weight, .lora_B.weight or .alpha, as diffusers writes"


def _configs(
    path: Path, metadata: Mapping[str, str], prefixes: Collection[str], ignored: Collection[str]
) -> dict[str, AdapterConfig]:
    """Return the configuration of each component that the metadata have one of."""
    if METADATA_KEY not in metadata:
        return {}
    source = f"{path}, {METADATA_KEY}"
    try:
        document = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise AdapterError(source, [f"expected JSON: {error}"]) from error
    if not isinstance(document, dict):
        raise AdapterError(source, [f"expected an object, found {shown(document)}"])
    said: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        prefix, name = _split(key)
        said.setdefault(prefix, {})[name] = value
    configs = {prefix: config_in(said[prefix], source, ignored) for prefix in prefixes if prefix in said}
    variants = [
        f"{prefix}{'.' if prefix else ''}{key}: expected false, since this form has no {what} here, got true"
        for prefix, config in configs.items()
        for key, what, on in (
            ("use_dora", "magnitudes of DoRA", config.use_dora),
            ("lora_bias", "biases of B", config.lora_bias),
        )
        if on
    ]
    if variants:
        raise AdapterError(source, variants)
    return configs


def _settings(path: Path, config: AdapterConfig, modules: Collection[str]) -> dict[str, Setting]:
    try:
        return {module: config.setting_of(module) for module in modules}
    except TimeoutError as error:  # of a regular expression
        raise AdapterError(f"{path}, {METADATA_KEY}", [str(error)]) from error


def _spellings(modules: Collection[str]) -> dict[str, list[str]]:
    """Return the modules by their paths, and by those that text models of transformers 4 had."""
    return {f"text_model.{path}": [path] for path in modules} | {path: [path] for path in modules}
