"""Slots of an ONNX model: the inputs that take an adapter, as listed in its metadata. Imports neither torch nor onnxruntime.

A slot is three optional inputs, filled from a file in onnxruntime's adapter format: ``<site>.lora_A.weight``, ``(rank, in)``,
``<site>.lora_B.weight``, ``(out, rank)``, and ``<site>.scaling``, ``(1,)``, all in single precision. An adapter fills any
number of slots, each with any rank.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_fx.errors import ExportError, did_you_mean, first_line, option, shortened

KEY = "lora_fx.slots"
"""Key in the model's metadata of its slots, as JSON."""

FORMAT = 1
"""Version of those metadata, and the ``adapter_version`` of adapter files for such models."""

MAX_PROBLEMS = 10
"""Largest number of problems in one message."""

FLOAT = "tensor(float)"
"""Single precision in onnxruntime's spelling."""

Found = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a parameter → its type, in onnxruntime's spelling, and its shape."""


@dataclass(frozen=True)
class OnnxSlot:
    """The slot of one site.

    Attributes:
        site: its name, the prefix of its inputs: the path of a module, or ``<path>@n`` where the n-th call has a slot of its own.
        module: the path of the module, or the name of a bare parameter.
        weight: the name of the weight.
        layout: of the stored weight, ``"out_in"`` or ``"in_out"``; A and B do not depend on it.
        in_features: width of A.
        out_features: height of B.
        apart: why an adapter of PEFT's does not fit there, since it would compute something else; empty where it fits.
        apart_as_weight: the same of an adapter that names the weight, under ``target_parameters``.
    """

    site: str
    module: str
    weight: str
    layout: str
    in_features: int
    out_features: int
    apart: str = ""
    apart_as_weight: str = ""

    @property
    def a(self) -> str:
        """Name of the input for A."""
        return f"{self.site}.lora_A.weight"

    @property
    def b(self) -> str:
        """Name of the input for B."""
        return f"{self.site}.lora_B.weight"

    @property
    def scaling(self) -> str:
        """Name of the input for the factor of the product."""
        return f"{self.site}.scaling"

    @property
    def names(self) -> tuple[str, str, str]:
        """The names of the three inputs."""
        return self.a, self.b, self.scaling

    def problems(self, found: Found) -> list[str]:
        """Return the problems of an adapter's parameters for this slot; none where it has no parameters for it."""
        given = [name for name in self.names if name in found]
        if not given:
            return []
        missing = [name for name in self.names if name not in found]
        if missing:
            return [f"{', '.join(missing)}: missing beside {', '.join(given)}: a slot needs A, B and scaling"]
        rank = next(iter(found[self.a][1]), 0)
        wanted = {self.a: (rank, self.in_features), self.b: (self.out_features, rank), self.scaling: (1,)}
        wrong = [f"{name}: expected {FLOAT}, got {found[name][0]}" for name in self.names if found[name][0] != FLOAT]
        return wrong + [
            f"{name}: expected shape {shape}, of a site of {self.in_features} and {self.out_features} features and A of rank {rank}, "
            f"got {found[name][1]}"
            for name, shape in wanted.items()
            if found[name][1] != shape
        ]


@dataclass(frozen=True)
class SlotTable:
    """The slots of a model, as in its metadata.

    Attributes:
        slots: in the order of the model.
        base: the fingerprint of its weights, see :func:`lora_fx.adapters.peft_format.fingerprint.fingerprint`.
    """

    slots: tuple[OnnxSlot, ...]
    base: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The names of the inputs of all slots."""
        return frozenset(name for slot in self.slots for name in slot.names)

    @property
    def version(self) -> int:
        """The ``model_version`` of adapter files for this base."""
        return version_of(self.base)

    def problems(self, found: Found) -> list[str]:
        """Return the reasons why an adapter with these parameters does not fit, at most a few of them."""
        known = self.names
        problems = [
            f"{name}: the model has no such slot{did_you_mean(name, known)}"
            for name in sorted(found)
            if name not in known
        ]
        problems += [problem for slot in self.slots for problem in slot.problems(found)]
        problems += [] if found else ["it has no parameters"]
        return shortened(problems, MAX_PROBLEMS, "problems")

    def to_text(self) -> str:
        """Return the metadata as text, the same for equal slots."""
        slots = [asdict(slot) for slot in self.slots]
        data = {"format": FORMAT, "model_version": self.version, "slots": slots, "base": dict(self.base)}
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    def read(metadata: Mapping[str, str], source: str) -> SlotTable:
        """Read the metadata of a model.

        Args:
            metadata: all entries of the model.
            source: its path, for messages.

        Raises:
            ExportError: it has no slots, or its metadata are malformed.
        """
        if KEY not in metadata:
            raise ExportError(
                f"{source} has no slots for adapters. Export it with slots: "
                f"{option('lora_fx.export.onnx(branched, path, slots=True)', 'lora-fx export MODEL_DIR OUT.onnx --slots')}."
            )
        try:
            data = json.loads(metadata[KEY])
            if data["format"] != FORMAT:
                raise ExportError(
                    f"{source}: expected slots of format {FORMAT}, got {data['format']}. Export the model again, or use "
                    "the lora_fx that wrote it."
                )
            slots = tuple(OnnxSlot(**each) for each in data["slots"])
            table = SlotTable(slots, data["base"])
            if not (all(map(_has_right_types, slots)) and slots and _maps_text_to_text(table.base)):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ExportError(f"{source}: the metadata under {KEY!r} are malformed. Export the model again.") from error
        return table


def version_of(base: Mapping[str, str]) -> int:
    """Return a hash of a base in 31 bits, the size of the field in onnxruntime's files."""
    digest = hashlib.sha256(json.dumps(dict(base), sort_keys=True).encode()).hexdigest()
    return 1 + int(digest, 16) % (2**31 - 1)


def onnxruntime_says(error: Exception) -> str:
    """Return the first line of an error of onnxruntime's, without the line of its source code."""
    return first_line(_SOURCE_LINE.sub("", str(error)), type(error).__name__).rstrip(".")


_SOURCE_LINE = re.compile(r"^\S+\.cc:\d+ .*?\)>? (?=[A-Z\[])")


def _has_right_types(slot: OnnxSlot) -> bool:
    kinds: Mapping[Any, type] = {"str": str, "int": int}
    return all(type(getattr(slot, each.name)) is kinds[each.type] for each in fields(slot))


def _maps_text_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
