"""Which features A and B of stacked matrices have in PEFT's files: told by their shapes, else by who wrote them.

A stack is one parameter ``(experts, p, q)``, and PEFT has two layouts of the factors of its update:

    as_stored    A (experts · r, p)    B (q, r · experts)    ΔW = (B A)ᵀ of each expert
    exchanged    A (experts · r, q)    B (p, r · experts)    ΔW = B A

    PEFT            module that says ``is_transposed``    any other module
    up to 0.18.1    as_stored                             as_stored
    0.19.0          exchanged                             as_stored
    from 0.19.1     as_stored                             exchanged

So do ``ParamWrapper.update_layer`` and ``get_delta_weight`` in ``peft/tuners/lora/layer.py``, as changed by
huggingface/peft#3083 and #3165. A stack of one matrix has no layout of its own: every version adds ``B A`` to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lora_fx.errors import listed, option
from lora_fx.graph.records import ParameterModule
from lora_fx.rules.peft_config.config import CONFIG_NAME
from lora_fx.rules.validation import shown
from lora_fx.sites.call_sites import Site

StackLayout = Literal["exchanged", "as_stored"]
LAYOUTS: tuple[StackLayout, ...] = get_args(StackLayout)

_TRANSPOSED_SINCE_5 = frozenset({"transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts"})
"""Classes of transformers 4, with the parameters that they have now, that say ``is_transposed`` from transformers 5.0 on.

