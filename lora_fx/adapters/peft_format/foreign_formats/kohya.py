"""kohya's keys, which web interfaces for diffusion models take: dots of a module's path as underscores, and alpha beside the factors.

    lora_unet_<module>.lora_down.weight    A
    lora_unet_<module>.lora_up.weight      B
    lora_unet_<module>.alpha               the scaling is alpha / rank; without one it is 1

``lora_te_``, ``lora_te1_`` and ``lora_te2_`` stand before the modules of text encoders, ``lora_transformer_`` before those of diffusers'
transformers. A path cannot be told from such a name alone; the modules of the graph tell. A U-Net has two names for each module: by
its path in diffusers, and by that in the code that SDXL was published with (``input_blocks_4_1_…``). So has FLUX, and some of its names
mean several modules (:mod:`.flux_names`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from lora_fx.adapters.peft_format.foreign_formats import flux_names
from lora_fx.adapters.peft_format.foreign_formats.diffusers import component_of, published_path
from lora_fx.adapters.peft_format.foreign_formats.foreign_file import MAX_NAMED, ForeignFile, branches_in, pairs
from lora_fx.adapters.peft_format.keys import PREFIX
from lora_fx.adapters.peft_format.tensors import AdapterTensor
from lora_fx.errors import AdapterError, printable, shortened
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.target_names import alpha_of

_KEY = re.compile(r"(?P<prefix>lora_(?:unet|transformer|prior|te\d?))_(?P<name>[^.]+)\.(?P<rest>.+)")
_KINDS = {"lora_down.weight": "A", "lora_up.weight": "B"}


def is_kohyas(key: str) -> bool:
    """Tell whether a key begins as kohya's do."""
    return _KEY.fullmatch(key) is not None


def read_kohya(path: Path, metadata: Mapping[str, str], entries: Mapping[str, AdapterTensor]) -> ForeignFile:
    """Read a file of kohya's form.

    Args:
        path: of the file.
        metadata: texts in it.
        entries: its tensors.

    Raises:
        AdapterError: it is malformed, or of an unsupported kind; all problems are named.
    """
    factors: dict[str, dict[str, dict[str, AdapterTensor]]] = {}
    alphas: dict[str, dict[str, AdapterTensor]] = {}
    problems = []
    for key, tensor in entries.items():
        found = _KEY.fullmatch(key)
        if found is not None and found["rest"] in _KINDS:
            by_module = factors.setdefault(found["prefix"], {})
            by_module.setdefault(found["name"], {})[_KINDS[found["rest"]]] = tensor
        elif found is not None and found["rest"] == "alpha":
            alphas.setdefault(found["prefix"], {})[found["name"]] = tensor
        else:
            problems.append(f"{printable(key)}: {_why_not(key)}")
    problems += [f"{prefix}: alphas without factors" for prefix in alphas.keys() - factors.keys()]
    if problems:
        raise AdapterError(str(path), shortened(problems, MAX_NAMED, "keys"))
    components = {prefix: pairs(path, each, alphas.get(prefix, {}), {}) for prefix, each in factors.items()}
    return ForeignFile("kohya", path, metadata, components, _spellings, "_", _fused)


