"""A call binds its arguments as the model's forward does, and whatever the trace fixed is refused when it differs."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from architectures import build
from torch import fx, nn

import lora_fx
from lora_fx.transformers_releases import CACHE


def module(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            for name, part in parts.items():
                self.add_module(name, part)

    Model.forward = forward  # type: ignore[method-assign]
    return Model().eval()


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.randn(3, 4) for _ in range(count)]


# By position.


def test_positions_are_those_of_the_model_whatever_the_order_of_the_example() -> None:
    model = module(lambda self, a, b: self.linear(a) - b)
    a, b = tensors(2)
    graph_module = lora_fx.trace(model, {"b": b, "a": a})
    assert torch.equal(graph_module(a, b), model(a, b))
    assert torch.equal(graph_module(a, b=b), model(a, b))


def test_positions_of_a_bert_are_those_of_the_model() -> None:
    model = build("bert")
    ids, types = torch.randint(0, 97, (2, 7)), torch.randint(0, 2, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    graph_module = lora_fx.trace(model, {"input_ids": ids, "token_type_ids": types, "attention_mask": mask})
    with torch.no_grad():
        assert torch.equal(graph_module(ids, mask, types)[0], model(ids, mask, types)[0])
    names = list(inspect.signature(graph_module.forward).parameters)
    assert names[:3] == ["input_ids", "attention_mask", "token_type_ids"]


def with_gap() -> nn.Module:
    def forward(self: Any, x: torch.Tensor, other: Any = None, mask: Any = None) -> torch.Tensor:
        value = self.linear(x) if other is None else self.linear(x) + other
        return value if mask is None else value * mask

    return module(forward)


def test_an_argument_that_the_trace_has_not_keeps_its_position() -> None:
    model = with_gap()
    x, mask = tensors(2)
    graph_module = lora_fx.trace(model, {"x": x, "mask": mask})
    for found in (graph_module(x, mask=mask), graph_module(x, None, mask)):
        assert torch.equal(found, model(x, None, mask))
    with pytest.raises(
        lora_fx.InputError, match=r"'other' is .*, expected its default, None: the graph was traced without it"
    ):
        graph_module(x, mask)
    assert str(inspect.signature(graph_module.forward)) == "(x=None, *, mask=None)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), lora_fx.trace])
def test_a_copy_is_called_as_its_original(copied: Callable[[Any], Any]) -> None:
    model = with_gap()
    x, mask = tensors(2)
    graph_module = copied(lora_fx.trace(model, {"mask": mask, "x": x}))
    assert torch.equal(graph_module(x, None, mask), model(x, None, mask))
    with pytest.raises(lora_fx.InputError, match=r"'other' is .*: the graph was traced without it"):
        graph_module(x, mask)


def test_an_interpreter_binds_as_the_graph_does() -> None:
    model = with_gap()
    x, mask = tensors(2)
    graph_module = lora_fx.trace(model, {"mask": mask, "x": x})
    assert torch.equal(fx.Interpreter(graph_module).run(x, None, mask), model(x, None, mask))


def test_a_variadic_model_takes_as_many_inputs_as_in_the_trace() -> None:
    model = module(lambda self, *xs, scale=1: self.linear(xs[0]) + xs[1] * scale)
    a, b = tensors(2)
    graph_module = lora_fx.trace(model, (a, b))
    assert torch.equal(graph_module(b, a), model(b, a))
    with pytest.raises(lora_fx.InputError, match="expected at most 2 inputs by position, got 3"):
        graph_module(a, b, a)


def test_a_compiled_graph_binds_as_the_graph_does() -> None:
    model = with_gap()
    x, mask = tensors(2)
    compiled = torch.compile(lora_fx.trace(model, {"mask": mask, "x": x}), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, None, mask), model(x, None, mask))


def test_a_script_takes_its_inputs_in_the_order_of_the_model(tmp_path: Any) -> None:
    model = module(lambda self, a, b: self.linear(a) - b)
    a, b = tensors(2)
    lora_fx.export.torchscript(lora_fx.trace(model, {"b": b, "a": a}), tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(a, b)["output"], model(a, b))


# Constants.


@pytest.mark.parametrize(
    ("traced", "given"), [(3, 5), (3, 3.0), (1, True), (True, False), (0.5, 0.25), (0.0, -0.0), ("a", "b"), (None, 1)]
)
def test_a_constant_may_be_given_again_and_nothing_else(traced: Any, given: Any) -> None:
    def forward(self: Any, x: torch.Tensor, k: Any = 7) -> torch.Tensor:
        return self.linear(x) * (2 if k is None else len(k) if isinstance(k, str) else k)

    model = module(forward)
    (x,) = tensors(1)
    for graph_module in (lora_fx.trace(model, (x, traced)), lora_fx.trace(model, {"x": x, "k": traced})):
        for found in (graph_module(x), graph_module(x, traced), graph_module(x, k=traced)):
            assert torch.equal(found, model(x, traced))
        with pytest.raises(lora_fx.InputError, match=r"'k' is .*, expected .*, since it is a constant of the graph"):
            graph_module(x, given)
        with pytest.raises(
            lora_fx.InputError, match=r"'k' is a tensor of shape \(\), expected .*, since it is a constant"
        ):
            graph_module(x, k=torch.tensor(3))


def test_a_tensor_for_what_was_none_is_refused_and_the_other_way_round() -> None:
    model = with_gap()
    x, mask = tensors(2)
    without, with_mask = lora_fx.trace(model, {"x": x, "mask": None}), lora_fx.trace(model, {"x": x, "mask": mask})
    assert torch.equal(without(x, mask=None), model(x))
    with pytest.raises(lora_fx.InputError, match=r"'mask' is a tensor of shape \(3, 4\), expected None"):
        without(x, mask=mask)
    with pytest.raises(lora_fx.InputError, match="'mask' is missing, but the graph was traced with it"):
        with_mask(x, mask=None)


def of_containers() -> tuple[nn.Module, lora_fx.TracedGraphModule]:
    def forward(self: Any, xs: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        value = sum(self.linear(x) * (index + 1) for index, x in enumerate(xs)) + options.get("bias", 0)
        return -value if options["negative"] else value  # type: ignore[no-any-return]

    model = module(forward)
    return model, lora_fx.trace(model, {"xs": tensors(2), "options": {"bias": torch.randn(4), "negative": True}})


def test_containers_are_taken_in_the_structure_of_the_trace() -> None:
    model, graph_module = of_containers()
    xs, bias = tensors(2), torch.randn(4)
    options = {"negative": True, "bias": bias}  # in another order than in the trace
    assert torch.equal(graph_module(xs, options), model(xs, options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": tensors(3)}, "'xs' is a list of 3, expected one of 2"),
        ({"xs": tensors(1)}, "'xs' is a list of 1, expected one of 2"),
        ({"xs": tuple(tensors(2))}, "'xs' is a tuple, expected a list"),
        ({"xs": tensors(1)[0]}, r"'xs' is a tensor of shape \(3, 4\), expected a list"),
        ({"xs": [*tensors(1), 3]}, r"'xs\[1\]' is 3, expected a tensor"),
        (
            {"options": {"bias": torch.ones(4), "negative": False}},
            r"'options\['negative'\]' is False, expected True",
        ),
        ({"options": {"bias": torch.ones(4)}}, "'options' is a mapping of 'bias', .* one of 'bias', 'negative'"),
        ({"options": {"bias": torch.ones(4), "negative": True, "more": 1}}, "'options' is a mapping of .*'more'"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    _, graph_module = of_containers()
    inputs = {"xs": tensors(2), "options": {"bias": torch.ones(4), "negative": True}}
    with pytest.raises(lora_fx.InputError, match=message + r"(.|\n)*race again"):
        graph_module(**{**inputs, **change})


# What is no input.


@pytest.mark.parametrize("value", [3, "text", [1.0], 2.5])
def test_what_is_no_tensor_is_refused(value: Any) -> None:
    (x,) = tensors(1)
    with pytest.raises(lora_fx.InputError, match=r"'x' is .*, expected a tensor"):
        lora_fx.trace(with_gap(), {"x": x})(value)
    with pytest.raises(lora_fx.InputError, match="'x' is array"):
        lora_fx.trace(with_gap(), {"x": x})(x.numpy())


def test_what_the_model_has_not_is_refused_with_a_list_of_inputs() -> None:
    x, mask = tensors(2)
    graph_module = lora_fx.trace(with_gap(), {"x": x, "mask": mask})
    with pytest.raises(lora_fx.InputError, match=r"no input 'masc' \(did you mean 'mask'\?\).*traced with: x, mask"):
        graph_module(x, masc=mask)
    with pytest.raises(lora_fx.InputError, match=r"expected at most 3 inputs by position, got 4.*traced with: x, mask"):
        graph_module(x, None, mask, mask)
    with pytest.raises(lora_fx.InputError, match="'x' is given twice"):
        graph_module(x, x=x)


def test_a_flag_of_transformers_keeps_the_value_of_the_trace() -> None:
    model = build("gpt2")
    ids, mask = torch.randint(0, 97, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    graph_module = lora_fx.trace(model)
    graph_module(input_ids=ids, attention_mask=mask, use_cache=False)
    with pytest.raises(lora_fx.InputError, match=r"'use_cache' is True, expected False"):
        graph_module(input_ids=ids, attention_mask=mask, use_cache=True)
    with pytest.raises(lora_fx.InputError, match=rf"'{CACHE}' is .*: the graph was traced without it"):
        graph_module(ids, mask)


# What the model fills in.


def of_positions(name: str, **more: torch.Tensor) -> tuple[nn.Module, Any]:
    """Return a model, and a graph of it that takes positions and types of tokens."""
    model, ids = build(name), torch.randint(3, 97, (2, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7).expand(2, 7)}
    return model, lora_fx.trace(model, {**given, **more}, inference=True)


def test_positions_and_types_left_out_are_those_of_the_model() -> None:
    ids = torch.randint(3, 97, (3, 5))
    model, graph_module = of_positions("bert", token_type_ids=torch.ones(2, 7, dtype=torch.int64))
    with torch.no_grad():
        assert torch.equal(graph_module(ids)[0], model(ids)[0])
        positions = torch.tensor([[2, 0, 1, 4, 3]])
        found = graph_module(ids, position_ids=positions.expand(3, 5))[0]
        assert torch.equal(found, model(ids, position_ids=positions)[0])
        assert not torch.allclose(found, graph_module(ids)[0])


def test_types_of_tokens_that_change_nothing_are_taken_as_a_tokenizer_gives_them() -> None:
    model, ids = build("bert", layers=1), torch.randint(3, 97, (3, 5))
    graph_module = pickle.loads(pickle.dumps(lora_fx.trace(model, inference=True)))
    zeros, mask = torch.zeros_like(ids), torch.ones_like(ids)
    mask[1, 3:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, token_type_ids=zeros)[0]
        for types in (zeros, zeros.int()):
            given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
            assert torch.equal(graph_module(**transformers.BatchEncoding(given))[0], expected)
        assert torch.equal(graph_module(input_ids=ids, token_type_ids=zeros)[0], model(ids)[0])
    for types in (zeros + 1, zeros[:, :4], zeros.to("meta")):
        with pytest.raises(
            lora_fx.InputError, match=r"expected zeros of shape \(3, 5\), as the model .*'token_type_ids': a tensor"
        ):
            graph_module(input_ids=ids, attention_mask=mask, token_type_ids=types)
    llama = lora_fx.trace(build("llama", layers=1), inference=True)
    with pytest.raises(
        lora_fx.InputError, match=r"no input 'token_type_ids'\. Omit it: tokenizer\(…, return_token_type"
    ):
        llama(input_ids=ids, token_type_ids=zeros)


def test_types_of_tokens_that_a_row_of_zeros_hid_in_the_trace_are_refused() -> None:
    model, ids = build("gpt2", layers=1), torch.randint(3, 97, (3, 5))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.transformer.wte.weight[0] = 0  # of which GPT-2 adds types that are zeros
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    zeros = torch.zeros_like(ids)
    without = lora_fx.trace(model, given, inference=True)
    with_types = lora_fx.trace(model, {**given, "token_type_ids": zeros}, inference=True)
    for graph_module in (without, with_types):
        graph_module.load_state_dict(values)
    with pytest.raises(lora_fx.InputError, match=r"'token_type_ids' is a tensor .* the graph was traced without it"):
        without(**given, token_type_ids=zeros)
    with pytest.raises(lora_fx.InputError, match="'token_type_ids' is missing, but the graph was traced with it"):
        with_types(**given)
    model.load_state_dict(values)
    with torch.no_grad():
        assert torch.equal(with_types(**given, token_type_ids=zeros)[0], model(**given, token_type_ids=zeros)[0])


class TypesMatter(transformers.BertModel):  # type: ignore[misc]
    """A model for which types of zero are something else than none."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ):
        types = torch.ones_like(input_ids) if token_type_ids is None else token_type_ids
        return super().forward(input_ids, attention_mask, types)


