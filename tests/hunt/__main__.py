"""Random models through rules, adapters, passes, files and exports, beside PEFT and float64: equal, refused or wrong, counted.

make hunt                                    # 300 models; run again, it goes on where it was stopped
python tests/hunt --models 1 --seed 17       # one model, and all that came of it
python tests/hunt --models 300 --results hunt.jsonl --write   # the table of tests/README.md

Of twenty seeds 16 are programs of modules, functional products and in-place operators over shared weights, three are transformers models
with a config of their own, and one is such a model in 4 bits. A seed decides everything: model, adapters, passes and forms of export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent.parent / "tools")]

import guides  # noqa: E402
from hunt.check import ProgramHunt  # noqa: E402
from hunt.language_models import LanguageModelHunt  # noqa: E402
from hunt.outcome import RESULTS, Outcome, TookTooLong  # noqa: E402

from lora_fx.cli.printing import run_script  # noqa: E402

PERIOD, PROGRAMS = 20, 16
"""Of so many seeds in a row, so many are programs."""


def check(seed: int, *, exports: bool = True) -> Outcome:
    """Return what comes of a seed; an outcome without results where its model does not run in eager mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if seed % PERIOD < PROGRAMS:
            return ProgramHunt(seed, exports=exports).run()
        return LanguageModelHunt(seed, exports=exports, four_bits=seed % PERIOD == PERIOD - 1).run()


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """End what takes longer, of the processor, or ten times as long by the clock."""

    def late(*_: Any) -> None:
        raise TookTooLong

    before = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(10 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def timed(seed: int, limit: int, *, exports: bool) -> Outcome:
    """Return what comes of a seed within a time; as wrong what takes longer, and an error beside the passes."""
    start = time.process_time()
    try:
        with limited(limit):
            outcome = check(seed, exports=exports)
    except TookTooLong:
        outcome = Outcome(seed, results=[("all", "wrong", f"took more than {limit} s")])
    except Exception as error:
        outcome = Outcome(seed, results=[("all", "wrong", f"{type(error).__name__}: {error}")])
    outcome.seconds = round(time.process_time() - start, 1)
    return outcome


def counts(outcomes: Sequence[Outcome]) -> str:
    """Return the table: a row for each pass, with how often each result came of it."""
    counted: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for what, result, _ in outcome.results:
            counted.setdefault(what, Counter())[result] += 1
    total = sum(counted.values(), Counter[str]())
    rows = {**counted, f"**{len(outcomes)} models**": total}
    lines = [f"| asked | {' | '.join(RESULTS)} |", "|---" + "|---:" * len(RESULTS) + "|"]
    return "\n".join(
        lines + [f"| {what} | {' | '.join(str(row[each]) for each in RESULTS)} |" for what, row in rows.items()]
    )


def refusals(outcomes: Sequence[Outcome]) -> str:
    """Return every message of a refusal, by its first words, with how often it came and the first seed that it came of."""
    said: dict[str, list[int]] = {}
    for outcome in outcomes:
        for what, result, text in outcome.results:
            if result in ("refused", "not compared"):
                said.setdefault(f"{what}: {text[:150]}", []).append(outcome.seed)
    often = sorted(said.items(), key=lambda each: -len(each[1]))
    return "\n".join(f"{len(seeds)} ×, first by seed {seeds[0]}: {text}" for text, seeds in often)


def line(outcomes: Sequence[Outcome]) -> str:
    """Return how much was tried, in one sentence."""
    kinds = Counter("float64" in each.kinds for each in outcomes)
    compared = sum(result in ("equal", "wrong") for each in outcomes for _, result, _ in each.results)
    worst = max((each.worst for each in outcomes if "float64" in each.kinds), default=0.0)
    seconds = sum(each.seconds for each in outcomes)
    return (
        f"Seeds {outcomes[0].seed} to {outcomes[-1].seed}: {len(outcomes)} models, {kinds[True]} of them in float64, {compared} comparisons, "
        f"{seconds:.0f} s of a processor. The largest difference in float64 is {worst:.0e} of the largest value."
    )


def earlier(results: Path | None, *, exports: bool) -> Mapping[int, Outcome]:
    """Return outcomes of a run that was stopped, by seed."""
    if results is None or not results.exists():
        return {}
    found = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
    kept = [each for each in found if each.pop("exports") == exports]
    return {each["seed"]: Outcome(**each | {"results": [tuple(one) for one in each["results"]]}) for each in kept}


def hunt(models: int, seed: int, limit: int, *, exports: bool, results: Path | None) -> list[Outcome]:
    """Take models the whole way, one seed after another, and keep what came of each at once."""
    known, done = earlier(results, exports=exports), list[Outcome]()
    while len(done) < models:
        outcome = known.get(seed)
        if outcome is None:
            outcome = timed(seed, limit, exports=exports)
            if results is not None:
                with results.open("a", encoding="utf-8") as file:  # on a line of its own, whatever a kill cut off
                    file.write("\n" + json.dumps({**dataclasses.asdict(outcome), "exports": exports}) + "\n")
        seed += 1
        if not outcome.results:
            continue
        done.append(outcome)
        for what, said in outcome.wrong or [("", "")]:
            wrong = f", WRONG, {what}: {said}" if what else ""
            print(f"{len(done)}/{models} seed {outcome.seed}, {outcome.seconds} s{wrong}", file=sys.stderr, flush=True)
    return done


def main(
    models: Annotated[int, typer.Option(min=1, help="How many models.")] = 300,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    limit: Annotated[int, typer.Option(help="Seconds of a processor for each model.")] = 120,
    exports: Annotated[bool, typer.Option(help="Write files too.")] = True,
    results: Annotated[
        Path | None, typer.Option(help="JSON lines, one for each seed; seeds that it has are not run again.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the table into tests/README.md.")] = False,
) -> None:
    """Take random models the whole way, and print what came of them."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    done = hunt(models, seed, limit, exports=exports, results=results)
    text = f"{line(done)}\n\n{counts(done)}"
    if models == 1:
        print(
            f"{', '.join(done[0].kinds)}\n"
            + "\n".join(f"{what}: {result} {said}" for what, result, said in done[0].results)
        )
    else:
        print(f"{text}\n\n{refusals(done)}\n")
    if write:
        guides.write("tests/hunt", text)
    for outcome in done:
        for what, said in outcome.wrong:
            print(f"wrong: {what}: {said}\n  again: python tests/hunt --models 1 --seed {outcome.seed}")
    raise typer.Exit(any(each.wrong for each in done))


EXAMPLES = "Examples:  make hunt   ·   python tests/hunt --models 1 --seed 17"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
