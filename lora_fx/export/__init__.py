"""Writing graphs for other runtimes, one module a format."""

from lora_fx.export._delivering import Exported
from lora_fx.export._onnx import onnx
from lora_fx.export._pt2 import pt2
from lora_fx.export._torchscript import torchscript

__all__ = ["Exported", "onnx", "pt2", "torchscript"]
