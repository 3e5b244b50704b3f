"""Descriptions of graphs made by hand, for tests of what draws them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

Description = dict[str, Any]

STATE = "float32 [batch, sequence, 2048]"
HEADS = "float32 [batch, 32, sequence, 64]"


class Drawing:
    """Collects nodes and groups, and derives from the inputs of nodes which edges and stubs each group has."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.nodes: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.sites: list[dict[str, Any]] = []
        self.shared: set[str] = set()
        self.group(None, "model", title, type=title)

    def group(self, parent: str | None, kind: str, name: str, **fields: Any) -> str:
        group_id = f"g{len(self.groups)}"
        if parent is not None:
            fields["parent"] = parent
            self.groups[int(parent[1:])]["items"].append(group_id)
        self.groups.append({"kind": kind, "name": name, **fields, "items": []})
        return group_id

    def module(self, parent: str, name: str, type_name: str, **fields: Any) -> str:
        path = self.groups[int(parent[1:])].get("path", "")
        return self.group(parent, "module", name, path=f"{path}.{name}".strip("."), type=type_name, **fields)

    def node(self, group: str, label: str, *inputs: str, **fields: Any) -> str:
        node_id = f"n{len(self.nodes)}"
        kind = fields.pop("kind", "operator")
        made = {
            "name": f"{label}_{len(self.nodes)}",
            "op": f"aten.{label}.default" if kind == "operator" else kind,
            "label": label,
            "kind": kind,
            "status": "same",
            "group": group,
            "args": ", ".join(self.nodes[int(read[1:])]["name"] for read in inputs),
            "inputs": list(inputs),
            "line": 0,
            "path": self.groups[int(group[1:])].get("path", ""),
            **fields,
        }
        self.nodes.append({key: value for key, value in made.items() if value not in ("", [])})
        self.groups[int(group[1:])]["items"].append(node_id)
        return node_id

    def linear(self, parent: str, name: str, read: str, rank: int = 0, **fields: Any) -> str:
        """Add a linear layer, with a branch beside it if it has a rank."""
        module = self.module(parent, name, "Linear", **({"note": f"LoRA, rank {rank}"} if rank else {}))
        path = self.groups[int(module[1:])]["path"]
        weight = {"name": f"{path}.weight", "short": "weight", "value": "float32 [2048, 2048]"}
        base = self.node(module, "linear", read, weights=[weight], value=STATE, site=len(self.sites), **fields)
        site = {"name": path, "op": "linear", "in": 2048, "out": 2048, "weight": weight["name"], "node": base}
        if not rank:
            reason = "its name is not one of q_proj, v_proj"
            self.sites.append({**site, "state": "none", "ranks": [], "reason": reason})
            return base
        self.sites.append({**site, "state": "branch", "ranks": [rank], "decision": "llama:select[0]"})
        return self.branch(module, base, read, path, rank)

    def branch(self, module: str, base: str, read: str, path: str, rank: int) -> str:
        facts = {"site": path, "adapter": "default", "rank": rank, "alpha": 16.0, "scaling": 2.0, "dropout": 0.1}
        branch = self.group(
            module,
            "branch",
            "LoRA default",
            path=path,
            note=f"rank {rank}, alpha 16, scaling 2",
            branch={**facts, "rule": "llama:select[0]"},
        )
        added: dict[str, Any] = {"status": "added"}
        inner = f"float32 [batch, sequence, {rank}]"
        factors = [
            {"name": f"{path}.lora_{side}.default", "short": f"lora_{side}", "value": value, "trainable": True}
            for side, value in (("A", f"float32 [{rank}, 2048]"), ("B", f"float32 [2048, {rank}]"))
        ]
        dropped = self.node(branch, "dropout", read, part="dropout", value=STATE, **added)
        down = self.node(branch, "linear", dropped, part="A", value=inner, weights=factors[:1], **added)
        up = self.node(branch, "linear", down, part="B", value=STATE, weights=factors[1:], **added)
        scaled = self.node(branch, "mul", up, part="scale", value=STATE, **added)
        return self.node(branch, "add", base, scaled, part="add", value=STATE, **added)

    def finish(self, *, opened: list[str], **fields: Any) -> Description:
        for group in self.groups:
            group["counts"] = {
                "nodes": 0, **dict.fromkeys(("added", "removed", "rewired", "changed"), 0)
            }  # fmt: skip
            group["edges"], group["stubs"] = [], []
        for node in self.nodes:
            for group in self._around(node["group"]):
                counts = self.groups[int(group[1:])]["counts"]
                counts["nodes"] += 1
                if node["status"] != "same":
                    counts[node["status"]] += 1
        self._connect()
        total = Counter(node["status"] for node in self.nodes)
        branches = sum(group["kind"] == "branch" for group in self.groups)
        description = {
            "format": 1,
            "title": self.title,
            "show": "diff",
            "before": "traced",
            "after": "rewritten by llama",
            "counts": {
                "nodes": len(self.nodes),
                **{status: total[status] for status in ("added", "removed", "rewired", "changed", "same")},
                "branches": branches,
            },
            "lines": ["/models/modeling_llama.py:112: hidden_states = self.proj(hidden_states)"],
            "nodes": self.nodes,
            "groups": [
                {key: value for key, value in group.items() if key == "items" or value not in ([], "")}
                for group in self.groups
            ],
            "open": opened,
            "changes": self._changes(),
            "sites": self.sites,
            **fields,
        }
        return {key: value for key, value in description.items() if value not in ([], "")}

    def _around(self, group: str | None) -> list[str]:
        found = []
        while group is not None:
            found.append(group)
            group = self.groups[int(group[1:])].get("parent")
        return found

    def _connect(self) -> None:
        edges: dict[tuple[str, int, int], str] = {}
        stubs: dict[tuple[str, str, int], dict[str, Any]] = {}
        for number, node in enumerate(self.nodes):
            former = [(read, "removed") for read in node.get("former", [])]
            new = "removed" if node["status"] == "removed" else "added"
            reads = [
                (read, new if new in (node["status"], self.nodes[int(read[1:])]["status"]) else "same")
                for read in node.get("inputs", [])
            ]
            for read, status in reads + former:
                sources = [read, *self._around(self.nodes[int(read[1:])]["group"])]
                readers = [f"n{number}", *self._around(node["group"])]
                common = next(group for group in readers[1:] if group in sources)
                for below, group in pairwise(readers):
                    items = self.groups[int(group[1:])]["items"]
                    position = items.index(below)
                    if group == common:
                        source = items.index(sources[sources.index(group) - 1])
                        edges.setdefault((group, source, position), status)
                        break
                    key = (group, read, position if read in self.shared else -1)
                    stub = stubs.setdefault(key, {"source": read, "to": [], "status": status})
                    if read in self.shared:
                        stub["shared"] = True
                    if position not in stub["to"]:
                        stub["to"].append(position)
        for (group, source, position), status in edges.items():
            self.groups[int(group[1:])]["edges"].append([source, position, status])
        for (group, _, _), stub in stubs.items():
            self.groups[int(group[1:])]["stubs"].append(stub)

    def _changes(self) -> list[str]:
        changes: dict[str, None] = {}
        for number, node in enumerate(self.nodes):
            if node["status"] != "same":
                branch = [g for g in self._around(node["group"]) if self.groups[int(g[1:])]["kind"] == "branch"]
                changes[branch[0] if branch else f"n{number}"] = None
        return list(changes)


