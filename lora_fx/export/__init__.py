"""Writing graphs for other runtimes, one module a format."""

from lora_fx.export.deliver import Exported
from lora_fx.export.onnx_adapter_file import ExportedAdapter, onnx_adapter, onnx_adapter_from_peft
from lora_fx.export.onnx_file import onnx
from lora_fx.export.pt2_file import pt2
from lora_fx.export.torchscript_file import torchscript

__all__ = ["Exported", "ExportedAdapter", "onnx", "onnx_adapter", "onnx_adapter_from_peft", "pt2", "torchscript"]
