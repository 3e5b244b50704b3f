"""Adapters in diffusers' and kohya's forms, made here by what these document; diffusers' own loaders are asked in peers.md."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.adapters.peft_format.foreign_formats.diffusers import component_of
from lora_fx.cli import app
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.planning.plan import Chosen

FILE = "pytorch_lora_weights.safetensors"
X = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 10)
        self.to_out = nn.ModuleList([nn.Linear(10, 8), nn.Dropout(0.1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.to_q(x) @ self.to_k(x).mT).softmax(-1)
        return self.to_out[1](self.to_out[0](scores @ self.to_v(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.attn1 = nn.Conv2d(6, 8, (3, 1), padding=(1, 0)), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn1(self.proj_in(x).flatten(2).mT.contiguous())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attentions[0](x) - self.attentions[1](x)


class Net(nn.Module):
    """The paths of a U-Net's modules, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_blocks[0](x)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(2)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def traced(model: Any) -> Any:
    return lora_fx.trace(model, (X,), inference=True)


def wrapped(model: Any, **settings: Any) -> Any:
    config = peft.LoraConfig(**{"target_modules": TARGETS, "r": 2, "lora_alpha": 2, **settings})
    found = peft.get_peft_model(copy.deepcopy(model), config).eval()
    set_factors(found)
    return found


