"""FSDP2: the parameters of a graph sharded over processes, a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from lora_fx.errors import LoraFxError
from lora_fx.graph.cached_graphs import check_undivided
from lora_fx.graph.graph_module import TracedGraphModule, as_traced
from lora_fx.graph.info import info_of
from lora_fx.graph.layers import check_mixed_precision, check_unquantised, layers, nesting
from lora_fx.graph.nested import nest_in_place
from lora_fx.graph.sharded import agreed, digest_of, groups_of


def fully_shard(graph_module: TracedGraphModule, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """Shard the parameters of a graph over the processes of a group, as torch's function of this name does with one module (in place).

    Each layer is a unit, whose parameters are whole while it is computed, and the rest of the graph is one more. A flat graph is nested for
    it. Every process calls this with an equal graph, before it makes an optimizer; factors are equal where ``rewrite`` was given a
    seed. Activation checkpointing works as before. :func:`lora_fx.save_adapter` takes a sharded graph, called by every process, and the
    first writes; other functions refuse it.

    Args:
        graph_module: is changed.
        mesh: as for torch's function; by default all processes of the default group.
        options: of torch's function.

    Raises:
        LoraFxError: the graph cannot be nested or sharded so, is quantised or unlike those of other processes, or the options cast
            parameters. All processes raise, also where one alone refuses; the graph is as it was.
        PlanError: the argument is no graph of lora_fx.
    """

    def checked() -> tuple[None, str]:
        _check(graph_module, options)
        return None, digest_of(graph_module)

    agreed(groups_of(mesh), checked)
    nest_in_place(graph_module, info_of(graph_module).checkpointing)
    for layer in layers(graph_module).values():
        torch_fully_shard(layer, mesh=mesh, **options)
    torch_fully_shard(graph_module, mesh=mesh, **options)
    # By this name Trainer knows a model that it is not to move or wrap.
    vars(graph_module)["is_distributed_loading_by_transformers"] = True


def _check(graph_module: TracedGraphModule, options: Mapping[str, Any]) -> None:
    """Refuse a graph that cannot be sharded by its layers."""
    check_mixed_precision(options.get("mp_policy"))
    check_undivided(as_traced(graph_module))
    check_unquantised(graph_module)
    parts = nesting(graph_module, graph_module.graph)
    assert parts.outer is not None
    read = [str(node.target) for node in parts.outer.find_nodes(op="get_attr")]
    shared = next((name for name in read for path in parts.classes if name.startswith(f"{path}.")), None)
    if shared is not None:
        raise LoraFxError(
            f"{shared!r} is read outside of its layer too, where FSDP does not have it whole: train with DDP."
        )
