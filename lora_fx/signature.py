"""How a graph is called: by the names of the model's own arguments, and back come the model's own output classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree


class InputCodeGen(_PyTreeCodeGen):
    """Generates a ``forward`` whose arguments may be left out, so that the graph's own check can say what is missing."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """Return the ``def`` line and the flattening of the inputs."""
        definition = super().gen_fn_def(free_vars, maybe_return_annotation, expanded_def=expanded_def)
        required = ", ".join(self.pytree_info.orig_args)
        optional = ", ".join(f"{name}=None" for name in self.pytree_info.orig_args)
        return definition.replace(f"forward(self, {required})", f"forward(self, {optional})", 1)


def argument_names(graph: fx.Graph) -> list[str]:
    """Return the names of the arguments of a graph's ``forward``, without ``self``."""
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    return [name for name in codegen.pytree_info.orig_args if name != "self"]


def take_inputs(graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Give an exported graph a ``forward`` without the arguments that were constants of the trace.

    Args:
        graph: edited.
        args: the positional example inputs.
        kwargs: the keyword example inputs.
        fixed: those of ``kwargs`` that are constants.
    """
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    names = [name for name in argument_names(graph) if name not in fixed]
    in_spec = pytree.tree_flatten((args, {name: value for name, value in kwargs.items() if name not in fixed}))[1]
    graph.set_codegen(InputCodeGen(_PyTreeInfo(names, in_spec, codegen.pytree_info.out_spec)))
