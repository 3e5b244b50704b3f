"""What is named after one layer gets the name that it has in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fx.tracing.repeated_layers.calls import Departure


class Moved:
    """Names below one path become names below another."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self._stacks: dict[tuple[str, ...], dict[str, Any]] = {}

    def is_below(self, name: str) -> bool:
        """Tell whether a name lies below the old path."""
        return name.startswith(f"{self.old}.")

    def name(self, name: str) -> str:
        """Return a name below the new path."""
        return self.new + name[len(self.old) :]

    def stack(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        """Return the modules in which a node would have been recorded; nodes of one module share them."""
        key = tuple(stack)
        if key not in self._stacks:
            self._stacks[key] = dict(self._entry(*item) for item in stack.items())
        return self._stacks[key]

    def meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata that a node would have."""
        stack = meta.get("nn_module_stack")
        return dict(meta) if stack is None else {**meta, "nn_module_stack": self.stack(stack)}

    def _entry(self, key: str, recorded: tuple[str, Any]) -> tuple[str, tuple[str, Any]]:
        path, kind = recorded
        if path != self.old and not self.is_below(path):
            return key, recorded
        head = f"{_ROOT}{path}"
        if not key.startswith(head):  # behind it may be which call of the module it is
            raise Departure(f"{path!r} is recorded as {key!r}")
        return f"{_ROOT}{self.name(path)}{key[len(head) :]}", (self.name(path), kind)


_ROOT = "L__self__"  # torch.export's name for the model
