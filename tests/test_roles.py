"""Roles by dataflow: they agree with the names of real models, and read none of them."""

from __future__ import annotations

import functools
import random
import string
from typing import Any

import architectures
import families
import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx.graph.graph_module import assemble, copy_graph, state_of
from lora_fx.sites.attention import attentions
from lora_fx.sites.call_sites import Site, sites
from lora_fx.sites.roles import Purpose, purposes
from lora_fx.tracing.example_inputs import example_inputs

# Whose attention has a weight for each of query, key and value; what the named rules say of each in the words of roles.
SEPARATE = (
    "t5", "llama", "bert", "mt5", "bart", "opt", "gptj", "gpt_neo", "roberta", "xlm-roberta", "electra", "deberta-v2",
    "layoutlm", "llama4_text", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3",
    "qwen3_moe", "glm", "glm4", "olmo2", "cohere2", "gpt_oss", "whisper", "vit", "clip", "siglip_vision_model", "wav2vec2",
    "distilbert", "squeezebert", "albert",
)  # fmt: skip

FUSED = {
    "gpt2": "c_attn", "bloom": "query_key_value", "gpt_neox": "query_key_value", "deberta": "in_proj",
    "chatglm": "query_key_value", "gpt_bigcode": "c_attn", "gpt_bigcode-multi-head": "c_attn", "mpt": "Wqkv",
    "falcon": "query_key_value", "falcon-grouped": "query_key_value", "falcon-multi-head": "query_key_value",
    "codegen": "qkv_proj", "phi3": "qkv_proj", "modernbert": "Wqkv", "deepseek_v3": "kv_b_proj",
}  # fmt: skip

GATED = {
    "phi3": "gate_up_proj",
    "modernbert": "Wi",
    "glm": "gate_up_proj",
    "mixtral": "gate_up_proj",
    "gpt_oss": "gate_up_proj",
}


def build(name: str) -> nn.Module:
    return architectures.model(name) if name in architectures.ARCHITECTURES else families.model(name)


def traced(name: str) -> lora_fx.TracedGraphModule:
    return architectures.traced(name) if name in architectures.ARCHITECTURES else families.traced(name)


@functools.cache
def found(name: str) -> tuple[tuple[Site, Purpose], ...]:
    known = purposes(traced(name))
    return tuple((site, known[site.name]) for site in sites(traced(name)))


def each(names: Any) -> list[Any]:
    return architectures.rows(names, (*architectures.REPRESENTATIVES, *families.REPRESENTATIVES, "phi3"))


def targets(name: str) -> tuple[str, ...]:
    known = architectures.ARCHITECTURES.get(name) or families.FAMILIES[name]
    assert not isinstance(known.target_modules, str)
    return known.target_modules


@pytest.mark.parametrize("name", each(SEPARATE))
def test_query_and_value_are_the_sites_that_the_named_rule_selects(name: str) -> None:
    by_role = {
        site.name
        for site, purpose in found(name)
        if any(role.endswith(("attention.query", "attention.value")) for role in purpose.roles)
    }
    by_name = {site.name for site, _ in found(name) if site.module.rpartition(".")[2] in targets(name)}
    assert by_role == by_name != set()


# Where the named rule selects something else, and why the roles are right.
DIFFERENT = {
    "blip-2": {"vision tower, fused": "qkv", "Q-Former": "query", "Q-Former ": "value"},
    "deberta": {"positions, query of the content-to-position term": "pos_q_proj"},
}


@pytest.mark.parametrize("name", each(DIFFERENT))
def test_what_a_named_rule_misses_is_known(name: str) -> None:
    by_role = {
        site.module.rpartition(".")[2]
        for site, purpose in found(name)
        if any(role.endswith(("attention.query", "attention.value")) for role in purpose.roles)
    }
    by_name = {site.module.rpartition(".")[2] for site, _ in found(name)} & set(targets(name))
    assert by_role - by_name == set(DIFFERENT[name].values())
    assert by_name <= by_role


EXPECTED = {
    "t5": {"k": "key", "o": "output", "wi": "mlp.up", "wo": "mlp.down", "lm_head": "head lm_head", "embed_tokens": "embedding"},
    "llama": {
        "k_proj": "key", "o_proj": "output", "gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down",
        "embed_tokens": "embedding", "lm_head": "head lm_head",
    },
    "bert": {"key": "key", "word_embeddings": "embedding", "position_embeddings": "", "pooler.dense": ""},
    "electra": {"dense_prediction": "head", "embeddings_project": ""},
    "mixtral": {"gate": "router", "gate_up_proj": "expert.gate expert.up", "down_proj": "expert.down"},
    "qwen2_moe": {
        "mlp.gate": "router", "experts.gate_up_proj": "expert.gate expert.up", "experts.down_proj": "expert.down",
        "shared_expert.gate_proj": "mlp.gate", "shared_expert.down_proj": "mlp.down", "shared_expert_gate": "",
    },
    "phi3": {"gate_up_proj": "mlp.gate mlp.up"},
    "squeezebert": {"intermediate.conv1d": "mlp.up", "output.conv1d": "mlp.down", "post_attention.conv1d": "output"},
    "deepseek_v3": {"q_a_proj": "", "q_b_proj": "query", "kv_a_proj_with_mqa": "key", "kv_b_proj": "key value"},
    "whisper": {"conv1": "", "fc1": "mlp.up", "fc2": "mlp.down", "encoder_attn.k_proj": "key", "proj_out": "head lm_head"},
}  # fmt: skip


