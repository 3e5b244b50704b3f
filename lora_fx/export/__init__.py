"""Writing graphs for other runtimes, one module a format."""

from lora_fx.export._torchscript import torchscript

__all__ = ["torchscript"]
