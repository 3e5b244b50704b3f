"""The models that PEFT's test configurations name: its structures and module names, in sizes that differ from each other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import architectures
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx


class _Chain(nn.Module):
    """Modules that are called one after the other, under the names that PEFT's tests give them."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


def _mlp(bias: bool = True, wide: int = 20) -> nn.Module:
    return _Chain(
        lin0=nn.Linear(10, wide, bias=bias),
        relu=nn.ReLU(),
        drop=nn.Dropout(0.5),
        lin1=nn.Linear(wide, 4, bias=bias),
        sm=nn.LogSoftmax(dim=-1),
    )


class _DeepMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [
            _Chain(lin0=nn.Linear(6, 9), relu=nn.ReLU(), drop=nn.Dropout(0.5), lin1=nn.Linear(9, 6)) for _ in range(4)
        ]
        self.layers = nn.ModuleList(blocks)
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def _embedding(name: str) -> nn.Module:
    return _Chain(
        **{name: nn.Embedding(30, 5)}, conv1d=Conv1D(4, 5), relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(8, 3)
    )


class _EmbeddingOfTransformers(nn.Module):
    """Says which module embeds its inputs, as a transformers model does."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in _embedding("embed_tokens").named_children():
            self.add_module(name, module)

    forward = _Chain.forward

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


class _Sibling(nn.Module):
    """A frozen embedding whose name begins with that of the adapted one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_tokens_extra = nn.Embedding(30, 5), nn.Embedding(30, 5)
        self.lin0 = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.embed_tokens(x) + self.embed_tokens_extra(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


def _convolution(kind: str, module: nn.Module, features: int) -> nn.Module:
    return _Chain(**{kind: module}, relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(features, 3))


class _LinearOfParameters(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def _mlp_of_parameters() -> nn.Module:
    return _Chain(
        lin0=_LinearOfParameters(10, 20), relu=nn.ReLU(), drop=nn.Dropout(0.5), lin1=_LinearOfParameters(20, 3)
    )


class _Attention(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2, **sizes)
        self.lin0 = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu = nn.Linear(10, 20), nn.ReLU()
        self.gru = nn.GRU(20, 20, batch_first=True)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.gru(self.relu(self.lin0(x)).unsqueeze(1))[0].squeeze(1))


class _Parts(nn.Module):
    """A linear, an embedding and a convolution, each with its own input."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 36, bias=bias)
        self.embed = nn.Embedding(30, 28)
        self.conv2d = nn.Conv2d(20, 24, 3, bias=bias)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(x), self.embed(ids), self.conv2d(image)


class _Paths(nn.Module):
    """One linear at each of several paths; the result is their sum."""

    def __init__(self, *paths: str) -> None:
        super().__init__()
        self.paths = paths
        for path in paths:
            *parents, name = path.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.add_module(name, nn.Linear(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.get_submodule(path)(x) for path in self.paths)


class _Tied(nn.Module):
    """A language model whose head is its embedding, if told so."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = _TiedConfig(tied)
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if tied else None
        self.model = _Chain(embed_tokens=nn.Embedding(30, 12), linear=nn.Linear(12, 12, bias=False))
        self.lm_head = nn.Linear(12, 30, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(x))

    def prepare_inputs_for_generation(self) -> None:
        return None

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class _TiedConfig:
    def __init__(self, tied: bool) -> None:
        self.tie_word_embeddings = tied

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "custom", "tie_word_embeddings": self.tie_word_embeddings}


class _Seq2SeqTied(nn.Module):
    """An encoder and a decoder that share their embedding with the head, if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.config = _TiedConfig(True)
        self._tied_weights_keys = {
            "model.encoder.embed_tokens.weight": "model.shared.weight",
            "model.decoder.embed_tokens.weight": "model.shared.weight",
            "lm_head.weight": "model.shared.weight",
        }
        self.model = nn.Module()
        self.model.shared = nn.Embedding(30, 12)
        for stack in ("encoder", "decoder"):
            chain = _Chain(embed_tokens=nn.Embedding(30, 12), linear=nn.Linear(12, 12, bias=False))
            chain.embed_tokens.weight = self.model.shared.weight
            self.model.add_module(stack, chain)
        self.lm_head = nn.Linear(12, 30, bias=False)
        self.lm_head.weight = self.model.shared.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model.encoder(x) * self.model.decoder(x))

    def prepare_inputs_for_generation(self) -> None:
        return None

    def get_input_embeddings(self) -> nn.Module:
        return self.model.shared

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class _Wrapped(nn.Module):
    """A weight that torch's parametrization computes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7, bias=False)
        self.lin.other_weight = nn.Parameter(torch.randn(7, 5))
        nn.utils.parametrize.register_parametrization(self.lin, "weight", _PlusOne())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class _PlusOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class _TopLevelParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.param


