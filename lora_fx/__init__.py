"""LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, and fold them back into its weights."""

from lora_fx import export, huggingface
from lora_fx.activating import activate
from lora_fx.adapters import from_adapter, load_adapter, save_adapter
from lora_fx.combining import combine
from lora_fx.drawing import draw
from lora_fx.errors import (
    AdapterError,
    ExportError,
    FoldError,
    InputError,
    LoraFxError,
    PlanError,
    RuleError,
    TraceError,
    VerifyError,
)
from lora_fx.fold_report import FoldReport, fold_report
from lora_fx.folding import fold, recipe
from lora_fx.fusion import fuse
from lora_fx.graph_module import TracedGraphModule
from lora_fx.materializing import materialize
from lora_fx.parameters import ParameterSummary, lora_plus_groups, parameter_summary
from lora_fx.planning import Plan, plan
from lora_fx.rewriting import rewrite
from lora_fx.tracing import trace
from lora_fx.transferring import transfer
from lora_fx.unloading import unload
from lora_fx.verification import verify

__all__ = [
    "AdapterError",
    "ExportError",
    "FoldError",
    "FoldReport",
    "InputError",
    "LoraFxError",
    "ParameterSummary",
    "Plan",
    "PlanError",
    "RuleError",
    "TraceError",
    "TracedGraphModule",
    "VerifyError",
    "activate",
    "combine",
    "draw",
    "export",
    "fold",
    "fold_report",
    "from_adapter",
    "fuse",
    "huggingface",
    "load_adapter",
    "lora_plus_groups",
    "materialize",
    "parameter_summary",
    "plan",
    "recipe",
    "rewrite",
    "save_adapter",
    "trace",
    "transfer",
    "unload",
    "verify",
]
