"""Programs of others: those that are plain compute the same, and nothing in the others is executed."""

from __future__ import annotations

import functools
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.programs import load_program

MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
Records = dict[str, bytes]


@pytest.mark.parametrize("name", ["t5", "llama", "bert", "gpt2"])
def test_what_lora_fx_exports_loads_and_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    lora_fx.export.pt2(architectures.traced(name), path, verify=False)
    module, expected = load_program(path).module(), torch.export.load(path).module()
    for size in architectures.SIZES:
        batch = architectures.inputs(name, *size)
        with torch.no_grad():
            found, plain = module(**batch), expected(**batch)
        assert list(found) == list(plain)
        assert all(torch.equal(found[key], plain[key]) for key in plain)


class Sizes(nn.Module):
    """Divides, rounds and raises sizes; has every kind of tensor, an input that is a text, and operators with graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(1, 3).expand(2, 3).clone())
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor, mode: str, nested: dict[str, list[torch.Tensor]], unused: torch.Tensor) -> Any:
        n = x.shape[0]
        torch._check(n % 2 == 0)
        y = torch.einsum("ij,kj->ik", self.linear(x), x).reshape(n // 2, 2, n) if mode == "pairs" else x
        self.steps.add_(1)
        with torch.no_grad():
            z = torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))
        return {
            "pairs": y + torch.tensor([1.0]),
            "branch": [z, z + self.offset],
            "sizes": x.new_zeros((n + 7) // 8 * 3 + n % 3 + n**2 + max(n, 5)),
            "found": torch.nonzero(x > 0.5),
            "nested": nested["a-b"][0],
            "half": n / 2,
        }


def sizes_inputs(rows: int = 6) -> tuple[Any, ...]:
    x = torch.rand(rows, 4, generator=torch.Generator().manual_seed(3))
    return x, "pairs", {"a-b": [x + 1]}, torch.ones(2)


@functools.cache
def sizes_archive() -> bytes:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic}, None, {"a-b": [{0: dynamic}]}, None)
    program = torch.export.export(Sizes(), sizes_inputs(), dynamic_shapes=shapes, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"notes.txt": "é"})
    return buffer.getvalue()


def test_a_program_with_arithmetic_of_sizes_computes_the_same_bits_at_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(sizes_archive())
    program, plain = load_program(path), torch.export.load(io.BytesIO(sizes_archive()))
    assert program._guards_code == plain._guards_code
    assert program._guards_code
    module, expected = program.module(), plain.module()
    for rows in (4, 6, 20):
        torch.testing.assert_close(module(*sizes_inputs(rows)), expected(*sizes_inputs(rows)), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="Guard failed"):
        module(*sizes_inputs(7))


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y[1:]


def test_a_size_that_derives_from_another_loads(tmp_path: Path) -> None:
    size = torch.export.Dim("size", min=3, max=1000)
    program = torch.export.export(
        Shifted(), (torch.ones(5), torch.ones(6)), dynamic_shapes=({0: size}, {0: size + 1}), strict=False
    )
    torch.export.save(program, tmp_path / "model.pt2")
    module = load_program(tmp_path / "model.pt2").module()
    assert torch.equal(module(torch.ones(8), torch.ones(9)), torch.full((8,), 2.0))


@functools.cache
def shifted_archive() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Shifted(), (torch.ones(5), torch.ones(6))), buffer)
    return buffer.getvalue()


def records(archived: bytes | None = None) -> Records:
    with zipfile.ZipFile(io.BytesIO(archived or sizes_archive())) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archived(found: Mapping[str, bytes], **settings: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **settings) as archive:
        for name, content in found.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


class Evil:
    """Runs an expression when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return eval, (self.code,)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(found: Records, record: str, change: Callable[[Any], object]) -> None:
    parsed = json.loads(found[record])
    change(parsed)
    found[record] = json.dumps(parsed).encode()


def pickled_weight(found: Records, code: str) -> None:
    edit(found, WEIGHTS, lambda config: config["config"]["linear.bias"].update(use_pickle=True, path_name="weight_77"))
    found["data/weights/weight_77"] = saved(Evil(code))


