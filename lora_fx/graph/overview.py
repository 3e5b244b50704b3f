"""Overview of a graph on a few lines: its parameters, adapters, inputs and output. The repr of a graph, also as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import torch
from torch import fx, nn

from lora_fx.errors import listed, shortened
from lora_fx.graph.adapter_names import adapter_of, original_name
from lora_fx.graph.adapter_rows import ADAPTER_NAMES
from lora_fx.graph.adapter_states import AdapterState, adapter_states
from lora_fx.graph.info import AdapterRecord, known_info
from lora_fx.graph.input_checks import InputCheck
from lora_fx.torch_internals import PyTreeCodeGen

MAX_ADAPTERS, MAX_INPUTS = 5, 6


def element_counts(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of elements in the parameters that require a gradient, and in all, each tensor once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def overview_text(graph_module: fx.GraphModule) -> str:
    """Return the overview as text, on at most 12 lines."""
    rows = _rows(graph_module)
    width = max(len(name) for name, _ in rows)
    return "\n".join([_heading(graph_module), *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)])


def overview_html(graph_module: fx.GraphModule) -> str:
    """Return the overview as a table of HTML, for notebooks."""
    cells = "".join(
        f'<tr><td style="text-align:left">{html.escape(name)}</td><td style="text-align:left">{html.escape(text)}</td></tr>'
        for name, text in _rows(graph_module)
    )
    heading = html.escape(_heading(graph_module))
    return f'<table><caption style="text-align:left;white-space:nowrap">{heading}</caption>{cells}</table>'


def _rows(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    states = adapter_states(graph_module)
    info = known_info(graph_module)
    adapters = shortened([_adapter(graph_module, state) for state in states], MAX_ADAPTERS, "in gm.adapters")
    named = ["adapters", *[""] * (len(adapters) - 1)]
    return [
        ("parameters", _parameters(graph_module)),
        *zip(named, adapters, strict=False),
        *([("folded", f"{_counted(len(info.merged), 'parameter', 'parameters')} changed")] if info.merged else []),
        ("inputs", _inputs(graph_module)),
        ("output", _output(graph_module)),
        ("code", "gm.code; its nodes: print(gm.graph)"),
    ]


def _heading(graph_module: fx.GraphModule) -> str:
    mode = "training" if graph_module.training else "evaluation"
    floating = [p for p in graph_module.parameters() if p.is_floating_point()]
    place = f", {_short(floating[0].dtype)} on {floating[0].device}" if floating else ""
    name = type(graph_module).__name__
    subject = "Graph" if name == "GraphModule" else f"{name} as a graph"
    return f"{subject} of {len(graph_module.graph.nodes):,} nodes, in {mode} mode{place}"


def _parameters(graph_module: fx.GraphModule) -> str:
    trainable, total = element_counts(graph_module)
    return f"{trainable:,} trainable of {total:,}" + (f" ({100 * trainable / total:.4g}%)" if total else "")


def _adapter(graph_module: fx.GraphModule, state: AdapterState) -> str:
    record = known_info(graph_module).adapters.get(state.name)
    found = [str(state)]
    if record is not None and record.branches:
        found.append(_settings(record))
    copies = sum(
        original_name(name) is not None and adapter_of(name) == state.name
        for name, _ in graph_module.named_parameters()
    )
    if copies:
        found.append(_counted(copies, "trained copy", "trained copies"))
    found += [f"{len(each.rows)} rows of {each.weight}" for each in (record.tokens if record is not None else ())]
    if record is not None and record.prefix is not None:
        found.append(f"a {record.prefix.kind} of {record.prefix.tokens} tokens")
    return ": ".join([found[0], ", ".join(found[1:])]) if len(found) > 1 else found[0]


def _settings(record: AdapterRecord) -> str:
    settings = [branch.setting for _, branch in record.branches.values()]
    rank, alpha, scaling = (
        _span(values)
        for values in (
            [each.rank for each in settings],
            [each.alpha for each in settings],
            [each.scale / each.strength if each.strength else each.scale for each in settings],
        )
    )
    return f"rank {rank}, alpha {alpha}, scaling {scaling}, {_counted(len(record.branches), 'branch', 'branches')}"


def _span(values: Iterable[float]) -> str:
    ordered = sorted(set(values))
    return f"{ordered[0]:g}" if len(ordered) == 1 else f"{ordered[0]:g} to {ordered[-1]:g}"


def _inputs(graph_module: fx.GraphModule) -> str:
    checks = [module for module in graph_module.modules() if isinstance(module, InputCheck)]
    examples = known_info(graph_module).examples
    names: dict[str, tuple[str | None, ...]] = {check.name: (None,) * check.rank for check in checks}
    if examples is not None:
        varying = {
            (check.name, dim)
            for check in checks
            for dim in range(check.rank)
            if check.low[dim] != check.high[dim] and check.name in examples.tensors
        }
        axes = {place: axis for axis, places in examples.together(varying).items() for place in places}
        names = {check.name: tuple(axes.get((check.name, dim)) for dim in range(check.rank)) for check in checks}
    shown = [f"{check.name} ({', '.join(_sizes(check, names[check.name]))})" for check in checks]
    shown += [f"{ADAPTER_NAMES} (of each row)"] if shown and known_info(graph_module).by_row else []
    return listed(shown, MAX_INPUTS) if shown else listed(_placeholders(graph_module), MAX_INPUTS) or "none"


def _sizes(check: InputCheck, axes: Sequence[str | None]) -> list[str]:
    return [
        str(check.low[dim]) if check.low[dim] == check.high[dim] else axis or "any" for dim, axis in enumerate(axes)
    ]


def _placeholders(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]


def _output(graph_module: fx.GraphModule) -> str:
    codegen = graph_module.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, PyTreeCodeGen) else None
    if spec is None or spec.is_leaf():
        return "a tensor"
    keys = spec.context if isinstance(spec.context, list) else []
    kind: str = spec.type.__name__
    return f"{kind} ({listed([str(key) for key in keys], MAX_INPUTS)})" if keys else kind


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
