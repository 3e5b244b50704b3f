"""Files that readers take, from which a fuzzer starts; and hostile ones, each of which once hung a reader or made it fail."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from fuzz.readers import safetensors

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 9, "target_modules": ["q_proj"], "rank_pattern": {"q.*": 2}}
RULES = '[defaults]\nrank = 4\n[[select]]\ntarget = ["q_proj"]\nlayers = ["0-3"]\n[[select]]\nregex = "(a|b)+c"\n'


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, buffer)
    return buffer.getvalue()


@cache
def valid() -> Mapping[str, Sequence[bytes]]:
    """Return files that each reader takes."""
    places = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "token_dim": 8, "num_attention_heads": 2}
    return {
        "rules": [RULES.encode()],
        "config": [json.dumps(LORA).encode(), json.dumps({**prefix, "num_layers": 2}).encode()],
        "tensors": [safetensors({"base_model.model.q.lora_A.weight": 3, "base_model.model.q.lora_B.weight": 5})],
        "pickle": [_pickled()],
        "index": [json.dumps(places).encode()],
        "header": [safetensors({"a": 3, "b": 5})],
        "inputs": [safetensors({"x": 3, "y": 3})],
    }


def _lora(**more: Any) -> bytes:
    return json.dumps({**LORA, **more}).encode()


def _file(header: bytes, body: bytes = b"1234") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def _claiming(shape: str) -> bytes:
    return _file(b'{"a":{"dtype":"F32","shape":' + shape.encode() + b',"data_offsets":[0,4]}}')


def hostile() -> Sequence[tuple[str, str, bytes]]:
    """Return a reader, a name and the bytes of each file that must be refused."""
    files = {
        "a huge product of sizes": _claiming(f"[{','.join([str(2**62)] * 50_000)}]"),
        "sizes of many digits": _claiming(f"[{','.join(['9' * 4000] * 50)}]"),
        "a million dimensions": _claiming(f"[{','.join(['1'] * 100_000)}]"),
        "terabytes": _file(b'{"a":{"dtype":"U8","shape":[4398046511104],"data_offsets":[0,4398046511104]}}'),
        "a header of terabytes": struct.pack("<Q", 2**42) + b"{}",
    }
    nested = b'{"peft_type":"LORA","x":' + b"[" * 100_000
    config = {
        "a million keys": _lora(**{f"k{number}": 1 for number in range(1_000_000)}),
        "ten thousand keys": _lora(**{f"k{number}": 1 for number in range(10_000)}),
        "a million patterns": _lora(rank_pattern={f"k{number}": 2 for number in range(1_000_000)}),
        "many expressions": _lora(rank_pattern={f"(k|{number})[a-z--[aeiou]]": 2 for number in range(20_000)}),
        "an expression that hangs": _lora(target_modules="(?:.|..|...)+[0-8][0-9]{2}"),
        "depth": nested,
        "an object as the method": _lora(peft_type={}),
        "a list as the method": _lora(peft_type=["LORA"]),
    }
    index = {
        "a path above": "../secret.safetensors", "an absolute path": "/dev/zero", "a long name": "x" * 5000, "a long path": "x/" * 3000,
        "a surrogate": "\ud800",
    }  # fmt: skip
    places = {f"k{number}": f"s{number}" for number in range(5_000)}
    return [
        *((reader, name, data) for reader in ("tensors", "header", "inputs") for name, data in files.items()),
        *(("config", name, data) for name, data in config.items()),
        *(("index", name, json.dumps({"weight_map": {"a": path}}).encode()) for name, path in index.items()),
        ("index", "many shards", json.dumps({"weight_map": places}).encode()),
        ("rules", "a dotted key", b"a" + b".a" * 30_000 + b" = 1"),
        ("rules", "a quoted dotted key", b"a" + b'."a"' * 12_000 + b" = 1"),
        ("rules", "depth", b"a = " + b"[" * 30_000),
        ("pickle", "no pickle", b"\x80\x02" + b"(" * 100_000),
    ]
