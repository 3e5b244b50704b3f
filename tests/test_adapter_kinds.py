"""Adapters beside every kind of site, in PEFT's files and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import build, few, run, traced
from conftest import set_factors
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.errors import PlanError
from lora_fx.graph.info import info_of
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.read_config import read_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Kinds(nn.Module):
    """A look-up, convolutions of one and two dimensions, projections, and a product with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1)
        self.image = nn.Conv2d(1, 5, (3, 2), padding=(1, 0))
        self.proj = nn.Linear(5, 6)
        self.matrix = nn.Parameter(torch.randn(7, 6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2))
        x = self.image(x[:, None]).mean(-1).transpose(1, 2)
        return nn.functional.linear(self.proj(x), self.matrix)


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6]])


def files_equal(left: Path, right: Path) -> None:
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (left, right))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["table", "conv", "image", "proj"]}, {"target_modules": [], "target_parameters": ["matrix"]}],
    ids=["modules", "parameter"],
)
def test_every_kind_of_site_comes_back_as_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = Kinds().eval()
    if "target_parameters" in settings:
        base = nn.Sequential(base).eval()  # PEFT wraps the module that has the parameter, and cannot wrap the root
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, **settings))
    set_factors(wrapped)
    wrapped.eval().save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    mine = lora_fx.from_adapter(base, tmp_path / "peft", example_inputs=(IDS,)).eval()
    assert torch.allclose(mine(IDS), wrapped(IDS), atol=1e-6)
    assert not torch.allclose(mine(IDS), base(IDS), atol=1e-3)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    files_equal(tmp_path / "ours", tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert torch.allclose(
        again(IDS), wrapped(IDS), atol=1e-6
    )  # the kernel of a convolution depends on where its weight lies


def test_the_embeddings_that_peft_adds_to_a_file_are_compared_with_the_models(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    wrapped = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj", "lm_head"])
    )
    set_factors(wrapped)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        wrapped.eval().save_pretrained(str(tmp_path))
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    mine = lora_fx.from_adapter(llama, tmp_path, inference=True)
    batch = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    assert torch.equal(mine(**batch).logits, wrapped(**batch).logits)
    with torch.no_grad():
        llama.lm_head.weight[0, 0] += 1
    with pytest.raises(lora_fx.AdapterError, match=r"another value than the model's 'lm_head\.weight'"):
        lora_fx.from_adapter(llama, tmp_path, inference=True)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, intermediate_size_mlp=28, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_local_experts=3, interleave_moe_layer_step=1,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=60, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("make", few([mixtral, llama4, gpt_oss], [mixtral]))
def test_stacked_experts_come_back_as_they_were(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    base = make().eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.1)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    set_factors(wrapped, scale=0.1)
    wrapped.eval().save_pretrained(str(tmp_path / "peft"))
    mine = lora_fx.from_adapter(base, tmp_path / "peft", inference=True)
    batch = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    found, expected, before = (each(**batch).logits.detach() for each in (mine, wrapped, base))
    assert torch.allclose(found, expected, atol=2e-6 * float(expected.abs().max()) + 2e-6)
    assert not torch.allclose(found, before, atol=1e-3)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    files_equal(tmp_path / "ours", tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert torch.equal(again(**batch).logits, expected)
    merged = lora_fx.fold(mine).state_dict()
    theirs = wrapped.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[key], theirs[key], atol=1e-6) for key in theirs)


def olmoe() -> nn.Module:
    config = transformers.OlmoeConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=5, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(
            mixtral,
            {"target_parameters": ["gate.weight", "experts.down_proj"], "rank_pattern": {"gate.weight": 3}},
            marks=pytest.mark.matrix,
        ),
        (olmoe, {"target_parameters": ["mlp.gate.weight"]}),
        pytest.param(gpt_oss, {"target_parameters": ["router.weight"], "bias": "lora_only"}, marks=pytest.mark.matrix),
    ],
)
def test_the_weights_of_routers_come_back_as_they_were(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(4)
    base = make().eval()
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, target_modules=[], **settings)
    )
    set_factors(wrapped, scale=0.3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.3)
    wrapped.eval().save_pretrained(str(tmp_path / "peft"))
    mine = lora_fx.from_adapter(base, tmp_path / "peft", inference=True)
    batch = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    found, expected, before = (each(**batch).logits.detach() for each in (mine, wrapped, base))
    assert torch.allclose(found, expected, atol=2e-6 * float(expected.abs().max()))
    assert not torch.allclose(found, before, atol=1e-3)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    files_equal(tmp_path / "ours", tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert torch.equal(again(**batch).logits, expected)
    merged = lora_fx.fold(mine).state_dict()
    theirs = wrapped.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[key], theirs[key], atol=1e-6) for key in theirs)