def test_types_of_tokens_that_the_model_does_not_fill_in_so_are_refused() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    graph_module = lora_fx.trace(TypesMatter(config).eval(), inference=True)
    ids = torch.randint(3, 50, (3, 5))
    with pytest.raises(lora_fx.InputError, match=r"'token_type_ids' is a tensor .* the graph was traced without it"):
        graph_module(ids, token_type_ids=torch.zeros_like(ids))


def test_what_is_no_tensor_is_told_how_it_becomes_one() -> None:
    (x,) = tensors(1)
    graph_module = lora_fx.trace(with_gap(), {"x": x})
    for given, said in (
        (x.numpy(), r"a ndarray, expected a tensor as in the trace\. Convert it: torch\.as_tensor\(x\)\."),
        (x.tolist(), r"a list, expected a tensor as in the trace\. Convert it: torch\.as_tensor\(x\)\."),
        (transformers.BatchEncoding({"x": x}), r"'x' is a BatchEncoding, .* by their names: graph\(\*\*batch\)\."),
    ):
        with pytest.raises(lora_fx.InputError, match=said):
            graph_module(given)


def test_positions_that_the_model_counts_otherwise_are_not_filled_in() -> None:
    _, graph_module = of_positions("roberta")  # counts from the padding on
    with pytest.raises(lora_fx.InputError, match="input 'position_ids' is missing"):
        graph_module(torch.randint(3, 97, (3, 5)))


