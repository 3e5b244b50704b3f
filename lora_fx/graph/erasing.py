"""Dead nodes of a graph, erased one by one: those of a caller, and none that was dead before."""

from __future__ import annotations

from torch import fx


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and its inputs that nothing else reads (in place)."""
    if node.users or node.op == "placeholder" or node._erased:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        erase_unread(graph, source)
