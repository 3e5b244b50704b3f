"""Reads exported programs (``.pt2``) of strangers so that nothing in them is executed.

``torch.export.load`` (2.13) executes what a file says in many places: it unpickles weights, constants, custom objects and,
where the safe way fails, example inputs; it evaluates expressions of sizes (``sympy.sympify``); it runs Python that it
generates from names of nodes, inputs and weights, and from guards; it calls whatever ``torch.…`` or ``_operator.…`` leads
to; it imports modules that a tree of inputs names; it opens shared libraries of AOTInductor; and it tries an older layout
where this one fails. So a file is read once, and refused unless every record, and every text in its JSON, is of a kind that
is known to be data. Texts have rules by the field that they stand in (:data:`_RULES`): a field without a rule has no text.

The records are found by torch's own reader of archives, in the bytes that torch then loads: two readers may find different
records in one file. For the same reason, and for the older layout, this calls ``load_pt2``, not ``torch.export.load``.

Not guarded against: what operators of torch compute, and programs that take very long or much memory.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _dict_to_dataclass
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from lora_fx.errors import TraceError, first_line
from lora_fx.exporting import quiet

_MODEL, _SAMPLE_INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_PAYLOADS = (
    ("data/weights/", "model_weights_config.json", re.compile(r"weight_\d+", re.ASCII)),
    ("data/constants/", "model_constants_config.json", re.compile(r"tensor_\d+", re.ASCII)),
)
_RECORD = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/.*"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)",
    re.ASCII,
)
_LARGEST_JSON, _LONGEST_EXPRESSION, _LARGEST_NUMBER, _LARGEST_POWER = 2**28, 10_000, 2**64, 8


class _RefusedError(Exception):
    """A record is not to be loaded."""

    def __init__(self, record: str, found: str, expected: str) -> None:
        super().__init__(f"{record}: found {found}; expected {expected}")


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Read a program that ``torch.export.save`` wrote, without executing anything that the file says.

    Everything in it must be plain: tensors, trees of tuples, lists and dictionaries, operators of torch (``aten``, ``prims``
    and control flow), arithmetic of sizes. What else ``torch.export`` can store, such as tensor subclasses, custom objects,
    custom operators and compiled code, is refused. Calling the program executes its operators.

    Args:
        path: of the file; it is read once.

    Raises:
        TraceError: the file cannot be read, is damaged, or has something in it that is not plain; the message names it.
    """
    try:
        with _reading("the file"):
            data = _regular(Path(path)).read_bytes()
        _check_archive(data)
        with _reading(_MODEL), quiet():
            program: torch.export.ExportedProgram = load_pt2(io.BytesIO(data)).exported_programs["model"]
        return program
    except _RefusedError as error:
        raise TraceError(
            f"{path}: {error}. Nothing of it was loaded: have the program written again by torch.export.save of torch "
            f"{torch.__version__}, from plain tensors and operators of torch."
        ) from error


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise _RefusedError("the file", "no regular file of this name", "a .pt2 file")
    return path


@contextmanager
def _reading(record: str) -> Iterator[None]:
    """Refuse a record that cannot be read; every error of libraries ends here."""
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        said = _shown(first_line(str(root), type(root).__name__))
        raise _RefusedError(record, f"what torch cannot read ({said})", "what torch.export.save writes") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:120]}… ({len(text)} characters)"


def _check_archive(data: bytes) -> None:
    """Refuse the bytes of an archive unless loading them executes nothing."""
    with _reading("the archive"):
        reader = PT2ArchiveReader(io.BytesIO(data))
        names = _records(reader.archive_file, "the archive", len(data))
    for name in names:
        if not _RECORD.fullmatch(name):
            raise _RefusedError(
                _shown(name), "a record of this name", "those of one program alone: no compiled or older ones"
            )
    _check_json(reader, _MODEL, schema.ExportedProgram)
    for folder, config, tensor in _PAYLOADS:
        _check_payloads(reader, folder, config, tensor)
    with _reading(_SAMPLE_INPUTS):
        _check_sample_inputs(reader.read_bytes(_SAMPLE_INPUTS))