def test_positions_that_the_model_counts_from_its_mask_are_not_filled_in() -> None:
    _, graph_module = of_positions("opt")
    ids, mask = torch.randint(3, 90, (3, 5)), torch.ones(3, 5, dtype=torch.int64)
    mask[0, :2] = 0
    with pytest.raises(lora_fx.InputError, match="input 'position_ids' is missing"):
        graph_module(ids, mask)


def test_too_few_dimensions_are_told_where_a_mask_is_left_out() -> None:
    with pytest.raises(
        lora_fx.InputError, match=r"'input_ids' has shape \(3,\), expected 2 .* pass input_ids\.unsqueeze\(0\)"
    ):
        lora_fx.trace(build("llama", layers=1), inference=True)(torch.tensor([3, 4, 5]))


class MasksItsPadding(transformers.BertModel):  # type: ignore[misc]
    """A model that makes a mask from the tokens where none is given."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        mask = input_ids.ne(self.config.pad_token_id).long() if attention_mask is None else attention_mask
        return super().forward(input_ids, mask)


def test_a_mask_that_the_model_makes_from_its_tokens_is_not_filled_in() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    graph_module = lora_fx.trace(MasksItsPadding(config).eval(), inference=True)
    with pytest.raises(lora_fx.InputError, match="input 'attention_mask' is missing"):
        graph_module(torch.randint(3, 50, (3, 5)))


def test_flags_of_the_config_may_be_repeated_and_others_say_how_they_are_traced() -> None:
    model, ids = build("llama"), torch.randint(0, 97, (2, 7))
    graph_module = lora_fx.trace(model, inference=True)
    same = {"return_dict": True, "output_hidden_states": False, "output_attentions": None, "use_cache": False}
    with torch.no_grad():
        assert torch.equal(graph_module(ids, **same, labels=None).logits, model(ids).logits)
    for given, message in (
        ({"output_hidden_states": True}, "example_inputs={…, 'output_hidden_states': True}) makes a graph with this"),
        ({"return_dict": False}, "it returns what the model's class returns: to_tuple() of that is a tuple"),
        ({"labels": ids}, "rewrite(…, labels=True) makes a graph that takes labels and returns the loss"),
        ({"use_cache": True}, "rewrite(…, cache=True) makes a graph with a key-value cache"),
        ({"inputs_embeds": torch.ones(2, 7, 8)}, "example_inputs={…, 'inputs_embeds': a tensor}) makes a graph"),
    ):
        with pytest.raises(lora_fx.InputError, match=re.escape(message)):
            graph_module(ids, **given)
    every = {"input_ids": ids, "output_hidden_states": True}
    with torch.no_grad():
        assert len(lora_fx.trace(model, every, inference=True)(ids, output_hidden_states=True).hidden_states) == 3


def test_labels_that_were_not_traced_are_told_before_inputs_that_were_omitted_for_them() -> None:
    ids = torch.randint(3, 97, (2, 7))
    with pytest.raises(
        lora_fx.InputError, match=r"input 'labels' is a tensor .* rewrite\(…, labels=True\) makes a graph"
    ):
        lora_fx.trace(build("t5", layers=1), inference=True)(input_ids=ids, labels=ids)


def test_sizes_that_do_not_fit_are_told() -> None:
    graph_module = lora_fx.trace(build("llama"), inference=True)
    with pytest.raises(lora_fx.InputError) as refused:
        graph_module(torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
    assert str(refused.value) == (
        "expected input sizes with input_ids.size(1) == attention_mask.size(1), which the trace covers, got input_ids.size(1) = 7, "
        "attention_mask.size(1) = 5. Pass inputs of equal sizes."
    )


# Names.


@pytest.mark.parametrize(
    "name", ["type", "half", "torch", "relation_0", "getattr", "device", "args", "kwargs", "pytree"]
)
def test_an_input_may_have_the_name_of_anything_in_the_code(name: str, tmp_path: Any) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}): return self.linear(x) * {name}.size(0) + {name}", namespace)
    model = module(namespace["forward"])
    x, y = tensors(2)
    graph_module = lora_fx.trace(model, {"x": x, name: y})
    for copied in (graph_module, copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        assert torch.equal(copied(x[:2], **{name: y[:2]}), model(x[:2], y[:2]))
        with pytest.raises(lora_fx.InputError, match=rf"x\.size\(0\) == {name}\.size\(0\)"):
            copied(x[:2], y)
        with pytest.raises(lora_fx.InputError, match=f"'{name}' has 1 dimensions"):
            copied(x, y[0])
    lora_fx.export.torchscript(graph_module, tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x, y)["output"], model(x, y))


@pytest.mark.parametrize("name", ["class", "global", "None", 'a"b', "a\\b", "ª", "ﬁrst"])
def test_a_module_whose_name_cannot_be_written_is_refused(name: str) -> None:
    model = module(lambda self, x: self.inner[name](x), inner=nn.ModuleDict({name: nn.Linear(4, 4)}))
    with pytest.raises(lora_fx.TraceError, match=r"cannot write .* into the code of a graph. Rename it"):
        lora_fx.trace(model, (torch.randn(3, 4),))


def test_a_parameter_named_self_is_refused_and_may_lie_deeper() -> None:
    model = module(lambda self, x: x @ self._parameters["self"])
    model.register_parameter("self", nn.Parameter(torch.randn(4, 3)))
    (x,) = tensors(1)
    with pytest.raises(
        lora_fx.TraceError, match=r"a part named 'self', and torch\.fx cannot write 'self' into the code"
    ):
        lora_fx.trace(model, (x,))
    outer = module(lambda self, x: self.model(x), model=model)
    assert torch.equal(lora_fx.trace(outer, (x,))(x), model(x))


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile"])
def test_a_module_named_like_an_attribute_of_a_graph_is_refused_and_may_lie_deeper(name: str) -> None:
    model = module(lambda self, x: self._modules[name](x), **{name: nn.Linear(4, 4)})
    (x,) = tensors(1)
    with pytest.raises(lora_fx.TraceError, match=f"a part named '{name}', and a traced graph has an attribute"):
        lora_fx.trace(model, (x,))
    outer = module(lambda self, x: self.model(x), model=model)
    assert torch.equal(lora_fx.trace(outer, (x,))(x), model(x))


def test_a_module_without_tensors_is_refused_by_its_name_too() -> None:
    model = module(lambda self, x: self.inner["global"](x), inner=nn.ModuleDict({"global": nn.Dropout(0.5)}))
    with pytest.raises(lora_fx.TraceError, match="cannot write 'global' into the code"):
        lora_fx.trace(model, (torch.randn(3, 4),))


def test_names_with_spaces_and_numbers_are_taken() -> None:
    model = module(lambda self, x: self.inner["a b"](x), inner=nn.ModuleDict({"a b": nn.Linear(4, 4)}))
    (x,) = tensors(1)
    assert torch.equal(lora_fx.trace(model, (x,))(x), model(x))
