"""The private names of torch that this package uses, in one list, with what each is for.

torch promises nothing of such names: a release may rename one. A module of the package imports them from here, where the lookup of a
name that this torch lacks raises an :class:`ImportError` that says which part of the package needs it and which releases have it.
Modules that use none of them go on working. ``ATTRIBUTES`` lists the private attributes of torch's public objects, which are read in
place: they are looked up when this module is imported, and all that are gone are named at once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.sym_node import SymNode

from lora_fx.errors import listed

if TYPE_CHECKING:
    from torch._C import DisableTorchFunction
    from torch._C import _disabled_torch_function_impl as disabled_torch_function_impl
    from torch._C._nn import _parse_to as parse_to
    from torch._dynamo import config as dynamo_config
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor import config as inductor_config
    from torch._ops import HigherOrderOperator, OpOverload
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
    from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
        _resolve_process_group as resolve_process_group,
    )
    from torch.export import _trace as export_trace
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module
    from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
    from torch.fx.graph import _PyTreeInfo as PyTreeInfo
    from torch.fx.graph_module import _forward_from_src as forward_from_src
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.dropout import _DropoutNd as DropoutBase
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._sympy.value_ranges import ValueRanges

    all_gather_into_tensor = torch.ops._c10d_functional.all_gather_into_tensor
    all_reduce = torch.ops._c10d_functional.all_reduce
    make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
    wait_tensor = torch.ops._c10d_functional.wait_tensor

__all__ = [
    "BatchNormBase",
    "DisableTorchFunction",
    "DropoutBase",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "NormBase",
    "OpOverload",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "TorchDispatchMode",
    "ValueRanges",
    "all_gather_into_tensor",
    "all_reduce",
    "aoti_compile_and_package",
    "aoti_load_package",
    "disabled_torch_function_impl",
    "dynamo_config",
    "export_trace",
    "forward_from_src",
    "in_kernel_invocation_manager",
    "inductor_config",
    "make_wrapper_subclass",
    "parse_to",
    "pytree",
    "resolve_process_group",
    "use_lazy_graph_module",
    "wait_tensor",
]


@dataclass(frozen=True)
class Private:
    """Where torch keeps a private name, and what the package uses it for."""

    module: str
    name: str  # dotted from the module; "" for the module itself
    purpose: str

    @property
    def path(self) -> str:
        """The whole dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


NAMES = {
    "BatchNormBase": Private("torch.nn.modules.batchnorm", "_BatchNorm", "batch norms of every dimension"),
    "DisableTorchFunction": Private("torch._C", "DisableTorchFunction", "traces of repeated layers"),
    "DropoutBase": Private("torch.nn.modules.dropout", "_DropoutNd", "dropouts of every dimension"),
    "FakeTensor": Private("torch._subclasses.fake_tensor", "FakeTensor", "values of nodes without data"),
    "FakeTensorMode": Private("torch._subclasses.fake_tensor", "FakeTensorMode", "values of nodes without data"),
    "HigherOrderOperator": Private("torch._ops", "HigherOrderOperator", "regions that a trace wraps"),
    "NormBase": Private("torch.nn.modules.batchnorm", "_NormBase", "running statistics"),
    "OpOverload": Private("torch._ops", "OpOverload", "operators in graphs"),
    "PyTreeCodeGen": Private("torch.fx.graph", "_PyTreeCodeGen", "inputs and outputs of graphs"),
    "PyTreeInfo": Private("torch.fx.graph", "_PyTreeInfo", "inputs and outputs of graphs"),
    "TorchDispatchMode": Private("torch.utils._python_dispatch", "TorchDispatchMode", "comparisons with the model"),
    "ValueRanges": Private("torch.utils._sympy.value_ranges", "ValueRanges", "bounds of sizes in exported programs"),
    "all_gather_into_tensor": Private(
        "torch", "ops._c10d_functional.all_gather_into_tensor", "parts of other processes"
    ),
    "all_reduce": Private("torch", "ops._c10d_functional.all_reduce", "sums over processes"),
    "aoti_compile_and_package": Private("torch._inductor", "aoti_compile_and_package", "packages of AOTInductor"),
    "aoti_load_package": Private("torch._inductor", "aoti_load_package", "packages of AOTInductor"),
    "disabled_torch_function_impl": Private("torch._C", "_disabled_torch_function_impl", "quantised weights"),
    "dynamo_config": Private("torch._dynamo.config", "", "torch.export's settings"),
    "export_trace": Private("torch.export._trace", "", "torch.export's settings"),
    "forward_from_src": Private(
        "torch.fx.graph_module", "_forward_from_src", "classes of equal layers in nested graphs"
    ),
    "in_kernel_invocation_manager": Private(
        "torch._subclasses.fake_tensor", "in_kernel_invocation_manager", "results of repeated calls in a trace"
    ),
    "inductor_config": Private("torch._inductor.config", "", "the C++ compiler that torch looks for"),
    "make_wrapper_subclass": Private("torch", "Tensor._make_wrapper_subclass", "quantised weights"),
    "parse_to": Private("torch._C._nn", "_parse_to", "arguments of Module.to in a model's forward"),
    "pytree": Private("torch.utils._pytree", "", "nested inputs and outputs"),
    "resolve_process_group": Private(
        "torch.distributed.distributed_c10d", "_resolve_process_group", "groups of processes by their names"
    ),
    "use_lazy_graph_module": Private(
        "torch.fx._lazy_graph_module", "_use_lazy_graph_module", "exports without compiling in between"
    ),
    "wait_tensor": Private("torch", "ops._c10d_functional.wait_tensor", "sums over processes"),
}


