"""How time and memory are measured, and how numbers are compared before they are.

Time: in one process, in alternation. Each repetition runs every contender once, beginning with another, so that what slows the
machine down slows all of them; medians are of their repetitions.

Memory on a CPU: torch's profiler records each allocation and each release of a step, so that the peak is exact, and the same in
every run. What libraries take for themselves, not through torch, is not in it. On a GPU it is what torch's allocator counts.
Resident memory, which is what a machine runs out of, is that and what the C library cannot use again in between; it depends on what
ran before, and so is measured in a process of its own, and told as a median.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler is not what is asked about

Step = Callable[[], object]


def alternating(
    steps: Mapping[str, Step],
    repetitions: int,
    *,
    before: Mapping[str, Step] | None = None,
    warm_up: int = 2,
    device: str = "cpu",
    clock: Callable[[str], float] | None = None,
    says: str = "",
    limit: float = math.inf,
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of each repetition of each step; what some need done ``before`` is not timed.

    Args:
        steps: by name.
        repetitions: of each.
        before: what some need done.
        warm_up: repetitions before those.
        device: that the steps run on.
        clock: seconds, of a device; by default :func:`now`.
        says: what is measured, for the progress bar.
        limit: seconds after which no repetition begins, but for the first three: a processor may have no instructions for a dtype.
    """
    clock = clock or now
    names, times = list(steps), {name: list[float]() for name in steps}
    bar = tqdm(total=(warm_up + repetitions) * len(names), desc=says, leave=False, disable=None)
    started = time.perf_counter()
    for repetition in range(warm_up + repetitions):
        if repetition >= warm_up + 3 and time.perf_counter() - started > limit:
            break
        start = repetition % len(names)
        for name in names[start:] + names[:start]:
            if before is not None and name in before:
                before[name]()
            begin = clock(device)
            steps[name]()
            took = clock(device) - begin
            if repetition >= warm_up:
                times[name].append(took)
            bar.update()
    bar.close()
    return {name: tuple(found) for name, found in times.items()}


def now(device: str) -> float:
    """Return the time when all that was asked of a device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Return the most bytes that are allocated at once while a step runs, beyond those before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    allocated = [event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event["name"] == "[memory]"]
    before = allocated[0]["Total Allocated"] - allocated[0]["Bytes"]
    return int(max(event["Total Allocated"] for event in allocated) - before)


def resident_bytes(step: Step, repetitions: int = 5) -> int | None:
    """Return by how much resident memory grows while a step runs, at its peak: the median after a first step; None but on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    step()
    found = []
    for _ in range(repetitions):
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = status("VmRSS")
        step()
        found.append(status("VmHWM") - before)
    return round(statistics.median(found))


def status(key: str) -> int:
    """Return a size of this process, in bytes, by its name in ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, on as many threads as torch has here."""
    threads = (torch.get_num_threads(),)
    context = mp.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *arguments).result()


def saved_bytes(forward: Step, module: nn.Module) -> int:
    """Return the bytes of the distinct storages that a forward pass keeps for backward, without those of weights and buffers."""
    storages: dict[int, torch.UntypedStorage] = {}  # which are kept, so that none is freed and its address used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    del output
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Return the largest relative difference (of norms) between tensors of the same names; 0 if they are bit-equal."""
    if set(found) != set(expected):
        raise SystemExit(f"there is nothing to compare: {sorted(set(found) ^ set(expected))[:5]} are on one side alone")
    unlike = [name for name in expected if not torch.equal(found[name], expected[name])]
    return max((_relative(found[name], expected[name]) for name in unlike), default=0.0)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float(norm(found.double() - expected.double()) / norm(expected.double()).clamp_min(1e-300))


def shown(value: float) -> str:
    """Return a difference in words."""
    return "bit-equal" if value == 0 else f"{value:.0e}"