The others that say so came with transformers 5 (OpenAIPrivacyFilterExperts), or had other parameters before (AriaExperts).
"""

_LAST_BEFORE, _FIRST_CHANGE, _SECOND_CHANGE = (0, 18, 1), (0, 19, 0), (0, 19, 1)


@dataclass(frozen=True)
class Writer:
    """Who wrote a file, as far as it says.

    Attributes:
        peft: version of PEFT whose format it is, from 0.18.0 on.
        transformers: version, which files of lora_fx say.
    """

    peft: str | None
    transformers: str | None = None


@dataclass(frozen=True)
class Stack:
    """A stack of matrices that an adapter adapts.

    Attributes:
        name: of the parameter.
        module: what is known of its module.
        transposed: whether that says ``is_transposed``; None where it is not known.
        fits: the layouts that the shapes of the factors allow.
    """

    name: str
    module: ParameterModule | None
    transposed: bool | None
    fits: frozenset[StackLayout]

    @property
    def kind(self) -> object:
        """Equal for stacks that have one layout in a file: those of one class. Where it is not known, of one module."""
        return self.name.rpartition(".")[0] if self.module is None else (self.module.classes[0], self.transposed)

    @property
    def varies(self) -> bool:
        """Whether it is transposed under transformers 5 and not under transformers 4."""
        return self.module is not None and not _TRANSPOSED_SINCE_5.isdisjoint(self.module.classes)


def is_transposed(site: Site, module: ParameterModule | None) -> bool | None:
    """Return whether the module of a stack says ``is_transposed``, which means ``(in, out)``; None where it is not known.

    Args:
        site: at which the stack is multiplied with.
        module: what is known of it.
    """
    if module is not None:
        return module.transposed
    return None if site.layout == "in_out" else False


def written_layout(version: str, *, transposed: bool) -> StackLayout:
    """Return the layout that a release of PEFT writes.

    Args:
        version: of the release.
        transposed: whether the module says ``is_transposed``, with the version of transformers beside it.

    Raises:
        ValueError: it is no release.
    """
    release = _release(version)
    if release is None:
        raise ValueError(f"{version} is no release of PEFT")
    exchanged = release >= _FIRST_CHANGE and transposed == (release < _SECOND_CHANGE)
    return "exchanged" if exchanged else "as_stored"


def stack_layouts(
    stacks: Sequence[Stack], writer: Writer, given: StackLayout | None
) -> tuple[dict[str, StackLayout], list[str]]:
    """Return the layout of each stack by its name, and the problems.

    The shapes decide, for all stacks of a class if they do for one. Where they fit both ways, ``given`` does, and else the version.
    It decides nothing where another class has shapes that it does not write.
    """
    layouts: dict[str, StackLayout] = {}
    problems: list[str] = []
    told = [(stack, *_by_version(stack, writer)) for stack in stacks]
    refuting = next(
        (stack for stack, layout, _ in told if layout and len(stack.fits) == 1 and layout not in stack.fits), None
    )
    by_kind: dict[object, list[Stack]] = {}
    for stack in stacks:
        by_kind.setdefault(stack.kind, []).append(stack)
    for group in by_kind.values():
        proofs = {layout: stack for stack in reversed(group) if len(stack.fits) == 1 for layout in stack.fits}
        least_known = next((stack for stack in group if stack.transposed is None), group[0])
        layout, reason = _by_version(least_known, writer)
        if layout and refuting:
            reason = f"peft_version {shown(writer.peft)} does not write the shapes that are found at {refuting.name}"
        if len(proofs) > 1:
            first, second = (f"{proofs[each].name} is {each}" for each in LAYOUTS)
            problems.append(
                f"by the shapes of A and B {first} and {second}, and PEFT writes all stacks of a module class in one layout. "
                "Save the adapter again with the PEFT that trained it"
            )
        elif given and proofs and given not in proofs:
            [(found, proof)] = proofs.items()
            problems.append(
                f"{option(f'stacks={given!r}', f'--stacks {given}')}, but by the shapes of A and B {proof.name} is {found}. "
                f"Leave {option('stacks', '--stacks')} out"
            )
        chosen = next(iter(proofs), None) or given or (None if refuting else layout)
        if chosen is None and all(stack.fits for stack in group):
            names = listed([stack.name for stack in group], 2)
            problems.append(
                f"{CONFIG_NAME}: A and B at {names} fit both layouts of stacks, and {reason}. {_question(least_known)}"
            )
        layouts |= {each.name: min(each.fits) if len(each.fits) == 1 else chosen or "exchanged" for each in group}
    return layouts, problems


def _by_version(stack: Stack, writer: Writer) -> tuple[StackLayout | None, str]:
    """Return the layout that the writer gave a stack, or None and why it is not known."""
    if writer.peft is None:
        return None, "there is no peft_version, as before PEFT 0.18.0"
    release = _release(writer.peft)
    if release is None:
        return (
            None,
            f"peft_version {shown(writer.peft)} is no release, and of before or after a change of PEFT's",
        )
    if release < _FIRST_CHANGE:
        return "as_stored", ""
    if stack.transposed is None:
        return (
            None,
            f"that of peft_version {shown(writer.peft)} depends on the module's class, which the graph does not know",
        )
    if stack.varies and not _is_5(writer.transformers):
        return None, f"that of peft_version {shown(writer.peft)} depends on the version of transformers beside it"
    return written_layout(writer.peft, transposed=stack.transposed), ""


def _question(stack: Stack) -> str:
    """Say how to tell the layout, and which versions write which."""
    if stack.varies:
        stored = "PEFT up to 0.18.1, 0.19.0 with transformers 4, and from 0.19.1 on with transformers 5"
        exchanged = "PEFT 0.19.0 with transformers 5, and from 0.19.1 on with transformers 4"
    elif stack.transposed is None:
        stored = "PEFT up to 0.18.1, 0.19.0 if the module has no is_transposed, and from 0.19.1 on if it has"
        exchanged = "PEFT 0.19.0 if the module has is_transposed, and from 0.19.1 on if it has not"
    elif stack.transposed:
        stored, exchanged = "PEFT up to 0.18.1 and from 0.19.1 on", "PEFT 0.19.0"
    else:
        stored, exchanged = "PEFT up to 0.19.0", "PEFT from 0.19.1 on"
    first = option('stacks="as_stored"', "--stacks as_stored")
    second = option('stacks="exchanged"', "--stacks exchanged")
    return f"Say which: {first} if it was trained with {stored}; {second} if with {exchanged}"


def _release(version: str) -> tuple[int, ...] | None:
    """Return the numbers of a release that writes what this version does; None where that is not known.

    A version of the development before a release (``0.20.1.dev0@<commit>``) writes what it does, but where a change came with it:
    ``0.18.2.dev0`` and ``0.19.1.dev0`` are of before and after.
    """
    found = re.fullmatch(
        r"([0-9]{1,6}(?:\.[0-9]{1,6}){1,3})(\.?(?:dev|rc|a|b)[0-9]{1,6}.*)?(?:\.post[0-9]{1,6})?", version
    )
    if found is None:
        return None
    numbers = tuple(map(int, found[1].split(".")))
    numbers += (0,) * (3 - len(numbers))
    return None if found[2] and _LAST_BEFORE < numbers <= _SECOND_CHANGE else numbers


def _is_5(transformers: str | None) -> bool:
    """Tell whether a version of transformers is 5 or above."""
    found = re.match(r"([0-9]{1,6})\.", transformers or "")
    return found is not None and int(found[1]) >= 5