@pytest.mark.parametrize("name", each(EXPECTED))
def test_the_other_roles_are_found(name: str) -> None:
    for end, expected in EXPECTED[name].items():
        roles = {
            " ".join(role.removeprefix("self_attention.").removeprefix("cross_attention.") for role in purpose.roles)
            for site, purpose in found(name)
            if f".{site.module}".endswith(f".{end}")
        }
        assert roles == {expected}, end


@pytest.mark.parametrize(
    ("name", "cross"),
    [
        ("t5", "EncDecAttention"),
        pytest.param("bart", "encoder_attn", marks=pytest.mark.matrix),
        ("blip-2", "crossattention"),
        ("whisper", "encoder_attn"),
    ],
)
def test_self_and_cross_attention_are_told_apart(name: str, cross: str) -> None:
    for site, purpose in found(name):
        for role in purpose.roles:
            if "attention" in role:
                assert role.startswith("cross_attention") == (cross in site.module), site.name


def renamed(graph_module: lora_fx.TracedGraphModule, seed: int) -> tuple[lora_fx.TracedGraphModule, dict[str, str]]:
    """Return the graph with every name of a module, parameter and node replaced by a random one, and the new names."""
    random_ = random.Random(seed)

    def word() -> str:
        return "".join(random_.choices(string.ascii_lowercase, k=9))

    state = state_of(graph_module)
    names = {name: f"{word()}.{word()}" for name in (*state.tensors, *state.modules)}
    graph, _ = copy_graph(graph_module.graph)
    nodes: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = names[str(node.target)]
        for key in ("nn_module_stack", "stack_trace", "custom", "from_node", "source_fn_stack"):
            node.meta.pop(key, None)
        if node.op not in ("placeholder", "output"):
            nodes[node.name] = node.name = word()
    state = type(state)(
        {names[name]: tensor for name, tensor in state.tensors.items()},
        frozenset(names[name] for name in state.non_persistent),
        {names[name]: module for name, module in state.modules.items()},
    )
    made = assemble(graph, state, meta=graph_module.meta, training=False, trainable=frozenset())
    return made, nodes


@pytest.mark.parametrize("name", each((*SEPARATE, *FUSED, "qwen2_moe", "blip-2")))
def test_no_name_is_read(name: str) -> None:
    graph_module, nodes = renamed(traced(name), seed=3)
    known = purposes(graph_module)
    again = {site.node: known[site.name] for site in sites(graph_module)}
    assert {nodes[site.node]: purpose for site, purpose in found(name)} == again


@pytest.mark.parametrize(
    "name",
    architectures.rows(("llama", "t5", "bert", "gpt2", "phi3", "whisper", "gemma2"), ("llama", "gpt2")),
)
def test_eager_attention_has_the_roles_of_fused_attention(name: str) -> None:
    model = build(name)
    config = type(model.config).from_dict(model.config.to_dict())  # type: ignore[attr-defined, operator]
    config._attn_implementation = "eager"
    eager = lora_fx.trace(type(model)(config).eval(), inference=True)
    known = purposes(eager)
    assert {site.name: known[site.name] for site in sites(eager)} == {
        site.name: purpose for site, purpose in found(name)
    }
    assert not any("scaled_dot_product" in str(node.target) for node in eager.graph.nodes)


class Recorder(fx.Interpreter):
    """Runs a graph, sets features of one site to zero, and keeps each value as it was when it was last read."""

    def __init__(self, module: fx.GraphModule, site: str = "", features: list[int] | None = None) -> None:
        super().__init__(module)
        self.site, self.features = site, features
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        for read in node.all_input_nodes:
            if isinstance(self.env[read], torch.Tensor):
                self.values[read.name] = self.env[read].clone()
        value = super().run_node(node)
        if node.name == self.site and self.features is not None:
            value = value.clone()
            value[..., self.features] = 0
        return value


def arguments(name: str) -> list[torch.Tensor]:
    given = example_inputs(build(name), None).kwargs
    return [given[node.name] for node in traced(name).graph.find_nodes(op="placeholder")]


