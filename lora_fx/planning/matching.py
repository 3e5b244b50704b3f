"""Matching of one selection with a call site: every predicate, and the first that refuses. Or with a parameter, for training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_fx.rules.dotted_names import layer_of
from lora_fx.rules.rule_file import Selection
from lora_fx.rules.validation import Bounds
from lora_fx.rules.vocabulary import RoleName, role_is
from lora_fx.sites.call_sites import Site
from lora_fx.sites.roles import Purpose


@dataclass(frozen=True)
class Refusal:
    """Reason for which a selection does not claim a site.

    Attributes:
        agreed: number of predicates that matched before this one. The greater, the nearer the selection came.
        reason: in words.
        kind: the reason without the layer, the role or the width of this site: equal for sites that differ in nothing else.
    """

    agreed: int
    reason: str
    kind: str

    @property
    def by_name(self) -> bool:
        """Whether a predicate on the name refuses: target, regex, layers or exclude."""
        return self.agreed < _ON_NAMES


def refusal(selection: Selection, site: Site, purpose: Purpose) -> Refusal | None:
    """Return the reason for which ``selection`` does not claim a site, or None if all its predicates match."""
    reasons = (
        None if selection.names(site.module) else ("no selection names it",),
        _layer(selection, site.module),
        (f"exclude has {selection.excluding(site.module)!r}",) if selection.excludes(site.module) else None,
        _op(selection, site),
        _role(selection, purpose),
        _bounds(selection.in_features, site.in_features, "in_features"),
        _bounds(selection.out_features, site.out_features, "out_features"),
        _bounds(selection.groups, site.matrices if site.kernel else 1, "groups"),
        _excluded(selection, purpose),
        _call(selection, site),
        _features(selection, purpose),
    )
    refused = ((asked, reason) for asked, reason in enumerate(reasons) if reason is not None)
    return next((Refusal(asked, reason[0], reason[-1]) for asked, reason in refused), None)


_Reason = tuple[str, ...]
"""A reason, and the same without what is particular to the site, where that is another text."""


def trains(selection: Selection, purpose_of: Mapping[Site, Purpose]) -> Callable[[str], bool]:
    """Return what tells whether a selection that says ``trainable`` means a parameter: one of a module that it selects, or of its parts."""
    named = selection.model_copy(update={"layers": None, "exclude": None})
    layers = None if selection.layers is None else Selection(layers=selection.layers)
    excluded = None if selection.exclude is None else Selection(target=selection.exclude)
    admitted: set[str] | None = None
    if any(
        (
            selection.role,
            selection.op,
            selection.in_features,
            selection.out_features,
            selection.groups,
            selection.exclude_role,
        )
    ):
        alone = selection.model_copy(update={"trainable": None, "target": None, "regex": None, "layers": None})
        admitted = {site.module for site, purpose in purpose_of.items() if refusal(alone, site, purpose) is None}

    def means(parameter: str) -> bool:
        path, _, leaf = parameter.rpartition(".")
        parts = path.split(".")
        modules = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} | {parameter}
        if selection.trainable == "bias" and not leaf.endswith("bias"):
            return False
        if excluded is not None and any(map(excluded.matches_name, modules)):
            return False
        if layers is not None and not layers.matches_name(parameter):
            return False
        return any(map(named.matches_name, modules if admitted is None else modules & admitted))

    return means


def _layer(selection: Selection, name: str) -> _Reason | None:
    if selection.admits_layer(name):
        return None
    index, admitted = layer_of(name), json.dumps(selection.layers)
    if index is None:
        return (f"it is in no numbered layer, and layers is {admitted}",)
    return f"its layer {index} is not in {admitted}", f"its layer is not in {admitted}"


def _op(selection: Selection, site: Site) -> _Reason | None:
    if selection.op is None or site.op in selection.op:
        return None
    return f"it is {_one_of([site.op])}, not {_one_of(selection.op)}", f"it is not {_one_of(selection.op)}"


def _role(selection: Selection, purpose: Purpose) -> _Reason | None:
    if selection.role is None or _has_role(purpose, selection.role):
        return None
    wanted = _one_of(selection.role)
    return f"its role is {_one_of(purpose.roles) or 'not known'}, not {wanted}", f"its role is not {wanted}"


def _excluded(selection: Selection, purpose: Purpose) -> _Reason | None:
    excluded = [name for name in selection.exclude_role or () if _has_role(purpose, [name])]
    return (f"its role {excluded[0]} is excluded",) if excluded else None


def _has_role(purpose: Purpose, names: Sequence[RoleName]) -> bool:
    return any(role_is(role, name) for role in purpose.roles for name in names)


def _bounds(bounds: Bounds | None, size: int, key: str) -> _Reason | None:
    if bounds is None or bounds.admits(size):
        return None
    return f"its {key} {size} are outside {bounds}", f"its {key} are outside {bounds}"


def _call(selection: Selection, site: Site) -> _Reason | None:
    if isinstance(selection.calls, str) or max(site.call, 1) in selection.calls:
        return None
    wanted = _one_of(selection.calls)
    return f"it is call {max(site.call, 1)}, not {wanted}", f"it is not call {wanted}"


def _features(selection: Selection, purpose: Purpose) -> _Reason | None:
    missing = [part for part in selection.features or () if part not in purpose.parts]
    if not missing:
        return None
    known = f"its parts are {_one_of(tuple(purpose.parts))}" if purpose.parts else "it is not a fused projection"
    return (f"it has no part {missing[0]!r}: {known}",)


def _one_of(items: Sequence[object]) -> str:
    return " or ".join(str(item) for item in items)


_ON_NAMES = 3
"""Number of the predicates on names, which are asked first."""
