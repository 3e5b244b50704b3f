"""Reads exported programs (``.pt2``) of strangers so that nothing in them is executed.

``torch.export.load`` (2.13) executes what a file says in many places: it unpickles weights, constants, custom objects and,
where the safe way fails, example inputs; it evaluates expressions of sizes (``sympy.sympify``); it runs Python that it
generates from names of nodes, inputs and weights, and from guards; it calls whatever ``torch.…`` or ``_operator.…`` leads
to; it imports modules that a tree of inputs names; it opens shared libraries of AOTInductor; and it tries an older layout
where this one fails. So a file is read once, and refused unless every record, and every text in its JSON, is of a kind that
is known to be data. Texts have rules by the field that they stand in (``program_texts.RULES``): a field without a rule has no text.

The records are found by torch's own reader of archives, in the bytes that torch then loads: two readers may find different
records in one file. For the same reason, and for the older layout, this calls ``load_pt2``, not ``torch.export.load``.

Not guarded against: what operators of torch compute, and programs that take very long or much memory.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _dict_to_dataclass
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from lora_fx.errors import TraceError, first_line
from lora_fx.program_texts import OF_NODES, RULES, is_key, is_nothing
from lora_fx.tracing.torch_export import quiet

_MODEL, _SAMPLE_INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_PAYLOADS = (
    ("data/weights/", "model_weights_config.json", re.compile(r"weight_\d+", re.ASCII)),
    ("data/constants/", "model_constants_config.json", re.compile(r"tensor_\d+", re.ASCII)),
)
_RECORD = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/.*"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)",
    re.ASCII,
)
_LARGEST_JSON = 2**28


class _RefusedError(Exception):
    """A record is not to be loaded."""

    def __init__(self, record: str, found: str, expected: str) -> None:
        super().__init__(f"{record}: found {found}; expected {expected}")


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Read a program that ``torch.export.save`` wrote, without executing anything that the file says.

    Everything in it must be plain: tensors, trees of tuples, lists and dictionaries, operators of torch (``aten``, ``prims``
    and control flow), arithmetic of sizes. What else ``torch.export`` can store, such as tensor subclasses, custom objects,
    custom operators and compiled code, is refused. Calling the program executes its operators.

    Args:
        path: of the file; it is read once.

    Raises:
        TraceError: the file cannot be read, is damaged, or has something in it that is not plain; the message names it.
    """
    try:
        with _reading("the file"):
            data = _regular(Path(path)).read_bytes()
        _check_archive(data)
        with _reading(_MODEL), quiet():
            program: torch.export.ExportedProgram = load_pt2(io.BytesIO(data)).exported_programs["model"]
        return program
    except _RefusedError as error:
        raise TraceError(
            f"{path}: {error}. Nothing of it was loaded: have the program written again by torch.export.save of torch "
            f"{torch.__version__}, from plain tensors and operators of torch."
        ) from error


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise _RefusedError("the file", "no regular file of this name", "a .pt2 file")
    return path


@contextmanager
def _reading(record: str) -> Iterator[None]:
    """Refuse a record that cannot be read; every error of libraries ends here."""
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        said = _shown(first_line(str(root), type(root).__name__))
        raise _RefusedError(record, f"what torch cannot read ({said})", "what torch.export.save writes") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:120]}… ({len(text)} characters)"


def _check_archive(data: bytes) -> None:
    """Refuse the bytes of an archive unless loading them executes nothing."""
    with _reading("the archive"):
        reader = PT2ArchiveReader(io.BytesIO(data))
        names = _records(reader.archive_file, "the archive", len(data))
    for name in names:
        if not _RECORD.fullmatch(name):
            raise _RefusedError(
                _shown(name), "a record of this name", "those of one program alone: no compiled or older ones"
            )
    _check_json(reader, _MODEL, schema.ExportedProgram)
    for folder, config, tensor in _PAYLOADS:
        _check_payloads(reader, folder, config, tensor)
    with _reading(_SAMPLE_INPUTS):
        _check_sample_inputs(reader.read_bytes(_SAMPLE_INPUTS))


def _records(archive: Any, record: str, limit: int) -> list[str]:
    """Return the names of an archive's records, which together are no larger than it is, each there once."""
    names: list[str] = archive.get_all_records()
    size = sum(archive.get_record_size(name) for name in names)
    if size > limit:
        raise _RefusedError(record, f"{size} bytes of records in {limit}", "records that are not compressed")
    if len({name.casefold() for name in names}) != len(names):
        raise _RefusedError(record, "several records of one name", "one each")
    return names