def to_kohya(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], modules: Collection[str], model_class: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of an adapter in PEFT's words by kohya's keys, and the metadata.

    Args:
        config: of the adapter.
        tensors: by PEFT's keys.
        modules: the paths of all modules of the model.
        model_class: module and name of the model's class, by which the prefix is chosen, see :func:`.diffusers.component_of`.

    Raises:
        AdapterError: it has more than A and B of linear layers and convolutions, or two modules would have one name.
    """
    settings = branches_in(config, tensors, "kohya")
    spellings = _flat(modules)
    twice = [spellings[name] for name in map(_flattened, settings) if len(spellings.get(name, ())) > 1]
    if twice:
        told = [f"{' and '.join(map(repr, paths))} have one name in kohya's form" for paths in twice]
        raise AdapterError("the adapter cannot be written in kohya's form", shortened(told, MAX_NAMED, "modules"))
    prefix = {"text_encoder": "lora_te", "transformer": "lora_transformer"}.get(component_of(model_class), "lora_unet")
    found: dict[str, torch.Tensor] = {}
    for module, setting in settings.items():
        name = f"{prefix}_{_flattened(published_path(module, model_class))}"
        alpha = alpha_of(setting.rank, setting.scale, rslora=False)
        exact = torch.float32 if float(torch.tensor(alpha, dtype=torch.float32)) == alpha else torch.float64
        found[f"{name}.lora_down.weight"] = tensors[f"{PREFIX}{module}.lora_A.weight"]
        found[f"{name}.lora_up.weight"] = tensors[f"{PREFIX}{module}.lora_B.weight"]
        found[f"{name}.alpha"] = torch.tensor(alpha, dtype=exact)
    ranks = {setting.rank for setting in settings.values()}
    said = {"ss_network_module": "networks.lora", "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic"}
    return found, said


def _why_not(key: str) -> str:
    if key.endswith(".dora_scale"):
        return "a magnitude of DoRA, which is not supported in this form"
    if ".hada_" in key or ".lokr_" in key or ".lora_mid." in key:
        return "a factor of LoHa, LoKr or LoCon in Tucker's form, which are not supported"
    return "expected lora_unet_<module>.lora_down.weight, .lora_up.weight or .alpha, as kohya's trainer writes"


def _flattened(path: str) -> str:
    return path.replace(".", "_")


def _flat(modules: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(modules):
        found.setdefault(_flattened(path), []).append(path)
    return found


def _spellings(modules: Collection[str]) -> dict[str, list[str]]:
    """Return the modules by their names in kohya's form, all of each."""
    others: dict[str, list[str]] = {}
    for name, paths in flux_names.names(modules):
        if len(paths) == 1:
            others.setdefault(_flattened(name), []).extend(paths)
    layers = max((1 + int(each[1]) for path in modules if (each := _RESNET.match(path))), default=None)
    for path in sorted(modules):
        in_original_code = () if layers is None else _in_original_code(path, layers)
        for other in (f"text_model_{_flattened(path)}", *map(_flattened, in_original_code)):
            others.setdefault(other, []).append(path)
    return others | _flat(modules)


def _fused(modules: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the names in kohya's form that mean several modules, whose outputs lie behind one another."""
    return {_flattened(name): paths for name, paths in flux_names.names(modules) if len(paths) > 1}


_RESNET = re.compile(r"down_blocks\.\d+\.resnets\.(\d+)")


def _in_original_code(path: str, layers: int) -> Iterator[str]:
    """Yield the path of a U-Net's module in the code of its authors (stability.ai, ``openaimodel.py``).

    Args:
        path: in diffusers.
        layers: residual blocks in each block on the way down; on the way up there is one more.
    """
    found = _BLOCK.fullmatch(path)
    if path in _OUTSIDE:
        yield _OUTSIDE[path]
    elif found is not None:
        way, block, kind, index = found["way"], int(found["block"] or 0), found["kind"], int(found["index"])
        rest = _IN_RESNET.get(found["rest"], found["rest"]) if kind == "resnets" else found["rest"]
        if way == "mid_block":
            yield f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{rest}"
        elif way == "down_blocks":
            place = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else index)
            inner = {"resnets": "0.", "attentions": "1.", "downsamplers": "0."}[kind]
            yield f"input_blocks.{place}.{inner}{'op' if kind == 'downsamplers' else rest}"
        else:
            place = block * (layers + 1) + (layers if kind == "upsamplers" else index)
            for inner in {"resnets": "0.", "attentions": "1.", "upsamplers": "12"}[kind].rstrip("."):
                yield f"output_blocks.{place}.{inner}.{rest}"


_BLOCK = re.compile(
    r"(?P<way>down_blocks|mid_block|up_blocks)\.(?:(?P<block>\d+)\.)?(?P<kind>resnets|attentions|downsamplers|upsamplers)\."
    r"(?P<index>\d+)\.(?P<rest>.+)"
)
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
