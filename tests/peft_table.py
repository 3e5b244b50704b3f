"""PEFT's own LoRA configurations through lora_fx, with PEFT beside it: ``python tests/peft_table.py`` writes the table of all.

Every row of ``peft_configurations.py`` goes the whole way, one promise after the other. PEFT makes the adapter and saves it.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import peft
import torch
from peft_configurations import ROWS, Row
from peft_models import inputs, model, run, traced
from torch import nn

import lora_fx
from lora_fx.graph.info import info_of
from lora_fx.rules.vocabulary import splits_weight

ROUNDING = 2e-5
"""The largest difference of two computations of one function in float32, relative to the largest value."""


class Kind(Enum):
    """What came of one promise."""

    EQUAL = "equal bit for bit"
    ROUNDED = "equal up to rounding"
    REFUSED = "refused"
    WRONG = "wrong"
    RAW = "raw error"
    PEER = "PEFT itself refuses"


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    text: str = ""
    largest: float = 0.0


class _PeerError(Exception):
    """PEFT cannot do it."""


@dataclass(frozen=True)
class Case:
    """One row on its way: what PEFT made and saved, and the graph that read it."""

    row: Row
    directory: Path
    wrapped: nn.Module
    outputs: list[torch.Tensor]
    graph: list[lora_fx.TracedGraphModule] = field(default_factory=list)

    @property
    def loaded(self) -> lora_fx.TracedGraphModule:
        return self.graph[0]

    def reloaded(self, **settings: Any) -> Any:
        """Return PEFT's model with the adapter that it saved."""
        with _peer():
            return peft.PeftModel.from_pretrained(_base(self.row), self.directory, **settings).eval()


def check(row: Row) -> dict[str, Outcome]:
    """Take a row the whole way; the outcome of every promise by its name. None but the first where PEFT or the load refuses."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found: dict[str, Outcome] = {}
        try:
            case = _case(row, Path(folder))
        except _PeerError as error:
            return {"load": Outcome(Kind.PEER, str(error)), "rules": _refused_too(row)}
        for name, promise in PROMISES.items():
            found[name] = _outcome(promise, case)
            if name == "load" and found[name].kind is not Kind.EQUAL:
                return {**found, "rules": _outcome(_rules, case)}
        return found


def verdict(found: Mapping[str, Outcome]) -> str:
    """Return in one word what came of a row."""
    kinds = [each.kind for each in found.values()]
    for kind, word in ((Kind.RAW, "raw"), (Kind.WRONG, "wrong")):
        if kind in kinds:
            return word
    if found["load"].kind is not Kind.EQUAL:
        return "PEFT refuses" if found["load"].kind is Kind.PEER else "refused"
    refused = any(each.kind is Kind.REFUSED for name, each in found.items() if name != "rules")
    return "in part" if refused else "in full"


@contextmanager
def _peer() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _PeerError(f"{type(error).__name__}: {error}") from error


def _base(row: Row) -> nn.Module:
    return copy.deepcopy(model(row.model))


def _config(settings: Mapping[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(**copy.deepcopy(dict(settings)))


def _case(row: Row, folder: Path) -> Case:
    with _peer():
        wrapped = peft.get_peft_model(_base(row), _config(row.settings)).eval()
        _move(wrapped, 1)
        wrapped.save_pretrained(folder / "theirs")
        with torch.no_grad():
            outputs = run(wrapped, row.model)
    return Case(row, folder / "theirs", wrapped, outputs)


def _move(module: nn.Module, seed: int) -> None:
    """Add something to all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _outcome(promise: Callable[[Case], Outcome], case: Case) -> Outcome:
    try:
        return promise(case)
    except _PeerError as error:
        return Outcome(Kind.PEER, str(error))
    except (lora_fx.LoraFxError, UserWarning) as error:
        return Outcome(Kind.REFUSED, str(error))
    except Exception as error:
        return Outcome(Kind.RAW, f"{type(error).__name__}: {error}")


def _compared(mine: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor], what: str = "") -> Outcome:
    mine, theirs = list(mine), list(theirs)
    if [each.shape for each in mine] != [each.shape for each in theirs]:
        return Outcome(Kind.WRONG, f"{what} {[*map(_shape, mine)]} where PEFT has {[*map(_shape, theirs)]}".strip())
    pairs = list(zip(mine, theirs, strict=True))
    if all(torch.equal(a, b) for a, b in pairs):
        return Outcome(Kind.EQUAL)
    largest = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs if a.numel())
    return Outcome(Kind.ROUNDED if largest <= ROUNDING else Kind.WRONG, f"{what} {largest:.0e} apart".strip(), largest)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _is_uncalled(name: str, row: Row) -> bool:
    """Tell whether a parameter is a factor at a module that the model never calls, as the embedding that others are tied to."""
    module, found, _ = name.removeprefix("base_model.model.").partition(".lora_")
    return bool(found) and row.model == "seq2seq tied" and module == "model.shared"