def _records(archive: Any, record: str, limit: int) -> list[str]:
    """Return the names of an archive's records, which together are no larger than it is, each there once."""
    names: list[str] = archive.get_all_records()
    size = sum(archive.get_record_size(name) for name in names)
    if size > limit:
        raise _RefusedError(record, f"{size} bytes of records in {limit}", "records that are not compressed")
    if len({name.casefold() for name in names}) != len(names):
        raise _RefusedError(record, "several records of one name", "one each")
    return names


def _check_json(reader: PT2ArchiveReader, record: str, kind: type) -> Any:
    """Return a record's JSON as torch reads it, all of whose texts were checked."""
    with _reading(record):
        text = reader.read_bytes(record)
        if len(text) > _LARGEST_JSON:
            raise _RefusedError(record, f"{len(text)} bytes", f"at most {_LARGEST_JSON}")
        parsed = json.loads(text.decode("utf-8"))
        if not isinstance(parsed, dict):
            raise _RefusedError(record, f"a JSON {type(parsed).__name__}", "a JSON object")
        value = _dict_to_dataclass(kind, parsed)
        _check_texts(record, value, kind.__name__)
        return value


def _check_payloads(reader: PT2ArchiveReader, folder: str, config: str, tensor: re.Pattern[str]) -> None:
    """Refuse tensors that would be unpickled, or made without their bytes being there."""
    payloads: dict[str, schema.PayloadMeta] = _check_json(reader, folder + config, schema.PayloadConfig).config
    with _reading(folder + config):
        for key, payload in payloads.items():
            record = folder + str(payload.path_name)
            if payload.use_pickle is not False:
                raise _RefusedError(record, f"a pickled object for {_shown(key)}", "the bytes of a tensor")
            if not tensor.fullmatch(payload.path_name) or payload.tensor_meta is None:
                raise _RefusedError(
                    record, f"an object for {_shown(key)} that is not a tensor", "the bytes of a tensor"
                )
            sizes = [size.as_int for size in payload.tensor_meta.sizes]
            if reader.archive_file.get_record_size(record) == 0 and math.prod(sizes) != 0:
                raise _RefusedError(record, f"no bytes for sizes {_shown(sizes)}", "the bytes of a tensor")


def _check_sample_inputs(data: bytes) -> None:
    """Refuse example inputs that torch would unpickle without restrictions, or that have other than plain keys and values."""
    if not data:
        return
    _records(torch._C.PyTorchFileReader(io.BytesIO(data)), _SAMPLE_INPUTS, len(data))
    _check_sample(torch.load(io.BytesIO(data), weights_only=True))


def _check_sample(value: object) -> None:
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for key, inner in value.items():
            if not _is_key(key):
                raise _RefusedError(_SAMPLE_INPUTS, f"the key {_shown(key)}", "keys of letters, digits, _, - and .")
            _check_sample(inner)
    elif type(value) in (tuple, list):
        assert isinstance(value, tuple | list)
        for inner in value:
            _check_sample(inner)
    elif value is not None and type(value) not in _SAMPLES:
        raise _RefusedError(
            _SAMPLE_INPUTS, f"a {type(value).__name__}", "tensors, numbers, texts, tuples, lists and dictionaries"
        )


_SAMPLES = (torch.Tensor, torch.nn.Parameter, bool, int, float, complex, str, torch.dtype, torch.device)


def _check_texts(record: str, value: object, field: str, *, of_node: bool = False) -> None:
    """Refuse a value of the schema unless each text in it follows the rule of its field."""
    if isinstance(value, schema.CustomObjArgument):
        raise _RefusedError(record, f"a custom object in {field}", "tensors and numbers")
    if dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            name = f"{type(value).__name__}.{each.name}"
            _check_texts(record, vars(value)[each.name], name, of_node=of_node or isinstance(value, schema.Node))
    elif isinstance(value, list):
        for inner in value:
            _check_texts(record, inner, field, of_node=of_node)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(record, key, f"keys of {field}")
            _check_texts(record, inner, f"metadata.{key}" if field.endswith(".metadata") else field, of_node=of_node)
    elif isinstance(value, str):
        # A node's own texts stand in generated code as Python writes them; those of inputs are pasted into guards.
        _check_text(record, value, f"{field} of a node" if of_node and field in _OF_NODES else field)
    elif value is not None and not isinstance(value, bool | int | float):
        raise _RefusedError(record, f"{_shown(value)} in {field}", "what the schema has there")


