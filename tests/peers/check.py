"""Run by the driver in a process for each library: take models of it the whole way, and print a JSON line for each.

python check.py LIBRARY MODEL…
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent), str(HERE.parent.parent / "tools")]

import models  # noqa: E402
from torchvision_operators import define_operator_schemas  # noqa: E402

define_operator_schemas()

import peft  # noqa: E402
from conftest import set_factors  # noqa: E402
from graph_diff import first_difference  # noqa: E402

import lora_fx  # noqa: E402
from lora_fx.adapters.peft_format.foreign_formats.diffusers import component_of  # noqa: E402
from lora_fx.planning.plan import Chosen  # noqa: E402

STEPS = 3


@dataclass
class Row:
    """What came of a model: a cell for each column, and why one failed."""

    cells: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def cell(self, column: str) -> Iterator[None]:
        """Note a failure of the block in a column."""
        try:
            yield
        except Exception as error:
            refused = column in ("TorchScript", "ONNX") and isinstance(error, lora_fx.LoraFxError)
            self.cells[column] = "refused" if refused else "failed"
            self.notes[column] = f"{'' if refused else type(error).__name__ + ': '}{error}"


def check(peer: models.Peer) -> Row:
    """Take one model the whole way."""
    row = Row()
    torch.manual_seed(0)
    model = peer.build().eval()
    _set_vectors(model)
    torch.manual_seed(1)
    inputs, others = peer.inputs(2), peer.inputs(3)
    with row.cell("trace"):
        traced = lora_fx.trace(model, inputs, dynamic=peer.dynamic)
        row.cells["trace"] = _shown(max(_difference(traced, model, each) for each in (inputs, others)))
    if "trace" in row.notes:
        return row
    with row.cell("sites"):
        graph = lora_fx.rewrite(traced, peer.rules, rank=4, alpha=6, dropout=0.0)
        plan = [each for each in lora_fx.plan(traced, peer.rules) if isinstance(each, Chosen)]
        names = [each.site.module for each in plan]
        row.cells["sites"] = str(len(names))
    if "sites" in row.notes:
        return row
    set_factors(graph, scale=0.05)
    assert _difference(graph, traced, inputs) > 0, "the adapter does not change the output"
    with row.cell("PEFT"):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)
        theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
        set_factors(theirs.base_model.model, scale=0.05)
        summary = lora_fx.parameter_summary(graph)
        assert (summary.trainable, summary.total) == theirs.get_nb_trainable_parameters(), "other counts of parameters"
        row.cells["PEFT"] = _shown(max(_difference(graph, theirs.base_model.model, each) for each in (inputs, others)))
        with row.cell("training"):
            row.cells["training"] = _shown(_trained_apart(copy.deepcopy(graph), theirs.base_model.model, peer))
    folded = None
    with row.cell("fold"):
        folded = lora_fx.fold(graph)
        row.cells["fold"] = _shown(_difference(folded, graph, others))
        row.cells["graph"] = first_difference(folded, traced) or "the trace"
    with tempfile.TemporaryDirectory() as place:
        with row.cell("adapter"):
            row.cells["adapter"] = _in_forms(peer, graph, traced, model, Path(place))
        for column, export in (("TorchScript", lora_fx.export.torchscript), ("ONNX", lora_fx.export.onnx)):
            if folded is not None:
                with row.cell(column):
                    done = export(folded, Path(place) / column)
                    row.cells[column] = "bit-equal" if done.largest == 0 else f"{done.largest:.0e}"
    return row


def _in_forms(peer: models.Peer, graph: Any, traced: Any, model: nn.Module, place: Path) -> str:
    """Save an adapter, load it back, and compare with the graph; what diffusers has a loader for in its form too."""
    inputs = peer.inputs(2)
    lora_fx.save_adapter(graph, place / "peft")
    differences = {"PEFT": _difference(lora_fx.from_adapter(traced, place / "peft"), graph, inputs)}
    if peer.library == "diffusers" and hasattr(model, "load_lora_adapter"):
        lora_fx.save_adapter(graph, place / "diffusers", format="diffusers")
        theirs: Any = copy.deepcopy(model)
        prefix = component_of(f"{type(model).__module__}:{type(model).__name__}")
        theirs.load_lora_adapter(place / "diffusers", prefix=prefix or None, use_safetensors=True)
        differences["loaded by diffusers"] = _difference(theirs, graph, inputs)
        theirs.save_lora_adapter(place / "theirs", adapter_name=next(iter(theirs.peft_config)))
        differences["saved by diffusers"] = _difference(lora_fx.from_adapter(traced, place / "theirs"), graph, inputs)
        if prefix:
            differences |= _of_pipeline(graph, traced, model, prefix, place, inputs)
    return ", ".join(f"{name} {_shown(value)}" for name, value in differences.items())


def _of_pipeline(graph: Any, traced: Any, model: nn.Module, prefix: str, place: Path, inputs: Any) -> dict[str, float]:
    """Return the differences after the loader of the pipeline that a model is of, by diffusers' and kohya's keys, and after its writer."""
    import diffusers

    pipeline: Any = {
        "UNet2DConditionModel": diffusers.StableDiffusionPipeline,
        "SD3Transformer2DModel": diffusers.StableDiffusion3Pipeline,
        "FluxTransformer2DModel": diffusers.FluxPipeline,
    }[type(model).__name__]
    lora_fx.save_adapter(graph, place / "kohya", format="kohya")
    differences = {}
    for form, keys in (("diffusers", "diffusers' keys"), ("kohya", "kohya's keys")):
        if form == "kohya" and pipeline is diffusers.StableDiffusion3Pipeline:
            continue  # its loader does not know these keys
        theirs: Any = copy.deepcopy(model)
        options = {"return_alphas": True} if pipeline is diffusers.FluxPipeline else {}
        state, *alphas, metadata = pipeline.lora_state_dict(place / form, return_lora_metadata=True, **options)
        load = pipeline.load_lora_into_unet if prefix == "unet" else pipeline.load_lora_into_transformer
        given = {"network_alphas": alphas[0]} if alphas else {}
        load(state, **{prefix: theirs}, metadata=metadata, **given)
        differences[f"{keys} in a pipeline"] = _difference(theirs, graph, inputs)
        if form == "diffusers":
            layers = {f"{prefix}_lora_layers": peft.get_peft_model_state_dict(theirs, adapter_name="default_0")}
            said = {f"{prefix}_lora_adapter_metadata": theirs.peft_config["default_0"].to_dict()}
            pipeline.save_lora_weights(place / "pipeline", **layers, **said)
            again = lora_fx.from_adapter(traced, place / "pipeline")
            differences["saved by a pipeline"] = _difference(again, graph, inputs)
    return differences


def _set_vectors(model: nn.Module) -> None:
    """Give biases, the weights of norms, running statistics and a head of zeros values that are not those they start with."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and (tensor.dim() == 1 or (tensor.dim() > 1 and not tensor.any())):
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)