def llama(layers: int = 32, *, ranks: dict[int, int] | None = None) -> Description:
    """Return something like a rewritten Llama: branches of rank 8 (or the layer's in ``ranks``) beside q_proj and v_proj."""
    made = Drawing("LlamaForCausalLM")
    ids = made.node("g0", "input_ids", kind="input", value="int64 [batch, sequence]")
    mask = made.node("g0", "attention_mask", kind="input", value="int64 [batch, sequence]")
    model = made.module("g0", "model", "LlamaModel", note=f"LoRA ×{2 * layers}, rank 8")
    embedding = made.module(model, "embed_tokens", "Embedding")
    weight = {"name": "model.embed_tokens.weight", "short": "weight", "value": "float32 [32000, 2048]"}
    state = made.node(embedding, "embedding", ids, weights=[weight], value=STATE)
    positions = made.node(model, "arange", value="int64 [sequence]")
    for label in ("unsqueeze", "le", "index", "and", "expand", "where"):
        mask = made.node(model, label, mask, positions, value="bool [batch, 1, sequence, sequence]")
    rotary = made.module(model, "rotary_emb", "LlamaRotaryEmbedding")
    angles = positions
    for label in ("unsqueeze", "to", "expand", "matmul", "transpose", "cat"):
        angles = made.node(rotary, label, angles, value="float32 [1, sequence, 64]")
    cos = made.node(rotary, "cos", angles, value="float32 [1, sequence, 64]")
    sin = made.node(rotary, "sin", angles, value="float32 [1, sequence, 64]")
    made.shared = {mask, cos, sin}
    ranks = ranks or {}
    runs: list[list[int]] = []
    for layer in range(layers):
        if runs and ranks.get(runs[-1][-1], 8) == ranks.get(layer, 8):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    for run in runs:
        parent, path = model, "model.layers"
        if len(run) > 1:
            name = f"layers.{run[0]}–{run[-1]} ×{len(run)}"
            note = f"LoRA ×{2 * len(run)}, rank {ranks.get(run[0], 8)}"
            parent = made.group(model, "repeat", name, type="LlamaDecoderLayer", note=note, copies=len(run))
        for layer in run:
            rank = ranks.get(layer, 8)
            note = {"note": f"LoRA ×2, rank {rank}"} if rank else {}
            around = {"path": f"{path}.{layer}", "type": "LlamaDecoderLayer", **note}
            state = _layer(made, made.group(parent, "module", f"layers.{layer}", **around), state, mask, cos, sin, rank)
    state = _norm(made, model, "norm", state)
    head = made.linear("g0", "lm_head", state)
    made.node("g0", "output", head, kind="output")
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    rows = [{"layer": str(n), "cells": list(range(7 * n, 7 * n + 7))} for n in range(layers)]
    coverage = [{"stack": "model.layers", "columns": projections, "rows": rows}]
    return made.finish(opened=["g0", model], coverage=coverage, elsewhere=[7 * layers])


