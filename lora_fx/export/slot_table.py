"""Slots: the places of an ONNX model that take an adapter, as its metadata name them. Imports neither torch nor onnxruntime.

A slot is three optional inputs, which a file of onnxruntime's adapter format fills: ``<site>.lora_A.weight``, ``(rank, in)``,
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

from lora_fx.errors import ExportError, did_you_mean, first_line

KEY = "lora_fx.slots"
"""Of the model's metadata: what its slots are, as JSON."""

FORMAT = 1
"""The version of that, and what the adapter files of such models have for ``adapter_version``."""

MOST = 10
"""So many problems are told."""

FLOAT = "tensor(float)"
"""Single precision, as onnxruntime calls it."""

Found = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a parameter → its type, as onnxruntime calls it, and its shape."""


@dataclass(frozen=True)
class OnnxSlot:
    """The slot of one site.

    Attributes:
        site: its name, after which its inputs are called: the path of a module, or ``<path>@n`` where the n-th call has its own.
        module: the path of the module, or the name of a bare parameter.
        weight: the name of the weight.
        layout: ``"out_in"`` or ``"in_out"``, how the weight is stored; A and B do not depend on it.
        in_features: width of A.
        out_features: height of B.
        apart: why an adapter of PEFT's computes something else there; empty where it does not.
    """

    site: str
    module: str
    weight: str
    layout: str
    in_features: int
    out_features: int
    apart: str = ""

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
        """The names of all three."""
        return self.a, self.b, self.scaling

    def problems(self, found: Found) -> list[str]:
        """Return what is wrong with the parameters that an adapter has for this slot; nothing where it has none."""
        given = [name for name in self.names if name in found]
        if not given:
            return []
        missing = [name for name in self.names if name not in found]
        if missing:
            return [f"{', '.join(missing)}: missing beside {', '.join(given)}: a slot is filled by A, B and scaling"]
        rank = next(iter(found[self.a][1]), 0)
        wanted = {self.a: (rank, self.in_features), self.b: (self.out_features, rank), self.scaling: (1,)}
        wrong = [f"{name}: expected {FLOAT}, found {found[name][0]}" for name in self.names if found[name][0] != FLOAT]
        return wrong + [
            f"{name}: expected shape {shape}, of a site of {self.in_features} and {self.out_features} features and A of rank {rank}, "
            f"found {found[name][1]}"
            for name, shape in wanted.items()
            if found[name][1] != shape
        ]


@dataclass(frozen=True)
class SlotTable:
    """What the metadata of a model say.

    Attributes:
        slots: in the order of the model.
        base: the fingerprint of its weights, see :func:`lora_fx.origins.fingerprint`.
    """

    slots: tuple[OnnxSlot, ...]
    base: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The names of all inputs that the slots are."""
        return frozenset(name for slot in self.slots for name in slot.names)

    @property
    def version(self) -> int:
        """What adapter files for this base have for ``model_version``."""
        return version_of(self.base)

    def problems(self, found: Found) -> list[str]:
        """Return why an adapter with these parameters does not fit, at most a few of the reasons."""
        known = self.names
        told = [
            f"{name}: the model has no such slot{did_you_mean(name, known)}"
            for name in sorted(found)
            if name not in known
        ]
        told += [problem for slot in self.slots for problem in slot.problems(found)]
        told += [] if found else ["it has no parameters"]
        return [*told[:MOST], *([f"and {len(told) - MOST} more problems"] if len(told) > MOST else [])]

    def to_text(self) -> str:
        """Return the metadata, always the same for the same slots."""
        slots = [asdict(slot) for slot in self.slots]
        said = {"format": FORMAT, "model_version": self.version, "slots": slots, "base": dict(self.base)}
        return json.dumps(said, separators=(",", ":"))

    @staticmethod
    def read(metadata: Mapping[str, str], source: str) -> SlotTable:
        """Read the metadata of a model.

        Args:
            metadata: all that it has.
            source: its path, for messages.

        Raises:
            ExportError: it has no slots, or its metadata are malformed.
        """
        if KEY not in metadata:
            raise ExportError(
                f"{source} has no slots for adapters. Export it with them: lora_fx.export.onnx(branched, path, slots=True), or "
                "lora-fx export MODEL_DIR OUT.onnx --slots."
            )
        try:
            said = json.loads(metadata[KEY])
            if said["format"] != FORMAT:
                raise ExportError(
                    f"{source} has slots of format {said['format']}, and this lora_fx knows {FORMAT}. Export the model again, or use "
                    "the lora_fx that wrote it."
                )
            slots = tuple(OnnxSlot(**each) for each in said["slots"])
            table = SlotTable(slots, said["base"])
            if not (all(map(_is_typed, slots)) and slots and _is_of_texts(table.base)):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ExportError(f"{source}: its metadata under {KEY!r} are malformed. Export the model again.") from error
        return table


def version_of(base: Mapping[str, str]) -> int:
    """Return a number of 31 bits that tells a base from others; onnxruntime's files have room for no more."""
    digest = hashlib.sha256(json.dumps(dict(base), sort_keys=True).encode()).hexdigest()
    return 1 + int(digest, 16) % (2**31 - 1)


def onnxruntime_says(error: Exception) -> str:
    """Return the first line of an error of onnxruntime's, without the place in its own source."""
    return first_line(_PLACE.sub("", str(error)), type(error).__name__).rstrip(".")


_PLACE = re.compile(r"^\S+\.cc:\d+ .*?\)>? (?=[A-Z\[])")


def _is_typed(slot: OnnxSlot) -> bool:
    kinds: Mapping[Any, type] = {"str": str, "int": int}
    return all(type(getattr(slot, each.name)) is kinds[each.type] for each in fields(slot))


def _is_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
