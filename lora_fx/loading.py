"""A model from a directory, or its structure alone from a config. Nothing is downloaded, no code that comes with it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
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
    config = _read_config(path)
    with torch.device("meta"):
        return _build(config, path)


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the transformers model in a directory, in evaluation mode. Of weights, only safetensors files are read.

    Args:
        path: of the directory.
        dtype: of the weights; by default that in which they were saved.

    Raises:
        LoraFxError: it is no such directory, transformers cannot load it, or files do not have all of its weights.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise LoraFxError(f"{path}: expected a directory with a config.json and safetensors files.")
    config = _read_config(path)
    model_class = _class_of(config) or transformers.AutoModel
    options = {"trust_remote_code": False} if model_class is transformers.AutoModel else {}
    try:
        loaded, report = model_class.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype or "auto",
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise LoraFxError(f"{path}: transformers {transformers.__version__} cannot load this model: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise LoraFxError(
            f"{path}: the files have no values for {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}, which would "
            f"be random. Let 'architectures' in config.json name the class that was saved; it says {config.architectures}."
        )
    assert isinstance(loaded, nn.Module)
    return loaded.eval()


def _read_config(path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraFxError(
            f"{path}: transformers {transformers.__version__} cannot read this config: {error}"
        ) from error


def _class_of(config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    return next((getattr(transformers, name) for name in names if _is_model(name)), None)


def _build(config: Any, path: Path) -> nn.Module:
    model_class = _class_of(config)
    try:
        made = transformers.AutoModel.from_config(config) if model_class is None else model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise LoraFxError(f"{path}: a model cannot be made of this config: {error}") from error
    assert isinstance(made, nn.Module)
    return made


def _is_model(name: Any) -> bool:
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