def _norm(made: Drawing, parent: str, name: str, read: str) -> str:
    norm = made.module(parent, name, "LlamaRMSNorm")
    value = read
    for label in ("pow", "mean", "add", "rsqrt"):
        value = made.node(norm, label, value, value="float32 [batch, sequence, 1]")
    value = made.node(norm, "mul", read, value, value=STATE)
    weight = {"name": f"model.{name}.weight", "short": "weight", "value": "float32 [2048]"}
    return made.node(norm, "mul", value, weights=[weight], value=STATE)


def _layer(made: Drawing, layer: str, read: str, mask: str, cos: str, sin: str, rank: int) -> str:
    normed = _norm(made, layer, "input_layernorm", read)
    attention = made.module(layer, "self_attn", "LlamaAttention", **({"note": f"LoRA ×2, rank {rank}"} if rank else {}))
    heads = []
    for name in "qkv":
        projected = made.linear(attention, f"{name}_proj", normed, rank if name in "qv" else 0)
        status = {"status": "rewired", "differences": [{"what": "input", "before": "linear", "after": "add"}]}
        viewed = made.node(attention, "view", projected, value=HEADS, **(status if rank and name in "qv" else {}))
        heads.append(made.node(attention, "transpose", viewed, value=HEADS))
    for position in (0, 1):
        first = made.node(attention, "mul", heads[position], cos, value=HEADS)
        halves = [made.node(attention, "slice", heads[position], value=HEADS) for _ in range(2)]
        negated = made.node(attention, "neg", halves[1], value=HEADS)
        rotated = made.node(attention, "cat", negated, halves[0], value=HEADS)
        second = made.node(attention, "mul", rotated, sin, value=HEADS)
        heads[position] = made.node(attention, "add", first, second, value=HEADS)
    for position in (1, 2):
        for label in ("unsqueeze", "expand", "reshape"):
            heads[position] = made.node(attention, label, heads[position], value=HEADS)
    attended = made.node(attention, "scaled_dot_product_attention", *heads, mask, value=HEADS)
    joined = made.node(attention, "reshape", made.node(attention, "transpose", attended, value=HEADS), value=STATE)
    mixed = made.linear(attention, "o_proj", joined)
    residual = made.node(layer, "add", read, mixed, value=STATE)
    normed = _norm(made, layer, "post_attention_layernorm", residual)
    feed = made.module(layer, "mlp", "LlamaMLP")
    gate = made.node(made.module(feed, "act_fn", "SiLU"), "silu", made.linear(feed, "gate_proj", normed), value=STATE)
    gated = made.node(feed, "mul", gate, made.linear(feed, "up_proj", normed), value=STATE)
    return made.node(layer, "add", residual, made.linear(feed, "down_proj", gated), value=STATE)


