from .aoti_package import aoti
from .deliver import Exported
from .executorch_file import executorch
from .generation_directory import generation
from .onnx_adapter_file import ExportedAdapter, onnx_adapter, onnx_adapter_from_peft
from .onnx_file import onnx
from .pt2_file import pt2
from .torchscript_file import torchscript

__all__ = [
    "Exported",
    "ExportedAdapter",
    "aoti",
    "executorch",
    "generation",
    "onnx",
    "onnx_adapter",
    "onnx_adapter_from_peft",
    "pt2",
    "torchscript",
]
