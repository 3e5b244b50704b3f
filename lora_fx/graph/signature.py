"""Signature of a graph: called as the model's own ``forward``, with the inputs of the trace; it returns the model's own classes.

A trace covers one structure of inputs. Tensors may vary, as far as the checks of the graph allow; everything else is a constant:
flags, ``None``, the number of elements of a list, and the defaults of omitted arguments. A call binds its arguments by the
signature of the model's ``forward``, and a constant that differs from the trace is refused.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from reprlib import Repr
from typing import Any

import torch
from torch import fx

from lora_fx.errors import InputError, TraceError, did_you_mean
from lora_fx.graph.adapter_rows import ADAPTER_NAMES, AdapterRows
from lora_fx.graph.codegen import ShortCode
from lora_fx.graph.omitted import Fill, advice_on
from lora_fx.torch_internals import PyTreeCodeGen, PyTreeInfo, pytree

ITEM_COUNT = "num_items_in_batch"
"""transformers' name for the number of labels in all batches of an optimizer step, by which a loss is divided."""


class Leaf(Enum):
    """A placeholder for a value that a signature does not hold."""

    TENSOR = "a tensor"
    NUMBER = "a number, or a tensor of one, which may be left out"
    OTHER = "its default"  # a default that does not pickle, or does not compare
    ABSENT = "nothing"


@dataclass(frozen=True)
class Argument:
    """One argument of the model's ``forward``.

    Attributes:
        name: as in the signature.
        positional: whether it may be given by position.
        traced: whether it was given in the trace; if not, it keeps its default.
        spec: the structure of its value.
        leaves: the values in that structure: ``TENSOR`` for a tensor, ``NUMBER`` for the whole value where it may be left out,
            otherwise the constant.
        fill: of a tensor that may be omitted, its value then; of an argument without which the graph was traced, the one tensor that
            changes nothing.
        rows: of the tensor that is given as a list of names, what they become.
    """

    name: str
    positional: bool
    traced: bool
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    fill: Fill | None = None
    rows: AdapterRows | None = None

    @property
    def is_input(self) -> bool:
        """Whether it was traced with tensors alone, so that its whole value varies."""
        return self.traced and all(leaf in (Leaf.TENSOR, Leaf.NUMBER) for leaf in self.leaves)

    def tensors(self, value: Any) -> list[Any]:
        """Return the tensors in ``value``, in the order of the trace; ``ABSENT`` if it was not given.

        Of an argument that may be left out the one value is None, a number or a tensor; of one with a fill, the fill where it is
        omitted.
        """
        if self.leaves == (Leaf.NUMBER,):
            return [self._number(value)]
        if self.rows is not None:
            return [self.rows.chosen(None if value is Leaf.ABSENT else value)]
        if self.fill is not None and not self.traced and isinstance(value, torch.Tensor):
            return []  # compared with the fill where the sizes of the others are known
        if self.fill is not None and self.traced:
            if value is Leaf.ABSENT or value is None:
                return [self.fill]
            value = self.fill.cast(value) if isinstance(value, torch.Tensor) else value
        if value is Leaf.ABSENT or (value is None and self.leaves == (Leaf.TENSOR,)):
            if Leaf.TENSOR in self.leaves:
                raise InputError(
                    f"input '{self.name}' is missing, but the graph was traced with it. Pass it, "
                    "or trace again with example_inputs without it."
                )
            return []
        found = []
        for (label, part), leaf in zip(_parts(self.name, value, self.spec), self.leaves, strict=True):
            if leaf is not Leaf.TENSOR:
                self._check_constant(label, part, leaf)
            elif isinstance(part, torch.Tensor):
                found.append(part)
            else:
                raise InputError(_no_tensor(label, part))
        return found

    def check_fill(self, value: torch.Tensor, others: Mapping[str, torch.Tensor]) -> None:
        """Raise :class:`InputError` unless a tensor is the one that changes nothing."""
        assert self.fill is not None
        expected = self.fill.value(others)
        if value.shape != expected.shape or value.is_meta or not bool(value.eq(expected.to(value.device)).all()):
            raise InputError(
                f"input '{self.name}' is {_shown(value)}, expected {self.fill.kind} of shape {tuple(expected.shape)}, as the model "
                f"takes them where they are omitted: the graph was traced without them. Omit them, or trace again with them"
                f"{self._advice(self.name, value)}."
            )

    def _number(self, value: Any) -> Any:
        if value is Leaf.ABSENT or value is None or isinstance(value, torch.Tensor | int | float):
            return None if value is Leaf.ABSENT else value
        raise InputError(
            f"input '{self.name}' is {_shown(value)}, expected a number or a tensor of one. "
            "Pass that, or leave it out: the loss is then the mean over the batch."
        )

    def _check_constant(self, label: str, given: Any, constant: Any) -> None:
        if given is constant or (not isinstance(given, torch.Tensor) and _is_same(given, constant)):
            return
        if not self.traced:
            raise InputError(
                f"input '{label}' is {_shown(given)}, expected its default, {_shown(constant)}: the graph was traced without it. "
                f"Omit it, or trace again with it{self._advice(label, given)}."
            )
        raise InputError(
            f"input '{label}' is {_shown(given)}, expected {_shown(constant)}, since it is a constant of the graph. "
            f"Pass that, or trace again with example_inputs that have this value{self._advice(label, given)}."
        )

    def _advice(self, label: str, given: Any) -> str:
        return f": {advice_on(self.name, given)}" if label == self.name else ""