def _check_text(record: str, text: str, field: str) -> None:
    fits, expected = _RULES.get(field, (_is_nothing, "no text there"))
    if not fits(text):
        raise _RefusedError(record, f"{_shown(text)} in {field}", expected)


def _is_nothing(_: str) -> bool:
    return False


def _is_anything(_: str) -> bool:
    return True


def _is_name(text: str) -> bool:
    """Whether generated code can have this as a variable; some values have no name."""
    return not text or text.isidentifier()


def _is_qualified_name(text: str) -> bool:
    """Whether this is the path of a module or tensor; of those with two underscores, Python's own attributes."""
    return not text or all(
        re.fullmatch(r"[\w@-]+", part) and not (part.startswith("__") and part.endswith("__"))
        for part in text.split(".")
    )


def _is_key(key: object) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and re.fullmatch(r"[\w.-]+", key) is not None)


def _is_plain(text: str) -> bool:
    """Whether a text ends no string in generated code."""
    return text.isprintable() and not set(text) & set("'\"\\")


def _is_device(text: str) -> bool:
    return text in ("cpu", "cuda", "mps", "xpu", "meta")


def _are_functions(text: str) -> bool:
    """Whether ``name,function;...`` leads to attributes alone, which are not called."""
    return re.fullmatch(r"[\w.,;]*", text) is not None and "__" not in text


def _is_operator(text: str) -> bool:
    """Whether torch finds an operator that computes with tensors and numbers alone."""
    if re.fullmatch(_SIZE_OPERATORS, text, re.ASCII) or re.fullmatch(_HIGHER_ORDER, text):
        return True
    named = re.fullmatch(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", text, re.ASCII)
    if named is None:
        return False
    operator = getattr(getattr(getattr(torch.ops, named[1]), named[2], None), named[3], None)
    # aten.save and aten.from_file write files
    return isinstance(operator, torch._ops.OpOverload) and all(
        argument.name != "filename" for argument in operator._schema.arguments
    )


_SIZE_OPERATORS = (
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift)"
    r"|math\.(trunc|ceil|floor|sqrt)|torch\.(sym_(not|int|float|ite|max|min|sqrt)|_sym_sqrt)"
)
_HIGHER_ORDER = (
    r"torch\.ops\.higher_order\."
    r"(cond|while_loop|map_impl|scan|associative_scan|wrap_with_set_grad_enabled|wrap_with_autocast)"
)


def _is_treespec(text: str) -> bool:
    """Whether a tree has plain containers alone: others import what their context names."""
    match json.loads(text):
        case [1, tree]:
            return _is_tree(tree)
    return False


def _is_tree(tree: object) -> bool:
    match tree:
        case {"type": None, "context": None, "children_spec": []}:
            return True
        case {"type": str(kind), "context": str(context), "children_spec": [*children]}:
            keys = json.loads(context)
            plain = keys is None or (isinstance(keys, list) and all(map(_is_key, keys)))
            return re.fullmatch(_CONTAINERS, kind) is not None and plain and all(map(_is_tree, children))
    return False


_CONTAINERS = (
    r"builtins\.(tuple|list|dict)|collections\.OrderedDict|torch\.fx\.immutable_collections\.immutable_(list|dict)"
    r"|transformers\.modeling_outputs\.\w+"
)


def _parsed(text: str) -> ast.expr:
    """Return the expression in a text that Python, sympy's tokens and generated code read alike: one line, no comments."""
    if len(text) > _LONGEST_EXPRESSION or not re.fullmatch(r"[\w ()\[\]+\-*/%.,'=<>!]+", text, re.ASCII):
        return ast.Tuple([], ast.Load())  # in no grammar
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return ast.Tuple([], ast.Load())


def _is_size(text: str) -> bool:
    return _is_arithmetic(_parsed(text), _is_sympy)


def _is_symbol(text: str) -> bool:
    return re.fullmatch(r"(s|u|zf|zuf)\d{1,6}", text, re.ASCII) is not None