def _called(module: Any, inputs: Any) -> list[torch.Tensor]:
    found = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    return [each for each in pytree.tree_leaves(found) if isinstance(each, torch.Tensor)]


def _difference(left: Any, right: Any, inputs: Any) -> float:
    """Return the largest difference of two modules' outputs, as a part of the largest value; gradients are off."""
    with torch.no_grad():
        mine, theirs = (_called(module.eval(), copy.deepcopy(inputs)) for module in (left, right))
    return _largest(mine, theirs)


def _largest(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    assert len(mine) == len(theirs), f"{len(mine)} outputs against {len(theirs)}"
    assert all(each.shape == other.shape for each, other in zip(mine, theirs, strict=True)), "outputs of other shapes"
    found = [
        ((each - other).abs().max() / max(float(other.abs().max()), 1e-30)).item()
        if not torch.equal(each, other)
        else 0.0
        for each, other in zip(mine, theirs, strict=True)
    ]
    return max(found, default=0.0)


def _trained_apart(graph: Any, theirs: nn.Module, peer: models.Peer) -> float:
    """Return the largest difference of outputs over steps of training in train mode, under one random state for each."""
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (graph, theirs)]
    differences = []
    for step in range(STEPS):
        torch.manual_seed(20 + step)
        inputs, outputs = peer.inputs(3), []
        for module, optimizer in zip((graph, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            outputs.append(_called(module.train(), copy.deepcopy(inputs)))
            optimizer.zero_grad()
            sum(each.square().mean() for each in outputs[-1] if each.requires_grad).backward()  # type: ignore[union-attr]
            optimizer.step()
        differences.append(_largest(*([each.detach() for each in given] for given in outputs)))
    graph.eval(), theirs.eval()
    inputs = peer.inputs(2)
    return max(*differences, _difference(graph, theirs, inputs))


def _shown(value: float) -> str:
    return "bit-equal" if value == 0 else f"{value:.0e}"


def main(library: str, names: list[str], told: Callable[[str], None]) -> None:
    """Check models of a library one by one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in names:
        start = time.process_time()
        try:
            row = check(models.PEERS[library][name])
            found: dict[str, Any] = {"cells": row.cells, "notes": row.notes}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        told(json.dumps({"row": name, **found, "seconds": round(time.process_time() - start)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:], lambda line: print(line, flush=True))
