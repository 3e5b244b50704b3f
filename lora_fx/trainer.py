"""Checkpoints of transformers' ``Trainer`` that hold a graph's adapters, and not their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.training_args import TrainingArguments

from lora_fx.adapters.peft_format.save_load import save_adapter
from lora_fx.errors import LoraFxError
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.graph_module import TracedGraphModule, state_of


class AdapterCallback(TrainerCallback):
    """A callback with which the checkpoints of a ``Trainer`` hold the trained parameters, and no copy of the frozen base.

    ``Trainer(model=graph, callbacks=[AdapterCallback()], …)``. From then on the graph's state dict holds the trained parameters
    alone, and loading such a state dict misses nothing. So ``resume_from_checkpoint``, ``load_best_model_at_end`` and
    ``save_model`` work as for any model, with small files. Beside the trainer's own files each checkpoint gets a directory for
    each adapter, of its name, which :func:`~lora_fx.load_adapter` and PEFT read.

    Without it a checkpoint has the whole state dict, which transformers refuses to write where weights are tied.
    """

    def on_init_end(self, *_event: Any, model: Any = None, **_context: Any) -> None:
        """Restrict the graph's state dict to its trained parameters."""
        if not isinstance(model, TracedGraphModule) or not adapters(model):
            raise LoraFxError(
                f"AdapterCallback expected a graph with adapters, and the trainer has a {type(model).__name__}: "
                "make one by lora_fx.rewrite(model, …, labels=True)."
            )
        model.register_state_dict_post_hook(_keep_trained)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(_miss_no_frozen)  # type: ignore[no-untyped-call]

    def on_save(
        self, args: TrainingArguments, state: TrainerState, *_control: Any, model: Any = None, **_context: Any
    ) -> None:
        """Write each adapter into the checkpoint, from one process."""
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for adapter in adapters(model):
                save_adapter(model, checkpoint / adapter, adapter, overwrite=True)


def _trained(module: nn.Module) -> set[str]:
    """Return the first name of each parameter that trains."""
    tensors, names = state_of(module).tensors, state_of(module).names()
    return {name for name in names if tensors[name].requires_grad}


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    kept = {f"{prefix}{name}" for name in _trained(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    trained = _trained(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]
