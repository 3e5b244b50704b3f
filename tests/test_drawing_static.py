"""Pictures as DOT, and as what Graphviz makes of that."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lora_fx.drawing.render import graphviz
from lora_fx.drawing.render.dot import dot
from lora_fx.drawing.render.graphviz import render
from lora_fx.drawing.render.text import visible
from lora_fx.errors import ExportError

STATUSES = ("added", "removed", "rewired", "changed")


class Described:
    """A description made by hand: operators and groups in the order of the graph, whose edges and stubs follow from that."""

    def __init__(self, title: str = "Model") -> None:
        self.nodes: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = [{"kind": "model", "name": title, "path": "", "type": title, "items": []}]
        self.changes: list[str] = []
        self._around = [0]

    def node(self, label: str, /, *inputs: str, **more: Any) -> str:
        identity = f"n{len(self.nodes)}"
        self.nodes.append(
            {"name": f"{label}_{len(self.nodes)}", "op": f"aten.{label}.default", "label": label, "kind": "operator"}
            | {"status": "same", "group": f"g{self._around[-1]}", "args": "", "inputs": list(inputs)} | more
        )  # fmt: skip
        self.groups[self._around[-1]]["items"].append(identity)
        branch = self.groups[self._around[-1]]["kind"] == "branch"
        self.changes += [identity] if self.nodes[-1]["status"] != "same" and not branch else []
        return identity

    def begin(self, name: str, /, kind: str = "module", **more: Any) -> str:
        identity = f"g{len(self.groups)}"
        self.groups[self._around[-1]]["items"].append(identity)
        self.groups.append({"kind": kind, "name": name, "parent": f"g{self._around[-1]}", "items": []} | more)
        self._around.append(len(self.groups) - 1)
        self.changes += [identity] if kind == "branch" else []
        return identity

    def end(self) -> None:
        self._around.pop()

    def description(self, opened: Sequence[str] = ("g0",), shared: Sequence[str] = (), **more: Any) -> dict[str, Any]:
        for group in self.groups:
            group["counts"] = self._counts(group)
        for group in self.groups:
            self._connect(group, shared)
        counts = {**self.groups[0]["counts"], "branches": sum(group["kind"] == "branch" for group in self.groups)}
        counts["same"] = counts["nodes"] - sum(counts[status] for status in STATUSES)
        return {
            "format": 1, "title": self.groups[0]["name"], "show": "diff", "before": "traced", "after": "rewritten by llama",
            "counts": counts, "lines": [], "nodes": self.nodes, "groups": self.groups, "open": list(opened),
            "changes": self.changes, "sites": [], "coverage": [], "elsewhere": [],
        } | more  # fmt: skip

    def _members(self, item: str) -> list[dict[str, Any]]:
        if item.startswith("n"):
            return [self.nodes[int(item[1:])]]
        return [node for inner in self.groups[int(item[1:])]["items"] for node in self._members(inner)]

    def _counts(self, group: dict[str, Any]) -> dict[str, int]:
        members = [node for item in group["items"] for node in self._members(item)]
        return {"nodes": len(members), **{each: sum(n["status"] == each for n in members) for each in STATUSES}}

    def _connect(self, group: dict[str, Any], shared: Sequence[str]) -> None:
        position: dict[str, int] = {}
        for index, item in enumerate(group["items"]):
            position |= {f"n{self.nodes.index(node)}": index for node in self._members(item)}
        edges: dict[tuple[int, int, str], None] = {}
        stubs: dict[tuple[str, int], str] = {}
        for index, item in enumerate(group["items"]):
            for node in self._members(item):
                for source in node["inputs"]:
                    status = "added" if "added" in (node["status"], self.nodes[int(source[1:])]["status"]) else "same"
                    if source not in position:
                        stubs[source, index] = status
                    elif position[source] != index:
                        edges[position[source], index, status] = None
        group["edges"] = [list(edge) for edge in edges]
        group["stubs"] = [
            {"source": source, "to": [to], "status": status} | ({"shared": True} if source in shared else {})
            for (source, to), status in stubs.items()
        ]


def projection(made: Described, name: str, source: str, rank: int | None = None) -> str:
    """Add a linear layer, with a branch where it has a rank; return its value."""
    made.begin(name, type="Linear", **({"note": f"LoRA, rank {rank}"} if rank else {}))
    weight = {"name": f"{name}.weight", "short": "weight", "value": "float32 [48, 48]"}
    value = made.node("linear", source, weights=[weight])
    if rank:
        made.begin("LoRA default", "branch", note=f"rank {rank}, alpha 16, scaling 2")
        lower = made.node(
            "linear", source, status="added", part="A", weights=[{"short": "A", "value": f"float32 [{rank}, 48]"}]
        )
        upper = made.node(
            "linear", lower, status="added", part="B", weights=[{"short": "B", "value": f"float32 [48, {rank}]"}]
        )
        scaled = made.node("mul", upper, status="added", part="scale")
        value = made.node("add", value, scaled, status="added", part="add")
        made.end()
    made.end()
    return value


def layer(made: Described, value: str, cos: str, sin: str, mask: str, ranked: Sequence[str]) -> str:
    """Add a layer of a decoder."""

    def rank(name: str) -> int | None:
        return 8 if name in ranked else None

    made.begin("input_layernorm", type="LlamaRMSNorm")
    normed = made.node("mul", made.node("rsqrt", made.node("mean", made.node("pow", value))), value)
    made.end()
    made.begin("self_attn", type="LlamaAttention")
    q, k, v = (projection(made, f"{each}_proj", normed, rank(f"{each}_proj")) for each in "qkv")
    heads = [
        made.node("transpose", made.node("view", each, status="rewired" if rank(f"{name}_proj") else "same"))
        for name, each in zip("qkv", (q, k, v), strict=True)
    ]
    turned = [
        made.node("add", made.node("mul", each, cos), made.node("mul", made.node("cat", each), sin))
        for each in heads[:2]
    ]
    attended = made.node("scaled_dot_product_attention", *turned, heads[2], mask)
    out = projection(made, "o_proj", made.node("reshape", attended), rank("o_proj"))
    made.end()
    value = made.node("add", value, out)
    made.begin("mlp", type="LlamaMLP")
    gate = made.node("silu", projection(made, "gate_proj", value, rank("gate_proj")))
    up = projection(made, "up_proj", value, rank("up_proj"))
    down = projection(made, "down_proj", made.node("mul", gate, up), rank("down_proj"))
    made.end()
    return made.node("add", value, down)


def decoder(layers: int = 32, ranked: Sequence[str] = ("q_proj", "v_proj"), *, repeated: bool = True) -> dict[str, Any]:
    """Return a description like that of a Llama."""
    made = Described("LlamaForCausalLM")
    ids = made.node("input_ids", kind="input", value="int64 [batch, sequence]")
    positions = made.node("position_ids", kind="input", value="int64 [batch, sequence]")
    inner = made.begin("model", type="LlamaModel")
    made.begin("embed_tokens", type="Embedding")
    value = made.node("embedding", ids, weights=[{"short": "weight", "value": "float32 [99, 48]"}])
    made.end()
    mask = made.node("where", made.node("le", positions))
    made.begin("rotary_emb", type="LlamaRotaryEmbedding")
    angle = made.node("matmul", positions)
    cos, sin = made.node("cos", angle), made.node("sin", angle)
    made.end()
    if repeated:
        note = f"LoRA ×{len(ranked)}, rank 8" if ranked else ""
        made.begin(f"layers.0–{layers - 1} ×{layers}", "repeat", type="LlamaDecoderLayer", copies=layers, note=note)
    for index in range(layers):
        made.begin(f"layers.{index}", type="LlamaDecoderLayer")
        value = layer(made, value, cos, sin, mask, ranked if repeated or index % 2 else ())
        made.end()
    if repeated:
        made.end()
    made.begin("norm", type="LlamaRMSNorm")
    value = made.node("mul", made.node("rsqrt", value), value)
    made.end()
    made.end()
    made.begin("lm_head", type="Linear")
    logits = made.node("linear", value)
    made.end()
    made.node("output", logits, kind="output")
    return made.description(opened=["g0", inner], shared=[cos, sin, mask])


def test_a_repeat_is_drawn_once_as_a_stack_with_its_count() -> None:
    text = dot(decoder(32))
    assert text.count("layers.0–31 ×32 · LlamaDecoderLayer") == 1
    assert text.count("layers.1") == 0
    assert text.count("LoRA default") == 2
    assert "subgraph cluster_g4_stack {" in text


def test_the_parts_of_a_branch_are_seen_in_a_cluster_of_their_own() -> None:
    text = dot(decoder(2))
    branch = re.search(
        r'subgraph cluster_\w+ \{ graph \[label="LoRA default\\lrank 8, alpha 16, scaling 2\\l".*?\n\}', text, re.S
    )
    assert branch is not None
    assert [part for part in ("A · linear", "B · linear", "scale · mul", "+ add") if part not in branch[0]] == []


def test_a_closed_group_says_its_name_class_count_and_what_is_in_it() -> None:
    assert 'label="norm · LlamaRMSNorm\\n2 operators"' in dot(decoder(2))
    assert 'label="layers.0–1 ×2 · LlamaDecoderLayer\\n62 operators"' in dot(decoder(2, ()))


def test_every_status_has_its_mark_and_its_colour_and_stands_in_the_legend() -> None:
    made = Described()
    value = made.node("relu")
    for status in STATUSES:
        value = made.node(f"op_{status}", value, status=status)
    text = dot(made.description())
    for status, mark, looks in (
        ("added", "+", "penwidth=2"),
        ("removed", "−", "dashed"),
        ("rewired", "⇄", "#7a3fb0"),
        ("changed", "~", "#9a7200"),
    ):
        assert re.search(rf'label="{re.escape(mark)} op_{status}"[^\n]*{looks}', text), status
        assert f"{mark} 1 {status}</td>" in text
    assert 'label="relu" ]' in text


def test_what_a_rewired_operator_read_before_is_a_dashed_edge() -> None:
    made = Described()
    old, new = made.node("old"), made.node("new", status="added")
    reader = made.node("view", new, status="rewired", former=[old])
    text = dot(made.description())
    assert re.search(rf"{old} -> {reader} \[[^\n]*dashed", text)
    assert re.search(rf"{new} -> {reader} \[[^\n]*penwidth", text)
    assert "− read before" in text
    assert "− read before" not in dot(decoder(2))


def test_edges_of_a_repeat_are_those_of_its_first_and_its_last_item() -> None:
    described = decoder(3)
    (norm,) = (f"g{index}" for index, group in enumerate(described["groups"]) if group["name"] == "norm")
    first_layer = next(group for group in described["groups"] if group["name"] == "layers.0")
    assert f"{first_layer['items'][-1]} -> {norm}" in dot(described).splitlines()


def test_a_shared_value_stands_in_a_pill_at_each_reader() -> None:
    described = decoder(4)
    (cos,) = (node["name"] for node in described["nodes"] if node["label"] == "cos")
    assert dot(described).count(f'label="rotary_emb · {cos}"') == 2


def test_repeats_with_branches_are_each_open() -> None:
    made = Described()
    for stack in ("encoder", "decoder"):
        made.begin(f"{stack}.0–1 ×2", "repeat", type="Layer", copies=2)
        for index in range(2):
            made.begin(f"{stack}.{index}")
            projection(made, "query", made.node("relu"), 4)
            made.end()
        made.end()
    assert dot(made.description()).count("LoRA default") == 2


def test_siblings_that_are_alike_are_open_once() -> None:
    text = dot(decoder(6, repeated=False))
    assert text.count("LoRA default") == 2
    assert text.count("like layers.1") == 2
    assert "Not all is shown" not in text


def test_a_picture_has_a_limit_and_says_what_it_leaves_out() -> None:
    made = Described()
    value = made.node("relu")
    for index in range(6000):
        value = made.node("mul", value, "n0", status="changed" if index % 100 == 7 else "same")
    text = dot(made.description())
    assert drawn(text) <= 400
    assert text.count('label="~ mul') == 60
    assert "more operators" in text
    assert "Not all is shown: … stands for operators left out" in text


def test_a_plain_chain_of_operators_is_one_box_that_names_them() -> None:
    made = Described()
    start = made.node("linear", made.node("input", kind="input"), weights=[{"short": "weight"}])
    reshaped = made.node("reshape", made.node("transpose", made.node("view", start)))
    out = made.node("relu", made.node("silu", reshaped), status="changed")
    text = dot(made.description())
    box = re.search(r'^("[\w:]+") \[label="view → transpose → reshape → silu"\]$', text, re.M)
    assert box is not None
    assert f"{start} -> {box[1]}\n{box[1]} -> {out}" in text
    assert "Not all is shown" not in text


def test_a_value_read_twice_or_changed_ends_a_chain() -> None:
    made = Described()
    first = made.node("exp", made.node("sin", made.node("cos", made.node("input", kind="input"))))
    made.node("tan", made.node("tanh", first, status="changed"))
    made.node("relu", first)
    text = dot(made.description())
    assert [each for each in ("cos → sin → exp", '"~ tanh', '"tan"', '"relu"') if each not in text] == []


def test_a_closed_group_is_connected_to_the_shared_values_it_reads() -> None:
    described = decoder(3, ())
    identity = {group["name"]: f"g{index}" for index, group in enumerate(described["groups"])}
    assert f"{identity['rotary_emb']} -> {identity['layers.0–2 ×3']}" in dot(described).splitlines()


def drawn(text: str) -> int:
    return len(re.findall(r"(?<!graph) \[label=", text))


def test_of_very_many_inputs_a_few_are_drawn_and_the_others_counted() -> None:
    made = Described()
    values = [made.node("relu")]
    for index in range(300):
        values.append(made.node("cat", *values, status="changed" if index % 50 == 7 else "same"))
    text = dot(made.description())
    assert drawn(text) <= 400
    assert re.search(r'label="and \d+ more values"', text)
    assert max(text.count(f"-> {value}\n") for value in values) <= 9


def test_groups_without_room_stay_closed_and_that_is_told() -> None:
    made = Described()
    for index in range(80):
        made.begin(f"blocks.{index}", type="Block")
        for _ in range(index + 3):
            made.node("relu", status="changed")
        made.end()
    text = dot(made.description())
    assert drawn(text) <= 400
    assert "Beyond a page: the layers are closed." in text
    assert text.count("Block\\n") == 80


def test_a_graph_without_changes_is_a_small_picture() -> None:
    text = dot(decoder(32, ()))
    assert text.count(" [label=") < 20
    assert "1,004 unchanged" in text


def test_an_empty_graph_is_a_picture() -> None:
    assert b"Nothing" in render(dot(Described("Nothing").description()), "svg")


HOSTILE = (
    'quote " end',
    "back\\slash \\N \\G \\l",
    "</text><script>alert(1)</script>",
    "&lt;b&gt; &amp; &#60;",
    "line\nbreak\r\ttab\0nul",
    "bidi \u202e end",
    "lone \ud800 half",
    "-->]]><!--",
    "<<b>bold</b>>",
    "};evil [label=x]",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_and_nothing_else(name: str) -> None:
    made = Described(name)
    made.begin(name, type=name, note=name)
    first = made.node("relu", label=name, name=name, status="added", weights=[{"short": name, "value": f"[{name}]"}])
    made.end()
    made.begin(f"{name}.1", type=name, note=name)
    made.node("relu", first, kind="input", name=name, value=name)
    made.end()
    described = made.description(["g0", "g1", "g2"], before=name, after=name)
    svg = render(dot(described), "svg")
    root = ElementTree.fromstring(svg)
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    shown = visible(name)
    assert f"+ {shown}" in texts
    assert f"{shown} → {shown}" in texts
    assert texts.count(shown) >= 3
    assert {each.tag.rpartition("}")[2] for each in root.iter()} <= {
        "svg",
        "g",
        "title",
        "polygon",
        "path",
        "text",
        "polyline",
    }


def test_a_name_without_end_is_cut() -> None:
    made = Described()
    made.node("relu", label="x" * 100_000)
    text = dot(made.description())
    assert "x" * 59 + "…" in text
    assert len(text) < 3000


def test_same_description_same_bytes() -> None:
    first, second = dot(decoder(4)), dot(decoder(4))
    assert first == second
    for kind in ("svg", "png"):
        assert render(first, kind) == render(second, kind)


def test_an_svg_refers_to_nothing_outside_and_is_small() -> None:
    svg = render(dot(decoder(32, [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")])), "svg")
    ElementTree.fromstring(svg)
    assert len(svg) < 200_000
    rest = svg.replace(b"http://www.w3.org/2000/svg", b"").replace(b"http://www.w3.org/1999/xlink", b"")
    assert re.findall(rb"http|href|<script|<!|version \d", rest) == []


def test_labels_of_modules_are_on_top_of_edges_in_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "subgraph cluster_x { graph [bgcolor=red label=a lp=1 lwidth=2 lheight=3];"
    made = Described(hostile)
    source = made.node("relu")
    made.begin("outer", type=hostile, note="of two lines", kind="branch")
    inner = made.node("relu", source, status="added", label=hostile)
    made.end()
    made.node("relu", inner)
    given = dot(made.description(["g1"], before=hostile))
    texts: dict[str, str] = {}

    def run(command: list[str], text: bytes, timeout: float) -> tuple[int, bytes, bytes]:
        texts[command[-2]] = text.decode()  # the last that is drawn of each kind
        return ran(command, text, timeout)

    ran = graphviz._run
    monkeypatch.setattr(graphviz, "_run", run)
    svg = render(given, "svg").decode()
    render(given, "png")
    assert texts["svg"] == texts["png"]
    drawn = [each.get("class") for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")]
    assert drawn == ["graph", *sorted(drawn[1:], key=["cluster", "edge", "node"].index)]
    assert drawn.count("node") == 3 + drawn.count("cluster") == 4
    above = svg[svg.rindex('class="edge"') :]
    assert "outer · subgraph" in above
    assert above.count("of two lines") == 1
    assert svg.count("outer · subgraph") == 1


def test_a_png_is_a_png() -> None:
    assert render(dot(decoder(2)), "png").startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let there be no pygraphviz, and a program ``dot`` with this as its script."""

    def install(script: str) -> None:
        path = tmp_path / "dot"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    without_pygraphviz(monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    return install


def without_pygraphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place, "pygraphviz").is_dir()])


