from __future__ import annotations

import contextlib
import functools
import gc
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import Matrices
from torch import fx, nn
from torch.onnx._internal._lazy_import import onnxscript_apis

import lora_fx

try:
    from _pytest.nodeid import NodeId
except ImportError:  # before pytest 9.2
    NodeId = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrices", type=Path, metavar="FILE", help="write what came of every matrix into this file")


def pytest_configure(config: pytest.Config) -> None:
    if "not matrix" in config.option.markexpr:  # ``make test``: half the examples where a test names no number of them
        from hypothesis import settings  # environments in which there is none import this file for its functions

        settings.register_profile("half", settings.default, max_examples=settings.default.max_examples // 2)
        settings.load_profile("half")
    path = config.getoption("--matrices")
    if path is not None and not hasattr(
        config, "workerinput"
    ):  # workers of xdist report to the process that started them
        config.pluginmanager.register(Matrices(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let reports say in which row of a matrix a case is.

    A row runs in one process, and so does all else of a file, whose fixtures are made once. xdist reads that off the ends of ids,
    but writes them where pytest before 9.2 had its ids.
    """
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        group = item.path.name if marker is None else str(marker.args[0])
        if marker is None:
            item.add_marker(pytest.mark.xdist_group(group))
        else:
            item.user_properties.append(("row", group))
        if NodeId is not None and config.getoption("loadgroup", False):
            item._id = NodeId.parse(f"{item.nodeid}@{group}")


def pytest_collection_finish() -> None:
    _keep_from_collection()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Keep what a file of tests leaves from being looked through again."""
    yield
    if nextitem is None or nextitem.path != item.path:
        _keep_from_collection()


def _keep_from_collection() -> None:
    """Let garbage collection pass over all that there is now: imports and models that live to the end took a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


torch.set_num_threads(1)  # the suite has a process for each core; the models are small

# torch.onnx asks onnxscript for all operators at each export, which parses their sources: half of what a small export costs.
onnxscript_apis.get_torchlib_ops = functools.cache(
    lambda: type(onnxscript_apis).__getattr__(onnxscript_apis, "get_torchlib_ops")()
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Let ``lora-fx draw`` trace models of one config once."""
    known: dict[str, lora_fx.TracedGraphModule] = {}

    def traced(model: Any, inputs: Any, **options: Any) -> lora_fx.TracedGraphModule:
        key = f"{type(model)} {model.config} {inputs} {options}"
        if key not in known:
            known[key] = lora_fx.trace(model, inputs, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lora_fx.drawing.models.trace", traced)
        yield


def set_factors(module: nn.Module, seed: int = 11, scale: float = 0.2) -> None:
    """Make every B (and A) of a branched graph or a PEFT model a known value that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def all_acting(graph: Any) -> Any:
    """Return a graph with all of its adapters acting: one that is added to others does not."""
    names = [state.name for state in lora_fx.parameter_summary(graph).adapters]
    return lora_fx.activate(graph, dict.fromkeys(names, 1.0))


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Fail unless the block leaves a module as it was: objects, values, requires_grad, modes, graph, random state."""
    before, random_state = _snapshot(module), torch.get_rng_state()
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    yield
    assert _snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, values[name]), name


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Let the system refuse larger files, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def _snapshot(module: nn.Module) -> object:
    return (
        [(name, id(p), p.data_ptr(), p.requires_grad, p.grad is None) for name, p in module.named_parameters()],
        [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()],
        [(name, id(m), m.training) for name, m in module.named_modules()],
        [node.format_node() for node in module.graph.nodes] if isinstance(module, fx.GraphModule) else None,
        str(getattr(module, "config", None)),
    )
