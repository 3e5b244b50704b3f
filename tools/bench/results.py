"""What benchmarks found: as data, as JSON, and as the table of tools/bench/README.md. Nothing is measured here."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

PACKAGES = ("torch", "transformers", "peft")
HEADER = (
    "| row | | time | speed | Ω | saved, MB | peak, MB | resident, MB | goal | met |",
    "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
)
COMPARISONS = {
    "speed": "≥",
    "overhead": "≤",
    "saved": "≤",
    "peak": "≤",
    "resident": "≤",
    "time": "≤",
    "seconds": "≤",
    "noise": "≤",
}


@dataclass(frozen=True)
class Measured:
    """What was measured of one contender.

    Attributes:
        name: of the contender.
        seconds: of each repetition.
        saved: bytes that are kept for the backward pass, of tensors that are no weights; None where there is none.
        peak: bytes that a step allocates, at its peak, beyond what there was before it; None where it was not measured.
        resident: bytes by which the memory of the process grows in a step, at its peak; None where it was not measured.
        difference: largest relative difference of an output or gradient to those of the first contender; 0 is bit-equal.
        against: the contender that its speed is relative to, if any.
    """

    name: str
    seconds: tuple[float, ...]
    saved: int | None = None
    peak: int | None = None
    resident: int | None = None
    difference: float | None = None
    against: str = ""

    @property
    def median(self) -> float:
        """The median time of a repetition."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Goal:
    """What a contender is to reach.

    Attributes:
        contender: that it is asked of.
        quantity: ``speed`` is the ratio of median times, ``overhead`` that of what a step takes longer than a frozen one,
            ``saved`` that of what is kept for backward beyond the frozen step, ``peak`` and ``resident`` that of the memory of
            a step, ``time`` that of median times; ``seconds`` is a time, and ``noise`` the median time in parts of the other's third quartile.
        bound: speed at least, and all others at most.
        against: the other contender.
    """

    contender: str
    quantity: Literal["speed", "overhead", "saved", "peak", "resident", "time", "seconds", "noise"]
    bound: float
    against: str = ""

    def __str__(self) -> str:
        bound = f"{COMPARISONS[self.quantity]} {self.bound:g}"
        if self.quantity == "seconds":
            return f"{bound} s"
        if self.quantity == "noise":
            return f"within noise of {self.against}"
        return f"{'Ω' if self.quantity == 'overhead' else self.quantity} {bound}× {self.against}"


@dataclass(frozen=True)
class Conditions:
    """Where and with what it was measured."""

    day: str
    machine: str
    threads: int
    versions: dict[str, str]

    @classmethod
    def present(cls, packages: Iterable[str] = PACKAGES, device: str = "") -> Conditions:
        """Return those of this process, with the versions of some packages."""
        machine = f"{platform.machine()}, {os.cpu_count()} cores{f', {device}' if device else ''}"
        versions = {package: version(package) for package in packages}
        return cls(f"{date.today():%Y-%m-%d}", machine, torch.get_num_threads(), versions)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.day}, {self.machine}, {threads}, {', '.join(f'{k} {v}' for k, v in self.versions.items())}"