def _is_ranged(text: str) -> bool:
    """Whether torch finds the number of a size that depends on data at once: it counts up to it."""
    return _is_symbol(text) or (_is_size(text) and not text.startswith(("u", "zuf")))


def _is_guard(text: str) -> bool:
    return _is_arithmetic(_parsed(text), _is_source)


_Leaf = Callable[[ast.expr, int], bool]


def _is_arithmetic(node: ast.expr, is_leaf: _Leaf, power: int = _LARGEST_POWER) -> bool:
    """Whether an expression is numbers and leaves, combined by operators whose results stay small."""

    def fits(*nodes: ast.expr) -> bool:
        return all(_is_arithmetic(each, is_leaf, power) for each in nodes)

    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return abs(value) <= _LARGEST_NUMBER
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
            return fits(operand)
        case ast.BoolOp(values=values):
            return fits(*values)
        case ast.Compare(left=left, ops=operators, comparators=values):
            return all(isinstance(each, _COMPARISONS) for each in operators) and fits(left, *values)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _is_power(left, right, is_leaf, power)
        case ast.BinOp(
            left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod(), right=right
        ):
            return fits(left, right)
    return is_leaf(node, power)


_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def _is_power(base: ast.expr, exponent: ast.expr, is_leaf: _Leaf, power: int) -> bool:
    """Whether the exponents, of one power in another multiplied, stay within ``power``."""
    found = _exponent(exponent)
    return found is not None and found <= power and _is_arithmetic(base, is_leaf, power // max(found, 1))


def _exponent(node: ast.expr) -> int | None:
    """Return the largest number in an exponent that is one, such as ``-Integer(2)`` and ``Rational(1, 2)``."""
    match node:
        case ast.Constant(value=int() as value):
            return abs(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _exponent(operand)
        case ast.Call(func=ast.Name(id="Integer" | "Rational"), args=[_, *_] as arguments, keywords=[]):
            found = [_exponent(argument) for argument in arguments]
            return None if None in found else max(each for each in found if each is not None)
    return None


def _is_sympy(node: ast.expr, power: int) -> bool:
    """Whether a leaf is what sympy's ``srepr`` writes for sizes: a symbol, or a call of a known function."""
    match node:
        case ast.Name(id=name):
            return _is_symbol(name) or name in ("true", "false", "oo", "int_oo")
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            return _is_symbol(name) and all(map(_is_small_keyword, keywords))
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=keywords):
            number = re.fullmatch(r"-?\d{1,40}(\.\d{0,60})?(e[+-]?\d{1,3})?", digits, re.ASCII)
            return number is not None and all(map(_is_small_keyword, keywords))
        case ast.Call(func=ast.Name(id=name), args=[base, exponent], keywords=[]) if name in _POWERS:
            return _is_power(base, exponent, _is_sympy, power)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if re.fullmatch(_FUNCTIONS, name):
            return all(_is_arithmetic(each, _is_sympy, power) for each in arguments)
    return False


def _is_small_keyword(keyword: ast.keyword) -> bool:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    return keyword.arg is not None and isinstance(value, bool | int) and 0 <= value <= 200


_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
# sympy's classes, and torch.utils._sympy.functions as GraphModuleDeserializer.deserialize lists them
_FUNCTIONS = (
    "Integer|Rational|Add|Mul|Max|Min|Mod|Abs|floor|ceiling|And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality"
    "|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt"
    "|FloorToInt|CeilDiv|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt"
    "|RoundDecimal|ToFloat|Identity"
)


def _is_source(node: ast.expr, power: int) -> bool:
    """Whether a leaf of a guard is an input, its sizes, or a known function of those."""
    match node:
        case ast.Constant(value=str(text)):
            return _is_key(text)
        case ast.Subscript(value=value, slice=ast.Constant(value=int())) if _is_layout(value):
            return True
        case ast.Call(
            func=ast.Name(id="len" | "max" | "min" | "int" | "float" | "abs" | "round"), args=arguments, keywords=[]
        ):
            return all(_is_arithmetic(each, _is_source, power) for each in arguments)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="math"), attr="trunc" | "floor" | "ceil" | "sqrt" | "isnan"),
            args=arguments,
            keywords=[],
        ):
            return all(_is_arithmetic(each, _is_source, power) for each in arguments)
    return _is_layout(node) or _is_input(node)


