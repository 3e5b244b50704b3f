"""A random program with random adapters, the whole way, beside the program in float64 and PEFT."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
from hunt.adapters import by_hand, drawn_adapter, give_values, key_of, set_values
from hunt.outcome import Outcome
from hunt.passes import Asked, step
from hunt.programs import Net, example

import lora_fx
from lora_fx.planning.plan import Chosen

EVERYTHING = {"select": [{"op": ["linear", "conv1d", "conv2d", "embedding"]}]}


class ProgramHunt:
    """One seed."""

    def __init__(self, seed: int, *, exports: bool) -> None:
        self.seed, self.draw, self.exports = seed, random.Random(seed + 10**6), exports
        self.outcome = Outcome(seed)
        net = Net(seed)
        wide = self.draw.random() < 0.75
        self.net: Any = (net.double() if wide else net).eval()
        cast = net.program.casts
        self.tolerance = (1e-4 if cast else 1e-9) if wide else (1e-3 if cast else 2e-4)
        self.outcome.kinds = [*net.program.kinds, "float64" if wide else "float32"]

    def run(self) -> Outcome:
        """Take the model the whole way; no results if it does not run in eager mode."""
        x = example(self.net)
        try:
            self.net(x.clone())
        except RuntimeError:
            return self.outcome
        before = {name: value.clone() for name, value in self.net.state_dict().items()}
        self._traced(x)
        same = all(torch.equal(value, before[name]) for name, value in self.net.state_dict().items())
        self.outcome.add("the model stays", "equal" if same else "wrong")
        return self.outcome

    def _traced(self, x: torch.Tensor) -> None:
        outcome, base = self.outcome, None
        self.inference = self.draw.random() < 0.5
        with outcome.asking("trace"):
            base = lora_fx.trace(self.net, (x.clone(),), inference=self.inference)
            for rows, length in ((3, 5), (2, 6), (1, 4)):
                mine = example(self.net, rows, length)
                theirs, kept = mine.clone(), mine.clone()
                with torch.no_grad():
                    outcome.near("trace", base(mine), self.net(theirs), self.tolerance)
                same = torch.equal(mine, theirs)
                outcome.add("inputs", "equal" if same else "wrong", f"overwritten: {not torch.equal(mine, kept)}")
        if base is None:
            return
        self.base = base
        self.sites = Counter[str]()
        with outcome.asking("plan"):
            for each in lora_fx.plan(base, EVERYTHING):
                if isinstance(each, Chosen) and each.site.module.startswith("pool."):
                    self.sites[each.site.module.removeprefix("pool.")] += 1
        if self.sites:
            self._branched(x)

    def _branched(self, x: torch.Tensor) -> None:
        first = drawn_adapter(self.net, self.sites, "default", self.draw)
        self.adapters, graph, branched = [first], None, None
        self.outcome.kinds += first.kinds
        with self.outcome.asking("rewrite"), torch.no_grad():
            graph = lora_fx.rewrite(self.base, first.rules())
            set_values(graph, self.seed, "default")
            graph.eval()
            branched = self._call(graph)
        if graph is None or branched is None:
            return
        self.tensors = dict(graph.named_parameters())
        if self._clear():
            with self.outcome.asking("rewrite"):
                self._beside_program("rewrite", graph, {"default": 1.0})
        program = self.net.program
        other = any(rank > min(self.net.pool[name].weight.shape[:2]) for name, (rank, _) in first.ranks.items())
        other |= any(name.startswith("again") for name in first.ranks)  # PEFT wraps the first of a module's names
        peft_has_it = not (program.functional | program.unlike) & {*first.ranks} and not first.calls and not other
        if peft_has_it:
            self._beside_peft(graph, x)
        asked = Asked(
            self.outcome,
            self.draw,
            self.base,
            graph,
            self._call,
            branched,
            self.tolerance,
            lambda: self._trace_again(x),
        )
        asked.passes(self.draw.sample(("deepcopy", "pickle", "fuse", "transfer", "off and on"), 2))
        with tempfile.TemporaryDirectory() as place:
            if asked.saved(Path(place) / "a") and not program.functional & {*first.ranks}:
                with self.outcome.asking("loaded by PEFT"):
                    model: Any = peft.PeftModel.from_pretrained(copy.deepcopy(self.net), str(Path(place) / "a"))
                    asked.compare("loaded by PEFT", model.base_model.model.eval())
        folded = asked.folds(self.net, strict=not program.ambiguous)
        if folded is not None and self.exports and self.draw.random() < 0.4:
            asked.exported(self.draw.choice((folded, graph)), {"x": example(self.net, 2, 6)})
        if not first.variant and not first.bias and self.draw.random() < 0.6:
            self._second(graph)

    def _trace_again(self, x: torch.Tensor) -> lora_fx.TracedGraphModule:
        return lora_fx.trace(self.net, (x.clone(),), inference=not self.inference)

    def _call(self, graph: Any, **more: Any) -> Any:
        return graph(example(self.net, 2, 6), **more)

    def _clear(self) -> bool:
        """Tell whether the program with updates is an oracle: each product of a chosen weight has one owner and one branch."""
        names = {name for adapter in self.adapters for name in adapter.ranks}
        special = any(adapter.variant or adapter.bias for adapter in self.adapters)
        program = self.net.program
        return not special and not (program.ambiguous & program.functional & names) and not program.both & names

    def _beside_program(self, what: str, graph: Any, strengths: dict[str, float]) -> None:
        wanted = by_hand(self.net, self.tensors, strengths, self.adapters, example(self.net, 2, 6))
        with torch.no_grad():
            self.outcome.near(what, self._call(graph), wanted, self.tolerance)

    def _beside_peft(self, graph: Any, x: torch.Tensor) -> None:
        outcome, adapter = self.outcome, self.adapters[0]
        try:
            wrapped: Any = peft.inject_adapter_in_model(adapter.config(), copy.deepcopy(self.net))
        except Exception as error:
            outcome.add("PEFT", "not compared", f"PEFT: {type(error).__name__}: {error}")
            return
        give_values(wrapped, graph)
        wrapped.eval()
        with outcome.asking("PEFT"), torch.no_grad():
            outcome.near("PEFT", self._call(graph), self._call(wrapped), self.tolerance)
        if self.inference:
            return
        if adapter.dropout and any(self.sites[name] != self.net.calls[name] for name in adapter.ranks):
            outcome.add("training", "not compared", "PEFT draws masks in calls that nothing reads, which are no nodes")
            return
        try:
            theirs = step(wrapped, self._call)
        except RuntimeError as error:  # an in-place operator that autograd refuses in eager mode
            outcome.add("training", "not compared", f"PEFT: {error}")
            return
        with outcome.asking("training"):
            loss, gradients = step(graph, self._call)
            outcome.near("training", loss, theirs[0], self.tolerance)
            compare_gradients(outcome, gradients, theirs[1], self.tolerance * 10)

    def _second(self, graph: Any) -> None:
        outcome, draw = self.outcome, self.draw
        second = drawn_adapter(self.net, self.sites, "second", draw)
        self.adapters.append(second)
        two = None
        with outcome.asking("rewrite again"):
            two = lora_fx.rewrite(graph, second.rules(), adapter="second").eval()
        if two is None:
            return
        outcome.kinds.append("two adapters")
        set_values(two, self.seed + 1, "second")
        self.tensors = dict(two.named_parameters())
        if not self._clear():
            return
        strengths = {"default": draw.choice((1.0, 0.5, -0.7)), "second": draw.choice((1.0, 2.0, 0.3))}
        for chosen in (strengths, {"second": 1.0}, {}):
            with outcome.asking("activate"):
                self._beside_program("activate", lora_fx.activate(two, chosen), chosen)
        with outcome.asking("combine"):
            both = lora_fx.combine(two, strengths, adapter="both", method="cat")
            self._beside_program("combine", both, strengths)
        with outcome.asking("fold two"):
            self._beside_program("fold two", lora_fx.fold(two, strengths, unshare=True), strengths)
        self._by_row(two, draw.choice((["second", "default"], ["__base__", "second"])))

    def _by_row(self, two: Any, names: list[str]) -> None:
        """Compare each row of a mixed batch with the program and the update of its adapter."""
        x = example(self.net, 2, 6)
        with self.outcome.asking("by row"), torch.no_grad():
            found = self._call(lora_fx.activate_by_row(two), adapter_names=names)
            for row, name in enumerate(names):
                wanted = by_hand(self.net, self.tensors, {name: 1.0}, self.adapters, x)
                found_row, wanted_row = (
                    torch.utils._pytree.tree_map(lambda value, row=row: value[row], each) for each in (found, wanted)
                )
                self.outcome.near("by row", found_row, wanted_row, self.tolerance)


def compare_gradients(
    outcome: Outcome, mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Compare the gradients of all that trains, by the names of PEFT's tensors."""
    ours, wanted = ({key_of(name): value for name, value in each.items()} for each in (mine, theirs))
    if sorted(ours) == sorted(wanted):
        outcome.near("gradients", [ours[name] for name in wanted], list(wanted.values()), tolerance)
    else:
        outcome.add("gradients", "wrong", f"of {sorted({*ours} ^ {*wanted})[:4]} on one side alone")