@dataclass(frozen=True)
class Result:
    """A row: what was measured of its contenders.

    Attributes:
        row: its name.
        shape: what was run, in words.
        contenders: in the order of the table. One that is called ``frozen`` is what overheads are relative to.
        goals: of this row.
        conditions: where it was measured.
        notes: sentences to be read with the numbers.
    """

    row: str
    shape: str
    contenders: tuple[Measured, ...]
    goals: tuple[Goal, ...]
    conditions: Conditions
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measured:
        return next(each for each in self.contenders if each.name == name)

    def __contains__(self, name: str) -> bool:
        return any(each.name == name for each in self.contenders)

    def speed(self, name: str, against: str) -> float:
        """Return how many times faster a contender is than another."""
        return self[against].median / self[name].median

    def overhead(self, name: str) -> float:
        """Return Ω: how much longer a step takes than the frozen one, as a part of that."""
        return self[name].median / self["frozen"].median - 1

    def saved(self, name: str) -> int | None:
        """Return the bytes kept for backward beyond those of the frozen step."""
        own, frozen = self[name].saved, self["frozen"].saved if "frozen" in self else 0
        return None if own is None or frozen is None else own - frozen

    def found(self, goal: Goal) -> float:
        """Return the quantity that a goal is about."""
        own = self[goal.contender]
        if goal.quantity == "speed":
            return self.speed(goal.contender, goal.against)
        if goal.quantity == "seconds":
            return own.median
        if goal.quantity == "time":
            return own.median / self[goal.against].median
        if goal.quantity == "noise":
            return own.median / statistics.quantiles(self[goal.against].seconds, n=4, method="inclusive")[2]
        quantities: dict[str, Callable[[str], float | None]] = {
            "overhead": self.overhead,
            "saved": self.saved,
            "peak": lambda name: self[name].peak,
            "resident": lambda name: self[name].resident,
        }
        value, other = (quantities[goal.quantity](name) for name in (goal.contender, goal.against))
        if value is None or other is None:
            raise ValueError(f"{self.row}: {goal.quantity} was not measured of {goal.contender} and {goal.against}")
        return value / other if other > 0 else float("inf" if value > 0 else 1)

    def met(self, goal: Goal) -> bool:
        """Say whether a goal is reached."""
        found = self.found(goal)
        return found >= goal.bound if goal.quantity == "speed" else found <= goal.bound

    def as_json(self) -> dict[str, Any]:
        """Return the row as data, with what follows from it."""
        goals = [
            {**asdict(goal), "text": str(goal), "found": round(self.found(goal), 4), "met": self.met(goal)}
            for goal in self.asked()
        ]
        return {**asdict(self), "goals": goals}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Return the row that :meth:`as_json` was called of."""
        goals = [{key: value for key, value in goal.items() if key in Goal.__annotations__} for goal in data["goals"]]
        contenders = [Measured(**{**each, "seconds": tuple(each["seconds"])}) for each in data["contenders"]]
        return cls(
            **{
                **data,
                "contenders": tuple(contenders),
                "goals": tuple(Goal(**goal) for goal in goals),
                "conditions": Conditions(**data["conditions"]),
                "notes": tuple(data["notes"]),
            }
        )

    def asked(self) -> list[Goal]:
        """Return the goals whose contenders were run."""
        return [goal for goal in self.goals if goal.contender in self and (not goal.against or goal.against in self)]


def save(path: Path, results: Iterable[Result]) -> None:
    """Write rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([result.as_json() for result in results], indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def report(results: Iterable[Result], path: Path | None) -> None:
    """Print the table of rows, and write them as JSON where a path is given."""
    found = list(results)
    if path is not None:
        save(path, found)
    print(table(found))


def load(path: Path) -> list[Result]:
    """Read rows that were saved."""
    return [Result.from_json(each) for each in json.loads(path.read_text(encoding="utf-8"))]


def table(results: Iterable[Result]) -> str:
    """Return rows as a table in Markdown, with the shapes, the notes and the conditions below it."""
    results = list(results)
    lines = [*HEADER, *(line for result in results for line in _lines(result)), ""]
    lines += [
        f"- **{result.row}**: {' '.join(f'{sentence}.' for sentence in (result.shape, *result.notes))}"
        for result in results
    ]
    return "\n".join([*lines, "", *_where(results)])


def _where(results: Iterable[Result]) -> list[str]:
    """Return a line for each place and day, which names its rows if there are several."""
    rows: dict[str, list[str]] = {}
    for result in results:
        rows.setdefault(str(result.conditions), []).append(result.row)
    if len(rows) == 1:
        return [f"{line}." for line in rows]
    return [f"{', '.join(names)}: {line}.  " for line, names in rows.items()]


def _lines(result: Result) -> Iterator[str]:
    for number, each in enumerate(result.contenders):
        goals = [goal for goal in result.asked() if goal.contender == each.name]
        saved = result.saved(each.name)
        cells = (
            result.row if number == 0 else "",
            each.name,
            _time(each.median),
            f"{result.speed(each.name, each.against):.2f}×" if each.against else "",
            f"{result.overhead(each.name):.1%}" if "frozen" in result and each.name != "frozen" else "",
            "" if saved is None else _megabytes(saved),
            "" if each.peak is None else _megabytes(each.peak),
            "" if each.resident is None else _megabytes(each.resident),
            "; ".join(str(goal) for goal in goals),
            "; ".join(f"{'yes' if result.met(goal) else '**no**'}, {result.found(goal):.2f}" for goal in goals),
        )
        yield f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}" if abs(count) >= 10e6 else f"{count / 1e6:.1f}"
