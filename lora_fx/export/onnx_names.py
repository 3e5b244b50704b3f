"""Names of an ONNX model's inputs and outputs, which share one space with those of its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_fx.errors import ExportError, did_you_mean, listed
from lora_fx.export.onnx_ops import onnx_package
from lora_fx.export.prepare import Exportable

Names = Mapping[str, str] | Sequence[str]
"""New names: by the old ones, or of the first inputs or outputs in their order, as torch.onnx.export takes them."""


def with_names(exportable: Exportable, inputs: Names | None, outputs: Names | None) -> Exportable:
    """Return the graph with names that a model can have.

    An input within a list or mapping is called ``<input>.<index>`` or ``<input>.<key>``. An output gets ``out_`` before its name where
    an input or a weight has that name too, as ``sample`` of diffusers' models.

    Args:
        exportable: the graph.
        inputs: new names of inputs; others keep theirs.
        outputs: new names of outputs.

    Raises:
        ExportError: there is no such input or output, or two values would have one name.
    """
    own = {name: exportable.nested.get(name, name) for name in exportable.inputs}
    new_inputs = _new_names("input_names", inputs, list(own.values()))
    of_inputs = {name: new_inputs.get(place, place) for name, place in own.items()}
    new_outputs = _new_names("output_names", outputs, exportable.outputs)
    weights = {str(node.target) for node in exportable.plain.graph.find_nodes(op="get_attr")}
    _check_free("input", new_inputs, list(of_inputs.values()), weights)
    taken = weights.union(of_inputs.values())
    kept = [name for name in exportable.outputs if name not in new_outputs]
    evaded = {name: _evading(name, taken, {*kept, *new_outputs.values()}) for name in kept if name in taken}
    of_outputs = {name: new_outputs.get(name, evaded.get(name, name)) for name in exportable.outputs}
    _check_free("output", new_outputs, list(of_outputs.values()), taken)
    file_names = {name: name_in_file for name, name_in_file in of_inputs.items() if name != name_in_file}
    return replace(exportable, outputs=tuple(of_outputs.values()), file_names=file_names, evaded=evaded)


def name_values(model: Any, exportable: Exportable) -> None:
    """Give inputs and outputs of an ``onnx_ir`` model their names, and others to values within that have the same (in place)."""
    for value in model.graph.inputs:
        value.name = exportable.file_names.get(value.name, value.name)
    for value, name in zip(model.graph.outputs, exportable.outputs, strict=True):
        value.name = name
    taken = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken and not value.is_graph_output():
                value.name = None
    onnx_package("onnx_ir.passes.common").NameFixPass()(model)


def _new_names(option: str, given: Names | None, known: Sequence[str]) -> dict[str, str]:
    """Return the new names by the old ones."""
    kind = "inputs" if option == "input_names" else "outputs"
    names = given if given is not None else {}
    if not isinstance(names, Mapping):
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ExportError(
                f"{option}: expected a mapping from names to new ones, or a list of new ones, got {names!r}."
            )
        if len(names) > len(known):
            raise ExportError(
                f"{option}: expected {len(known)} names at most, for the {kind} {', '.join(known)}, got {len(names)}."
            )
        names = dict(zip(known, names, strict=False))
    for old, new in names.items():
        if old not in known:
            raise ExportError(
                f"{option}: {old!r} is none of the {kind}{did_you_mean(str(old), known)}: {listed(list(known), 8)}."
            )
        if not (isinstance(new, str) and new):
            raise ExportError(f"{option}: expected a name for {old!r}, got {new!r}.")
    return dict(names)


def _check_free(kind: str, new: Mapping[str, str], names: Sequence[str], taken: Collection[str]) -> None:
    """Raise :class:`ExportError` where a new name is that of another value."""
    for name in new.values():
        if name in taken or names.count(name) > 1:
            other = (
                f"another {kind}"
                if names.count(name) > 1
                else "a weight"
                if kind == "input"
                else "an input or a weight"
            )
            raise ExportError(f"{kind}_names: {name!r} is the name of {other} too. Choose another.")


def _evading(name: str, taken: Collection[str], outputs: Collection[str]) -> str:
    new = f"out_{name}"
    while new in taken or new in outputs:
        new = f"out_{new}"
    return new
