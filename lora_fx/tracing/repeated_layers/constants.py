"""Constants that the code of layers writes: torch.export numbers them as they come, all through the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from torch import fx

from lora_fx.tracing.repeated_layers.calls import Departure
from lora_fx.tracing.repeated_layers.moving import Moved
from lora_fx.tracing.repeated_layers.operators import STUB
from lora_fx.tracing.repeated_layers.template_body import Body

_LIFTED = re.compile(r"(?P<path>(?:.*\.)?)lifted_tensor_(?P<number>\d+)")

Names = Mapping[str, Mapping[str, str]]
"""Path of a stub, or nothing for what is traced → name in the trace → name in the graph."""


def constant_names(
    graph: fx.Graph, bodies: Mapping[str, Body], moves: Mapping[str, Moved], names: Collection[str]
) -> Names:
    """Return the names that constants would have in a full trace.

    Args:
        graph: with stubs.
        bodies: by the paths of templates.
        moves: by the paths of stubs.
        names: of the model's own tensors.

    Raises:
        Departure: the numbers in the trace have gaps, so that those of a full trace are not known.
    """
    if not any(body.constants(names) for body in bodies.values()):
        return {}
    found: dict[str, dict[str, str]] = {}
    traced = []
    for number, (path, name) in enumerate(_in_order(graph, bodies, moves, names)):
        match = _LIFTED.fullmatch(name)
        if match is None:
            raise Departure(f"{name!r} is a constant that is not numbered")
        place = moves[path].name(match["path"]) if path else match["path"]
        found.setdefault(path, {})[name] = f"{place}lifted_tensor_{number}"
        traced += [] if path else [int(match["number"])]
    if traced != list(range(len(traced))):
        raise Departure("some constants are not used")
    return found


def number_of(name: str) -> int:
    """Return the number in the name of a constant; 0 if it has none."""
    match = _LIFTED.fullmatch(name)
    return int(match["number"]) if match is not None else 0


def _in_order(
    graph: fx.Graph, bodies: Mapping[str, Body], moves: Mapping[str, Moved], names: Collection[str]
) -> Iterator[tuple[str, str]]:
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is STUB:
            path = str(node.args[0])
            yield from ((path, str(each.target)) for each in bodies[moves[path].old].constants(names))
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target not in names and source not in seen:
                seen.add(source)
                yield "", str(source.target)
