"""The base on disk beside the bases that adapters were trained on, as far as their files say which these were."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fx.adapters.peft_format.fingerprint import recorded
from lora_fx.adapters.peft_format.opening import AdapterFiles, check_base
from lora_fx.folding.checkpoint_places import Places
from lora_fx.graph.state import State


def check_bases(opened: Sequence[AdapterFiles], places: Places, state: State, *, strict: bool) -> None:
    """Compare the base with those that the adapters were trained on, if the file of any says of which values it was.

    Raises:
        AdapterError: they differ, and ``strict`` asks for equal ones.
    """
    told = any(recorded(files.file.metadata)[0] for files in opened)
    found = places.fingerprint(state) if told else {}
    for files in opened:
        check_base(files, found, strict=strict)