def statuses() -> Description:
    """Return a small graph with a node of each status and a site in each state."""
    made = Drawing("Small")
    read = made.node("g0", "x", kind="input", value="float32 [batch, 2048]")
    block = made.module("g0", "block", "Block", note="LoRA ×1, rank 8")
    first = made.linear(block, "first", read, 8)
    old = made.node(block, "relu", read, status="removed", value=STATE)
    difference = {"what": "argument 2", "before": "0", "after": "1"}
    softmax = made.node(block, "softmax", first, status="changed", value=STATE, differences=[difference])
    joined = made.node(block, "add", first, softmax, status="rewired", former=[old], value=STATE)
    second = made.linear(block, "second", joined)
    third = made.linear(block, "third", second, 4)
    made.sites[2] |= {"state": "merged"}
    made.sites[0] |= {"ranks": [8, 4]}
    made.node("g0", "output", made.linear("g0", "head", third), kind="output")
    rows = [{"layer": "0", "cells": [0, 1, 2]}, {"layer": "1", "cells": [None, 1, 2]}]
    coverage = [{"stack": "block", "columns": ["first", "second", "third"], "rows": rows}]
    return made.finish(opened=["g0", block], coverage=coverage, elsewhere=[3])


def wide() -> Description:
    """Return a graph with many modules beside each other, each of a long chain."""
    made = Drawing("Wide")
    read = made.node("g0", "x", kind="input", value=STATE)
    for number in range(30):
        value, expert = read, made.module("g0", f"expert.{number}", "Expert")
        for _ in range(40):
            value = made.node(expert, "relu", value, value=STATE)
    return made.finish(opened=["g0"])


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "&amp;&lt;b&gt;",
    "\"quoted\" 'twice' `thrice` ${alert(3)}",
    "two\nlines\r\tand a tab",
    "\u202egnp.exe\u2066",
    "\u2028\u2029\x00\x1b[31m",
    "m" * 5_000,
    "ａ漢字👩‍🚀é\ud800",
    "<!--<script>",
    "__proto__",
)


def hostile() -> Description:
    """Return a graph whose every text is one that a stranger would choose."""
    made = Drawing(HOSTILE[0])
    read = made.node("g0", HOSTILE[2], kind="input", value=HOSTILE[1])
    for text in HOSTILE:
        group = made.group("g0", "module", text, path=text, type=text, note=text)
        weights = [{"name": text, "short": text, "value": text}]
        difference = {"what": text, "before": text, "after": text}
        facts = {"name": text, "op": text, "args": text, "path": text, "value": text, "weights": weights}
        site = {"site": len(made.sites), "status": "changed", "differences": [difference]}
        read = made.node(group, text, read, **facts, **site)
        facts = {"name": text, "op": text, "in": 1, "out": 1, "node": read, "state": "none", "ranks": []}
        made.sites.append({**facts, "reason": text, "decision": text})
        branch = {"site": text, "adapter": text, "rank": 8, "rule": text}
        branched = made.group("g0", "branch", text, note=text, branch=branch)
        read = made.node(branched, text, read, status="added", part=text)
    opened = [f"g{number}" for number in range(len(made.groups))]
    rows = [{"layer": text, "cells": [number]} for number, text in enumerate(HOSTILE)]
    coverage = [{"stack": HOSTILE[0], "columns": [HOSTILE[1]], "rows": rows}]
    lines = {"lines": [HOSTILE[0]], "before": HOSTILE[0], "after": HOSTILE[1]}
    return made.finish(opened=opened, coverage=coverage, elsewhere=[0], **lines)
