"""Adapters of stacked experts by every version of PEFT: each update is the one that its version computed, or the layout is asked for.

PEFT exchanged the features of A and B in 0.19.0 for modules that say ``is_transposed``, and in 0.19.1 for all others instead.
``written`` writes the files of each version by that rule, and ``update`` computes what it made of them. Both were compared with
PEFT 0.17.1, 0.18.0, 0.18.1, 0.19.0, 0.19.1, 0.20.0 and 0.21.2 themselves, under transformers 4.57.6 and 5.23.0.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.adapters.peft_format.stacks import written_layout
from lora_fx.cli import app
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.graph.info import info_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Unsupported layer type:UserWarning")

RANK, ALPHA, EXPERTS = 2, 3, 3
SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


class Experts(nn.Module):
    """Two stacks of square matrices, stored (out, in)."""

    def __init__(self, width: int = 24, middle: int = 24, experts: int = EXPERTS) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, middle, width))
        self.down_proj = nn.Parameter(torch.randn(experts, width, middle))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.gate_up_proj.mT).tanh(), self.down_proj.mT)


class TransposedExperts(nn.Module):
    """Two stacks of matrices, stored (in, out), of a module that says so itself, under any transformers."""

    is_transposed = True

    def __init__(self, width: int = 24, middle: int = 24, experts: int = EXPERTS) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, width, middle))
        self.down_proj = nn.Parameter(torch.randn(experts, middle, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.gate_up_proj).tanh(), self.down_proj)


class OtherExperts(Experts):
    """The same as another class."""


class Model(nn.Module):
    """Modules of experts, one after the other."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.parts:
            x = getattr(self, name)(x)
        return x


def model_of(kind: str) -> nn.Module:
    """Return a small model. Of OLMoE and Granite gate_up_proj is square, of the others with 24 inside down_proj."""
    torch.manual_seed(7)
    if kind in ("own", "own transposed"):
        return Model(experts=Experts() if kind == "own" else TransposedExperts())
    sizes: dict[str, Any] = {**SIZES, "intermediate_size": 24, "num_experts_per_tok": 2}
    configs: dict[str, Any] = {
        "olmoe": transformers.OlmoeConfig(**{**sizes, "intermediate_size": 12}, num_experts=EXPERTS),
        "granite": transformers.GraniteMoeConfig(**{**sizes, "intermediate_size": 12}, num_local_experts=EXPERTS),
        "mixtral": transformers.MixtralConfig(**{**sizes, "intermediate_size": 20}, num_local_experts=EXPERTS),
        "gpt_oss": transformers.GptOssConfig(**sizes, head_dim=6, num_local_experts=EXPERTS),
        "llama4": transformers.Llama4TextConfig(
            **sizes, head_dim=6, intermediate_size_mlp=28, num_local_experts=EXPERTS, interleave_moe_layer_step=1
        ),
    }
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(configs[kind]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.1)
    return model


@functools.cache
def traced(kind: str) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(model_of(kind), (X,) if kind.startswith("own") else None, inference=True)


X = torch.linspace(-1, 1, EXPERTS * 5 * 24).reshape(EXPERTS, 5, 24)
BOTH = ("gate_up_proj", "down_proj")
QUESTION = (
    'Say which: stacks="as_stored" if it was trained with PEFT up to 0.19.0; '
    'stacks="exchanged" if with PEFT from 0.19.1 on'
)


RELEASES = ("0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.2")


def layout_of(version: str, *, transposed: bool) -> str:
    """What PEFT of a version does, as its release notes and code say."""
    if version < "0.19.0":
        return "as_stored"
    return "exchanged" if transposed == (version < "0.19.1") else "as_stored"


def update(a: torch.Tensor, b: torch.Tensor, layout: str) -> torch.Tensor:
    """``ParamWrapper.get_delta_weight``, in fp64."""
    a, b = a.double().reshape(EXPERTS, -1, a.shape[-1]), b.double().reshape(b.shape[0], -1, EXPERTS)
    return torch.einsum("o r e, e r i -> e i o" if layout == "as_stored" else "o r e, e r i -> e o i", b, a) * (
        ALPHA / RANK
    )


