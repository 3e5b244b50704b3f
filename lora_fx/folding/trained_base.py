"""The base on disk beside the bases that adapters were trained on, as far as their files say which these were."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lora_fx.adapters.peft_format.fingerprint import recorded, recorded_schemes
from lora_fx.adapters.peft_format.opening import AdapterFiles, check_base
from lora_fx.errors import AdapterError, listed, option, printable, warn
from lora_fx.files.bounded import CONFIG_BYTES, read_bounded
from lora_fx.files.quantised_checkpoints import scheme_of_settings
from lora_fx.folding.checkpoint_places import Places
from lora_fx.folding.dense_base import DenseBase
from lora_fx.graph.state import State


def trained_on(opened: Sequence[AdapterFiles]) -> list[dict[str, str]]:
    """Return the fingerprints of the bases that adapters were trained on; an empty one for those that do not say."""
    return [recorded(files.file.metadata)[0] for files in opened]


def check_bases(
    opened: Sequence[AdapterFiles], dense: DenseBase, places: Places, state: State, *, strict: bool
) -> None:
    """Compare the base with those that the adapters were trained on, if the file of any says of which values it was.

    PEFT's files do not. Of these, a warning says where their config names a base that is quantised, and the fold is into a dense one.

    Raises:
        AdapterError: they differ, and ``strict`` asks for equal ones; or factors are for a weight that lies the other way round.
    """
    told = trained_on(opened)
    found = places.fingerprint(state) if any(told) else {}
    for files, base in zip(opened, told, strict=True):
        check_base(files, found | places.same_values(base, found, dense.loaded_in), strict=strict)
        _check_way_round(files, places)
        if not dense.schemes and not base:
            _warn_of_quantised_base(files)


def _check_way_round(files: AdapterFiles, places: Places) -> None:
    """Refuse factors at parameters that were quantised as ``(out, in)``, and that GPT-2's layers store ``(in, out)``.

    PEFT takes the sides of factors at a parameter by how it is stored.
    """
    named = tuple(files.config.target_parameters or ())
    turned = [
        name
        for name in recorded_schemes(files.file.metadata)
        if any(f".{name}".endswith(f".{each}") for each in named) and name in places.plain and places.is_turned(name)
    ]
    if turned:
        problem = (
            f"target_parameters: {listed(turned, 3)} was quantised as (out, in), and is stored (in, out) in {places.checkpoint.model}, so that "
            "the factors are for its transpose. Load the model quantised, fold with lora_fx.from_adapter and lora_fx.fold, and write it with "
            "lora_fx.huggingface.save_pretrained; or train with a bnb_4bit_compute_dtype that is the model's dtype"
        )
        raise AdapterError(str(files.directory), [problem])


def _warn_of_quantised_base(files: AdapterFiles) -> None:
    name = files.config.base_model_name_or_path
    if not name:
        return
    settings = _quantisation_of(name)
    if settings is None and not _NAMED.search(name):
        return
    scheme = None if settings is None else scheme_of_settings(settings)
    way = scheme or "nf4"
    hint = option(f"quantised={way!r}", f"--quantised {way}")
    told = (
        "by its name"
        if settings is None
        else scheme or str(settings.get("quant_method", "in a way that it does not name"))
    )
    warn(
        f"{files.directory}: its config says that it was trained on {printable(name)}, which is quantised ({printable(told)}), and it is folded "
        f"into a dense base. If its weights learned beside quantised ones, fold into that checkpoint, or pass "
        f"{hint if scheme else f'the way in which it was quantised, {hint} for example'}."
    )


_NAMED = re.compile(r"(?i)(?:^|[-_./])(?:bnb|4-?bit|8-?bit|gptq|awq|int4|nf4)(?:$|[-_./])")
"""Words by which names of checkpoints say that they are quantised, as in ``model-bnb-4bit``."""


def _quantisation_of(name: str) -> dict[str, Any] | None:
    """Return ``quantization_config`` of a base that is a directory, or in the cache of the hub; nothing is downloaded."""
    path: Any = Path(name) / "config.json"
    with suppress(OSError, ValueError, RecursionError):
        if not path.is_file():
            path = try_to_load_from_cache(name, "config.json")
        if isinstance(path, str | Path):
            found = json.loads(read_bounded(Path(path), CONFIG_BYTES))
            settings = found.get("quantization_config") if isinstance(found, dict) else None
            return settings if isinstance(settings, dict) else None
    return None