def bare(found: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors without its prefix, as ``get_peft_model_state_dict`` has them for a model that is not wrapped."""
    return {key.removeprefix("base_model.model."): each for key, each in peft.get_peft_model_state_dict(found).items()}


def with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{key}": each for key, each in tensors.items()}


def of_earlier_releases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in tensors.items():
        kind = "down" if ".lora_A." in key else "up"
        module = key.partition(".lora_")[0]
        for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
            if module.endswith(f".{leaf}"):
                name = f"{module.removesuffix(leaf)}processor.{leaf.removesuffix('.0')}_lora.{kind}.weight"
                break
        else:
            name = f"{module}.lora.{kind}.weight"
        found[name] = tensor
    return found


def kohyas(tensors: Mapping[str, torch.Tensor], prefix: str = "lora_unet", **alphas: float) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in tensors.items():
        module = key.partition(".lora_")[0]
        name = f"{prefix}_{module.replace('.', '_')}"
        found[f"{name}.lora_{'down' if '.lora_A.' in key else 'up'}.weight"] = tensor
        for leaf, alpha in alphas.items():
            if module.endswith(leaf):
                found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def saved(directory: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    told = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file({key: each.clone() for key, each in tensors.items()}, directory / FILE, {"format": "pt", **told})
    return directory


def as_metadata(found: Any, prefix: str = "") -> dict[str, Any]:
    said = {**found.peft_config["default"].to_dict(), "target_modules": TARGETS}
    return {f"{prefix}{key}": value for key, value in json.loads(json.dumps(said, default=list)).items()}


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("a pipeline's", {}),
        ("a model's", {}),
        ("of earlier releases", {}),
        ("with metadata", {"lora_alpha": 7, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 5}}),
        ("with metadata and a prefix", {"lora_alpha": 7, "use_rslora": True, "rank_pattern": {"to_k": 3}}),
        ("with alphas", {"lora_alpha": 7, "alpha_pattern": {"to_v": 5}}),
        ("kohya's", {"lora_alpha": 7, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 5}}),
        ("kohya's without alphas", {}),
    ],
)
def test_a_file_of_other_tools_computes_what_peft_computes_with_its_factors(
    form: str, settings: dict[str, Any], model: Any, traced: Any, tmp_path: Path
) -> None:
    theirs = wrapped(model, **settings)
    tensors, metadata = bare(theirs), None
    if form == "of earlier releases":
        tensors = with_prefix(of_earlier_releases(tensors), "unet")
    elif form == "a pipeline's":
        tensors = with_prefix(tensors, "unet")
    elif form == "with metadata":
        metadata = as_metadata(theirs)
    elif form == "with metadata and a prefix":
        tensors, metadata = with_prefix(tensors, "transformer"), as_metadata(theirs, "transformer.")
    elif form == "with alphas":
        modules = {key.partition(".lora_")[0] for key in tensors}
        tensors |= {f"{each}.alpha": torch.tensor(5.0 if each.endswith("to_v") else 7.0) for each in modules}
    elif form.startswith("kohya's"):
        alphas = {"to_q": 7.0, "to_k": 7.0, "to_v": 5.0, "0": 7.0, "proj_in": 7.0} if settings else {}
        tensors = kohyas(tensors, **alphas)
    directory = saved(tmp_path / "adapter", tensors, metadata)
    for path in (directory, directory / FILE):
        graph = lora_fx.from_adapter(traced, path)
        assert torch.equal(graph(X), theirs(X))
    assert not torch.equal(graph(X), model(X))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_metadata_that_say_a_split_of_the_weights_take_it_from_them_as_peft_and_diffusers_do(
    start: str, model: Any, traced: Any, tmp_path: Path
) -> None:
    # diffusers' load_lora_adapter makes a LoraConfig of the metadata, by which PEFT splits the weights, and then loads the factors.
    theirs = wrapped(model, init_lora_weights=start, target_modules=["to_q", "to_k"])
    told = {**as_metadata(theirs), "target_modules": ["to_q", "to_k"]}
    graph = lora_fx.from_adapter(traced, saved(tmp_path / "a", bare(theirs), told))
    assert torch.allclose(graph(X), theirs(X), rtol=0, atol=1e-5)
    plain = lora_fx.from_adapter(traced, saved(tmp_path / "b", bare(theirs)))
    assert not torch.allclose(graph(X), plain(X), rtol=0, atol=1e-3)


def test_what_is_written_for_diffusers_is_read_back_and_its_metadata_are_a_peft_configuration(
    model: Any, traced: Any, tmp_path: Path
) -> None:
    theirs = wrapped(model, lora_alpha=7, rank_pattern={"to_k": 3}, use_rslora=True)
    graph = lora_fx.from_adapter(traced, saved(tmp_path / "given", bare(theirs), as_metadata(theirs)))
    lora_fx.save_adapter(graph, tmp_path / "out", format="diffusers")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]
    written = load_file(tmp_path / "out" / FILE)
    assert written.keys() == bare(theirs).keys()
    assert all(torch.equal(written[key], each) for key, each in bare(theirs).items())
    assert torch.equal(lora_fx.from_adapter(traced, tmp_path / "out")(X), graph(X))
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        config = peft.LoraConfig(**json.loads(file.metadata()["lora_adapter_metadata"]))
    again = peft.get_peft_model(copy.deepcopy(model), config).eval()
    peft.set_peft_model_state_dict(again, {f"base_model.model.{key}": each for key, each in written.items()})
    assert torch.equal(again(X), theirs(X))
    with pytest.raises(lora_fx.LoraFxError, match="exists already"):
        lora_fx.save_adapter(graph, tmp_path / "out", format="kohya")
    lora_fx.save_adapter(graph, tmp_path / "out", format="kohya", overwrite=True)
    assert set(load_file(tmp_path / "out" / FILE)) == set(
        kohyas(written, **dict.fromkeys(("to_q", "to_k", "to_v", "0", "proj_in"), 1.0))
    )
    assert torch.equal(lora_fx.from_adapter(traced, tmp_path / "out")(X), graph(X))


def test_alphas_of_kohyas_form_give_each_scaling(model: Any, traced: Any, tmp_path: Path) -> None:
    theirs = wrapped(model, lora_alpha=7, rank_pattern={"to_k": 3}, use_rslora=True)
    graph = lora_fx.from_adapter(traced, saved(tmp_path / "given", bare(theirs), as_metadata(theirs)))
    lora_fx.save_adapter(graph, tmp_path / "out", format="kohya")
    for name, tensor in load_file(tmp_path / "out" / FILE).items():
        if name.endswith(".alpha"):
            rank = 3 if name.endswith("to_k.alpha") else 2
            assert tensor.shape == ()
            assert tensor.item() / rank == 7 / rank**0.5


@pytest.mark.parametrize(
    ("model_class", "component"),
    [
        ("diffusers.models.unets.unet_2d_condition:UNet2DConditionModel", "unet"),
        ("diffusers.models.transformers.transformer_flux:FluxTransformer2DModel", "transformer"),
        ("diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL", ""),
        ("transformers.models.clip.modeling_clip:CLIPTextModel", "text_encoder"),
        ("transformers.models.llama.modeling_llama:LlamaForCausalLM", ""),
        ("mine:UNet", ""),
    ],
)
def test_the_prefix_that_is_written_is_what_pipelines_call_a_model_of_the_class(
    model_class: str, component: str
) -> None:
    assert component_of(model_class) == component


def test_what_a_file_has_for_other_models_of_a_pipeline_is_left_out_with_a_warning(
    model: Any, traced: Any, tmp_path: Path
) -> None:
    theirs = wrapped(model)
    other = {f"text_encoder.q_proj.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"}
    directory = saved(tmp_path / "a", {**with_prefix(bare(theirs), "unet"), **other})
    told = r"the graph has the modules of unet \(10 modules\); what is for other models of the pipeline is left out: text_encoder \(1 mod"
    with pytest.warns(UserWarning, match=told):
        graph = lora_fx.from_adapter(traced, directory)
    assert torch.equal(graph(X), theirs(X))


def test_of_two_text_encoders_the_sizes_tell_which_is_meant(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList([nn.Linear(5, 7)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder[0](x)

    torch.manual_seed(4)
    x, model = torch.randn(3, 5), Encoder().eval()
    traced = lora_fx.trace(model, (x,), inference=True)
    mine = {"A": torch.randn(2, 5), "B": torch.randn(7, 2)}
    other = {"A": torch.randn(2, 6), "B": torch.randn(8, 2)}
    name, plain = "encoder_0", "text_model_encoder_0"  # with the part of the path that transformers 5 dropped
    pair = {
        **{f"lora_te1_{plain}.lora_{d}.weight": other[k] for d, k in (("down", "A"), ("up", "B"))},
        **{f"lora_te2_{plain}.lora_{d}.weight": mine[k] for d, k in (("down", "A"), ("up", "B"))},
    }
    with pytest.warns(UserWarning, match="modules of lora_te2"):
        graph = lora_fx.from_adapter(traced, saved(tmp_path / "a", pair))
    layer = model.encoder[0]
    assert torch.equal(graph(x), layer(x) + (x @ mine["A"].T) @ mine["B"].T)
    more = {
        f"lora_te1_encoder_0{extra}.lora_{d}.weight": other[k]
        for extra in ("", "_x")
        for d, k in (("down", "A"), ("up", "B"))
    }
    mine_too = {key: each for key, each in pair.items() if "te2" in key}
    with pytest.warns(UserWarning, match="modules of lora_te2"):
        assert torch.equal(lora_fx.from_adapter(traced, saved(tmp_path / "b", {**more, **mine_too}))(x), graph(x))
    both = {key.replace("te2", "te1"): each for key, each in pair.items() if "te2" in key} | {
        key: each for key, each in pair.items() if "te2" in key
    }
    with pytest.raises(lora_fx.AdapterError, match=r"got lora_te1 and lora_te2, each of which fits\. Split the file"):
        lora_fx.from_adapter(traced, saved(tmp_path / "a", both))
    twice = {key.replace(plain, each): value for key, value in pair.items() if "te2" in key for each in (name, plain)}
    with pytest.raises(lora_fx.AdapterError, match=r"a second name of 'encoder\.0'"):
        lora_fx.from_adapter(traced, saved(tmp_path / "a", twice))


class Ambiguous(nn.Module):
    """Two modules whose paths are one name in kohya's form."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b, self.a = nn.Linear(5, 5), nn.ModuleDict({"b": nn.Linear(5, 5)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a_b(x) * self.a["b"](x)


def test_a_name_of_kohyas_form_that_two_modules_have_is_refused_both_ways(tmp_path: Path) -> None:
    x = torch.randn(3, 5)
    graph = lora_fx.rewrite(Ambiguous().eval(), ["a_b"], rank=2, example_inputs=(x,))
    with pytest.raises(lora_fx.AdapterError, match=r"'a\.b' and 'a_b' have one name in kohya's form"):
        lora_fx.save_adapter(graph, tmp_path / "out", format="kohya")
    pair = {"lora_unet_a_b.lora_down.weight": torch.ones(2, 5), "lora_unet_a_b.lora_up.weight": torch.ones(5, 2)}
    with pytest.raises(lora_fx.AdapterError, match=r"a_b: expected the name of one module, got that of a\.b and a_b"):
        lora_fx.load_adapter(lora_fx.unload(graph), saved(tmp_path / "a", pair))


def test_names_of_sdxls_original_code_are_those_of_diffusers_modules() -> None:
    from lora_fx.adapters.peft_format.foreign_formats.kohya import _spellings

    # Two residual blocks on each level, as SDXL has; the right side by diffusers' convert_ldm_unet_checkpoint.
    paths = {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_8_1_transformer_blocks_0_attn1_to_q": "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q",
        "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
        "middle_block_1_transformer_blocks_3_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_0_in_layers_2": "up_blocks.1.resnets.2.conv1",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "out_2": "conv_out",
    }
    found = _spellings(tuple(paths.values()))
    assert {name: found[name] for name in paths} == {name: [path] for name, path in paths.items()}


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv1(x)


class Levels(nn.Module):
    """Two blocks with two residual blocks each, the second with attentions, which alone get slots."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(
            [nn.ModuleDict({"resnets": nn.ModuleList([Resnet(), Resnet()])}) for _ in "ab"]
        )
        self.down_blocks[1]["attentions"] = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8)}) for _ in "ab"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.down_blocks:
            for resnet in block["resnets"]:
                x = resnet(x)
        for attention in self.down_blocks[1]["attentions"]:
            x = x + attention["to_q"](x)
        return x


def test_a_name_of_sdxls_original_code_is_one_module_in_a_graph_and_in_slots(tmp_path: Path) -> None:
    from lora_fx.adapters.peft_format.foreign_formats.kohya import _spellings

    x, name = torch.randn(3, 8), "lora_unet_input_blocks_4_1_to_q"
    pair = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    file = saved(tmp_path / "a", pair) / FILE
    graph = lora_fx.rewrite(Levels().eval(), rules=["to_q"], example_inputs=(x,))
    read = lora_fx.from_adapter(lora_fx.unload(graph), file)
    site = "down_blocks.1.attentions.0.to_q"
    assert [key.partition(".lora_")[0] for key in read.state_dict() if "lora_A" in key] == [site]
    lora_fx.export.onnx(graph, tmp_path / "s.onnx", slots=True, verify=False)
    made = lora_fx.export.onnx_adapter_from_peft(file, tmp_path / "s.onnx", tmp_path / "s.onnx_adapter")
    assert made.ranks == {site: 2}
    split = {f"{site}.lora_A.weight": torch.randn(2, 8), f"{site}.lora_B.weight": torch.randn(8, 2)}
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "olora"}
    with pytest.raises(
        lora_fx.LoraFxError, match=r"splitting the weights of \S*to_q \('olora'\), and slots are beside whole"
    ):
        lora_fx.export.onnx_adapter_from_peft(
            saved(tmp_path / "b", split, told), tmp_path / "s.onnx", tmp_path / "t.onnx_adapter"
        )
    assert "input_blocks_4_1_to_q" not in _spellings(
        ["down_blocks.1.attentions.0.to_q", "down_blocks.2.attentions.0.to_q"]
    )


def test_an_old_name_that_two_modules_have_is_refused(tmp_path: Path) -> None:
    graph = lora_fx.trace(Ambiguous().eval(), (torch.randn(3, 5),))
    name = "lora_te_text_model_a_b"
    pair = {f"{name}.lora_down.weight": torch.ones(2, 5), f"{name}.lora_up.weight": torch.ones(5, 2)}
    with pytest.raises(lora_fx.AdapterError, match=r"a_b: expected the name of one module, got that of a\.b and a_b"):
        lora_fx.load_adapter(graph, saved(tmp_path / "a", pair))


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_text_encoder_of_clip_is_written_by_the_names_that_other_tools_know(form: Any, tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    rules = peft.LoraConfig(
        target_modules=["q_proj", "fc1"], r=2, rank_pattern={r"layers\.1\.mlp\.fc1": 3}, alpha_pattern={"fc1": 5}
    )
    ids = torch.tensor([[1, 5, 7, 2]])
    graph = lora_fx.rewrite(model, rules, example_inputs={"input_ids": ids})
    set_factors(graph)
    lora_fx.save_adapter(graph, tmp_path / "a", format=form)
    name = {
        "diffusers": "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_B.weight",
        "kohya": "lora_te_text_model_encoder_layers_1_mlp_fc1.lora_up.weight",
    }[form]
    written = load_file(tmp_path / "a" / FILE)
    assert written[name].shape == (12, 3)
    assert all("text_model" in key for key in written)
    read = lora_fx.from_adapter(model, tmp_path / "a", example_inputs={"input_ids": ids})
    assert torch.equal(read.eval()(input_ids=ids)[0], graph.eval()(input_ids=ids)[0])
    assert not torch.equal(graph(input_ids=ids)[0], model(input_ids=ids)[0])


UNET = "unet.down_blocks.0.attentions.0.attn1.to_q"
A, B = torch.ones(2, 8), torch.ones(12, 2)
GOOD = {f"{UNET}.lora_A.weight": A, f"{UNET}.lora_B.weight": B}
NAN, WIDE = torch.tensor(float("nan")), torch.ones(3)
MALFORMED: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "no B": ({f"{UNET}.lora_A.weight": A}, None, "down_blocks.0.attentions.0.attn1.to_q: B is missing"),
    "two ranks": (
        {**GOOD, f"{UNET}.lora_B.weight": torch.ones(12, 3)},
        None,
        r"expected A of \(rank, in\) and B of \(out, rank\), got \(2, 8\) and \(12, 3\)",
    ),
    "an alpha of three numbers": (
        {**GOOD, f"{UNET}.alpha": WIDE},
        None,
        "alpha: expected one number, got torch.float32",
    ),
    "an alpha that is no number": ({**GOOD, f"{UNET}.alpha": NAN}, None, "alpha: expected a finite number, got nan"),
    "an alpha alone": ({**GOOD, "unet.x.alpha": torch.tensor(1.0)}, None, "x: an alpha without factors"),
    "DoRA": (
        {**GOOD, f"{UNET}.lora_magnitude_vector": torch.ones(12)},
        None,
        "a magnitude of DoRA, which is not supported",
    ),
    "LoKr": ({"unet.to_q.lokr_w1": A, **GOOD}, None, "a factor of LoKr or LoHa, which are not supported"),
    "a bias": ({**GOOD, f"{UNET}.lora_B.bias": torch.ones(12)}, None, "a bias of a factor"),
    "another tensor": (
        {**GOOD, "unet.conv_in.weight": A},
        None,
        "conv_in.weight: expected <module>.lora_A.weight, .lora_B",
    ),
    "a second spelling": ({**GOOD, f"{UNET}.lora.down.weight": A}, None, "a second A of"),
    "no such module": (
        {**GOOD, "unet.down_blocks.0.attn1.to_q.lora_A.weight": A, "unet.down_blocks.0.attn1.to_q.lora_B.weight": B},
        None,
        r"down_blocks.0.attn1.to_q: the graph has no such module \(did you mean",
    ),
    "another model": (
        {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B},
        None,
        r"unet \(1 modules\): expected modules of the graph, such as '\S+', got 'unet.a' and others",
    ),
    "another size": (
        {f"{UNET}.lora_A.weight": torch.ones(2, 9), f"{UNET}.lora_B.weight": B},
        None,
        r"expected shape \(2, 8\)",
    ),
    "no number": ({**GOOD, f"{UNET}.lora_B.weight": B * NAN}, None, "expected finite numbers, found 24 of 24"),
    "metadata of DoRA": (
        GOOD,
        {"unet.peft_type": "LORA", "unet.r": 2, "unet.use_dora": True},
        r"lora_adapter_metadata: unet\.use_dora: expected false, since this form has no magnitudes of DoRA here, got true",
    ),
    "metadata of another rank": (
        GOOD,
        {"unet.peft_type": "LORA", "unet.r": 3},
        "expected rank 3, by the metadata, got factors of 2",
    ),
    "metadata of another alpha": (
        {**GOOD, f"{UNET}.alpha": torch.tensor(3.0)},
        {"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 4},
        "expected alpha 4, by the metadata, got 3",
    ),
    "metadata of another method": (GOOD, {"unet.peft_type": "LOKR"}, "peft_type: expected 'LORA', found 'LOKR'"),
    "metadata that are a list": (GOOD, [1], "expected an object, found"),
    "no factor": ({"unet.lora": A}, None, "lora: expected <module>.lora_A.weight"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_the_place_of_its_fault(case: str, traced: Any, tmp_path: Path) -> None:
    tensors, metadata, told = MALFORMED[case]
    with pytest.raises(lora_fx.AdapterError, match=told):
        lora_fx.from_adapter(traced, saved(tmp_path / "a", tensors, metadata))


def test_metadata_that_are_no_json_or_nested_without_end_are_refused(traced: Any, tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000):
        save_file(GOOD, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(lora_fx.AdapterError, match="expected JSON"):
            lora_fx.from_adapter(traced, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("dora_scale", "a magnitude of DoRA"),
        ("hada_w1_a", "a factor of LoHa, LoKr or LoCon"),
        ("weight", "expected lora_unet_<module>"),
    ],
)
def test_what_kohyas_form_has_beside_lora_is_refused_by_name(key: str, told: str, traced: Any, tmp_path: Path) -> None:
    pair = {"lora_unet_a.lora_down.weight": A, "lora_unet_a.lora_up.weight": B}
    with pytest.raises(lora_fx.AdapterError, match=f"lora_unet_a.{key}: {told}"):
        lora_fx.from_adapter(traced, saved(tmp_path / "a", {**pair, f"lora_unet_a.{key}": A}))


def test_a_directory_with_two_files_or_a_file_without_its_config_is_refused(traced: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(GOOD, tmp_path / f"{name}.safetensors")
    with pytest.raises(lora_fx.AdapterError, match=r"got one.safetensors, two.safetensors. Give one of these files"):
        lora_fx.from_adapter(traced, tmp_path)
    save_file({"base_model.model.a.lora_A.weight": A}, tmp_path / "x.safetensors")
    with pytest.raises(lora_fx.AdapterError, match=r"has PEFT's keys, which need adapter_config\.json beside them"):
        lora_fx.from_adapter(traced, tmp_path / "x.safetensors")
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(lora_fx.AdapterError, match="got a file without tensors"):
        lora_fx.from_adapter(traced, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(lora_fx.AdapterError, match=r"x\.safetensors"):
        lora_fx.from_adapter(traced, tmp_path / "x.safetensors")


def test_what_the_other_forms_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.words(ids))

    rules = {"select": [{"target": ["words"], "rank": 2}, {"target": ["out"], "trainable": "all"}]}
    graph = lora_fx.rewrite(Small().eval(), rules, example_inputs=(torch.randint(9, (2, 3)),))
    for form in ("diffusers", "kohya"):
        with pytest.raises(lora_fx.AdapterError) as error:
            lora_fx.save_adapter(graph, tmp_path / "out", format=form)
        assert "words: lora_embedding_A" in str(error.value)
        assert "out.weight: trains as a whole" in str(error.value)
    beside = {"select": [{"target": ["words"], "trainable": [2, 5]}, {"target": ["out"], "rank": 2}]}
    for rows in (beside, peft.TrainableTokensConfig(token_indices=[2, 5], target_modules=["words"])):
        graph = lora_fx.rewrite(Small().eval(), rules=rows, example_inputs=(torch.randint(9, (2, 3)),))
        with pytest.raises(lora_fx.AdapterError, match=r"words: rows of an embedding that train$"):
            lora_fx.save_adapter(graph, tmp_path / "out", format="kohya")
    with pytest.raises(lora_fx.AdapterError, match="expected 'peft', 'diffusers' or 'kohya', got 'comfy'"):
        lora_fx.save_adapter(graph, tmp_path / "out", format="comfy")
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_such_a_file_where_it_takes_an_adapter_directory(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    text = transformers.CLIPTextModel(config).eval()
    text.save_pretrained(tmp_path / "text")
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    pair = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}
    file = saved(tmp_path / "a", pair) / FILE
    told = CliRunner().invoke(app, ["inspect", str(file)])
    assert told.exit_code == 0, told.output
    assert "form" in told.output
    assert "kohya" in told.output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold_checkpoint(tmp_path / "text", [(file, 1.0)], tmp_path / "merged")
    weight = "encoder.layers.0.self_attn.q_proj.weight"
    merged = transformers.CLIPTextModel.from_pretrained(tmp_path / "merged").state_dict()[weight]
    torch.testing.assert_close(merged, text.state_dict()[weight] + 0.5 * b @ a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rules", "class_name"),
    [("unet", "UNet2DConditionModel"), ("sd3", "SD3Transformer2DModel"), ("flux", "FluxTransformer2DModel")],
)
def test_rules_of_diffusers_models_are_found_by_their_class(rules: str, class_name: str, traced: Any) -> None:
    net = Net().eval()
    net.config = {"_class_name": class_name}  # as diffusers has it
    plan = lora_fx.plan(net, example_inputs=(X,))
    assert plan.rules.name == rules
    chosen = [each.site.module for each in plan if isinstance(each, Chosen)]
    layer = "down_blocks.0.attentions.{}.attn1.{}"
    assert chosen == [layer.format(i, leaf) for i in range(2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    assert [each.site for each in lora_fx.plan(traced, rules)] == [each.site for each in plan]


class FluxBlock(nn.Module):
    """The paths of FLUX's blocks, in small: of a joint one, or of a single one."""

    def __init__(self, width: int, *, joint: bool) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q, self.attn.to_k, self.attn.to_v = (nn.Linear(width, width) for _ in range(3))
        self.joint = joint
        if joint:
            self.attn.to_out = nn.ModuleList([nn.Linear(width, width)])
        else:
            self.proj_mlp, self.proj_out = nn.Linear(width, 14), nn.Linear(width + 14, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attn: Any = self.attn
        y = nn.functional.scaled_dot_product_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x))
        return x + (attn.to_out[0](y) if self.joint else self.proj_out(torch.cat([y, self.proj_mlp(x)], dim=-1)))