class _SeveralKinds(nn.Module):
    """Two of each kind of layer, in a block of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.emb0, self.emb1 = nn.Embedding(30, 8), nn.Embedding(30, 8)
        self.conv0, self.conv1 = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)
        self.lin0, self.lin1 = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = (self.emb0(x) + self.emb1(x)).unsqueeze(1)
        return self.lin1(self.lin0(self.conv1(self.conv0(image)).squeeze(1)))


class _Heads(nn.Module):
    """Trained modules whose names begin with the name of another."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 6)
        for name in ("classifier", "classifier2", "classifier3", "classifier4"):
            self.add_module(name, nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        return self.classifier(x) + self.classifier2(x) * self.classifier3(x) - self.classifier4(x)


class _Named(nn.Module):
    """Linears whose names are made of PEFT's words."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.foo_linear = nn.Linear(8, 9)
        for name in (f"foo_{word}", f"{word}_foo", f"foo_{word}_foo", f"{word}_foo_{word}"):
            self.add_module(name, nn.Linear(9, 9))

    forward = _Chain.forward


class _TinyExperts(nn.Module):
    """Layers with experts as modules, to tell an index of a layer from that of an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(3))
        for layer in self.model.layers:
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            layer.self_attn.q_proj = nn.Linear(4, 4, bias=False)
            layer.mlp.experts = nn.ModuleList(nn.Module() for _ in range(2))
            for expert in layer.mlp.experts:
                expert.up_proj = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = layer.self_attn.q_proj(x)
            x = sum(expert.up_proj(x) for expert in layer.mlp.experts)
        return x


_SMALL = {
    "vocab_size": architectures.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 12}


def _qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SMALL, num_key_value_heads=2))


def _gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_GROUPED, pad_token_id=0))


def _llama4() -> nn.Module:
    sizes = {**_GROUPED, "intermediate_size": 40, "intermediate_size_mlp": 56}
    config = transformers.Llama4TextConfig(
        **sizes, num_local_experts=3, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    return transformers.Llama4ForCausalLM(config)


def _gpt_oss() -> nn.Module:
    sizes = {**_GROUPED, "intermediate_size": 40, "max_position_embeddings": 256}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**sizes, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0)
    )


def _classifier(name: str) -> nn.Module:
    config_class, model_class = {
        "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
        "llama": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
    }[name]
    return model_class(config_class(**{**_SMALL, "max_position_embeddings": 66}, num_labels=3, pad_token_id=0))


def _roberta() -> nn.Module:
    return transformers.RobertaModel(transformers.RobertaConfig(**{**_SMALL, "max_position_embeddings": 66}))


def _vision() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[12, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def _mamba() -> nn.Module:
    config = transformers.FalconMambaConfig(
        vocab_size=architectures.VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    return transformers.FalconMambaForCausalLM(config)


def _floats(*shape: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"x": torch.randn(*shape)}


def _ids(*shape: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"x": torch.randint(0, 30, shape)}


def _parts_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 40), "ids": torch.randint(0, 30, (3, 4)), "image": torch.randn(2, 20, 6, 5)}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _text(name: str) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: architectures.inputs(name, 3, 8)


PATHS = (
    "foo.bar.1.baz",
    "foo.bar.10.baz",
    "foo.bar.001.baz",
    "foo.bar.1.spam",
    "foo.bar.1.ham.2.baz",
    "foo.bar.2.ham.1.baz",
    "foo.whatever.1.baz",
    "foo.bar.q_proj",
    "bar.1.baz",
    "transformer.h.1.attn.attention.q_proj",
    "transformer.h.1.attn.attention.resid_dropout",
    "blocks.1.weight",
    "mlp.blocks.1.weight",
    "mlp.blocks.1.bias",
    "foobar",
)