WEIGHTS = ["q_proj.weight", "embed_tokens.weight", "lm_head.weight"]


def small_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_the_weights_of_linears_and_embeddings_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    base = small_llama()
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=[], target_parameters=WEIGHTS)
    )
    set_factors(wrapped, scale=0.3)
    wrapped.eval().save_pretrained(str(tmp_path / "peft"))
    mine = lora_fx.from_adapter(base, tmp_path / "peft", inference=True)
    batch = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    expected = wrapped(**batch).logits
    assert torch.allclose(mine(**batch).logits, expected, atol=1e-6)
    assert not torch.allclose(base(**batch).logits, expected, atol=1e-2)
    lora_fx.save_adapter(mine, tmp_path / "ours")  # beside the calls of the modules, which is the same here
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert torch.allclose(again(**batch).logits, expected, atol=1e-6)
    merged, theirs = lora_fx.fold(mine).state_dict(), wrapped.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[key], theirs[key], atol=1e-6) for key in theirs)


def test_a_module_and_its_weight_cannot_both_be_adapted_and_no_weight_of_a_convolution(tmp_path: Path) -> None:
    base = nn.Sequential(Kinds()).eval()
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["proj"]))
    wrapped.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    said = json.dumps({**config, "target_parameters": ["proj.weight", "conv.weight"]})
    (tmp_path / "adapter_config.json").write_text(said)
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.from_adapter(base, tmp_path, example_inputs=(IDS,))
    assert caught.value.problems == (
        "adapter_config.json: target_parameters names '0.conv.weight', the weight of a convolution, which PEFT takes for a stack of "
        "matrices. Merge the adapter with PEFT, and use the result",
        "adapter_config.json: target_parameters names '0.proj.weight', and target_modules selects its module: PEFT adapts one of the two",
    )


def test_parts_of_a_projection_are_saved_as_one_branch_with_zeros(tmp_path: Path) -> None:
    rules = {"select": [{"role": ["attention.query"], "features": ["query", "value"], "rank": 3, "alpha": 4}]}
    mine = lora_fx.rewrite(traced("gpt2"), rules).eval()
    set_factors(mine)
    lora_fx.save_adapter(mine, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build("gpt2"), str(tmp_path / "a")).eval()
    found, expected = (run("gpt2", each, 3, 11)[0] for each in (mine, theirs))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, run("gpt2", traced("gpt2").eval(), 3, 11)[0], atol=1e-3)
    assert read_config(tmp_path / "a").r == 6
    back = lora_fx.from_adapter(traced("gpt2"), tmp_path / "a").eval()
    assert torch.allclose(run("gpt2", back, 3, 11)[0], expected, atol=1e-6)


def test_what_peft_cannot_say_is_refused_with_all_reasons(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.proj(self.proj(x)))

    select: list[dict[str, Any]] = [
        {"target": ["proj"], "rank": 2, "calls": "each"},
        {"target": ["norm"], "trainable": "bias"},
    ]
    graph = lora_fx.rewrite(Twice(), {"select": select}, example_inputs=(torch.randn(3, 6),))
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.save_adapter(graph, tmp_path / "a")
    assert str(caught.value).splitlines() == [
        "adapter 'default' cannot be written for PEFT:",
        "  proj@1: a branch of one of several calls of a module, and PEFT has one branch for all of them",
        "  proj@2: a branch of one of several calls of a module, and PEFT has one branch for all of them",
        "  norm.bias: trains, and PEFT trains all biases, those of adapted modules, or whole modules",
    ]
    assert list(tmp_path.iterdir()) == []
    parts = {
        "select": [
            {"role": ["attention.query"], "features": ["query"], "rank": 3},
            {"role": ["attention.query"], "features": ["value"], "rank": 2},
        ]
    }
    with pytest.raises(lora_fx.AdapterError, match=r"its parts have the scalings 2\.66667, 4, and PEFT has one"):
        lora_fx.save_adapter(lora_fx.rewrite(traced("gpt2"), parts), tmp_path / "b")