class Flux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.proj_out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.transformer_blocks = nn.ModuleList([FluxBlock(8, joint=True)])
        self.single_transformer_blocks = nn.ModuleList([FluxBlock(8, joint=False) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            x = block(x)
        return self.proj_out(x)  # type: ignore[no-any-return]


PUBLISHED = {
    "lora_unet_img_in": ["x_embedder"],
    "lora_unet_double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{each}" for each in "qkv"],
    "lora_unet_double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "lora_unet_single_blocks_1_linear1": [
        *(f"single_transformer_blocks.1.attn.to_{each}" for each in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "lora_unet_single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
    "lora_unet_final_layer_linear": ["proj_out"],
}


def test_fluxs_published_names_mean_the_modules_whose_outputs_they_stack(tmp_path: Path) -> None:
    torch.manual_seed(4)
    net, x, generator = Flux().eval(), torch.randn(2, 7, 5), torch.Generator().manual_seed(6)
    tensors: dict[str, torch.Tensor] = {}
    merged = {name: tensor.double() for name, tensor in net.state_dict().items()}
    for rank, (name, paths) in enumerate(PUBLISHED.items(), 2):
        sizes: list[Any] = [net.state_dict()[f"{path}.weight"].shape for path in paths]
        a = torch.randn(rank, sizes[0][1], generator=generator)
        b = 0.3 * torch.randn(sum(size[0] for size in sizes), rank, generator=generator)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(3.0)}
        for path, rows in zip(paths, b.split([size[0] for size in sizes]), strict=True):
            merged[f"{path}.weight"] += 3 / rank * rows.double() @ a.double()
    graph = lora_fx.from_adapter(net, saved(tmp_path / "flux", tensors), example_inputs=(x,))
    expected = copy.deepcopy(net).double()
    expected.load_state_dict(merged)
    torch.testing.assert_close(graph(x).double(), expected(x.double()), rtol=1e-5, atol=1e-5)
    folded = lora_fx.fold(graph).state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(folded[name].double(), weight, rtol=1e-6, atol=1e-6)
    short = {key: each[:-1] if key.endswith("qkv.lora_up.weight") else each for key, each in tensors.items()}
    told = r"double_blocks_0_img_attn_qkv: the graph has no such module.*; it is the projection of q, k and v in one"
    with pytest.raises(lora_fx.AdapterError, match=told):
        lora_fx.from_adapter(graph, saved(tmp_path / "short", short), "other")