def _named(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], what: str) -> Outcome:
    base = ".base_layer.weight"  # of an embedding, which PEFT's files may have beside its factors
    mine, theirs = ({n: t for n, t in each.items() if not n.endswith(base)} for each in (mine, theirs))
    if mine.keys() != theirs.keys():
        surplus, missing = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
        return Outcome(Kind.WRONG, f"{what}: {surplus[:3]} are not in PEFT's; {missing[:3]} are missing")
    return _compared([mine[name] for name in theirs], theirs.values(), what)


def _badness(outcome: Outcome) -> tuple[int, float]:
    order = [Kind.EQUAL, Kind.PEER, Kind.ROUNDED, Kind.REFUSED, Kind.WRONG, Kind.RAW]
    return order.index(outcome.kind), outcome.largest


def _worst(*outcomes: Outcome) -> Outcome:
    return max(outcomes, key=_badness)


def _best(outcomes: Iterable[Outcome]) -> Outcome:
    return min(outcomes, key=_badness)


def _outputs(module: nn.Module, row: Row) -> list[torch.Tensor]:
    with torch.no_grad():
        return run(module, row.model)


def _load(case: Case) -> Outcome:
    case.graph.append(lora_fx.from_adapter(traced(case.row.model), case.directory).eval())
    return Outcome(Kind.EQUAL)


def _output(case: Case) -> Outcome:
    return _compared(_outputs(case.loaded, case.row), case.outputs)


def _trains(case: Case) -> Outcome:
    mine = lora_fx.parameter_summary(_trainable(case)).trainable
    trained = [p for name, p in case.wrapped.named_parameters() if p.requires_grad and not _is_uncalled(name, case.row)]
    theirs = sum(
        {p.data_ptr(): p.numel() for p in trained}.values()
    )  # the factors that PEFT ties are two over one memory
    return (
        Outcome(Kind.EQUAL) if mine == theirs else Outcome(Kind.WRONG, f"{mine} parameters train; with PEFT {theirs}")
    )


def _fold(case: Case) -> Outcome:
    with _peer():
        merged = case.reloaded().merge_and_unload()
        theirs = merged.state_dict()
    apart = _compared(_outputs(merged, case.row), case.outputs)
    if apart.kind is Kind.WRONG:  # PEFT merges into a weight that is used elsewhere too
        folded = _compared(_outputs(lora_fx.fold(case.loaded, unshare=True), case.row), case.outputs)
        return (
            folded
            if folded.kind is Kind.WRONG
            else Outcome(Kind.PEER, f"merge_and_unload is {apart.text}, fold is not")
        )
    folded = lora_fx.fold(case.loaded)
    mine = folded.state_dict()
    weights = {name: tensor for name, tensor in theirs.items() if name in mine and tensor.is_floating_point()}
    return _worst(
        _compared(_outputs(folded, case.row), _outputs(merged, case.row)),
        _compared([mine[name] for name in weights], weights.values(), "weights"),
    )


def _save(case: Case) -> Outcome:
    lora_fx.save_adapter(case.loaded, case.directory.with_name("mine"))
    return _read_back(case, "mine", case.wrapped)


def _read_back(case: Case, name: str, theirs: nn.Module) -> Outcome:
    """Compare what PEFT reads from a directory of lora_fx with a model of PEFT: all tensors of the adapter, and the outputs."""
    try:
        read = peft.PeftModel.from_pretrained(_base(case.row), case.directory.with_name(name)).eval()
    except Exception as error:
        return Outcome(Kind.WRONG, f"PEFT cannot read what save_adapter wrote: {type(error).__name__}: {error}")
    outputs = _compared(_outputs(read, case.row), _outputs(theirs.eval(), case.row), "read back")
    if splits_weight(str(case.row.settings.get("init_lora_weights"))):
        return outputs  # save_adapter writes PEFT's conversion, of twice the rank, and PEFT here the factors beside the changed base
    tensors = (
        {
            name: tensor
            for name, tensor in peft.get_peft_model_state_dict(each).items()
            if not _is_uncalled(name, case.row)
        }
        for each in (read, theirs)
    )
    return _worst(_named(*tensors, "tensors"), outputs)


def _unload(case: Case) -> Outcome:
    return _compared(_outputs(lora_fx.unload(case.loaded), case.row), _outputs(model(case.row.model), case.row))