def _is_layout(node: ast.expr) -> bool:
    match node:
        case ast.Call(
            func=ast.Attribute(value=source, attr="size" | "stride" | "storage_offset"), args=[], keywords=[]
        ):
            return _is_input(source)
    return False


def _is_input(node: ast.expr) -> bool:
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=key)):
            return _is_key(key)
        case ast.Subscript(value=ast.Subscript() as outer, slice=ast.Constant(value=key)):
            return _is_key(key) and _is_input(outer)
    return False


_NAME = (_is_name, "a name that is an identifier")
_QUALIFIED = (_is_qualified_name, "names of letters, digits, _, - and @, joined by dots")
_TEXT = (_is_anything, "a text")
_PLAIN = (_is_plain, "a text without quotes, backslashes and control characters")
_OPERATOR = (
    _is_operator,
    "an operator of torch that computes with tensors and numbers, such as torch.ops.aten.add.Tensor",
)
_TREE = (_is_treespec, "a tree of tuples, lists and dictionaries with plain keys")
_OF_NODES = ("Argument.as_string", "Argument.as_strings")
_RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "Argument.as_operator": _OPERATOR,
    "Argument.as_string": _PLAIN,
    "Argument.as_string of a node": _TEXT,
    "Argument.as_strings": _PLAIN,
    "Argument.as_strings of a node": _TEXT,
    "keys of Argument.as_string_to_argument": _PLAIN,
    "ConstantValue.as_string": _PLAIN,
    "Device.type": (_is_device, "a known type of device"),
    "ExportedProgram.guards_code": (_is_guard, "comparisons of the sizes of inputs"),
    "keys of ExportedProgram.opset_version": _NAME,
    "keys of ExportedProgram.range_constraints": (_is_ranged, "a size such as s0 or s0 + 1"),
    "ExportedProgram.torch_version": _PLAIN,
    "ExportedProgram.verifiers": _NAME,
    **{f"keys of Graph.{kind}_values": _NAME for kind in ("tensor", "sym_int", "sym_bool", "sym_float")},
    "GraphArgument.name": _NAME,
    "keys of GraphModule.metadata": _NAME,
    "keys of GraphModule.treespec_namedtuple_fields": _QUALIFIED,
    "InputToConstantInputSpec.name": _NAME,
    "ModuleCallEntry.fqn": _QUALIFIED,
    "ModuleCallSignature.forward_arg_names": _NAME,
    "ModuleCallSignature.in_spec": _TREE,
    "ModuleCallSignature.out_spec": _TREE,
    "NamedArgument.name": _NAME,
    "NamedTupleDef.field_names": _NAME,
    "Node.name": _NAME,
    "Node.target": _OPERATOR,
    "keys of Node.metadata": _NAME,
    **dict.fromkeys(("metadata.stack_trace", "metadata.nn_module_stack", "metadata.torch_fn"), _TEXT),
    **dict.fromkeys(("metadata.custom", "metadata.from_node"), _TEXT),
    "metadata.source_fn_stack": (_are_functions, "names and dotted paths"),
    "PayloadMeta.path_name": _QUALIFIED,
    "keys of PayloadConfig.config": _QUALIFIED,
    **{f"Sym{kind}Argument.as_name": _NAME for kind in ("Int", "Float", "Bool")},
    "SymExpr.expr_str": (_is_size, "arithmetic of sizes"),
    "TensorArgument.name": _NAME,
    "TokenArgument.name": _NAME,
    "InputToBufferSpec.buffer_name": _QUALIFIED,
    "BufferMutationSpec.buffer_name": _QUALIFIED,
    "InputToParameterSpec.parameter_name": _QUALIFIED,
    "ParameterMutationSpec.parameter_name": _QUALIFIED,
    "GradientToParameterSpec.parameter_name": _QUALIFIED,
    "InputToTensorConstantSpec.tensor_constant_name": _QUALIFIED,
    "GradientToUserInputSpec.user_input_name": _NAME,
    "UserInputMutationSpec.user_input_name": _NAME,
}
