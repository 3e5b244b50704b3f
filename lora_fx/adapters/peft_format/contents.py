"""Overview of an adapter directory, by its config and the headers of its tensors. No model is needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lora_fx.adapters.peft_format.fingerprint import recorded
from lora_fx.adapters.peft_format.keys import PREFIX, is_of_rows, module_of_key
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.errors import listed, printable

_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight|(?<=B)\.bias)?"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MAX_MODULES, MAX_WHOLE = 12, 6


@dataclass(frozen=True)
class AdapterOverview:
    """What an adapter directory says of itself. ``str()`` is a line for each.

    Attributes:
        source: the directory.
        data: by headings; numbers, texts, and lists of them, for JSON.
    """

    source: str
    data: Mapping[str, Any]

    def __str__(self) -> str:
        rows = [(heading, _shown(value)) for heading, value in self.data.items() if value not in (None, [], {}, "")]
        width = max(len(heading) for heading, _ in rows)
        return "\n".join([f"{self.source}:", *(f"  {heading:<{width}}  {text}" for heading, text in rows)])


def overview_of(files: AdapterFiles) -> AdapterOverview:
    """Return the overview of an adapter that was opened.

    Ranks, alphas, scalings and dropout are those of the config, by which adapters are applied.
    """
    config, entries = files.config, files.file.entries
    found = {key: _FACTOR.fullmatch(key.removeprefix(PREFIX)) for key in entries}
    modules = dict.fromkeys(match["module"] for match in found.values() if match is not None)
    settings = [config.setting_of(module) for module in modules]
    rows = {module_of_key(key): entry.shape[:1] for key, entry in entries.items() if is_of_rows(key)}
    whole = [key.removeprefix(PREFIX) for key, match in found.items() if match is None and not is_of_rows(key)]
    base, origin = recorded(files.file.metadata)
    mapping = config.auto_mapping or {}
    tensors = [*entries.values(), *([] if files.prefix is None else [files.prefix.tensor])]
    elements = sum(prod(entry.shape) for entry in tensors)
    size = sum(prod(entry.shape) * entry.dtype.itemsize for entry in tensors)
    data = {
        "form": files.foreign.form if files.foreign else None,
        "kind": _kind(files, [match["kind"] for match in found.values() if match is not None]),
        "written by": f"PEFT {config.peft_version}" if config.peft_version else None,
        "base": config.base_model_name_or_path,
        "class of base": mapping.get("base_model_class"),
        "task": config.task_type,
        "branches": len(modules),
        "rank": _distinct([setting.rank for setting in settings]),
        "alpha": _distinct([setting.alpha for setting in settings]),
        "scaling": _distinct([setting.scale for setting in settings]),
        "dropout": config.lora_dropout,
        "modules": [f"{name} ({count})" for name, count in Counter(_NUMBER.sub("*", name) for name in modules).items()],
        "rows of embeddings": [f"{module} ({', '.join(map(str, count))})" for module, count in rows.items()],
        "trained whole": whole,
        "tensors": len(tensors),
        "elements": elements,
        "bytes": size,
        "dtype": sorted({str(entry.dtype).removeprefix("torch.") for entry in tensors}),
        "rules": origin.rules or None,
        "checks its base": bool(base),
    }
    return AdapterOverview(str(files.directory), data)


def _kind(files: AdapterFiles, kinds: Sequence[str]) -> str:
    if files.prefix is not None:
        said = files.prefix.config
        layers = f" for {said.num_layers} layers" if files.prefix.kind == "prefix" else ""
        return f"{files.prefix.kind} of {said.num_virtual_tokens} tokens{layers}"
    if files.config.has_rows_alone:
        return "trainable tokens"
    scaling = "rsLoRA" if files.config.use_rslora else "LoRA"
    more = ["magnitudes (DoRA)"] * ("magnitude_vector" in kinds) + ["biases in B"] * files.config.lora_bias
    return f"{scaling} with {' and '.join(more)}" if more else scaling


def _distinct(values: Sequence[float]) -> list[float]:
    return sorted({round(value, 6) for value in values})


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes, its file has a fingerprint of the base" if value else "no, its file has no fingerprint of the base"
    if isinstance(value, list):
        return listed(
            [f"{each:g}" if isinstance(each, float | int) else printable(str(each)) for each in value], MAX_MODULES
        )
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return printable(str(value))