def written(
    directory: Path, model: nn.Module, version: str | None, layout: str, leaves: Sequence[str] = BOTH
) -> dict[str, torch.Tensor]:
    """Write an adapter as ``ParamWrapper`` of a version lays it out, and return the update of each stack, in fp64."""
    stacks = {
        name: p for name, p in model.named_parameters() if "experts" in name and name.rpartition(".")[2] in leaves
    }
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [],
        "target_parameters": list(leaves),
    }
    tensors: dict[str, torch.Tensor] = {}
    updates: dict[str, torch.Tensor] = {}
    for name, stack in stacks.items():
        parent = name.rpartition(".")[0]
        later = [each for each in stacks if each.startswith(f"{parent}.")]
        path = f"base_model.model.{parent}" + ".base_layer" * (len(later) - 1 - later.index(name))
        first, last = stack.shape[1:]
        into, out = (first, last) if layout == "as_stored" else (last, first)
        a, b = torch.randn(RANK * EXPERTS, into) * 0.2, torch.randn(out, RANK * EXPERTS) * 0.2
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        updates[name] = update(a, b, layout)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    said = config if version is None else {**config, "peft_version": version}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return updates


def updated(found: Mapping[str, torch.Tensor], model: nn.Module, updates: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether weights are those of a model with the updates, to two roundings in fp32."""
    weights = dict(model.named_parameters())
    expected = {name: (weights[name].detach().double() + each).float() for name, each in updates.items()}
    return all(torch.allclose(found[name], each, rtol=2e-7, atol=1e-7) for name, each in expected.items())


def merges(directory: Path, kind: str, updates: Mapping[str, torch.Tensor], stacks: Any = None) -> bool:
    """Tell whether a load and a fold give the weights with the updates."""
    folded = lora_fx.fold(lora_fx.load_adapter(traced(kind), directory, stacks=stacks))
    return updated(folded.state_dict(), model_of(kind), updates)


def problems(graph: lora_fx.TracedGraphModule, directory: Path, stacks: Any = None) -> tuple[str, ...]:
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.load_adapter(graph, directory, stacks=stacks)
    return caught.value.problems


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        *itertools.product(("own", "own transposed"), RELEASES),
        *few(
            itertools.product(("olmoe", "granite", "mixtral", "llama4"), RELEASES),
            (("mixtral", "0.18.1"), ("mixtral", "0.21.2")),
        ),
    ],
)
def test_the_files_of_every_release_give_the_update_that_it_computed(kind: str, version: str, tmp_path: Path) -> None:
    layout = layout_of(version, transposed=kind == "own transposed")
    for leaves in (("gate_up_proj",), ("down_proj",), BOTH):
        directory = tmp_path / "+".join(leaves)
        updates = written(directory, model_of(kind), version, layout, leaves)
        assert len(updates) == len(leaves)
        assert merges(directory, kind, updates)


@pytest.mark.parametrize("transformers_major", [4, 5])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_gpt_oss_of_transformers_4_and_5_is_told_by_its_wide_stack_else_by_versions_before_0_19_else_asked_for(
    version: str, transformers_major: int, tmp_path: Path
) -> None:
    layout = layout_of(version, transposed=transformers_major == 5)
    for leaves in (("gate_up_proj",), BOTH):
        updates = written(tmp_path / str(len(leaves)), model_of("gpt_oss"), version, layout, leaves)
        assert merges(tmp_path / str(len(leaves)), "gpt_oss", updates)
    updates = written(tmp_path / "down", model_of("gpt_oss"), version, layout, ["down_proj"])
    if version == "0.18.1":
        assert merges(tmp_path / "down", "gpt_oss", updates)
    else:
        assert problems(traced("gpt_oss"), tmp_path / "down") == (
            "adapter_config.json: A and B at model.layers.0.mlp.experts.down_proj fit both layouts of stacks, and that of "
            f"peft_version '{version}' depends on the version of transformers beside it. Say which: "
            'stacks="as_stored" if it was trained with PEFT up to 0.18.1, 0.19.0 with '
            'transformers 4, and from 0.19.1 on with transformers 5; stacks="exchanged" if with PEFT 0.19.0 with transformers 5, '
            "and from 0.19.1 on with transformers 4",
        )
        assert merges(tmp_path / "down", "gpt_oss", updates, layout)
        assert not merges(tmp_path / "down", "gpt_oss", updates, "exchanged" if layout == "as_stored" else "as_stored")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "there is no peft_version, as before PEFT 0.18.0"),
        *(
            (each, f"peft_version '{each}' is no release, and of before or after a change of PEFT's")
            for each in ("0.18.2.dev0", "0.19.1.dev0", "0.18.2.dev0@e84dd8f", "0.19.1.dev0@UNKNOWN", "0.19.0rc1", "new")
        ),
    ],
)
def test_what_no_release_wrote_is_told_by_a_stack_that_is_not_square_else_asked_for(
    version: str | None, reason: str, tmp_path: Path
) -> None:
    for layout in ("as_stored", "exchanged"):
        updates = written(tmp_path / f"{layout} both", model_of("olmoe"), version, layout)
        assert merges(tmp_path / f"{layout} both", "olmoe", updates)
        updates = written(tmp_path / layout, model_of("olmoe"), version, layout, ["gate_up_proj"])
        assert problems(traced("olmoe"), tmp_path / layout) == (
            "adapter_config.json: A and B at model.layers.0.mlp.experts.gate_up_proj fit both layouts of stacks, and "
            f"{reason}. {QUESTION}",
        )
        assert merges(tmp_path / layout, "olmoe", updates, layout)


def test_a_stack_that_is_not_square_decides_against_the_version(tmp_path: Path) -> None:
    for layout, version in (("as_stored", "0.21.2"), ("exchanged", "0.18.1")):
        assert merges(tmp_path / layout, "olmoe", written(tmp_path / layout, model_of("olmoe"), version, layout))


def test_a_given_layout_counts_more_than_the_version_as_of_an_adapter_that_peft_continued(tmp_path: Path) -> None:
    updates = written(tmp_path / "a", model_of("olmoe"), "0.18.1", "exchanged", ["gate_up_proj"])
    assert merges(tmp_path / "a", "olmoe", updates, "exchanged")
    assert not merges(tmp_path / "a", "olmoe", updates)
    continued: Any = peft.PeftModel.from_pretrained(model_of("olmoe"), str(tmp_path / "a"), is_trainable=True)
    continued.save_pretrained(str(tmp_path / "b"))
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["peft_version"] == "0.18.1"


def test_a_given_layout_that_the_shapes_contradict_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "a", model_of("olmoe"), None, "as_stored")
    assert problems(traced("olmoe"), tmp_path / "a", "exchanged") == (
        "stacks='exchanged', but by the shapes of A and B model.layers.0.mlp.experts.down_proj is as_stored. Leave stacks out",
    )
    assert problems(traced("olmoe"), tmp_path / "a", "swapped") == (
        "stacks: expected 'exchanged' or 'as_stored', got 'swapped'",
    )


def test_shapes_that_fit_no_layout_are_named_with_those_that_would(tmp_path: Path) -> None:
    written(tmp_path / "a", model_of("olmoe"), None, "as_stored")
    path = tmp_path / "a/adapter_model.safetensors"
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    save_file({**load_file(path), key: torch.zeros(RANK * EXPERTS, 5)}, path, metadata={"format": "pt"})
    assert problems(traced("olmoe"), tmp_path / "a") == (
        f"{key}: expected shape (6, 12), rank 2 at model.layers.0.mlp.experts.down_proj, of 12 and 24 features, or (6, 24) "
        "as_stored, got (6, 5)",
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight: expected shape (24, 6), rank 2 at "
        "model.layers.0.mlp.experts.down_proj, of 12 and 24 features, or (12, 6) as_stored, got (12, 6)",
    )


def test_classes_of_modules_are_told_apart_and_must_not_contradict_themselves_or_the_version(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = Model(experts=Experts(), wide_experts=OtherExperts(24, 20), more_wide_experts=OtherExperts(24, 20))
    graph = lora_fx.trace(model, (X,), inference=True)
    written(tmp_path / "stored", model, "0.21.2", "as_stored")
    assert problems(graph, tmp_path / "stored") == (
        "adapter_config.json: A and B at experts.gate_up_proj, experts.down_proj fit both layouts of stacks, and peft_version "
        f"'0.21.2' does not write the shapes that are found at wide_experts.gate_up_proj. {QUESTION}",
    )
    updates = written(tmp_path / "release", model, "0.18.1", "as_stored")
    folded = lora_fx.fold(lora_fx.load_adapter(graph, tmp_path / "release"))
    assert updated(folded.state_dict(), model, updates)
    written(tmp_path / "exchanged", model, "0.21.2", "exchanged")
    path = tmp_path / "exchanged/adapter_model.safetensors"
    stored = load_file(tmp_path / "stored/adapter_model.safetensors")
    mixed = {**load_file(path), **{key: each for key, each in stored.items() if "more_wide" in key}}
    save_file(mixed, path, metadata={"format": "pt"})
    assert problems(graph, tmp_path / "exchanged") == (
        "adapter_config.json: A and B at experts.gate_up_proj, experts.down_proj fit both layouts of stacks, and peft_version "
        f"'0.21.2' does not write the shapes that are found at more_wide_experts.gate_up_proj. {QUESTION}",
        "by the shapes of A and B wide_experts.gate_up_proj is exchanged and more_wide_experts.gate_up_proj is as_stored, and PEFT "
        "writes all stacks of a module class in one layout. Save the adapter again with the PEFT that trained it",
    )


def test_a_class_that_says_is_transposed_itself_is_asked_for_by_its_own_versions(tmp_path: Path) -> None:
    written(tmp_path / "a", model_of("own transposed"), None, "as_stored")
    (problem,) = problems(traced("own transposed"), tmp_path / "a")
    assert problem.endswith(
        'if it was trained with PEFT up to 0.18.1 and from 0.19.1 on; stacks="exchanged" if with PEFT 0.19.0'
    )


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "own", "own transposed"])
def test_what_is_saved_is_of_the_version_that_it_names_and_peft_reads_it(kind: str, tmp_path: Path) -> None:
    cases: list[tuple[Any, Sequence[str]]] = [("as_stored", BOTH[:1]), ("exchanged", BOTH[1:]), ("as_stored", BOTH)]
    for layout, leaves in cases:
        directory = tmp_path / f"{layout} {len(leaves)}"
        updates = written(directory, model_of(kind), None, layout, leaves)
        mine = lora_fx.load_adapter(traced(kind), directory, stacks=layout)
        lora_fx.save_adapter(mine, directory / "again")
        said = json.loads((directory / "again/adapter_config.json").read_text())
        assert said["peft_version"] == "0.21.2" == peft.__version__
        theirs: Any = peft.PeftModel.from_pretrained(model_of(kind), str(directory / "again"))
        assert updated(theirs.merge_and_unload().state_dict(), model_of(kind), updates)
        assert merges(directory / "again", kind, updates)  # and needs no answer


@pytest.mark.parametrize(
    ("kind", "leaf", "stacks"), [("granite", "gate_up_proj", None), ("gpt_oss", "down_proj", "as_stored")]
)
def test_a_branched_graph_computes_what_the_installed_peft_trained_at_square_stacks(
    kind: str, leaf: str, stacks: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=[f"experts.{leaf}"])
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model_of(kind)), config)
    set_factors(wrapped)
    wrapped.eval().save_pretrained(str(tmp_path / "a"))
    batch = {"input_ids": torch.randint(3, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    mine = lora_fx.load_adapter(traced(kind), tmp_path / "a", stacks=stacks)
    found, expected, before = (each(**batch).logits.detach() for each in (mine, wrapped, model_of(kind)))
    assert torch.allclose(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert not torch.allclose(found, before, atol=1e-3)


def test_a_stack_of_one_matrix_has_no_layout_and_peft_cannot_add_to_one_that_is_transposed(tmp_path: Path) -> None:
    for version in ("0.18.1", None):
        model = Model(experts=TransposedExperts(experts=1))
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=["experts.gate_up_proj"]
        )
        wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config)
        set_factors(wrapped)
        wrapped.save_pretrained(str(tmp_path / f"{version}"))
        path = tmp_path / f"{version}/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": version}))
        graph = lora_fx.from_adapter(model, tmp_path / f"{version}", example_inputs=(X[:1],), inference=True)
        assert torch.allclose(graph(X[:1]), wrapped(X[:1]), rtol=0, atol=1e-4)
        assert not torch.allclose(graph(X[:1]), model(X[:1]), atol=1e-2)
    rules = {"select": [{"target": ["experts.gate_up_proj"], "rank": RANK}]}
    wide = lora_fx.rewrite(
        Model(experts=TransposedExperts(middle=20, experts=1)), rules, example_inputs=(X[:1],), inference=True
    )
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.save_adapter(wide, tmp_path / "wide")
    assert caught.value.problems == (
        "experts.gate_up_proj: a stack of one matrix that is_transposed, to which PEFT cannot add an update",
    )


def test_of_a_graph_that_does_not_know_its_classes_the_layout_is_asked_for(tmp_path: Path) -> None:
    model = Model(experts=TransposedExperts())
    graph = lora_fx.trace(torch.export.export(model, (X,)), inference=True)
    assert info_of(graph).parameter_modules == {}
    updates = written(tmp_path / "a", model, "0.21.2", "as_stored")
    assert problems(graph, tmp_path / "a") == (
        "adapter_config.json: A and B at experts.gate_up_proj, experts.down_proj fit both layouts of stacks, and that of "
        "peft_version '0.21.2' depends on the module's class, which the graph does not know. Say which: "
        'stacks="as_stored" if it was trained with PEFT up to 0.18.1, 0.19.0 if the module '
        'has no is_transposed, and from 0.19.1 on if it has; stacks="exchanged" if with PEFT 0.19.0 if the module has '
        "is_transposed, and from 0.19.1 on if it has not",
    )
    loaded = lora_fx.load_adapter(graph, tmp_path / "a", stacks="as_stored")
    assert updated(lora_fx.fold(loaded).state_dict(), model, updates)
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.save_adapter(loaded, tmp_path / "b")
    assert caught.value.problems[0] == (
        "experts.gate_up_proj: a stack of matrices stored (in, out), for which PEFT goes by is_transposed of its module, which the "
        "graph does not know. Trace the model itself"
    )


def test_layouts_of_versions() -> None:
    changes = {
        ("as_stored", "as_stored"): (
            "0.17.0",
            "0.17.2.dev0",
            "0.18.0.rc0",
            "0.18.1.dev0@d1162c5",
            "0.18.1",
            "0.18.1.post1",
        ),
        ("exchanged", "as_stored"): ("0.19.0", "0.19"),
        ("as_stored", "exchanged"): ("0.19.1", "0.19.2.dev0", "0.20.1.dev0@UNKNOWN", "0.21.2", "1.0"),
    }
    for layouts, versions in changes.items():
        for version in versions:
            assert (written_layout(version, transposed=True), written_layout(version, transposed=False)) == layouts
    for version in (
        "0.18.2.dev0",
        "0.19.0.dev0",
        "0.19.1.dev0@e84dd8f",
        "0.19.0rc1",
        "",
        "١.٢.٣",
        "9" * 5000,
        "0.19.1\n",
    ):
        with pytest.raises(ValueError, match="is no release of PEFT"):
            written_layout(version, transposed=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt_oss") / "base"
    model_of("gpt_oss").save_pretrained(directory)  # type: ignore[operator]
    return directory


def test_a_fold_on_disk_asks_and_takes_an_answer_for_each_adapter(checkpoint: Path, tmp_path: Path) -> None:
    kept = written(tmp_path / "old", model_of("gpt_oss"), "0.18.1", "as_stored", ["down_proj"])
    asked = written(tmp_path / "new", model_of("gpt_oss"), "0.19.1", "exchanged", ["down_proj"])
    name = "model.layers.0.mlp.experts.down_proj"
    expected = {name: kept[name] + asked[name]}
    with pytest.raises(
        lora_fx.LoraFxError, match=r"^stacks: expected a layout or None for each of 1 adapters, got 2\.$"
    ):
        fold_checkpoint(checkpoint, [(tmp_path / "new", 1.0)], tmp_path / "out", stacks=["exchanged", None])
    base, old, new, out = map(str, (checkpoint, tmp_path / "old", tmp_path / "new", tmp_path / "cli"))

    def fold(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["fold", *arguments])
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    code, said = fold(base, new, out)
    assert code == 3
    assert "depends on the version of transformers beside it. Say which: --stacks " in said
    code, said = fold(base, old, new, out, "--stacks", "exchanged")
    assert code == 2
    assert "2 adapters, and 1 times --stacks: give it once for each (auto where the file tells), or not at all" in said
    assert fold(base, old, new, out, "--stacks", "auto", "--stacks", "exchanged", "--dry-run")[0] == 0
    assert not Path(out).exists()
    assert fold(base, old, new, out, "--stacks", "auto", "--stacks", "exchanged")[0] == 0
    assert updated(load_file(Path(out) / "model.safetensors"), model_of("gpt_oss"), expected)


def test_export_takes_the_layout_of_an_adapter_too(checkpoint: Path, tmp_path: Path) -> None:
    updates = written(tmp_path / "a", model_of("gpt_oss"), "0.19.1", "exchanged", ["down_proj"])
    arguments = ["--format", "pt2", "--adapter", str(tmp_path / "a"), "--stacks", "exchanged", "--no-verify"]
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "m.pt2"), *arguments])
    assert result.exit_code == 0, result.output
    assert updated(torch.export.load(tmp_path / "m.pt2").state_dict, model_of("gpt_oss"), updates)