_OWN: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "mlp": (_mlp, _floats(6, 10)),
    "mlp without bias": (lambda: _mlp(bias=False), _floats(6, 10)),
    "mlp with linears of one shape": (
        lambda: _Chain(lin0=nn.Linear(10, 10), relu=nn.ReLU(), lin1=nn.Linear(10, 10)),
        _floats(6, 10),
    ),
    "deep mlp": (_DeepMlp, _floats(4, 6)),
    "mlp with gru": (_Recurrent, _floats(4, 10)),
    "embedding": (lambda: _embedding("emb"), _ids(4, 2)),
    "embedding of transformers": (_EmbeddingOfTransformers, _ids(4, 2)),
    "embedding with sibling": (_Sibling, _ids(4, 2)),
    "conv1d": (lambda: _convolution("conv1d", nn.Conv1d(2, 4, 2), 20), _floats(3, 2, 6)),
    "conv2d": (lambda: _convolution("conv2d", nn.Conv2d(5, 10, 3), 10), _floats(4, 5, 3, 3)),
    "conv2d alone": (lambda: _Chain(conv=nn.Conv2d(3, 10, 3)), _floats(4, 3, 5, 6)),
    "conv2d alone, two groups": (lambda: _Chain(conv=nn.Conv2d(4, 6, 3, groups=2)), _floats(4, 4, 5, 6)),
    "conv2d, eight groups": (lambda: _convolution("conv2d", nn.Conv2d(16, 24, 3, groups=8), 24), _floats(4, 16, 3, 3)),
    "conv2d, two groups": (
        lambda: _convolution("conv2d", nn.Conv2d(6, 8, 3, padding=1, groups=2), 240),
        _floats(3, 6, 5, 6),
    ),
    "conv3d": (lambda: _convolution("conv3d", nn.Conv3d(5, 10, 3), 10), _floats(4, 5, 3, 3, 3)),
    "attention": (_Attention, _floats(4, 3, 10)),
    "attention, widths of key and value": (lambda: _Attention(kdim=20, vdim=30), _floats(4, 3, 10)),
    "parameters": (_mlp_of_parameters, _floats(6, 10)),
    "parts": (_Parts, _parts_inputs),
    "parts without bias": (lambda: _Parts(bias=False), _parts_inputs),
    "paths": (lambda: _Paths(*PATHS), _floats(3, 5)),
    "words": (lambda: _Paths("foo", "bar", "foobar", "spam"), _floats(3, 5)),
    "nested": (
        lambda: _Paths("foo", "bar", "module.foo", "module.foobar", "module.module.foo", "module.module.barfoo"),
        _floats(3, 5),
    ),
    "layers": (lambda: _Paths(*(f"layers.{i}.self_attn.{k}_proj" for i in range(5) for k in "kv")), _floats(3, 5)),
    "experts as modules": (_TinyExperts, _floats(3, 4)),
    "tied": (lambda: _Tied(True), _ids(3, 4)),
    "untied": (lambda: _Tied(False), _ids(3, 4)),
    "seq2seq tied": (_Seq2SeqTied, _ids(3, 4)),
    "parametrized": (_Wrapped, _floats(3, 5)),
    "parameter of the top": (_TopLevelParameter, _floats(3, 5)),
    "several kinds": (_SeveralKinds, _ids(3, 4)),
    "heads": (_Heads, _floats(4, 5)),
    "names with lora": (lambda: _Named("lora"), _floats(4, 8)),
    "names with weight": (lambda: _Named("weight"), _floats(4, 8)),
    "names with bias": (lambda: _Named("bias"), _floats(4, 8)),
    "names with baz": (lambda: _Named("baz"), _floats(4, 8)),
    "qwen2": (_qwen2, _text("llama")),
    "gemma3": (_gemma3, _text("llama")),
    "llama4": (_llama4, _text("llama")),
    "gpt-oss": (_gpt_oss, _text("llama")),
    "bert classifier": (lambda: _classifier("bert"), _text("bert")),
    "roberta classifier": (lambda: _classifier("roberta"), _text("bert")),
    "llama classifier": (lambda: _classifier("llama"), _text("llama")),
    "roberta encoder": (_roberta, _text("bert")),
    "resnet": (_vision, _pixels),
    "mamba": (_mamba, _text("llama")),
}


@functools.cache
def model(name: str) -> nn.Module:
    """Return the one model of a name in this process, in eval mode. Not to be changed."""
    if name not in _OWN:
        return architectures.build(name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = _OWN[name][0]().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return made


@functools.cache
def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return the inputs that a model of this name is run with."""
    if name not in _OWN:
        return architectures.inputs(name, 3, 8)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return _OWN[name][1]()


@functools.cache
def traced(name: str) -> lora_fx.TracedGraphModule:
    """Return the one trace of :func:`model`. Not to be changed. Of a model with batch norm, for inference."""
    text = isinstance(model(name), transformers.PreTrainedModel) and name != "resnet"
    return lora_fx.trace(model(name), example_inputs=None if text else inputs(name), inference=name == "resnet")


def run(module: nn.Module, name: str) -> list[torch.Tensor]:
    """Return the tensors of floats that a graph, a model or PEFT's wrapping of one gives for :func:`inputs`."""
    plain = isinstance(module, lora_fx.TracedGraphModule) or not isinstance(model(name), transformers.PreTrainedModel)
    decoder = not plain and hasattr(model(name).config, "use_cache")
    found = module(**inputs(name), **({"use_cache": False} if decoder else {}))
    values = [found] if isinstance(found, torch.Tensor) else list(found.values() if hasattr(found, "values") else found)
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