AS_PROGRAM = """
import sys, pygraphviz
picture = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
options = dict(each[2:].split("=") for each in sys.argv[1:] if each.startswith("-G"))
picture.graph_attr.update(options)
sys.stdout.buffer.write(picture.draw(format=sys.argv[2].removeprefix("-T"), prog=sys.argv[1].removeprefix("-K")))
"""


def test_the_program_dot_gives_the_picture_that_pygraphviz_gives(request: pytest.FixtureRequest) -> None:
    drawn_by_pygraphviz = [render(dot(decoder(2)), kind) for kind in ("svg", "png")]
    program = request.getfixturevalue("program")
    program(f'echo >> "$0.calls"; exec {sys.executable} -I -c {shlex.quote(AS_PROGRAM)} "$@"')
    assert [render(dot(decoder(2)), kind) for kind in ("svg", "png")] == drawn_by_pygraphviz
    assert (request.getfixturevalue("tmp_path") / "dot.calls").read_text() == "\n" * 4


def test_versions_and_addresses_of_graphviz_are_left_out(program: Callable[[str], None]) -> None:
    svg = '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "a"\n "http://b">\n<!-- Generated by graphviz version 1\n -->\n<svg/>'
    program(f"cat > /dev/null; case $2 in -Tdot) echo 'digraph {{}}';; *) echo '{svg}';; esac")
    assert render("digraph {}", "svg") == b'<?xml version="1.0"?>\n<svg/>\n'


