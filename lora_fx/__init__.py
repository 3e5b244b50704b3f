"""LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, and fold them back into its weights."""

from lora_fx import export, huggingface
from lora_fx.drawing import draw
from lora_fx.errors import ExportError, FoldError, InputError, LoraFxError, PlanError, RuleError, TraceError
from lora_fx.folding import fold, unload
from lora_fx.graph_module import TracedGraphModule
from lora_fx.materializing import materialize
from lora_fx.parameters import ParameterSummary, parameter_summary
from lora_fx.planning import Plan, plan
from lora_fx.rewriting import rewrite
from lora_fx.tracing import trace
from lora_fx.transferring import transfer

__all__ = [
    "ExportError",
    "FoldError",
    "InputError",
    "LoraFxError",
    "ParameterSummary",
    "Plan",
    "PlanError",
    "RuleError",
    "TraceError",
    "TracedGraphModule",
    "draw",
    "export",
    "fold",
    "huggingface",
    "materialize",
    "parameter_summary",
    "plan",
    "rewrite",
    "trace",
    "transfer",
    "unload",
]
