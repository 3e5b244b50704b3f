"""Flow of features: which output features of a call site reach which value, by indices pushed through the operators.

The output of the site is replaced by the indices of its features. Operators that only move values move the indices; those
that work elementwise leave them in place. Where values of different features meet, the exact places are given up and the set
of all features that took part goes on. So the result may name too many features, and never too few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.graph.aten_kinds import ACTIVATION, POINTWISE, POWER, SHAPE, name_of, shape_of, size_of, tensor_inputs
from lora_fx.graph.records import Features
from lora_fx.sites.weight_ops import WeightOp, weight_op

_NO_FEATURE = -1


@dataclass(frozen=True)
class Pushed:
    """The features in one value.

    Attributes:
        features: all features that take part in it.
        places: the feature at each place, in the sizes of the trace (several tensors for an operator that returns several);
            None after features have met.
        activated: whether a nonlinear operator was passed.
    """

    features: Features
    places: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    activated: bool = False


class Push:
    """The features of one site in every value that they reach, up to the next sites.

    Args:
        tensors: of the graph, by name.
        source: the site's node.
        product: the product that it computes.
        out_features: number of its output features.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], source: fx.Node, product: WeightOp, out_features: int
    ) -> None:
        self._constants = tensors
        self._values: dict[fx.Node, Pushed] = {source: self._start(source, product, out_features)}

    @staticmethod
    def _start(source: fx.Node, product: WeightOp, out_features: int) -> Pushed:
        shape = shape_of(source)
        everything = Features(((0, out_features),))
        if shape is None:
            return Pushed(everything)
        axis = product.feature_dim % len(shape)
        line = torch.arange(out_features).view([-1 if dim == axis else 1 for dim in range(len(shape))])
        return Pushed(everything, line.expand(shape))

    def step(self, node: fx.Node) -> Pushed | None:
        """Take the next node of the graph; return the features in its value, or None if there are none."""
        reached = [self._values[source] for source in tensor_inputs(node) if source in self._values]
        if not reached or weight_op(node) is not None:
            return None
        value = (
            self._push_through_shape_op(node)
            if name_of(node) in SHAPE
            else self._push_through_computation(node, reached)
        )
        self._values[node] = value
        return value

    def __getitem__(self, node: fx.Node) -> Pushed:
        return self._values[node]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    def _push_through_computation(self, node: fx.Node, reached: list[Pushed]) -> Pushed:
        """Return the features after an operator that computes."""
        features = reached[0].features
        for other in reached[1:]:
            features = features | other.features
        name = name_of(node)
        activated = name in ACTIVATION or any(value.activated for value in reached)
        places = [value.places for value in reached if isinstance(value.places, torch.Tensor)]
        shape = shape_of(node)
        if name not in POINTWISE | ACTIVATION | POWER or shape is None or len(places) < len(reached):
            return Pushed(features, None, activated)
        first, *others = (place.broadcast_to(shape) for place in places)
        same = all(torch.equal(first, other) for other in others)
        return Pushed(features, first if same else None, activated)

    def _push_through_shape_op(self, node: fx.Node) -> Pushed:
        """Return the features after an operator that only moves values, by running it on the indices."""
        sources = [source for source in tensor_inputs(node) if source in self._values]
        activated = any(self._values[source].activated for source in sources)
        try:
            args: Any = fx.map_arg(node.args, self._argument_of)
            kwargs: Any = fx.map_arg(dict(node.kwargs), self._argument_of)
            places = node.target(*args, **kwargs)  # type: ignore[operator]
        except (_UnknownError, RuntimeError, IndexError, TypeError):
            return self._push_through_computation(node, [self._values[source] for source in sources])
        several = (places,) if isinstance(places, torch.Tensor) else tuple(places)
        found = {index for part in several for index in part.unique().tolist()} - {_NO_FEATURE}
        return Pushed(Features.of(found), places if isinstance(places, torch.Tensor) else several, activated)

    def _argument_of(self, node: fx.Node) -> Any:
        if node in self._values:
            places = self._values[node].places
            if places is None:
                raise _UnknownError
            return places
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return self._constant(node, value)
        size = size_of(value)
        if size is None:
            raise _UnknownError
        return size

    def _constant(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """Return the value of an index tensor; for every other tensor, which brings no features, all places marked empty."""
        while name_of(node) in ("lift_fresh_copy", "detach", "to"):
            node = node.all_input_nodes[0]
        known = self._constants.get(str(node.target)) if node.op == "get_attr" else None
        if known is not None and not known.is_meta and not known.is_floating_point():
            return known
        shape = shape_of(node)
        if shape is None or not value.is_floating_point():
            raise _UnknownError
        return torch.full(shape, _NO_FEATURE)


class _UnknownError(Exception):
    """The value of an argument is not known before the graph runs."""


def disjoint(parts: Mapping[Any, Features]) -> bool:
    """Tell whether no two of these sets share a feature."""
    return sum(len(features) for features in parts.values()) == len(
        {index for features in parts.values() for index in features}
    )
