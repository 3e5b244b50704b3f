"""A model from a directory or a config file: its structure alone, on the meta device. No weights are read, no code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lora_fx.errors import LoraFxError


def empty_model(path: str | Path) -> nn.Module:
    """Return the transformers model that a config describes, without weights.

    Args:
        path: a model directory, or its ``config.json``.

    Raises:
        LoraFxError: there is no config, or transformers has no model for it. Code that comes with a model is never run.
    """
    path = Path(path)
    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise LoraFxError(
            f"{path}: expected a model directory with a config.json, or such a file. Nothing is downloaded."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraFxError(
            f"{path}: transformers {transformers.__version__} cannot read this config: {error}"
        ) from error
    with torch.device("meta"):
        return _build(config, path)


def _build(config: Any, path: Path) -> nn.Module:
    names = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, name) for name in names if _is_model(name)), None)
    try:
        made = transformers.AutoModel.from_config(config) if model_class is None else model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise LoraFxError(f"{path}: a model cannot be made of this config: {error}") from error
    assert isinstance(made, nn.Module)
    return made


def _is_model(name: Any) -> bool:
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