def _second(case: Case) -> Outcome:
    with _peer():
        both = case.reloaded(is_trainable=True)
        both.add_adapter("other", _config(case.row.second or case.row.settings))
        both.set_adapter("other")
        _move(both, 2)
        both.save_pretrained(case.directory, selected_adapters=["other"])
        alone = peft.PeftModel.from_pretrained(_base(case.row), case.directory / "other").eval()
        # A trained bias of the first stays in PEFT's model; factors that PEFT ties are not tied in a second adapter.
        theirs = [_outputs(each.eval(), case.row) for each in (alone, both)]
    graph = lora_fx.load_adapter(case.loaded, case.directory / "other", "other")
    return _worst(
        _best(_compared(_outputs(lora_fx.activate(graph, {"other": 1.0}).eval(), case.row), each) for each in theirs),
        _compared(_outputs(lora_fx.activate(graph, {"default": 1.0}).eval(), case.row), case.outputs),
    )


def _train(case: Case) -> Outcome:
    graph = _trainable(case)
    with _peer():
        wrapped = case.reloaded(is_trainable=True)
        if _compared(_outputs(wrapped, case.row), case.outputs).kind is Kind.WRONG:
            raise _PeerError("PEFT reads its own file as another model")
        before = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(wrapped).items()}
        _three_steps(wrapped, case.row)
        after = peft.get_peft_model_state_dict(wrapped)
    if all(torch.equal(after[name], tensor) for name, tensor in before.items()):
        return Outcome(Kind.PEER, "nothing trains")
    _three_steps(graph, case.row)
    lora_fx.save_adapter(graph, case.directory.with_name("mine trained"))
    return _read_back(case, "mine trained", wrapped)


def _trainable(case: Case) -> lora_fx.TracedGraphModule:
    more = {"trainable": True} if "trainable" in inspect.signature(lora_fx.from_adapter).parameters else {}
    graph = traced(case.row.model)
    if info_of(graph).inference:  # says why it cannot be traced for training
        graph = lora_fx.trace(model(case.row.model), inputs(case.row.model))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*trains with the gradient of one")
        return lora_fx.from_adapter(graph, case.directory, **more)