def operands_behind(graph_module: fx.GraphModule, site: str) -> dict[str, list[str]]:
    """Return the names of the operands of the first attention behind a site."""
    order = [node.name for node in graph_module.graph.nodes]
    first = next(
        a for a in attentions(list(graph_module.graph.nodes)) if order.index(a.result.name) > order.index(site)
    )
    parts = {"query": first.queries, "key": first.keys, "value": first.values}
    return {part: [node.name for node in nodes] for part, nodes in parts.items()}


@pytest.mark.parametrize("name", each(FUSED))
def test_a_part_of_a_fused_projection_reaches_its_operand_and_no_other(name: str) -> None:
    graph_module = traced(name)
    with torch.no_grad():
        plain = Recorder(graph_module)
        plain.run(*arguments(name), enable_io_processing=False)
        fused = [(site, purpose) for site, purpose in found(name) if site.module.endswith(FUSED[name])]
        assert fused
        for site, purpose in fused:
            parts = purpose.parts
            expected = {"key", "value"} if name == "deepseek_v3" else {"query", "key", "value"}
            assert set(parts) == expected
            assert sum(map(len, parts.values())) == site.out_features
            values = operands_behind(graph_module, site.node)
            for zeroed in parts:
                changed = Recorder(graph_module, site.node, list(parts[zeroed]))
                changed.run(*arguments(name), enable_io_processing=False)
                for part in parts:
                    same = all(torch.equal(changed.values[node], plain.values[node]) for node in values[part])
                    assert same == (part != zeroed), (zeroed, part)


@pytest.mark.parametrize("name", each(GATED))
def test_gate_and_up_of_a_fused_projection_are_told_apart(name: str) -> None:
    graph_module = traced(name)
    site, purpose = next((s, p) for s, p in found(name) if s.module.endswith(GATED[name]))
    gate, up = purpose.parts["gate"], purpose.parts["up"]
    assert not gate & up
    assert len(gate) + len(up) == site.out_features
    order = [node.name for node in graph_module.graph.nodes]
    activation = next(
        node
        for node in list(graph_module.graph.nodes)[order.index(site.node) :]
        if any(word in str(node.target) for word in ("silu", "gelu", "sigmoid"))
    )
    with torch.no_grad():
        plain, without_gate, without_up = (
            Recorder(graph_module, site.node, features) for features in (None, list(gate), list(up))
        )
        for recorder in (plain, without_gate, without_up):
            recorder.run(*arguments(name), enable_io_processing=False)
    assert torch.equal(without_up.values[activation.name], plain.values[activation.name])
    assert not torch.equal(without_gate.values[activation.name], plain.values[activation.name])


def test_parts_that_meet_before_they_are_split_are_not_told_apart() -> None:
    class Mixed(nn.Module):
        """Normalises query, key and value together."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm, self.out = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.norm(self.qkv(x)).chunk(3, dim=-1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))

    graph_module = lora_fx.trace(Mixed(), (torch.randn(2, 5, 6),))
    purpose = purposes(graph_module)["qkv"]
    assert purpose.roles == ("self_attention.query", "self_attention.key", "self_attention.value")
    assert purpose.parts == {}


def test_a_hand_written_attention_and_mlp() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
            self.up, self.down, self.other = nn.Linear(6, 14), nn.Linear(14, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            scores = torch.einsum("bqd,bkd->bkq", self.a(x), self.b(memory)) / 3
            x = x + self.d(torch.einsum("bkq,bkd->bqd", scores.softmax(1), self.c(memory)))
            return x + self.other(x) + self.down(torch.relu(self.up(x)))

    graph_module = lora_fx.trace(Block(), (torch.randn(2, 5, 6), torch.randn(2, 4, 6)))
    known = {name: " ".join(purpose.roles) for name, purpose in purposes(graph_module).items()}
    assert known == {
        "a": "cross_attention.query", "b": "cross_attention.key", "c": "cross_attention.value", "d": "cross_attention.output",
        "up": "mlp.up", "down": "mlp.down", "other": "",
    }  # fmt: skip


def test_parts_that_are_written_into_a_buffer_are_found() -> None:
    class Written(nn.Module):
        """Writes its keys into a tensor that it made before, and reads a view of that."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            keys = torch.empty_like(k.transpose(1, 2))
            keys[..., :] = k.transpose(1, 2)
            return self.out(nn.functional.scaled_dot_product_attention(q, keys.transpose(1, 2), v))

    purpose = purposes(lora_fx.trace(Written(), (torch.randn(2, 5, 6),)))["qkv"]
    assert {part: features.ranges for part, features in purpose.parts.items()} == {
        "query": ((0, 8),),
        "key": ((8, 16),),
        "value": ((16, 24),),
    }


def test_an_einsum_of_one_operand_is_no_product() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = torch.einsum("bqk->bqk", self.q(x) @ self.k(x).mT)
            return torch.einsum("bqk->bqk", scores).softmax(-1) @ self.v(x)

    known = purposes(lora_fx.trace(Permuted(), (torch.randn(2, 5, 6),)))
    assert known["v"].parts == {}
