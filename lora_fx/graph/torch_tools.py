"""Methods of modules that torch's own tools call, as they can be on a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_fx.errors import LoraFxError
from lora_fx.graph.layers import check_hook, check_unwrapped


class TorchTools(nn.Module):
    """A module that its graph is part of, towards tools that exchange, wrap or quantise modules."""

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """Set the module of a path, as torch's own method does, but no wrapper that computes it again."""
        check_unwrapped([f"{target}.{name}." for name, _ in module.named_children()])
        super().set_submodule(target, module, strict)

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """Do as torch does, but take no hook with which FSDP casts parameters, or makes them dense: dtypes are constants in a graph."""
        check_hook(self, hook)
        return super().register_forward_pre_hook(hook, **options)

    @property
    def qconfig(self) -> Any:
        """Not there: torch.ao.quantization sets it on the modules that it exchanges, and a graph calls none."""
        raise AttributeError("a graph has no qconfig")

    @qconfig.setter
    def qconfig(self, _value: Any) -> None:
        raise LoraFxError(
            "torch.ao.quantization exchanges modules, and a graph calls operators, so that nothing would be quantised. Quantise the file of "
            "lora_fx.export.onnx (onnxruntime.quantization.quantize_dynamic), or the model with the folded weights (huggingface.write_back)."
        )
