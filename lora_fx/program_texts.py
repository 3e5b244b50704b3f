"""The rules that the texts in an exported program follow, by the field that they stand in: so that whatever evaluates them finds data.

Torch evaluates expressions of sizes as Python, pastes names into code, resolves operators and imports what a tree names; see
:mod:`lora_fx.programs`. Each rule admits what torch writes, and nothing else.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable

import torch

_LONGEST_EXPRESSION, _LARGEST_NUMBER, _LARGEST_POWER = 10_000, 2**64, 8


def is_nothing(_: str) -> bool:
    """Admit no text: for fields without a rule."""
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


def is_key(key: object) -> bool:
    """Tell whether a key of a dictionary is a number, or a text that ends no string in generated code."""
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
            plain = keys is None or (isinstance(keys, list) and all(map(is_key, keys)))
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
            return is_key(text)
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
            return is_key(key)
        case ast.Subscript(value=ast.Subscript() as outer, slice=ast.Constant(value=key)):
            return is_key(key) and _is_input(outer)
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
OF_NODES = ("Argument.as_string", "Argument.as_strings")
"""Fields with other rules in a node."""

RULES: dict[str, tuple[Callable[[str], bool], str]] = {
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
"""For each field of the schema that may hold text what admits it, and that in words. A field without a rule holds none."""