def constant(name: str, content: Callable[[str], bytes], **payload: object) -> Callable[[Records, str], None]:
    def attack(found: Records, code: str) -> None:
        entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None} | payload
        edit(found, CONSTANTS, lambda config: config["config"].update(evil=entry))
        found[f"data/constants/{name}"] = content(code)

    return attack


def old_weights(found: Records, code: str) -> None:
    found["data/weights/model.pt"] = saved(Evil(code))


def sample_inputs(found: Records, code: str) -> None:
    found[SAMPLES] = saved(((Evil(code),), {}))


def sample_keys(found: Records, code: str) -> None:
    x, mode, _, unused = sizes_inputs()
    found[SAMPLES] = saved(((x, mode, {f"%({code})%": [x]}, unused), {}))


def expression(text: str) -> Callable[[Records, str], None]:
    def attack(found: Records, code: str) -> None:
        def change(program: Any) -> None:
            values = program["graph_module"]["graph"]["sym_int_values"]
            next(value["as_expr"] for value in values.values() if "as_expr" in value)["expr_str"] = text.replace(
                "CODE", code
            )

        edit(found, MODEL, change)

    return attack


def replaced(record: str, old: str, new: str) -> Callable[[Records, str], None]:
    """Return an attack that replaces a text of the JSON wherever it is."""

    def attack(found: Records, code: str) -> None:
        text = found[record].decode()
        assert json.dumps(old) in text
        found[record] = text.replace(json.dumps(old), json.dumps(new.replace("CODE", code))).encode()

    return attack


def weight_name(found: Records, code: str) -> None:
    name = f'training") is None or {code} or getattr(self, "training'
    for record in (MODEL, WEIGHTS):
        replaced(record, "linear.bias", name)(found, code)


def guard(found: Records, code: str) -> None:
    edit(found, MODEL, lambda program: program["guards_code"].append(code))


def tree(kind: str, context: object) -> Callable[[Records, str], None]:
    def attack(found: Records, code: str) -> None:
        def change(program: Any) -> None:
            signature = program["graph_module"]["module_call_graph"][0]["signature"]
            signature["out_spec"] = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])

        edit(found, MODEL, change)

    return attack


