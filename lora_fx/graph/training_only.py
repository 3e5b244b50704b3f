"""Parts of a model that compute in training alone: stochastic depth, noise on activations."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lora_fx.graph.aten_kinds import writes
from lora_fx.graph.pickling import record, restore
from lora_fx.torch_internals import OpOverload


class TrainingOnly(nn.Module):
    """Compute a graph in train mode, and return its first input in evaluation.

    Attributes:
        kind: the operator for which passes over graphs take it.
        changes_inputs: whether it writes to an input.
    """

    kind = "dropout"

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self._take(graph)

    def _take(self, graph: fx.Graph) -> None:
        # Not a part in the sense of torch: it has no tensors, and no mode.
        vars(self)["_body"] = fx.GraphModule(nn.Module(), graph)
        self.changes_inputs = any(writes(node) is not None for node in graph.nodes)

    def forward(self, value: Any, *others: Any) -> Any:
        """Return a value of the shape of the first."""
        return vars(self)["_body"](value, *others) if self.training else value

    def extra_repr(self) -> str:
        """Show the operators where the module is printed."""
        called = (node.target for node in vars(self)["_body"].graph.nodes if node.op == "call_function")
        return " → ".join(
            str(target._opname if isinstance(target, OpOverload) else getattr(target, "__name__", target))
            for target in called
        )

    def __getstate__(self) -> dict[str, Any]:
        held = {name: value for name, value in vars(self).items() if name != "_body"}
        return {**held, "_recorded": record(vars(self)["_body"].graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        recorded = state.pop("_recorded")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take(restore(recorded))
