"""Opening of an adapter directory: its config, the header of its file, and the base that it names. No graph is needed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fx.adapters.peft_format.fingerprint import differences, recorded
from lora_fx.adapters.peft_format.stacks import LAYOUTS, StackLayout
from lora_fx.errors import AdapterError, LoraFxError, shortened
from lora_fx.files.safetensors import TensorFile
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig, read_config
from lora_fx.rules.validation import shown

FILE_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory that was opened.

    Attributes:
        directory: where it is.
        config: of the adapter.
        file: with the tensors.
        stacks: the layout of the factors of stacked experts, if it was given.
    """

    directory: Path
    config: AdapterConfig
    file: TensorFile
    stacks: StackLayout | None = None


def read_adapter(
    directory: Path, stacks: StackLayout | None = None, ignore_config_keys: Collection[str] = ()
) -> AdapterFiles:
    """Open an adapter directory.

    Args:
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        stacks: the layout of the factors of stacked experts, where the directory does not tell it.
        ignore_config_keys: keys of the config that lora_fx does not know, and that have no effect on the result.

    Raises:
        AdapterError: something is missing or malformed, or of an unsupported kind.
    """
    if stacks is not None and stacks not in LAYOUTS:
        problem = f"stacks: expected {' or '.join(map(repr, LAYOUTS))}, got {shown(stacks)}"
        raise AdapterError(str(directory), [problem])
    if isinstance(ignore_config_keys, str):
        problem = f"ignore_config_keys: expected a list of keys, got {shown(ignore_config_keys)}"
        raise AdapterError(str(directory), [problem])
    if not (directory / CONFIG_NAME).is_file() and directory.is_dir():
        inner = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
        if inner:
            problem = f"expected {CONFIG_NAME}, found it in {', '.join(inner)}: give one of these directories"
            raise AdapterError(str(directory), [problem])
    config = read_config(directory, ignore_config_keys)
    path = directory / FILE_NAME
    if not path.is_file():
        if (directory / PICKLE_NAME).is_file():
            convert = f"import torch, safetensors.torch as s; s.save_file(torch.load('{PICKLE_NAME}', weights_only=True), '{FILE_NAME}')"
            problem = (
                f"{PICKLE_NAME} is a pickle, which can run code as it is read, and is not read. Convert it, in its directory: "
                f'python -c "{convert}"'
            )
            raise AdapterError(str(directory), [problem])
        raise AdapterError(str(directory), [f"expected {FILE_NAME}, which is not there"])
    try:
        return AdapterFiles(directory, config, TensorFile.open(path), stacks)
    except AdapterError:
        raise
    except LoraFxError as error:
        raise AdapterError(str(directory), [str(error)]) from error


def check_base(files: AdapterFiles, found: Mapping[str, str | None], *, strict: bool) -> None:
    """Compare a base with the base that an adapter was trained on, if the adapter's file has its fingerprint.

    Args:
        files: of the adapter.
        found: fingerprint of the base, see :func:`lora_fx.adapters.peft_format.fingerprint.differences`; empty if its weights are not known.
        strict: whether a difference is an error, or else a warning.

    Raises:
        AdapterError: they differ.
    """
    trained_on, _ = recorded(files.file.metadata)
    unlike = list(differences(trained_on, found)) if trained_on and found else []
    if unlike:
        source = str(files.directory)
        if strict:
            advice = "the adapter was trained on another base; pass that model, or strict=False"
            raise AdapterError(source, [advice, *shortened(unlike, _MAX_NAMED, "tensors")])
        warnings.warn(f"{source}: the adapter was trained on another base:\n  " + "\n  ".join(unlike), stacklevel=4)


_MAX_NAMED = 10
