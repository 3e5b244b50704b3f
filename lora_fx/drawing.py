"""A picture of what a rewrite changed: the layer of the first difference, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lora_fx.errors import ExportError
from lora_fx.files import replacing
from lora_fx.graph_module import TracedGraphModule
from lora_fx.provenance import module_path

_FORMATS = ("svg", "png", "dot")
_PLAIN = {
    "shape": "box",
    "style": "rounded,filled",
    "fillcolor": "#f4f4f4",
    "color": "#9a9a9a",
    "fontname": "Helvetica",
    "fontsize": "11",
    "margin": "0.14,0.05",
}
_ADDED = {"fillcolor": "#dbe9ff", "color": "#1f5fbf", "penwidth": "2"}


def draw(before: TracedGraphModule, after: TracedGraphModule, path: str | Path, *, overwrite: bool = False) -> None:
    """Draw two graphs side by side, as SVG, PNG or DOT by the suffix of ``path``.

    Shown is the layer with the first node that only one of the two has, or everything where they do not differ. Weights
    stand in the label of the operator that reads them. Added nodes have a thick blue border and a ``+``.

    Args:
        before: for instance ``trace(model)``.
        after: for instance ``rewrite(model)`` or ``fold(…)``.
        path: of the picture.
        overwrite: replace a file that exists.

    Raises:
        ExportError: the suffix is not known, or pygraphviz (the extra ``draw``) is not installed.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".")
    if kind not in _FORMATS:
        raise ExportError(f"{target.name}: a picture is one of {', '.join(f'.{name}' for name in _FORMATS)}.")
    picture = _picture(before, after)
    with replacing(target, overwrite=overwrite) as beside:
        if kind == "dot":
            beside.write_text(picture.string(), encoding="utf-8")
        else:
            beside.write_bytes(picture.draw(format=kind, prog="dot"))


def _picture(before: TracedGraphModule, after: TracedGraphModule) -> Any:
    try:
        import pygraphviz
    except ImportError as error:
        raise ExportError("drawing needs pygraphviz: pip install 'lora-fx[draw]'.") from error
    region = _region(before, after)
    picture = pygraphviz.AGraph(
        directed=True,
        strict=False,
        compound="true",
        newrank="true",
        fontname="Helvetica",
        nodesep="0.25",
        ranksep="0.3",
    )
    for side, graph, other in (("before", before, after), ("after", after, before)):
        _add_side(picture, side, graph, region, only_here=_names(graph) - _names(other))
    return picture


def _region(before: TracedGraphModule, after: TracedGraphModule) -> str:
    """Return the path of the layer (the path up to its first index) in which the graphs first differ."""
    for graph, other in ((after, before), (before, after)):
        unknown = _names(other)
        for node in graph.graph.nodes:
            if node.op != "get_attr" and node.name not in unknown:
                parts = module_path(node).split(".")
                index = next((position for position, part in enumerate(parts) if part.isdigit()), None)
                return ".".join(parts[: index + 1]) if index is not None else ""
    return ""


def _names(graph: TracedGraphModule) -> set[str]:
    return {node.name for node in graph.graph.nodes}


def _add_side(picture: Any, side: str, module: TracedGraphModule, region: str, only_here: set[str]) -> None:
    shown = [node for node in module.graph.nodes if _inside(node, region)]
    where = region or "the whole graph"
    members = []
    for node in shown:
        added = node.name in only_here
        picture.add_node(
            f"{side}:{node.name}", label=_label(node, region, added), **{**_PLAIN, **(_ADDED if added else {})}
        )
        members.append(f"{side}:{node.name}")
    for source, node in _edges(shown):
        if source not in shown:
            stub = f"{side}:{source.name}->{node.name}"  # one at each use, so that a mask does not tie the picture in knots
            picture.add_node(
                stub, label=source.name, shape="plaintext", fontname="Helvetica", fontsize="9", fontcolor="#707070"
            )
            picture.add_edge(stub, f"{side}:{node.name}", color="#c4c4c4", arrowsize="0.6")
            members.append(stub)
        else:
            color = "#1f5fbf" if {source.name, node.name} & only_here else "#707070"
            picture.add_edge(f"{side}:{source.name}", f"{side}:{node.name}", color=color, arrowsize="0.6")
    picture.add_subgraph(
        members, name=f"cluster_{side}", label=f"{side}: {where}", color="#dddddd", fontname="Helvetica", fontsize="14"
    )


def _inside(node: fx.Node, region: str) -> bool:
    if node.op in ("get_attr", "output"):
        return False
    path = module_path(node)
    return not region or path == region or path.startswith(f"{region}.")


def _edges(nodes: Iterable[fx.Node]) -> Iterable[tuple[fx.Node, fx.Node]]:
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op != "get_attr" and isinstance(source.meta.get("val"), (torch.Tensor, tuple, list, type(None))):
                yield source, node  # sizes are left out: they are read everywhere and say nothing here


def _label(node: fx.Node, region: str, added: bool) -> str:
    operator = (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target)).split(".")[0]
    )
    weights = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    lines = [line.removeprefix(f"{region}.") for line in (operator, *weights)]
    return "\n".join(["+ " + lines[0] if added else lines[0], *lines[1:]])