def _names_in(function: Any) -> SimpleNamespace:
    """An object with the names that a function's code reads or sets: for attributes of which a class itself says nothing."""
    return SimpleNamespace(**dict.fromkeys(function.__code__.co_names))


ATTRIBUTES = (
    ("UntypedStorage", torch.UntypedStorage(0), ("_cdata",), "tensors that share memory"),
    ("Tensor", torch.empty(0), ("_backward_hooks", "_post_accumulate_grad_hooks"), "hooks that a trace would lose"),
    (
        "Module",
        nn.Module(),
        ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
        "tensors of modules by name",
    ),
    (
        "Module",
        nn.Module(),
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
        "hooks that a trace would lose",
    ),
    (
        "torch.nn.modules.module",
        nn.modules.module,
        tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")),
        "hooks that a trace would lose",
    ),
    ("torch.nn.functional", nn.functional, ("_verify_batch_size",), "batch norms of models on meta"),
    ("Graph", torch.fx.Graph(), ("_codegen",), "inputs and outputs of graphs"),
    ("CodeGen", torch.fx.graph.CodeGen(), ("_body_transformer",), "checks in the code of graphs"),
    ("Node", torch.fx.Graph().output(None), ("_erased",), "passes that erase nodes"),
    ("GraphModule", torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), ("_wrapped_call",), "calls of graphs"),
    ("OpOverload", torch.ops.aten.add.Tensor, ("_schema", "_opname"), "arguments of operators"),
    (
        "torch.ops.aten",
        torch.ops.aten,
        ("_assert_scalar", "_assert_tensor_metadata", "_grouped_mm", "_is_all_true", "_to_copy", "_unsafe_view"),
        "operators in traces",
    ),
    ("ExportedProgram", _names_in(torch.export.ExportedProgram.__init__), ("_guards_code",), "conditions on sizes"),
    ("SymNode", _names_in(SymNode.__init__), ("_expr",), "sizes that a trace may vary"),
    (
        "BackwardCFunction",
        _names_in(BackwardCFunction.apply),
        ("_forward_cls",),
        "backward passes that a model wrote itself",
    ),
)
"""Owners by name, their private attributes that the package reads, and what for."""

OPTIONAL = frozenset({"_dispatch_impl"})
"""Attributes without which the package only takes longer."""

SUPPORTED = "2.11 to 2.13"


def __getattr__(name: str) -> Any:
    """Return a private name of torch, by the name of this list.

    Raises:
        ImportError: this torch lacks it. The message says what needs it.
    """
    if name not in NAMES:
        raise AttributeError(f"{__name__} lists no name {name!r}")
    private = NAMES[name]
    try:
        found: Any = importlib.import_module(private.module)
        for part in filter(None, private.name.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(_message([f"{private.path} ({private.purpose})"])) from error
    return found


def _message(names: list[str]) -> str:
    """The message of an ImportError about names that this torch lacks."""
    return f"torch {torch.__version__} lacks {listed(names, len(names))}, on which lora_fx depends. Install a release that has it: {SUPPORTED}"


def check_attributes() -> None:
    """Raise an :class:`ImportError` with all private attributes that this torch lacks."""
    gone = [
        f"{shown}.{name} ({purpose})"
        for shown, owner, names, purpose in ATTRIBUTES
        for name in names
        if not hasattr(owner, name)
    ]
    if gone:
        raise ImportError(_message(gone))


check_attributes()