def test_a_directory_is_only_replaced_if_it_holds_nothing_but_an_adapter(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(traced("bert"), "bert", rank=3)
    lora_fx.save_adapter(graph, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(lora_fx.LoraFxError, match="exists already"):
        lora_fx.save_adapter(graph, tmp_path / "a")
    set_factors(graph)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(lora_fx.LoraFxError, match=r"holds more than an adapter: notes\.txt"):
        lora_fx.save_adapter(graph, tmp_path / "a", overwrite=True)
    (tmp_path / "a" / "notes.txt").unlink()
    lora_fx.save_adapter(graph, tmp_path / "a", overwrite=True)
    after = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert after != before
    lora_fx.save_adapter(graph, tmp_path / "b")
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_where_an_adapter_comes_from_goes_with_it(tmp_path: Path) -> None:
    base = build("bert")
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION", revision="main")
    )
    wrapped.save_pretrained(str(tmp_path / "peft"))
    lora_fx.save_adapter(lora_fx.from_adapter(traced("bert"), tmp_path / "peft"), tmp_path / "ours")
    assert read_config(tmp_path / "ours").task_type == "FEATURE_EXTRACTION"
    assert read_config(tmp_path / "ours").revision == "main"
    graph = lora_fx.rewrite(traced("bert"), "bert")
    lora_fx.save_adapter(graph, tmp_path / "a")
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata["lora_fx"])
    assert metadata["format"] == "pt"
    assert said["rules"]["name"] == "bert"
    assert said["versions"].keys() == {"lora_fx", "torch", "transformers"}
    assert said["base"].keys() == traced("bert").state_dict().keys()
    again = lora_fx.load_adapter(traced("bert"), tmp_path / "a")
    assert info_of(again).adapters["default"].origin.rules == "bert"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"a.q": 4.0, "b.q": 4.0, "c.k": 8.0}, {"q": 4}),
        ({"a.q": 4.0, "b.q": 8.0, "c.k": 8.0}, {"a.q": 4}),
        ({"q": 4.0, "a.q": 8.0, "x.k": 8.0}, {"^q": 4}),
        ({"x.a.q": 4.0, "a.q": 5.0, "x.k": 8.0}, {"x.a.q": 4, "^a\\.q": 5}),
        ({"a+.q": 4.0, "a.q": 8.0, "k": 8.0}, {"^a\\+\\.q": 4}),
        ({"a(b": 4.0, "k": 8.0}, {"^a\\(b": 4}),
    ],
)
def test_patterns_do_not_overlap_and_mean_what_they_should(names: dict[str, float], expected: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    from lora_fx.rules.peft_config.target_names import patterns

    found = patterns(names, 8.0)
    assert found == expected
    for keys in (sorted(found), sorted(found, reverse=True)):
        for name, value in names.items():
            assert found.get(get_pattern_key(keys, name), 8) == value


def test_configs_are_read_as_peft_reads_them() -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [
        f"model.layers.{i}.{m}" for i in range(12) for m in ("attn.q", "attn.seq", "mlp.experts.1.up", "q.inner")
    ]
    modules += ["q", "head", "model.q", "layers.1.q", "x.layers.1.attn.q"]
    for said in (
        {"target_modules": ["q"]},
        {"target_modules": ["attn.q", "up"]},
        {"target_modules": r".*layers\.[13]\..*q"},
        {"target_modules": ["q"], "exclude_modules": ["attn.q"]},
        {"target_modules": ["q"], "exclude_modules": ".*[2-9].*"},
        {"target_modules": ["q", "up"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q", "up"], "layers_to_transform": 1},
        {"target_modules": ["q", "up"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q", "up"], "layers_to_transform": [1], "layers_pattern": ["blocks", "experts"]},
        {"target_modules": ["q", "model.layers.3.attn.q"], "layers_to_transform": [1]},
        {"target_modules": ["q", "inner"], "modules_to_save": ["q"]},
        {"target_modules": ["q"], "modules_to_save": ["layers.1"]},
    ):
        mine, theirs = AdapterConfig(peft_type="LORA", **said), peft.LoraConfig(**said)  # type: ignore[arg-type]
        for module in modules:
            assert mine.selects(module) == bool(check_target_module_exists(theirs, module)), (said, module)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Bent(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(x))


class Reused(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


class Louder(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


class Around(nn.Module):
    def __init__(self, lin: nn.Module, table: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.lin = table or nn.Embedding(19, 6), lin

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.table(ids))  # type: ignore[no-any-return]


class Outside(Around):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.table(ids), self.lin.weight, self.lin.bias)  # type: ignore[arg-type]


class Both(Around):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.lin(self.table(ids)), self.lin.weight)  # type: ignore[arg-type]


class Regularised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.norm()


@pytest.mark.parametrize(
    ("model", "target", "problem"),
    [
        (Around(Doubled(6, 6)), "lin", r"lin: its module computes more than the product, aten\.mul\.Tensor"),
        (Around(Bent(6, 6)), "lin", r"lin: its module computes more than the product, aten\.tanh\.default"),
        (Around(Reused(6, 6)), "lin", r"lin: its module computes more than the product, aten\.linear\.default"),
        (
            Around(nn.Linear(6, 6), Louder(19, 6)),
            "table",
            r"table: its module computes more than the product, aten\.mul",
        ),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
)
def test_where_a_module_is_not_the_product_alone_its_weight_is_what_peft_can_adapt(
    model: nn.Module, target: str, problem: str, tmp_path: Path
) -> None:
    ids = IDS[:, :5].clone()
    rules = {"select": [{"target": [target], "rank": 2, "dropout": 0.1}]}
    mine = lora_fx.rewrite(model.eval(), rules, example_inputs=(ids,)).eval()
    set_factors(mine)
    with pytest.warns(UserWarning, match=r"trains with a dropout of 0\.1; PEFT has none where it adapts a parameter"):
        lora_fx.save_adapter(mine, tmp_path / "ours")
    assert read_config(tmp_path / "ours").target_parameters == (f"{target}.weight",)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    assert torch.allclose(theirs(ids), mine(ids), atol=1e-5)
    assert not torch.allclose(model(ids), mine(ids), atol=1e-2)
    back = lora_fx.from_adapter(model, tmp_path / "ours", example_inputs=(ids,)).eval()
    assert torch.equal(back(ids), mine(ids))
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[target])).save_pretrained(
        str(tmp_path / "peft"), save_embedding_layers=False
    )
    with pytest.raises(lora_fx.AdapterError, match=problem):
        lora_fx.load_adapter(lora_fx.trace(model, (ids,)), tmp_path / "peft")


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix) * self.matrix.norm()


@pytest.mark.parametrize(
    ("model", "target", "said", "problem"),
    [
        (Outside(nn.Linear(6, 6)), "lin", {}, r"lin: its weight is multiplied with outside of the module"),
        (Both(nn.Linear(6, 6)), "lin", {}, r"lin: its weight is multiplied with outside of the module"),
        (
            Around(Regularised(6, 6)),
            "lin",
            {"target_modules": [], "target_parameters": ["lin.weight"]},
            r"lin: its weight is read by aten\.linalg_vector_norm\.default too",
        ),
        (
            Around(Owner()),
            "matrix",
            {"target_modules": [], "target_parameters": ["lin.matrix"]},
            r"lin\.matrix: its weight is read by aten\.linalg_vector_norm\.default too",
        ),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
)
def test_where_peft_would_compute_something_else_it_is_refused(
    model: nn.Module, target: str, said: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model.eval()
    ids = IDS[:, :5].clone()
    mine = lora_fx.rewrite(model, {"select": [{"target": [target], "rank": 2}]}, example_inputs=(ids,))
    with pytest.raises(lora_fx.AdapterError, match=problem if target == "matrix" else r"computes more|outside"):
        lora_fx.save_adapter(mine, tmp_path / "ours")
    config = peft.LoraConfig(r=2, **(said or {"target_modules": [target]}))  # type: ignore[arg-type]
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(
        str(tmp_path / "peft"), save_embedding_layers=False
    )
    with pytest.raises(lora_fx.AdapterError, match=problem):
        lora_fx.load_adapter(lora_fx.trace(model, (ids,)), tmp_path / "peft")


def classified(**settings: Any) -> tuple[nn.Module, Any]:
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_labels=3
    )
    base = transformers.RobertaForSequenceClassification(config).eval()
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["query"], **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return base, wrapped.eval()


def test_biases_and_a_container_of_modules_that_train_come_back_together(tmp_path: Path) -> None:
    base, wrapped = classified(bias="all", task_type="SEQ_CLS")
    wrapped.save_pretrained(str(tmp_path / "peft"))
    mine = lora_fx.from_adapter(base, tmp_path / "peft").eval()
    batch = {"input_ids": torch.randint(2, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    assert torch.equal(mine(**batch).logits, wrapped(**batch).logits)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert torch.equal(mine(**batch).logits, again(**batch).logits)


def test_of_two_adapters_that_train_one_parameter_one_acts(tmp_path: Path) -> None:
    base, first = classified(modules_to_save=["classifier"])
    first.save_pretrained(str(tmp_path / "a"))
    graph = lora_fx.from_adapter(base, tmp_path / "a", "a")
    both = lora_fx.load_adapter(graph, tmp_path / "a", "b")
    with pytest.raises(
        lora_fx.PlanError,
        match=r"'b' has trained copies of classifier\.dense\.bias, .*, and so has 'a', which acts",
    ):
        lora_fx.activate(both, {"a": 1.0, "b": 1.0})
    batch = {"input_ids": torch.randint(2, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    for name in "ab":
        assert torch.equal(lora_fx.activate(both.eval(), {name: 1.0})(**batch).logits, first(**batch).logits)


class Listed(nn.Module):
    """Modules in a list, two names of which one ends in the other, one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.dead = nn.Linear(6, 6), nn.Linear(6, 6)
        self.extra = nn.ModuleList([nn.Linear(6, 6), nn.LayerNorm(6)])
        self.head, self.my_head = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q(x)
        for module in self.extra:
            x = module(x)
        return self.head(x) + self.my_head(x)  # type: ignore[no-any-return]


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "select",
    [
        [{"target": ["q"], "rank": 2}, {"target": ["extra"], "trainable": "all"}],
        [{"target": ["q"], "rank": 2}, {"target": ["head", "my_head"], "trainable": "all"}],
        [{"target": ["head"], "trainable": "all"}, {"target": ["my_head"], "trainable": "all"}],
    ],
    ids=["a list", "names alike", "no branch"],
)
def test_whatever_trains_is_said_so_that_peft_loads_it(select: list[dict[str, Any]], tmp_path: Path) -> None:
    base = Listed().eval()
    mine = lora_fx.rewrite(base, {"select": select}, example_inputs=(X,)).eval()
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    lora_fx.save_adapter(mine, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).eval()
    assert torch.equal(theirs(X), mine(X))
    assert not torch.equal(mine(X), base(X))
    assert torch.equal(lora_fx.from_adapter(base, tmp_path / "a", example_inputs=(X,)).eval()(X), mine(X))


def test_branches_at_what_the_model_never_computes_with_are_left_out_with_a_warning(tmp_path: Path) -> None:
    base = Listed().eval()
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q", "dead"]))
    set_factors(wrapped)
    wrapped.eval().save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="has branches at dead, which the model never computes with"):
        mine = lora_fx.from_adapter(base, tmp_path, example_inputs=(X,)).eval()
    assert torch.equal(mine(X), wrapped(X))


def test_fused_graphs_are_taken_and_what_is_no_graph_with_weights_is_refused(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(traced("bert"), "bert", rank=3)
    set_factors(graph)
    lora_fx.save_adapter(lora_fx.fuse(graph), tmp_path / "a")
    other = lora_fx.rewrite(traced("bert"), "bert", rank=3)
    loaded = lora_fx.load_adapter(lora_fx.fuse(other), tmp_path / "a")
    assert torch.equal(run("bert", loaded.eval(), 3, 11)[0], run("bert", graph.eval(), 3, 11)[0])
    with torch.device("meta"):
        empty = lora_fx.trace(transformers.BertModel(build("bert").config))  # type: ignore[arg-type]
    for wrong, problem in (
        (build("bert"), "expected a graph of lora_fx"),
        (empty, "the graph is on the meta device"),
    ):
        with pytest.raises(lora_fx.PlanError, match=problem):
            lora_fx.load_adapter(wrong, tmp_path / "a")  # type: ignore[arg-type]
        with pytest.raises(lora_fx.PlanError, match=problem):
            lora_fx.save_adapter(wrong, tmp_path / "b")  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(lora_fx.LoraFxError, match="is a file, and an adapter is a directory"):
        lora_fx.save_adapter(graph, tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_grouped_convolution_and_a_parameter_of_the_root_cannot_be_said(tmp_path: Path) -> None:
    conv = lora_fx.rewrite(
        nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)),
        {"select": [{"op": ["conv1d"], "rank": 2}]},
        example_inputs=(torch.randn(2, 4, 9),),
    )
    with pytest.raises(lora_fx.AdapterError, match="0: a convolution in groups, each with an update of its own"):
        lora_fx.save_adapter(conv, tmp_path / "a")
    root = lora_fx.rewrite(nn.Linear(6, 4), {"select": [{"op": ["linear"], "rank": 2}]}, example_inputs=(X,))
    with pytest.raises(
        lora_fx.AdapterError, match="a parameter of the top-level module, at which PEFT has no branches"
    ):
        lora_fx.save_adapter(root, tmp_path / "a")


def test_of_mica_a_alone_trains_as_in_peft_through_every_form_of_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base, x = Kinds().eval(), {"example_inputs": (IDS,)}
    settings: dict[str, Any] = {"target_modules": ["table", "proj"], "init_lora_weights": "mica"}
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                assert "lora_A" in name or "lora_embedding_A" in name
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    mine = lora_fx.from_adapter(base, tmp_path / "peft", trainable=True, **x)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft"), is_trainable=True)
    trained = ["table.lora_A.default.weight", "proj.lora_A.default.weight"]
    assert [name for name, parameter in mine.named_parameters() if parameter.requires_grad] == trained
    for module in (mine, theirs):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module.train()(IDS).square().mean().backward()
            optimizer.step()
    lora_fx.save_adapter(mine, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    files_equal(tmp_path / "ours", tmp_path / "theirs")
    factors, start = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    for key, value in factors.items():
        assert torch.equal(value, start[key]) == ("_B" in key), key
    assert read_config(tmp_path / "ours").init_lora_weights == "mica"
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"), is_trainable=True)
    assert not any(p.requires_grad for name, p in again.named_parameters() if "_B" in name)
    plain = lora_fx.trace(base, (IDS,))
    for kept in (
        lora_fx.transfer(mine, onto=plain),
        lora_fx.activate(mine, {"default": 0.5}),
        lora_fx.load_adapter(mine, tmp_path / "ours"),
        copy.deepcopy(mine),
    ):
        assert [name for name, parameter in kept.named_parameters() if parameter.requires_grad] == trained
    assert torch.allclose(lora_fx.fold(mine.eval())(IDS), theirs.merge_and_unload().eval()(IDS), atol=1e-6)


def test_factors_of_mica_are_never_drawn(tmp_path: Path) -> None:
    base = Kinds().eval()
    settings: dict[str, Any] = {"target_modules": ["proj"], "init_lora_weights": "mica"}
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, **settings)).save_pretrained(str(tmp_path))
    mine = lora_fx.from_adapter(base, tmp_path, example_inputs=(IDS,))
    with pytest.raises(
        PlanError, match=r"the branch at 'proj' starts from the weight \(init 'mica'\), and there are no values for it"
    ):
        lora_fx.materialize(copy.deepcopy(mine).to("meta"), base.state_dict(), like=base)


class Dilated(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding="same", dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def test_a_dilated_convolution_is_refused_since_the_branch_of_peft_forgets_the_dilation(tmp_path: Path) -> None:
    base, x = Dilated(2).eval(), torch.randn(2, 4, 9)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["conv"]))
    set_factors(theirs)
    theirs.eval().save_pretrained(str(tmp_path / "peft"))
    graph = lora_fx.trace(base, (x,))
    problem = r"conv: its convolution has the dilation \(2,\), and PEFT's branch has none"
    with pytest.raises(lora_fx.AdapterError, match=problem):
        lora_fx.load_adapter(graph, tmp_path / "peft")
    with pytest.raises(lora_fx.AdapterError, match=problem):
        lora_fx.save_adapter(lora_fx.rewrite(graph, {"select": [{"target": ["conv"], "rank": 2}]}), tmp_path / "ours")
    expected = theirs(x)
    assert not torch.allclose(theirs.merge_and_unload()(x), expected, atol=1e-2)  # PEFT merges something else
