"""Writing graphs for other runtimes, one module a format."""

from lora_fx.export._delivering import Exported
from lora_fx.export._onnx import onnx
from lora_fx.export._onnx_adapter import ExportedAdapter, onnx_adapter, onnx_adapter_from_peft
from lora_fx.export._pt2 import pt2
from lora_fx.export._torchscript import torchscript

__all__ = ["Exported", "ExportedAdapter", "onnx", "onnx_adapter", "onnx_adapter_from_peft", "pt2", "torchscript"]
