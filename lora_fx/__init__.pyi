from . import export, generation, huggingface, parallel
from .adapters.activate import activate
from .adapters.combine import combine
from .adapters.explained_variance import EvaStart, eva
from .adapters.materialize import materialize
from .adapters.peft_format.save_load import from_adapter, load_adapter, save_adapter
from .adapters.row_selection import activate_by_row
from .adapters.transfer import transfer
from .branches.remove import unload
from .drawing.draw import draw
from .errors import (
    AdapterError,
    ExportError,
    FoldError,
    InputError,
    LoraFxError,
    PlanError,
    RuleError,
    TraceError,
    VerifyError,
    WriteError,
)
from .folding.dequantise import dequantise
from .folding.fold import fold, recipe
from .folding.report import FoldReport, fold_report
from .folding.verify import verify
from .graph.graph_module import TracedGraphModule
from .graph.nested import flatten, nest
from .planning.plan import Plan
from .planning.planner import plan
from .rewriting import rewrite
from .tracing.trace import trace
from .training.fuse import fuse
from .training.parameters import ParameterSummary, lora_plus_groups, parameter_summary

__all__ = [
    "AdapterError",
    "EvaStart",
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
    "WriteError",
    "activate",
    "activate_by_row",
    "combine",
    "dequantise",
    "draw",
    "eva",
    "export",
    "flatten",
    "fold",
    "fold_report",
    "from_adapter",
    "fuse",
    "generation",
    "huggingface",
    "load_adapter",
    "lora_plus_groups",
    "materialize",
    "nest",
    "parallel",
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
