"""What is asked of every branched graph, of whatever model: copies, passes, folds, files, exports, all beside what the graph computes."""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hunt.outcome import Outcome

import lora_fx

Call = Callable[[Any], Any]


@dataclass
class Asked:
    """A branched graph in eval mode, and what it computed.

    Attributes:
        outcome: of the seed.
        draw: decides what is asked.
        base: the trace.
        graph: the branched graph.
        call: calls a graph or model, and returns tensors.
        wanted: what the graph returned.
        tolerance: as a part of the largest value.
        onto: makes another trace of the same model, as transfer needs it.
    """

    outcome: Outcome
    draw: random.Random
    base: lora_fx.TracedGraphModule
    graph: lora_fx.TracedGraphModule
    call: Call
    wanted: Any
    tolerance: float
    onto: Callable[[], lora_fx.TracedGraphModule]

    def compare(self, what: str, graph: Any, wanted: Any = None) -> None:
        with torch.no_grad():
            self.outcome.near(what, self.call(graph), self.wanted if wanted is None else wanted, self.tolerance)

    def passes(self, names: Sequence[str]) -> None:
        """Passes that change nothing, and for some of these a fold behind it."""
        graph, active = self.graph, {"default": 1.0}
        made: Mapping[str, Callable[[], Any]] = {
            "deepcopy": lambda: copy.deepcopy(graph),
            "pickle": lambda: pickle.loads(pickle.dumps(graph)),
            "nest": lambda: lora_fx.nest(graph),
            "flatten": lambda: lora_fx.flatten(lora_fx.nest(graph)),
            "fuse": lambda: lora_fx.fuse(graph),
            "transfer": lambda: lora_fx.transfer(graph, onto=self.onto()).eval(),
            "off and on": lambda: lora_fx.activate(lora_fx.activate(graph, {}), active),
        }
        for what in names:
            with self.outcome.asking(what):
                changed = made[what]()
                self.compare(what, changed)
                if self.draw.random() < 0.4:
                    self.compare(f"{what}, fold", lora_fx.fold(changed, unshare=True))
        with self.outcome.asking("unload"), torch.no_grad():
            self.compare("unload", lora_fx.unload(graph), self.call(self.base.eval()))
        with self.outcome.asking("draw"), tempfile.TemporaryDirectory() as place:
            lora_fx.draw(self.base, graph, Path(place) / "graph.txt")
            self.outcome.add("draw", "equal")

    def folds(self, model: Any, *, strict: bool) -> lora_fx.TracedGraphModule | None:
        """Fold, in place too, and give the weights to the model itself. Return the folded graph."""
        outcome, folded = self.outcome, None
        with outcome.asking("fold"):
            folded = lora_fx.fold(self.graph)
            self.compare("fold", folded)
            if model is not None:
                own = copy.deepcopy(model)
                own.load_state_dict(folded.state_dict(), strict=strict)
                self.compare("fold, in the model", own)
        if folded is None:
            with outcome.asking("fold, unshared"):
                folded = lora_fx.fold(self.graph, unshare=True)
                self.compare("fold, unshared", folded)
        with outcome.asking("fold in place"):
            self.compare("fold in place", lora_fx.fold(copy.deepcopy(self.graph), inplace=True))
        return folded

    def saved(self, directory: Path) -> bool:
        """Save the adapter, and load it onto the trace."""
        done = False
        with self.outcome.asking("save"):
            lora_fx.save_adapter(self.graph, directory)
            done = True
        if done:
            with self.outcome.asking("load"):
                self.compare("load", lora_fx.from_adapter(self.base, directory).eval())
        return done

    def exported(self, graph: lora_fx.TracedGraphModule, inputs: Mapping[str, torch.Tensor]) -> None:
        """Write a file of one form, and run it."""
        form = self.draw.choice(("torchscript",) * 6 + ("pt2",) * 6 + ("onnx",) * 2)
        with tempfile.TemporaryDirectory() as place, self.outcome.asking(form):
            path = Path(place) / "model"
            if form == "torchscript":
                lora_fx.export.torchscript(graph, path)
                self.compare(form, torch.jit.load(path))
            elif form == "pt2":
                lora_fx.export.pt2(graph, path.with_suffix(".pt2"))
                program: Any = torch.export.load(path.with_suffix(".pt2")).module()
                self.compare(form, lambda *values, **named: program(**dict(zip(inputs, values, strict=False)), **named))
            else:
                import onnxruntime

                lora_fx.export.onnx(graph, path)
                session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
                feed = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
                names = [each.name for each in session.get_outputs()]
                found = dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))
                self.outcome.near(form, self.call(lambda *_, **__: found), self.wanted, max(self.tolerance, 2e-5))


def step(model: Any, call: Call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of a step of training under one random state, and gradients by name."""
    torch.manual_seed(5)
    model.train()
    model.zero_grad()
    try:
        leaves = [each for each in torch.utils._pytree.tree_leaves(call(model)) if isinstance(each, torch.Tensor)]
        loss = torch.stack([leaf.sin().sum() for leaf in leaves if leaf.is_floating_point()]).sum()
        loss.backward()
        return loss.detach(), {
            name: each.grad.clone()
            for name, each in model.named_parameters()
            if each.requires_grad and each.grad is not None
        }
    finally:
        model.eval()
        model.zero_grad()