def _check_json(reader: PT2ArchiveReader, record: str, kind: type) -> Any:
    """Return a record's JSON as torch reads it, all of whose texts were checked."""
    with _reading(record):
        text = reader.read_bytes(record)
        if len(text) > _LARGEST_JSON:
            raise _RefusedError(record, f"{len(text)} bytes", f"at most {_LARGEST_JSON}")
        parsed = json.loads(text.decode("utf-8"))
        if not isinstance(parsed, dict):
            raise _RefusedError(record, f"a JSON {type(parsed).__name__}", "a JSON object")
        value = _dict_to_dataclass(kind, parsed)
        _check_texts(record, value, kind.__name__)
        return value


def _check_payloads(reader: PT2ArchiveReader, folder: str, config: str, tensor: re.Pattern[str]) -> None:
    """Refuse tensors that would be unpickled, or made without their bytes being there."""
    payloads: dict[str, schema.PayloadMeta] = _check_json(reader, folder + config, schema.PayloadConfig).config
    with _reading(folder + config):
        for key, payload in payloads.items():
            record = folder + str(payload.path_name)
            if payload.use_pickle is not False:
                raise _RefusedError(record, f"a pickled object for {_shown(key)}", "the bytes of a tensor")
            if not tensor.fullmatch(payload.path_name) or payload.tensor_meta is None:
                raise _RefusedError(
                    record, f"an object for {_shown(key)} that is not a tensor", "the bytes of a tensor"
                )
            sizes = [size.as_int for size in payload.tensor_meta.sizes]
            if reader.archive_file.get_record_size(record) == 0 and math.prod(sizes) != 0:
                raise _RefusedError(record, f"no bytes for sizes {_shown(sizes)}", "the bytes of a tensor")


def _check_sample_inputs(data: bytes) -> None:
    """Refuse example inputs that torch would unpickle without restrictions, or that have other than plain keys and values."""
    if not data:
        return
    _records(torch._C.PyTorchFileReader(io.BytesIO(data)), _SAMPLE_INPUTS, len(data))
    _check_sample(torch.load(io.BytesIO(data), weights_only=True))


def _check_sample(value: object) -> None:
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for key, inner in value.items():
            if not is_key(key):
                raise _RefusedError(_SAMPLE_INPUTS, f"the key {_shown(key)}", "keys of letters, digits, _, - and .")
            _check_sample(inner)
    elif type(value) in (tuple, list):
        assert isinstance(value, tuple | list)
        for inner in value:
            _check_sample(inner)
    elif value is not None and type(value) not in _SAMPLES:
        raise _RefusedError(
            _SAMPLE_INPUTS, f"a {type(value).__name__}", "tensors, numbers, texts, tuples, lists and dictionaries"
        )


_SAMPLES = (torch.Tensor, torch.nn.Parameter, bool, int, float, complex, str, torch.dtype, torch.device)


def _check_texts(record: str, value: object, field: str, *, of_node: bool = False) -> None:
    """Refuse a value of the schema unless each text in it follows the rule of its field."""
    if isinstance(value, schema.CustomObjArgument):
        raise _RefusedError(record, f"a custom object in {field}", "tensors and numbers")
    if dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            name = f"{type(value).__name__}.{each.name}"
            _check_texts(record, vars(value)[each.name], name, of_node=of_node or isinstance(value, schema.Node))
    elif isinstance(value, list):
        for inner in value:
            _check_texts(record, inner, field, of_node=of_node)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(record, key, f"keys of {field}")
            _check_texts(record, inner, f"metadata.{key}" if field.endswith(".metadata") else field, of_node=of_node)
    elif isinstance(value, str):
        # A node's own texts stand in generated code as Python writes them; those of inputs are pasted into guards.
        _check_text(record, value, f"{field} of a node" if of_node and field in OF_NODES else field)
    elif value is not None and not isinstance(value, bool | int | float):
        raise _RefusedError(record, f"{_shown(value)} in {field}", "what the schema has there")


def _check_text(record: str, text: str, field: str) -> None:
    fits, expected = RULES.get(field, (is_nothing, "no text there"))
    if not fits(text):
        raise _RefusedError(record, f"{_shown(text)} in {field}", expected)
