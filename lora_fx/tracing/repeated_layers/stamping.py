"""Equal layers of a model are traced once, and their nodes stamped for the others.

Tracing costs tens of milliseconds a node's worth of Python, and most models are one layer many times. Here all layers of a class
but one, the template, are stubs for the length of the trace; afterwards each stub in the graph becomes a copy of what the
template recorded. The result is the graph of a full trace, node for node. Where that is not certain, it raises
:class:`Departure`, and the model is traced in full. That is known of the models of transformers; others have no stamped layers.

    _values, _fingerprints    what is known to be equal
    _classes                  which layers are equal
    _operators, _positions    what stands in the trace for a layer, and for its number
    _calls, _stubs            that all layers of a class are called alike
    _bodies                   what a template recorded, and that nothing passes its marks unseen
    _moving, _constants       what has other names in another layer
    _expanding                stubs into nodes
"""

from lora_fx.tracing.repeated_layers.calls import Departure, FirstDeparts
from lora_fx.tracing.repeated_layers.expand import expand
from lora_fx.tracing.repeated_layers.layer_classes import LEAST, LayerClass, foreign_part, layer_classes, without_first
from lora_fx.tracing.repeated_layers.stubs import stubbed

__all__ = [
    "LEAST",
    "Departure",
    "FirstDeparts",
    "LayerClass",
    "expand",
    "foreign_part",
    "layer_classes",
    "stubbed",
    "without_first",
]
