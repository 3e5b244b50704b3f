"""Where the tensors of a transformers model are in a checkpoint: under their own names, or made of others as it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lora_fx.adapters.peft_format.fingerprint import fingerprint_on_disk, in_recorded_dtypes
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.adapters.peft_format.reading import AdapterContents
from lora_fx.errors import AdapterError, FoldError, listed
from lora_fx.files.computed_file import ComputedFile
from lora_fx.files.safetensors import equal_in_files
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.graph.state import State
from lora_fx.tracing.transformers_models import KeyConversions


def widened(model: nn.Module, checkpoint: Checkpoint, adapters: Iterable[AdapterFiles]) -> nn.Module:
    """Return a model without weights in float64 if its checkpoint is, and an adapter too, whose factors no other dtype holds."""
    stored = {entry.dtype for _, entry in checkpoint.tensors.values() if entry.dtype.is_floating_point}
    trained = {entry.dtype for files in adapters for entry in files.file.entries.values()}
    return model.double() if stored == {torch.float64} and torch.float64 in trained else model


@dataclass(frozen=True)
class Places:
    """Where the tensors of a model are in its checkpoint.

    Attributes:
        checkpoint: it.
        plain: name in the model → key, for tensors that are stored as the model has them.
        converted: name in the model → keys, for tensors that transformers computes from others as it loads.
    """

    checkpoint: Checkpoint
    plain: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(model: nn.Module, checkpoint: Checkpoint) -> Places:
        """Rename every key as transformers does when it loads it."""
        conversions = KeyConversions.of(model)
        state = model.state_dict()
        made_of: dict[str, list[str]] = {}
        converts = set()
        for key in checkpoint.tensors:
            name, converter = conversions.applied(key, state)
            made_of.setdefault(name, []).append(key)
            if converter is not None:
                converts.add(name)
        plain = {name: keys[0] for name, keys in made_of.items() if len(keys) == 1 and name not in converts}
        converted = {name: tuple(keys) for name, keys in made_of.items() if name not in plain}
        return Places(checkpoint, plain, converted)

    def equal(self, one: str, other: str, *, dtype: torch.dtype | None) -> bool:
        """Tell whether two tensors that are stored as the model has them are equal when they are loaded in a dtype."""
        first, second = (self.checkpoint.find(self.plain[name]) for name in (one, other))
        return equal_in_files(first, second, dtype if dtype is not None else first[1].dtype)

    def fingerprint(self, state: State) -> dict[str, str | None]:
        """Return the fingerprint of the base, see :func:`lora_fx.adapters.peft_format.fingerprint.differences`."""
        found = {
            first: next((self.plain[name] for name in names if name in self.plain), None)
            for first, names in state.names().items()
            if first not in state.non_persistent
        }
        told = fingerprint_on_disk({n: self.checkpoint.find(key) for n, key in found.items() if key is not None})
        return {name: told.get(name) for name in found}

    def same_values(
        self, trained_on: Mapping[str, str], found: Mapping[str, str | None], loaded_in: torch.dtype | None
    ) -> dict[str, str]:
        """Return the fingerprints of tensors with the same values in other dtypes, see :func:`in_recorded_dtypes`."""
        stored = {
            name: self.checkpoint.find(self.plain[name])
            for name in trained_on
            if name in self.plain and not self.checkpoint.find(self.plain[name])[0].is_computed(self.plain[name])
        }
        return in_recorded_dtypes(trained_on, found, stored, loaded_in)

    def start(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the weight with these names as an adapter started from it; None for one that is, or is to be, quantised."""
        key = self.of_names(names)[0]
        return None if self.checkpoint.find(key)[0].is_computed(key) else self.checkpoint.read(key)

    def is_turned(self, name: str) -> bool:
        """Tell whether a tensor that is stored as the model has it is the transpose of the matrix that was quantised."""
        file, entry = self.checkpoint.find(self.plain[name])
        return isinstance(file, ComputedFile) and entry.name in file.computed and file.computed[entry.name].transposed

    def lacks(self, names: Sequence[str]) -> bool:
        """Tell whether the checkpoint has nothing of which a tensor of the model with these names is made."""
        return not any(name in self.plain or name in self.converted for name in names)

    def of_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the keys under which a tensor of the model with these names is stored; several where it is stored twice.

        Raises:
            FoldError: it is not in the checkpoint as the model has it.
        """
        keys = tuple(self.plain[name] for name in names if name in self.plain)
        if keys:
            return keys
        made_of = next((self.converted[name] for name in names if name in self.converted), ())
        if made_of:
            raise FoldError(
                f"{self.checkpoint.directory} does not store {names[0]!r} as the model has it: transformers makes it of "
                f"{listed(made_of, 3)}. Load the model, fold with lora_fx.from_adapter and lora_fx.fold, and write it with "
                "lora_fx.huggingface.save_pretrained."
            )
        raise FoldError(
            f"{self.checkpoint.directory} has no tensor for {' or '.join(map(repr, names))}, which an adapter changes. Is it the checkpoint of "
            "another model?"
        )


def tied_again(contents: AdapterContents, names: Mapping[str, tuple[str, ...]], files: AdapterFiles) -> AdapterContents:
    """Return an adapter with one copy of each tied parameter, if the copies for its modules are equal: a file has one tensor for it."""
    untied = {each.name for each in contents.trained if each.untied}
    copies = {name: value for name, value in contents.copies.items() if name not in untied}
    problems = []
    for tied in dict.fromkeys(names[name] for name in contents.copies if name in untied):
        one, *others = (contents.copies.get(name) for name in tied)
        if one is None or any(other is None or not torch.equal(one, other) for other in others):
            problems.append(
                f"{' and '.join(tied)}: one tied parameter of the model, which PEFT untied (modules_to_save without ensure_weight_tying) and "
                "trained to two values. Fold the loaded model with lora_fx.from_adapter and lora_fx.fold, and write it with "
                "lora_fx.huggingface.save_pretrained"
            )
        copies |= {} if one is None else {tied[0]: one}
    if problems:
        raise AdapterError(str(files.directory), problems)
    return replace(contents, copies=copies)


def check_weights_named(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a config that names other weights than those that are read where it names none."""
    named = getattr(model.config, "transformers_weights", None)
    used = (checkpoint.index or checkpoint.files[0].path).relative_to(checkpoint.model).as_posix()
    if named is not None and named != used:
        raise FoldError(
            f"{checkpoint.model}: expected the weights in {used}, found that config.json names {named!r} (transformers_weights), which "
            f"transformers loads. Rename that to {used}, and remove the key."
        )