def _three_steps(module: nn.Module, row: Row) -> None:
    module.train()
    optimizer = torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=0.05)
    for step in range(3):
        torch.manual_seed(step)
        outputs = run(module, row.model)
        torch.manual_seed(99)
        loss = sum((each * torch.randn(each.shape)).mean() for each in outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _rules(case: Case) -> Outcome:
    graph = lora_fx.rewrite(traced(case.row.model), rules=_config(case.row.settings))
    lora_fx.save_adapter(graph, case.directory.with_name("fresh"))
    with _peer():
        fresh = peft.get_peft_model(_base(case.row), _config(case.row.settings))
    if splits_weight(str(case.row.settings.get("init_lora_weights"))):
        shapes, theirs = (
            sorted(_shape(parameter) for parameter in each.parameters() if parameter.requires_grad)
            for each in (graph, fresh)
        )
        if shapes != theirs:
            return Outcome(Kind.WRONG, f"rewrite makes {shapes} where PEFT has {theirs}")
        return _compared(_outputs(graph, case.row), _outputs(fresh.eval(), case.row), "start")
    read = peft.PeftModel.from_pretrained(_base(case.row), case.directory.with_name("fresh"), is_trainable=True)
    mine, theirs = (
        {
            name: _shape(parameter)
            for name, parameter in each.named_parameters()
            if parameter.requires_grad and not _is_uncalled(name, case.row)
        }
        for each in (read, fresh)
    )
    scalings = [
        {
            name: module.scaling
            for name, module in each.named_modules()
            if hasattr(module, "scaling") and not _is_uncalled(f"{name}.lora_", case.row)
        }
        for each in (read, fresh)
    ]
    if mine != theirs or scalings[0] != scalings[1]:
        return Outcome(Kind.WRONG, f"rewrite makes {_unlike(mine, theirs) or _unlike(*scalings)}")
    return Outcome(Kind.EQUAL)


def _unlike(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {mine.get(name, 'nothing')} where PEFT has {theirs.get(name, 'nothing')}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    )


def _refused_too(row: Row) -> Outcome:
    """Return what ``rewrite`` says to a configuration that PEFT refuses."""
    try:
        config = _config(row.settings)
    except Exception:
        return Outcome(Kind.PEER, "no LoraConfig can say it")
    try:
        lora_fx.rewrite(traced(row.model), rules=config)
    except lora_fx.LoraFxError as error:
        return Outcome(Kind.REFUSED, str(error))
    except Exception as error:
        return Outcome(Kind.RAW, f"{type(error).__name__}: {error}")
    return Outcome(Kind.PEER, "lora_fx takes it")


PROMISES: Mapping[str, Callable[[Case], Outcome]] = {
    "load": _load,
    "output": _output,
    "trains": _trains,
    "fold": _fold,
    "save": _save,
    "unload": _unload,
    "two": _second,
    "steps": _train,
    "rules": _rules,
}
"""The promises, in the order in which a row takes them: loaded by ``from_adapter``; outputs as PEFT's; as much trains; ``fold`` is
``merge_and_unload``; written, PEFT reads it back; ``unload`` is the base; a second adapter beside it, and each of them alone; three
steps of training as PEFT's; and ``rewrite`` with the configuration as rules makes what PEFT makes.
"""


TABLE = Path(__file__).with_name("peft_configurations.md")

HEAD = """# PEFT's own LoRA configurations

[lora_fx](../README.md) › [tests](README.md) › peft_configurations.md

Made by `python tests/peft_table.py --write`. Each row is a configuration of PEFT's own tests (`peft_configurations.py`), on a model with
the same structure (`peft_models.py`). PEFT makes an adapter with it, moves all that trains, and saves it. A row *holds in full* if

1. `from_adapter` loads it, and the outputs are PEFT's;
2. as many parameters train;
3. `fold` gives PEFT's `merge_and_unload`, outputs and weights;
4. `save_adapter` writes it, and PEFT reads back the same tensors and computes the same;
5. `unload` gives the base;
6. `load_adapter` puts a second one beside it, and `activate` gives what PEFT computes with each;
7. three steps of SGD, with dropout, give PEFT's parameters.

Bit for bit, or up to a rounding of at most {rounding:.0e} of the largest value. *PEFT refuses* counts the configurations with which PEFT's
tests show that PEFT raises, or with which PEFT cannot compute. *Variants* change what LoRA computes; they are listed apart.
"""

COLUMNS = ("in full", "in part", "refused", "wrong", "raw", "PEFT refuses")


def _of_one_model(rows: list[Row]) -> list[tuple[str, dict[str, Outcome]]]:
    torch.set_num_threads(1)
    return [(str(row), check(row)) for row in rows]


def check_all(rows: Sequence[Row], processes: int) -> dict[str, dict[str, Outcome]]:
    """Return what came of each row; rows of one model in one process, which traces it once."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return dict(itertools.chain.from_iterable(pool.map(_of_one_model, by_model.values())))


def table(found: Mapping[str, dict[str, Outcome]]) -> str:
    """Return the whole table as Markdown."""
    parts = [HEAD.format(rounding=ROUNDING)]
    for title, chosen in (
        ("LoRA", [row for row in ROWS if row.variant is None]),
        ("Variants", [row for row in ROWS if row.variant is not None]),
    ):
        verdicts = [(row, verdict(found[str(row)])) for row in chosen]
        parts.append(
            f"## {title}\n\n| PEFT's tests | rows | {' | '.join(COLUMNS)} |\n|---{'|---:' * (len(COLUMNS) + 1)}|"
        )
        for name in (*dict.fromkeys(row.table for row in chosen), "all"):
            counted = Counter(word for row, word in verdicts if name in (row.table, "all"))
            cells = [str(counted[column] or "") for column in COLUMNS]
            parts[-1] += f"\n| {name} | {counted.total()} | {' | '.join(cells)} |"
        for word in COLUMNS[::-1]:
            rows = [row for row, each in verdicts if each == word]
            if rows:
                lines = [f"- {_line(row)}{_reasons(found[str(row)])}" for row in rows]
                parts.append(f"### {title}: {word}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> str:
    return f"`{row}`" + (f" ({row.variant})" if row.variant else "")


def _reasons(found: Mapping[str, Outcome]) -> str:
    told = [f"{name}: {_brief(each.text)}" for name, each in found.items() if each.text and each.kind is not Kind.EQUAL]
    return f" — {'; '.join(told)}" if told else ""


def _brief(text: str) -> str:
    plain = " ".join(re.sub(r"/\S*?(theirs(/other)?|mine|mine trained|fresh)\b", "…", text).split()).replace("`", "'")
    return plain if len(plain) <= 160 else plain[:159] + "…"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--write"]
    chosen = [row for row in ROWS if all(word in str(row) for word in words)]
    found = check_all(chosen, len(os.sched_getaffinity(0)))
    if "--write" in sys.argv:
        TABLE.write_text(table(found))
    for row in chosen:
        print(f"{verdict(found[str(row)])}: {_line(row)}{_reasons(found[str(row)])}")
    for plain in (True, False):
        counted = Counter(verdict(found[str(row)]) for row in chosen if (row.variant is None) is plain)
        print("LoRA:" if plain else "variants:", ", ".join(f"{count} {word}" for word, count in counted.items()))


if __name__ == "__main__":
    main()