@dataclass(frozen=True)
class Signature:
    """The arguments of the model's ``forward``, in its order.

    Attributes:
        arguments: all of them.
        inputs: for each tensor among them, its name in the constraints of the trace.
        flags: of the model's config, by the names of the arguments that override them; at these values they change nothing.
    """

    arguments: tuple[Argument, ...]
    inputs: tuple[str, ...]
    flags: Mapping[str, bool] = field(default_factory=dict, hash=False)

    @property
    def takes_item_count(self) -> bool:
        """Whether the number of items that a loss is divided by is an input."""
        return any(argument.name == ITEM_COUNT and argument.is_input for argument in self.arguments)

    @property
    def nested(self) -> dict[str, str]:
        """The inputs within a list or mapping, each with its place there: ``<input>.<index>`` or ``<input>.<key>``, at any depth."""
        places = [
            ".".join([argument.name, *key_parts(path)])
            for argument in self.arguments
            for path, leaf in pytree.tree_leaves_with_path(pytree.tree_unflatten(argument.leaves, argument.spec))
            if leaf in (Leaf.TENSOR, Leaf.NUMBER)
        ]
        return {name: place for name, place in zip(self.inputs, places, strict=True) if "." in place}

    @property
    def omissible(self) -> frozenset[str]:
        """Names of the inputs that may be left out."""
        return frozenset(argument.name for argument in self.arguments if argument.leaves == (Leaf.NUMBER,))

    def with_omissible(self, name: str) -> Signature:
        """Return the signature with an input, traced as a tensor, that may be left out and may be a number."""
        return replace(
            self,
            arguments=tuple(
                replace(argument, leaves=(Leaf.NUMBER,)) if argument.name == name else argument
                for argument in self.arguments
            ),
        )

    def with_fills(self, fills: Mapping[str, Fill]) -> Signature:
        """Return the signature with inputs that may be omitted, and their values then."""
        filled = (replace(argument, fill=fills.get(argument.name)) for argument in self.arguments)
        return replace(self, arguments=tuple(filled))

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Bind the arguments of a call and return the tensors in them, in the order of ``inputs``; None for an omitted number.

        Raises:
            InputError: the arguments are not those of the trace.
        """
        # The graph itself is called with one proxy for all inputs by position; within another module, with a proxy for each.
        if isinstance(args, fx.Proxy) or any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            raise TraceError(
                "torch.fx.symbolic_trace: the module is a graph of torch.fx already. Read or change its nodes at graph.graph, of a copy that "
                "copy.deepcopy(graph) makes; a graph of ATen operators that takes tensors by position is torch.export.export(graph, inputs).module()."
            )
        positional = [argument.name for argument in self.arguments if argument.positional]
        if len(args) > len(positional):
            raise InputError(
                f"expected at most {len(positional)} inputs by position, got {len(args)}. {self._traced_inputs()}"
            )
        given = dict(zip(positional, args, strict=False))
        known = [argument.name for argument in self.arguments]
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"input '{name}' is given twice, by position and by name. {self._traced_inputs()}")
            if name in self.flags and value is not None:
                self._check_flag(name, value)
            elif name in known:
                given[name] = value
            elif name == ADAPTER_NAMES:
                raise InputError(
                    f"this graph computes all rows with the same adapters, and got {name!r}: {name}={_shown(value)}. "
                    "lora_fx.activate_by_row(graph) makes a graph that takes it."
                )
            elif name not in self.flags:
                omit = " Omit it: tokenizer(…, return_token_type_ids=False)." if name == "token_type_ids" else ""
                raise InputError(
                    f"there is no input '{name}'{did_you_mean(name, known)}.{omit} {self._traced_inputs()}"
                )
        # Labels that were not traced are told before decoder_input_ids that were omitted for them.
        for argument in self.arguments:
            if not argument.traced:
                argument.tensors(given.get(argument.name, Leaf.ABSENT))
        found = [
            tensor
            for argument in self.arguments
            if argument.traced
            for tensor in argument.tensors(given.get(argument.name, Leaf.ABSENT))
        ]
        later = Fill | AdapterRows
        harmless = [argument for argument in self.arguments if argument.fill is not None and not argument.traced]
        if harmless or any(isinstance(value, later) for value in found):
            tensors = {
                name: value for name, value in zip(self.inputs, found, strict=True) if not isinstance(value, later)
            }
            for argument in harmless:
                if isinstance(value := given.get(argument.name), torch.Tensor):
                    argument.check_fill(value, tensors)
            found = [value.value(tensors) if isinstance(value, later) else value for value in found]
        return found

    def _check_flag(self, name: str, value: Any) -> None:
        if not _is_same(value, self.flags[name]):
            raise InputError(
                f"input '{name}' is {_shown(value)}, and the graph was traced with {self.flags[name]}, as the model's config says. "
                f"Omit it; {advice_on(name, value)}."
            )

    def shown(self) -> inspect.Signature:
        """Return the traced arguments as the signature of a method; keyword-only behind the first omitted argument."""
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("self", kind)]
        for argument in self.arguments:
            if not (argument.traced and argument.positional):
                kind = inspect.Parameter.KEYWORD_ONLY
            if argument.traced and argument.name.isidentifier() and not keyword.iskeyword(argument.name):
                default = argument.leaves[0] if argument.spec.is_leaf() and not argument.is_input else None
                parameters.append(inspect.Parameter(argument.name, kind, default=default))
        return inspect.Signature(parameters)

    def _traced_inputs(self) -> str:
        traced = (
            argument.name if argument.is_input else f"{argument.name}={_shown(argument)}"
            for argument in self.arguments
            if argument.traced
        )
        return f"The graph was traced with: {', '.join(traced)}. For other inputs, trace again with example_inputs that have them."


class InputCodeGen(ShortCode, PyTreeCodeGen):
    """A code generator whose ``forward`` binds its arguments by a :class:`Signature`."""

    def __init__(self, signature: Signature, out_spec: pytree.TreeSpec | None) -> None:
        in_spec = pytree.tree_flatten(((), dict.fromkeys(signature.inputs)))[1]
        super().__init__(PyTreeInfo(list(signature.inputs), in_spec, out_spec))
        self.signature = signature

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """Return the ``def`` line and the binding of the inputs."""
        del expanded_def
        names = [variable.split(":")[0].split("#")[0].strip() for variable in free_vars]
        bound = f"{', '.join(names)}, = " if names else ""
        # Not the names of the model's arguments: one might hide a name that the code below uses, such as `torch`.
        return (
            f"def forward(self, *args, **kwargs){maybe_return_annotation}:\n    {bound}{_GLOBAL}.tensors(args, kwargs)"
        )

    def additional_globals(self) -> list[tuple[str, Any]]:
        """Return the global names of the generated code."""
        return [*super().additional_globals(), (_GLOBAL, self.signature)]

    def process_inputs(self, *inputs: Any) -> Any:
        """Return the tensors of a call by position, for ``fx.Interpreter``; torch.export gives the tensors alone, by position."""
        every, omissible = self.signature.inputs, self.signature.omissible
        for names in (every, [name for name in every if name not in omissible]):
            if len(inputs) == len(names) and all(isinstance(value, torch.Tensor) for value in inputs):
                given = dict(zip(names, inputs, strict=True))
                return [given.get(name) for name in every]
        return self.signature.tensors(inputs, {})


_GLOBAL = "_lora_fx_signature"


def key_parts(path: pytree.KeyPath) -> list[str]:
    """Return the keys, indices and names that lead to a leaf."""
    return [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]


def signature_of(graph: fx.Graph) -> Signature:
    """Return the signature that ``take_inputs`` gave a graph, or the graph of which it is a copy."""
    codegen = graph._codegen
    assert isinstance(codegen, InputCodeGen)
    return codegen.signature


def let_omit(graph: fx.Graph, name: str) -> None:
    """Let calls of a graph omit an input, or give a number for it (in place): its placeholder is then None, or that number."""
    codegen = graph._codegen
    assert isinstance(codegen, InputCodeGen)
    graph.set_codegen(InputCodeGen(codegen.signature.with_omissible(name), codegen.pytree_info.out_spec))


def let_choose_rows(graph: fx.Graph, rows: AdapterRows) -> fx.Node:
    """Let calls of a graph give the name of an adapter for each row of the batch (in place); return the new input, their numbers."""
    codegen = graph._codegen
    assert isinstance(codegen, InputCodeGen)
    signature, spec = codegen.signature, pytree.tree_flatten(None, is_leaf=lambda _: True)[1]
    argument = Argument(ADAPTER_NAMES, False, True, spec, (Leaf.TENSOR,), rows=rows)
    inputs = (*signature.inputs, ADAPTER_NAMES)
    changed = replace(signature, arguments=(*signature.arguments, argument), inputs=inputs)
    graph.set_codegen(InputCodeGen(changed, codegen.pytree_info.out_spec))
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        return graph.placeholder(ADAPTER_NAMES)


def fill_in(graph: fx.Graph, fills: Mapping[str, Fill], flags: Mapping[str, bool]) -> None:
    """Let calls of a graph omit inputs that its model fills in, and give flags that change nothing (in place).

    Args:
        graph: with a signature.
        fills: the values of inputs, by their names.
        flags: of the model's config, those that were not given in the trace.
    """
    codegen = graph._codegen
    assert isinstance(codegen, InputCodeGen)
    signature = codegen.signature
    traced = {argument.name for argument in signature.arguments if argument.traced}
    free = {name: value for name, value in flags.items() if name not in traced}
    graph.set_codegen(InputCodeGen(replace(signature.with_fills(fills), flags=free), codegen.pytree_info.out_spec))


def _parts(label: str, value: Any, spec: pytree.TreeSpec) -> list[tuple[str, Any]]:
    """Split ``value`` along the structure of the trace, each part with a label; refuse another structure.

    The keys of a dictionary may come in another order.
    """
    if spec.is_leaf():
        return [(label, value)]
    parts, found = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if found.type is not spec.type:
        raise _other_structure(label, _kind(found.type, value), _kind(spec.type, None))
    if isinstance(value, dict) and isinstance(spec.context, list):
        if set(found.context) != set(spec.context):
            raise _other_structure(
                label, f"a mapping of {_comma_separated(found.context)}", f"one of {_comma_separated(spec.context)}"
            )
        by_key = dict(zip(found.context, parts, strict=True))
        keys, parts = spec.context, [by_key[key] for key in spec.context]
    else:
        if (len(parts), found.context) != (spec.num_children, spec.context):
            raise _other_structure(label, f"{_kind(found.type, value)} of {len(parts)}", f"one of {spec.num_children}")
        keys = list(range(len(parts)))
    nested = zip(keys, parts, spec.children(), strict=True)
    return [leaf for key, part, inner in nested for leaf in _parts(f"{label}[{key!r}]", part, inner)]


def _other_structure(label: str, found: str, expected: str) -> InputError:
    return InputError(
        f"input '{label}' is {found}, expected {expected} as in the trace. "
        "Pass the same structure, or trace again with example_inputs of this one."
    )


def _kind(kind: Any, value: Any) -> str:
    return f"a {kind.__name__}" if kind is not None else _shown(value)


def _comma_separated(keys: Sequence[Any]) -> str:
    return ", ".join(repr(key) for key in keys) or "nothing"


def _is_same(given: Any, constant: Any) -> bool:
    """Tell whether two constants are the same value: 1 is not True, 0.0 is not -0.0, and NaN is NaN."""
    if type(given) is not type(constant):
        return False
    return repr(given) == repr(constant) if isinstance(constant, float | complex) else bool(given == constant)


def _no_tensor(label: str, given: Any) -> str:
    """Return the message on a value that is no tensor, where the trace has one."""
    if isinstance(given, Mapping):
        what, do = f"a {type(given).__name__}", "Pass its entries by their names: graph(**batch)."
    elif hasattr(given, "__array__") or isinstance(given, list):
        what, do = (
            f"{_shown(given)}, a {type(given).__name__}".replace("\n", ""),
            f"Convert it: torch.as_tensor({label}).",
        )
    else:
        what, do = _shown(given), "Pass a torch.Tensor, or trace again with example_inputs that have this value."
    return f"input '{label}' is {what}, expected a tensor as in the trace. {do}"


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Leaf):
        return value.value
    if isinstance(value, Argument):
        return _shown(value.leaves[0]) if value.spec.is_leaf() else f"a {value.spec.type.__name__}"
    return _SHORT.repr(value)