def test_without_any_graphviz_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_pygraphviz(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"pip install 'lora-fx\[draw\]'.*\.html, \.dot, \.json or \.txt"):
        render("digraph {}", "svg")


def test_a_layout_without_end_is_given_up_with_all_that_it_started(
    program: Callable[[str], None], tmp_path: Path
) -> None:
    program('sleep 60 & echo $! > "$0.child"; wait')
    start = time.monotonic()
    with pytest.raises(ExportError, match=r"did not finish the picture within 0\.5 seconds.*\.html"):
        render("digraph {}", "svg", timeout=0.5)
    assert time.monotonic() - start < 5
    child = int((tmp_path / "dot.child").read_text())
    deadline = time.monotonic() + 5
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(child)


def running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_crash_of_graphviz_is_an_error_of_ours(program: Callable[[str], None]) -> None:
    program("kill -SEGV $$")
    with pytest.raises(ExportError, match=r"it crashed \(SIGSEGV\)"):
        render("digraph {}", "png")


def test_a_failure_of_graphviz_is_told_by_its_first_line(program: Callable[[str], None]) -> None:
    program("echo 'Error: no layout' >&2; echo more >&2; exit 3")
    with pytest.raises(ExportError, match=r"Error: no layout .*\.html") as caught:
        render("digraph {}", "svg")
    assert "more" not in str(caught.value)


def test_a_program_that_writes_no_picture_is_an_error(program: Callable[[str], None]) -> None:
    program("echo hello")
    with pytest.raises(ExportError, match="it wrote no picture"):
        render("digraph {}", "svg")


def test_what_is_no_dot_is_refused_by_graphviz_of_pygraphviz() -> None:
    with pytest.raises(ExportError, match="Graphviz could not lay the picture out"):
        render("digraph { a -> ", "svg")


def test_nothing_of_the_current_directory_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pygraphviz", "re", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert b"<svg" in render("digraph {}", "svg")
    assert not (tmp_path / "imported").exists()