def add_node(found: Records, target: str, *arguments: object) -> None:
    """Let the graph begin with a call; the names are those that aten.from_file has for its arguments."""
    names = ("filename", "shared", "size")[: len(arguments)]
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in zip(names, arguments, strict=True)]
    node = {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": "evil"}}], "metadata": {}}
    node |= {"name": "evil", "is_hop_single_tensor_return": True}

    def change(program: Any) -> None:
        graph = program["graph_module"]["graph"]
        graph["tensor_values"]["evil"] = next(iter(graph["tensor_values"].values()))
        graph["nodes"].insert(0, node)

    edit(found, MODEL, change)


def operator(target: str, *arguments: object) -> Callable[[Records, str], None]:
    def attack(found: Records, code: str) -> None:
        add_node(found, target, {"as_string": marker_of(code)}, *arguments)

    return attack


def operator_argument(found: Records, code: str) -> None:
    """An operator that calls what it is given: torch checks the operators of nodes, not those in their arguments."""
    found.clear()
    found.update(records(shifted_archive()))  # torch does not load one with graphs of its own
    arguments = {"as_bool": True}, {"as_operator": "torch.os.system"}, {"as_string": f"touch {marker_of(code)}"}
    add_node(found, "torch.ops.higher_order.wrap_with_set_grad_enabled", *arguments)


def compiled(found: Records, code: str) -> None:
    found["data/aotinductor/model/model.wrapper.so"] = b"\x7fELF"


def second_program(found: Records, code: str) -> None:
    """A second program, whose example inputs are the evil ones."""
    for name in (MODEL, SAMPLES, WEIGHTS, CONSTANTS):
        found[name.replace("model.", "other.").replace("model_", "other_")] = found[name]
    found["data/sample_inputs/other.pt"] = saved(((Evil(code),), {}))


def marker_of(code: str) -> str:
    return code.split("'")[1]


@dataclass(frozen=True)
class Attack:
    """One way to execute something.

    Attributes:
        change: makes the records of a good archive those of the attack, which evaluates some code.
        named: what the refusal names.
        runs: what has to be done with it where ``torch.export.load`` loads it: load it, call its module, or interpret its
            graph; nothing where it cannot be shown here.
    """

    change: Callable[[Records, str], None]
    named: str
    runs: str


FACTORY = {"default_factory_module": "evil_module", "default_factory_name": "x", "dict_context": []}
MEMBER = json.dumps([{"__enum__": True, "fqn": "evil_module:x", "name": "y"}])
ATTACKS = {
    "pickled weight": Attack(pickled_weight, "data/weights/weight_77", "load"),
    "pickled constant": Attack(
        constant("tensor_77", lambda code: saved(Evil(code))), "data/constants/tensor_77", "load"
    ),
    "opaque object": Attack(constant("opaque_obj_0", lambda code: pickle.dumps(Evil(code))), "opaque_obj_0", "load"),
    "custom object": Attack(constant("custom_obj_0", lambda code: pickle.dumps(Evil(code))), "custom_obj_0", ""),
    "older layout of weights": Attack(old_weights, "data/weights/model.pt", "load"),
    "example inputs": Attack(sample_inputs, SAMPLES, "load"),
    "keys of example inputs": Attack(sample_keys, SAMPLES, "call"),
    "expression": Attack(expression("CODE"), MODEL, "load"),
    "expression in a known function": Attack(expression("Max(Integer(1), CODE)"), MODEL, "load"),
    "expression in a keyword": Attack(expression("Symbol('s0', integer=CODE)"), MODEL, "load"),
    "expression in a symbol": Attack(expression("Symbol('s0').__class__(CODE)"), MODEL, "load"),
    "name of an input": Attack(replaced(MODEL, "unused", "unused=CODE"), MODEL, "load"),
    "name of a weight": Attack(weight_name, MODEL, "call"),
    "text of an input": Attack(replaced(MODEL, "pairs", "a' or CODE or 'b"), MODEL, "call"),
    "guard": Attack(guard, MODEL, "call"),
    "tree with a factory": Attack(tree("collections.defaultdict", FACTORY), MODEL, "load"),
    "tree with a member of an enumeration": Attack(tree("builtins.dict", MEMBER), MODEL, "load"),
    "operator in an argument": Attack(operator_argument, "torch.os.system", "interpret"),
    "operator of Python": Attack(operator("torch.os.system"), "torch.os.system", ""),
    "loader of libraries": Attack(operator("torch.ops.load_library"), "torch.ops.load_library", ""),
    "maker of callers": Attack(operator("_operator.methodcaller"), "_operator.methodcaller", ""),
    "operator that writes files": Attack(
        operator("torch.ops.aten.from_file.default", {"as_bool": True}, {"as_int": 4}), "aten.from_file", "call"
    ),
    "compiled code": Attack(compiled, "model.wrapper.so", ""),
    "second program": Attack(second_program, "models/other.json", "load"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_executed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, marker, found = ATTACKS[name], tmp_path / "executed", records()
    code = f"open('{marker}','w')"
    (tmp_path / "evil_module.py").write_text(code)  # what a tree may import
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    attack.change(found, code)
    path = tmp_path / "model.pt2"
    path.write_bytes(archived(found))
    with pytest.raises(lora_fx.TraceError) as caught:
        load_program(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    assert attack.named in str(caught.value)
    if attack.runs:
        run_plainly(path, attack.runs)
        assert marker.exists()


def run_plainly(path: Path, runs: str) -> None:
    """Do with a file what a user of torch does; some of the attacks fail only after they have run."""
    try:
        program = torch.export.load(path)
        if runs == "call":
            program.module()(*sizes_inputs())
        elif runs == "interpret":
            placeholders = program.graph.find_nodes(op="placeholder")
            torch.fx.Interpreter(program.graph_module).run(*placeholders)
    except Exception as error:
        print(error, file=sys.stderr)


@pytest.mark.parametrize("root", [True, False], ids=["alone", "behind a program"])
def test_the_layout_of_torch_2_7_is_refused(root: bool, tmp_path: Path) -> None:
    """Without a folder, torch takes an archive for one of the older layout, whose tensors are pickles."""
    marker, path, buffer = tmp_path / "executed", tmp_path / "model.pt2", io.BytesIO()
    evil = saved(Evil(f"open('{marker}','w')"))
    with zipfile.ZipFile(buffer, "w") as archive:
        if not root:
            for name, content in records().items():
                archive.writestr(f"archive/{name}", content)
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", records()[MODEL])
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", evil)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(lora_fx.TraceError, match=r"model\.pt2: the archive: "):
        load_program(path)
    assert not marker.exists()
    run_plainly(path, "load")
    assert marker.exists()


# Places whose texts nobody evaluates: torch stores them, or generated code has them as Python writes them.
UNREAD = {
    *(f"metadata.{key}" for key in ("stack_trace", "nn_module_stack", "torch_fn", "from_node")),
    "inputs.*.arg.as_string",
}
# Places whose texts stand between quotes, so that they may be anything without quotes.
QUOTED = {
    "torch_version",
    "graph_module.graph.inputs.*.as_string",
    "graph_module.signature.input_specs.*.constant_input.value.as_string",
}


def places(value: object, path: tuple[Any, ...] = ()) -> dict[str, tuple[Any, ...]]:
    """Return one path to each kind of place in a JSON that has a text, names of things taken together."""
    found: dict[str, tuple[Any, ...]] = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found |= places(inner, (*path, index))
    elif isinstance(value, str):
        found[".".join("*" if isinstance(key, int) else key for key in path)] = path
    return found


@pytest.mark.parametrize("record", [MODEL, WEIGHTS, CONSTANTS])
@pytest.mark.parametrize("text", ["a' or open('x') or 'b", 'a") or (open)("x', "a=open(0)", "__import__('x')\n"])
def test_no_text_stands_where_torch_would_evaluate_it(record: str, text: str, tmp_path: Path) -> None:
    """Every kind of place, so that none is forgotten."""
    good = records()
    taken = []
    found = places(json.loads(good[record]))
    assert len(found) >= (60 if record == MODEL else 3)
    for place, (*outer, last) in found.items():

        def change(parsed: Any, outer: list[Any] = outer, last: Any = last) -> None:
            for key in outer:
                parsed = parsed[key]
            parsed[last] = text

        changed = dict(good)
        edit(changed, record, change)
        path = tmp_path / "model.pt2"
        path.write_bytes(archived(changed))
        try:
            load_program(path)
        except lora_fx.TraceError:
            continue
        taken.append(place.rpartition("nodes.*.")[2])
    assert set(taken) <= (UNREAD if set(text) & set("'\"") else UNREAD | QUOTED)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "Pow(Pow(Symbol('s0'), Integer(8)), Integer(8))",
        "Pow(Integer(2), Symbol('s0'))",
        "LShift(Integer(1), Integer(999999999))",
        "Integer(" + "9" * 40 + ")",
        "Float('1e999999', precision=53)",
        "Float('1.0', precision=999999999)",
        "Symbol('s0', **{})",
        "Symbol('lambda')",
        "factorial(Integer(9))",
        "Max(*s0)",
        "s0.args",
        "s0[0]",
        "lambda: 1",
        "[s0 for s0 in s0]",
        "s0 if s0 else s0",
        "(s0 := 1)",
        "3!",
        "",
        "s0 # s1",
        "s0\n",
        "(" * 4000 + "s0" + ")" * 4000,
        "-" * 9000 + "s0",
        "+".join(["s0"] * 9000),
    ],
)
def test_an_expression_that_is_not_arithmetic_or_grows_is_refused(text: str, tmp_path: Path) -> None:
    found, path = records(), tmp_path / "model.pt2"
    expression(text)(found, "")
    path.write_bytes(archived(found))
    with pytest.raises(lora_fx.TraceError, match=r"models/model\.json: found .*; expected "):
        load_program(path)


def deep(found: Records) -> None:
    found[MODEL] = b'{"graph_module":' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def repeated(found: Records) -> None:
    found["MODELS/MODEL.JSON"] = found[MODEL]


def endless(found: Records) -> None:
    """Torch would make a tensor of these sizes, for which there are no bytes."""

    def change(config: Any) -> None:
        bias = config["config"]["linear.bias"]
        found[f"data/weights/{bias['path_name']}"] = b""
        bias["tensor_meta"]["sizes"] = [{"as_int": 10**12}]

    edit(found, WEIGHTS, change)


def counted(found: Records) -> None:
    def change(program: Any) -> None:
        program["range_constraints"]["u999999999999"] = {"min_val": 0, "max_val": None}

    edit(found, MODEL, change)


def without(record: str) -> Callable[[Records], None]:
    return lambda found: found.pop(record) and None


def instead(record: str, content: bytes) -> Callable[[Records], None]:
    return lambda found: found.update({record: content})


DAMAGES: dict[str, tuple[Callable[[Records], None], str]] = {
    **{f"without {record}": (without(record), record) for record in (MODEL, SAMPLES, WEIGHTS, CONSTANTS)},
    "without a format": (without("archive_format"), "archive"),
    "without a version": (without("archive_version"), MODEL),
    "without a weight": (without("data/weights/weight_0"), "data/weights/"),
    "a list": (instead(MODEL, b"[]"), "a JSON list"),
    "a number": (instead(WEIGHTS, b"1"), "a JSON int"),
    "an empty object": (instead(MODEL, b"{}"), MODEL),
    "no JSON": (instead(CONSTANTS, b"{"), CONSTANTS),
    "no text": (instead(MODEL, b"\xff\xfe"), MODEL),
    "a long number": (instead(WEIGHTS, b'{"config": ' + b"9" * 10_000 + b"}"), WEIGHTS),
    "no example inputs": (instead(SAMPLES, b"\x80\x02."), SAMPLES),
    "deep": (deep, MODEL),
    "repeated": (repeated, "several records of one name"),
    "endless": (endless, "no bytes for sizes"),
    "counted": (counted, "u999999999999"),
    "strange name": (instead("evil'\"<b>\u202e" + "x" * 300, b""), "a record of this name"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_program_is_refused_by_the_name_of_what_is_wrong(name: str, tmp_path: Path) -> None:
    change, named = DAMAGES[name]
    found, path = records(), tmp_path / "model.pt2"
    change(found)
    path.write_bytes(archived(found))
    with pytest.raises(lora_fx.TraceError) as caught:
        load_program(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert named in message
    assert "written again by torch.export.save" in message
    assert len(message) < len(str(path)) + 700
    assert message.isprintable()


def test_an_archive_that_grows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(archived(records() | {"extra/zeros": bytes(30_000_000)}, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(lora_fx.TraceError, match="not compressed"):
        load_program(path)


def test_example_inputs_that_grow_are_refused(tmp_path: Path) -> None:
    found, path, buffer = records(), tmp_path / "model.pt2", io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(found[SAMPLES])) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as grown,
    ):
        for name in plain.namelist():
            grown.writestr(name, plain.read(name) + bytes(1_000_000))
    path.write_bytes(archived(found | {SAMPLES: buffer.getvalue()}))
    with pytest.raises(lora_fx.TraceError, match=rf"{SAMPLES}.*not compressed"):
        load_program(path)


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_part_of_a_file_is_refused(part: float, tmp_path: Path) -> None:
    path, whole = tmp_path / "model.pt2", sizes_archive()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(lora_fx.TraceError, match=r"model\.pt2: the archive: found what torch cannot read"):
        load_program(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive" * 99, bytes(10_000)])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(lora_fx.TraceError, match=r"model\.pt2: the archive: found what torch cannot read"):
        load_program(path)


@pytest.mark.parametrize("path", ["missing.pt2", ".", "a\0b", "/dev/zero"])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(lora_fx.TraceError, match="the file: found no regular file"):
        load_program(path if path.startswith("/") else tmp_path / path)
