"""Readers of files that strangers give, each as a function of bytes that fails only by what a reader must never do."""

from __future__ import annotations

import json
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.peft_format.tensors import open_tensors
from lora_fx.errors import LoraFxError
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.rules.lookup import load
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.read_config import read_config
from lora_fx.rules.rule_file import RuleSet
from lora_fx.tracing.example_inputs import read_example_inputs

SECONDS = 2.0
"""Of a CPU, in which a file is read or refused."""

MESSAGE = 100_000
"""Characters of a message, at most."""


class Taker(nn.Module):
    """A module with the inputs that files have."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x if y is None else x + y


def rules(data: bytes, directory: Path) -> None:
    path = directory / "fuzzed.toml"
    path.write_bytes(data)
    read = load(path)
    assert isinstance(read, RuleSet)
    for selection in read.select[:3]:
        selection.matches_name("model.layers.3.self_attn.q_proj")


def config(data: bytes, directory: Path) -> None:
    (directory / "adapter_config.json").write_bytes(data)
    read = read_config(directory)
    if isinstance(read, AdapterConfig):
        try:
            read.selects("model.layers.3.self_attn.q_proj")
            read.setting_of("model.layers.3.self_attn.q_proj")
        except TimeoutError as error:  # as documented: callers say which selection it is of
            raise LoraFxError(str(error)) from error


def _adapter(name: str, data: bytes, directory: Path) -> None:
    (directory / name).write_bytes(data)
    file = open_tensors(directory)
    for key, entry in file.entries.items():
        if torch.Size(entry.shape).numel() <= 10_000:
            assert file.read(key).shape == entry.shape


def tensors(data: bytes, directory: Path) -> None:
    _adapter("adapter_model.safetensors", data, directory)


def pickle(data: bytes, directory: Path) -> None:
    _adapter("adapter_model.bin", data, directory)


def header(data: bytes, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(data)
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.size <= len(data)
    for key in list(checkpoint.tensors)[:10]:
        checkpoint.read(key)


def index(data: bytes, directory: Path) -> None:
    inside = directory / "model"
    inside.mkdir(exist_ok=True)
    for place in (directory / "secret.safetensors", inside / "a.safetensors", inside / "b.safetensors"):
        place.write_bytes(safetensors({place.stem: 3}))
    (inside / "model.safetensors.index.json").write_bytes(data)
    checkpoint = Checkpoint.open(inside)
    assert all(file.path.resolve().parent == inside.resolve() for file in checkpoint.files)
    for key in checkpoint.tensors:
        checkpoint.read(key)


def inputs(data: bytes, directory: Path) -> None:
    path = directory / "inputs.safetensors"
    path.write_bytes(data)
    assert "x" in read_example_inputs(path, Taker())


READERS: Mapping[str, Callable[[bytes, Path], None]] = {
    each.__name__: each for each in (rules, config, tensors, pickle, index, header, inputs)
}


def check(reader: str, data: bytes, directory: Path) -> str:
    """Let a reader read; return ``"read"`` or the message by which it refused, in time. Anything else raises."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            READERS[reader](data, directory)
            told = "read"
        except LoraFxError as error:
            told = str(error)
    took = time.process_time() - start
    assert took < SECONDS, f"{reader} took {took:.1f} s"
    assert 0 < len(told) < MESSAGE, f"{reader} says {len(told)} characters"
    return told


def safetensors(sizes: Mapping[str, int]) -> bytes:
    """Return a file with float32 vectors of these sizes, of ones."""
    entries, end = {}, 0
    for name, size in sizes.items():
        entries[name] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end := end + 4 * size]}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 1.0) * (end // 4)
