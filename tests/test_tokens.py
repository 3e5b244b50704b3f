"""Trainable tokens: rows of an embedding that train, with PEFT beside them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from graph_diff import first_difference
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapters.peft_format.contents import overview_of
from lora_fx.adapters.peft_format.opening import read_adapter
from lora_fx.errors import AdapterError, FoldError, PlanError, RuleError
from lora_fx.folding.checkpoint_plan import fold_checkpoint

ROWS = [7, 3, 5]
IDS = torch.tensor([[11, 3, 9, 5, 7, 2, 7], [5, 1, 3, 3, 8, 30, 4]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def named(name: str) -> str:
    """Return the name of a parameter of PEFT's in a graph."""
    own = name.removeprefix("base_model.model.").replace(".token_adapter.base_layer", "").replace(".base_layer", "")
    return own.replace(".token_adapter", "").replace(".trainable_tokens", ".token_adapter.trainable_tokens")


def moved(theirs: nn.Module, mine: nn.Module) -> None:
    """Give the trainable parameters of both the same other values."""
    torch.manual_seed(5)
    own = dict(mine.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
            own[named(name)].data.copy_(parameter)


@dataclass(frozen=True)
class Pair:
    tied: bool
    dtype: torch.dtype
    theirs: Any
    mine: lora_fx.TracedGraphModule
    base: lora_fx.TracedGraphModule
    directory: Path

    def model(self) -> Any:
        return llama(self.tied, self.dtype)


@pytest.fixture(
    scope="module",
    params=few(["tied, bfloat16", "untied, float32", "tied, float32, alone"], ("tied, bfloat16", "untied, float32")),
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    tied, dtype = request.param.startswith("tied"), getattr(torch, request.param.split(", ")[1])
    config: peft.PeftConfig = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=ROWS)
    if request.param.endswith("alone"):
        config = peft.TrainableTokensConfig(token_indices=ROWS)
    model = llama(tied, dtype)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, config)
    base = lora_fx.trace(llama(tied, dtype))
    mine = lora_fx.rewrite(base, config, seed=1)
    start = dict(mine.named_parameters())
    assert all(torch.equal(p, start[named(n)]) for n, p in theirs.named_parameters())
    moved(theirs, mine)
    directory = tmp_path_factory.mktemp("tokens") / "adapter"
    theirs.save_pretrained(directory)
    return Pair(tied, dtype, theirs.eval(), mine.eval(), base, directory)


def theirs_of(model: nn.Module) -> torch.Tensor:
    return model(**INPUTS, use_cache=False).logits.detach()


def logits(graph: nn.Module) -> torch.Tensor:
    return graph(**INPUTS).logits.detach()


def test_logits_and_gradients_are_pefts_bit_for_bit(pair: Pair) -> None:
    own = dict(pair.mine.named_parameters())
    for training in (True, False):
        one, other = (
            pair.theirs.train(training)(**INPUTS, use_cache=False).logits,
            pair.mine.train(training)(**INPUTS).logits,
        )
        assert torch.equal(one, other)
    for loss in (one, other):
        loss.float().square().sum().backward()
    trained = {name: p.grad for name, p in pair.theirs.named_parameters() if p.requires_grad}
    assert any("trainable_tokens_delta" in name for name in trained)
    assert all(torch.equal(grad, own[named(name)].grad) for name, grad in trained.items())


def test_a_fold_writes_the_rows_and_leaves_the_graph_of_the_trace(pair: Pair) -> None:
    folded = lora_fx.fold(pair.mine)
    assert [n.format_node() for n in folded.graph.nodes] == [n.format_node() for n in pair.base.graph.nodes]
    assert folded.state_dict().keys() == pair.base.state_dict().keys()
    before, after = (g.state_dict()["model.embed_tokens.weight"] for g in (pair.base, folded))
    values = pair.mine.get_parameter("model.embed_tokens.token_adapter.trainable_tokens_delta.default")
    assert torch.equal(after[ROWS], values.to(pair.dtype))
    rest = [row for row in range(31) if row not in ROWS]
    assert torch.equal(after[rest], before[rest])
    tolerance = 1e-6 if pair.dtype == torch.float32 else 1e-2
    assert (logits(folded) - logits(pair.mine)).abs().max() < tolerance * logits(folded).abs().max()
    lora_fx.verify(pair.mine, folded, INPUTS)
    report = lora_fx.fold_report(pair.mine, folded)
    assert [w.merged.elements for w in report if "embed_tokens" in w.merge.weight] == [len(ROWS) * 64]
    inplace = lora_fx.fold(copy.deepcopy(pair.mine), inplace=True)
    assert all(torch.equal(value, inplace.state_dict()[name]) for name, value in folded.state_dict().items())


def test_a_trace_of_pefts_model_folds_too_and_keeps_no_row(pair: Pair) -> None:
    folded = lora_fx.fold(lora_fx.trace(pair.theirs, inference=True))
    own = {named(name): value for name, value in folded.state_dict().items()}
    assert own.keys() == pair.base.state_dict().keys()
    mine = lora_fx.fold(pair.mine).state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in own.items())
    assert not folded.graph.find_nodes(op="call_function", target=torch.ops.aten.index_copy.default)


def test_files_go_both_ways(pair: Pair, tmp_path: Path) -> None:
    lora_fx.save_adapter(pair.mine, tmp_path / "mine")
    one, other = (load_file(d / "adapter_model.safetensors") for d in (pair.directory, tmp_path / "mine"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    kinds = [
        json.loads((d / "adapter_config.json").read_text())["peft_type"] for d in (pair.directory, tmp_path / "mine")
    ]
    assert kinds[0] == kinds[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(pair.model(), tmp_path / "mine").eval()
    assert torch.equal(theirs_of(theirs), logits(pair.mine))
    loaded = lora_fx.load_adapter(pair.base, pair.directory)
    assert torch.equal(logits(loaded), logits(pair.mine))
    assert torch.equal(logits(lora_fx.load_adapter(lora_fx.activate(pair.mine, {}), pair.directory)), logits(pair.base))


def test_rows_rest_act_again_and_are_transferred(pair: Pair) -> None:
    resting = lora_fx.activate(pair.mine, {})
    assert torch.equal(logits(resting), logits(pair.base))
    assert torch.equal(logits(lora_fx.activate(resting, {"default": 1.0})), logits(pair.mine))
    assert torch.equal(logits(lora_fx.unload(pair.mine)), logits(pair.base))
    assert torch.equal(logits(lora_fx.transfer(pair.mine, onto=pair.base)), logits(pair.mine))
    assert "3 rows of model.embed_tokens.weight" in repr(pair.mine)


def test_a_checkpoint_gets_the_rows_on_disk(pair: Pair, tmp_path: Path) -> None:
    pair.model().save_pretrained(tmp_path / "base")
    fold_checkpoint(tmp_path / "base", [(pair.directory, 1.0)], tmp_path / "out", verify=True, report=True)
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), lora_fx.fold(pair.mine).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


class Tagger(nn.Module):
    """An embedding, a projection, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 9)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.table(ids)).tanh())


TAGS = torch.tensor([[1, 4, 8, 4], [0, 2, 2, 7], [3, 5, 6, 4]])
BOTH = {"select": [{"target": ["table"], "trainable": [4, 0]}, {"target": ["mix", "table"], "rank": 3, "alpha": 6}]}


@pytest.fixture(scope="module")
def tagger() -> lora_fx.TracedGraphModule:
    torch.manual_seed(2)
    return lora_fx.trace(Tagger().eval(), (TAGS,))


def test_rows_of_a_rule_file_train_beside_a_branch_at_the_same_embedding(
    tagger: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    gm = lora_fx.rewrite(tagger, BOTH, seed=0)
    assert torch.equal(gm(TAGS), tagger(TAGS))
    values = gm.get_parameter("table.token_adapter.trainable_tokens_delta.default")
    assert torch.equal(values, tagger.get_parameter("table.weight")[[4, 0]])
    gm.train()
    optimizer = torch.optim.Adam([p for p in gm.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gm(TAGS).flatten(0, 1), TAGS.flip(1).flatten()).backward()
        optimizer.step()
    gm.eval()
    assert torch.equal(gm.get_parameter("table.weight"), tagger.get_parameter("table.weight"))
    expected = tagger.get_parameter("table.weight").detach().clone()
    expected[[4, 0]] = values.detach()
    assert not torch.equal(expected, tagger.get_parameter("table.weight"))
    folded = lora_fx.fold(gm, unshare=True)  # the branch is beside the embedding alone
    assert (folded(TAGS) - gm(TAGS)).abs().max() < 1e-6
    assert torch.equal(folded.get_parameter("head.weight"), expected)
    with pytest.raises(AdapterError, match="rows of its weight beside a branch, and PEFT has one of the two"):
        lora_fx.save_adapter(gm, tmp_path / "adapter")


def test_rows_are_carried_into_a_combination_and_onto_a_graph_from_meta(tagger: lora_fx.TracedGraphModule) -> None:
    gm = lora_fx.rewrite(
        tagger, {"select": [{"target": ["table"], "trainable": [2]}, {"target": ["mix"], "rank": 2}]}, seed=0
    )
    gm.get_parameter("table.token_adapter.trainable_tokens_delta.default").data.add_(1)
    two = lora_fx.rewrite(gm, {"select": [{"target": ["mix"], "rank": 3}]}, adapter="plain", seed=1)
    combined = lora_fx.combine(two, {"default": 1.0, "plain": 1.0})
    assert torch.equal(combined(TAGS), lora_fx.activate(two, {"default": 1.0, "plain": 1.0})(TAGS))
    with torch.device("meta"):
        empty = Tagger().eval()
    rules = {"select": [{"target": ["table"], "trainable": [2]}]}
    made = lora_fx.rewrite(empty, rules, example_inputs=(TAGS.to("meta"),))
    state = tagger.state_dict()
    ready = lora_fx.materialize(made, state)
    assert torch.equal(ready(TAGS), tagger(TAGS))
    value = ready.get_parameter("table.token_adapter.trainable_tokens_delta.default")
    assert value.requires_grad
    assert torch.equal(value, state["table.weight"][[2]])


def test_a_graph_that_was_pickled_takes_rows_as_the_graph_does(tagger: lora_fx.TracedGraphModule) -> None:
    graphs = [lora_fx.rewrite(each, BOTH, seed=4) for each in (tagger, pickle.loads(pickle.dumps(tagger)))]
    for each in graphs:
        set_factors(each)
        each.get_parameter("table.token_adapter.trainable_tokens_delta.default").data.mul_(3)
    assert first_difference(*graphs) is None
    assert torch.equal(*(each(TAGS) for each in graphs))
    assert not torch.equal(graphs[1](TAGS), tagger(TAGS))
    assert torch.equal(*(lora_fx.fold(each, unshare=True)(TAGS) for each in graphs))


def test_two_adapters_with_rows_of_one_embedding_act_one_at_a_time(tagger: lora_fx.TracedGraphModule) -> None:
    rules = {"select": [{"target": ["table"], "trainable": [2]}]}
    two = lora_fx.rewrite(lora_fx.rewrite(tagger, rules), rules, adapter="other")
    assert torch.equal(lora_fx.activate(two, {"other": 1.0})(TAGS), tagger(TAGS))
    with pytest.raises(PlanError, match=r"adapter 'other' and another one that acts have rows of table\.weight"):
        lora_fx.activate(two, {"default": 1.0, "other": 1.0})
    with pytest.raises(PlanError, match="'default' and 'other' have rows of embeddings, which are taken whole"):
        lora_fx.combine(two, {"default": 1.0, "other": 1.0})
    copied = lora_fx.rewrite(two, {"select": [{"target": ["table", "head"], "trainable": "all"}]}, adapter="whole")
    with pytest.raises(PlanError, match="or one rows and one a trained copy"):
        lora_fx.activate(copied, {"whole": 1.0, "other": 1.0})


DORA_OF = {"defaults": {"variant": "dora", "rank": 2}}


@pytest.mark.parametrize("at", ["table", "head"])
def test_dora_beside_rows_of_its_weight_is_refused(tagger: lora_fx.TracedGraphModule, at: str) -> None:
    rows = {"target": ["table"], "trainable": [2]}
    dora = {**DORA_OF, "select": [{"target": [at]}]}
    message = f"would have DoRA at '{at}', and adapter '.*' has rows of its weight, 'table.weight'"
    with pytest.raises(PlanError, match=message):
        lora_fx.rewrite(tagger, {**DORA_OF, "select": [{"target": [at]}, rows]})
    for first, second in (({"select": [rows]}, dora), (dora, {"select": [rows]})):
        two = lora_fx.rewrite(lora_fx.rewrite(tagger, first), second, adapter="other")
        with pytest.raises(PlanError, match=message):
            lora_fx.activate(two, {"default": 1.0, "other": 1.0})
    lora_fx.rewrite(tagger, {**DORA_OF, "select": [{"target": ["mix"]}, rows]})


def test_on_disk_rows_and_dora_of_one_embedding_are_refused(tmp_path: Path) -> None:
    llama(tied=False).save_pretrained(tmp_path / "base")
    kinds: dict[str, Any] = {"rows": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS}}
    kinds["dora"] = {"target_modules": ["embed_tokens"], "use_dora": True}
    for name, settings in kinds.items():
        wrapped = peft.get_peft_model(llama(tied=False), peft.LoraConfig(r=2, **settings))
        wrapped.save_pretrained(tmp_path / name, save_embedding_layers=False)
    pairs = [(tmp_path / name, 1.0) for name in kinds]
    for given in (pairs, pairs[::-1]):
        with pytest.raises(PlanError, match=r"DoRA at 'model\.embed_tokens', and adapter 'adapter_\d' has rows"):
            fold_checkpoint(tmp_path / "base", given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_scaled_beside_rows_of_its_weight_is_refused_by_its_node() -> None:
    config = peft.LoraConfig(r=2, target_modules=["table"], use_dora=True)
    plain = Tagger().eval()
    plain.head.weight = nn.Parameter(plain.head.weight.detach().clone())
    graph_module = lora_fx.trace(peft.get_peft_model(plain, config).eval(), (TAGS,))
    rules = {"select": [{"target": ["table.base_layer"], "trainable": [2]}]}
    with pytest.raises(FoldError, match=r"a branch must be linear in its site's input"):
        lora_fx.rewrite(graph_module, rules, adapter="rows")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"select": [{"target": ["table"], "trainable": [9]}]}, "'table.weight' has 9 rows, and 9 is none of them"),
        ({"select": [{"target": ["mix"], "trainable": [0]}]}, "matches no embedding; the model has table"),
        ({"select": [{"target": ["table"], "trainable": [1, 1]}]}, "expected 'bias', 'all' or a list of different integers"),
        ({"select": [{"target": ["table"], "trainable": [0], "rank": 2}]}, "expected none beside trainable"),
        (
            {"select": [{"target": ["table"], "trainable": [0]}, {"target": ["table"], "trainable": [1]}]},
            "names rows of 'table.weight', as an earlier selection does",
        ),
        ({"peft_type": "LORA", "target_modules": ["mix"], "trainable_token_indices": {"tabel": [0]}}, "no embedding is 'tabel'"),
        ({"peft_type": "LORA", "target_modules": ["mix"], "trainable_token_indices": {"table": [12]}}, "12 is none of them"),
        (
            {"peft_type": "LORA", "target_modules": ["table"], "trainable_token_indices": {"table": [0]}},
            "'table' would have a branch too, which PEFT refuses",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_train_are_refused_by_name(
    tagger: lora_fx.TracedGraphModule, rules: Any, message: str
) -> None:
    with pytest.raises(RuleError, match=message.replace("(", r"\(")):
        lora_fx.rewrite(tagger, rules)


def test_of_a_tie_that_its_config_does_not_name_one_module_alone_has_the_rows_as_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Tagger().eval()
    config = peft.LoraConfig(r=2, target_modules=["mix"], trainable_token_indices={"table": [4, 1]})
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path / "peft")
    gm = lora_fx.rewrite(model, config, example_inputs=(TAGS,), seed=0)
    moved(theirs, gm)
    assert torch.equal(theirs.eval()(TAGS), gm(TAGS))
    with pytest.raises(FoldError, match=r"with rows of table\.token_adapter\.trainable_tokens_delta\.default"):
        lora_fx.fold(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (lora_fx.fold(gm, unshare=True)(TAGS) - gm(TAGS)).abs().max() < 1e-6
        lora_fx.save_adapter(gm, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine").eval()
    assert torch.equal(again(TAGS), gm(TAGS))


def alone(directory: Path, model: nn.Module, **settings: Any) -> dict[str, torch.Tensor]:
    """Write an adapter of trainable tokens alone, with other values than the model's; return its tensors."""
    theirs = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=[4, 0], **settings))
    torch.manual_seed(6)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    theirs.save_pretrained(directory)
    return load_file(directory / "adapter_model.safetensors")


class Untied(nn.Module):
    """As the tagger, with a head of its own that has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.table(ids)).tanh())


@pytest.fixture(scope="module")
def untied() -> tuple[nn.Module, lora_fx.TracedGraphModule]:
    torch.manual_seed(3)
    model = Untied().eval()
    return model, lora_fx.trace(model, (TAGS,))


@pytest.mark.parametrize("target", [["table"], ["table", "head"], "t.*e|head"], ids=str)
def test_tokens_alone_are_read_written_and_folded_at_each_module_that_they_target(
    untied: tuple[nn.Module, lora_fx.TracedGraphModule], target: Any, tmp_path: Path
) -> None:
    model, base = untied
    tensors = alone(tmp_path / "theirs", copy.deepcopy(model), target_modules=target)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    gm = lora_fx.load_adapter(base, tmp_path / "theirs", trainable=True)
    assert torch.equal(gm(TAGS), theirs(TAGS))
    assert sum(p.numel() for p in gm.parameters() if p.requires_grad) == 2 * 5 * len(tensors)
    lora_fx.save_adapter(gm, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine").eval()
    assert torch.equal(again(TAGS), gm(TAGS))
    written = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(value, written[key]) for key, value in tensors.items())
    merged = theirs.merge_and_unload().state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in lora_fx.fold(gm).state_dict().items())
    assert str(lora_fx.load_adapter(base, tmp_path / "mine", "again")).count("2 rows of") == len(tensors)


def test_tokens_alone_stand_beside_a_lora_and_are_written_with_one_as_pefts_lora(
    untied: tuple[nn.Module, lora_fx.TracedGraphModule], tmp_path: Path
) -> None:
    model, base = untied
    alone(tmp_path / "tokens", copy.deepcopy(model), target_modules=["table"])
    gm = lora_fx.load_adapter(base, tmp_path / "tokens", "tokens")
    gm = lora_fx.rewrite(gm, {"defaults": {"rank": 2}, "select": [{"target": ["mix"]}]}, adapter="lora", seed=1)
    gm.get_parameter("mix.lora_B.lora.weight").data.normal_()
    both = lora_fx.combine(gm, {"tokens": 1.0, "lora": 1.0}, adapter="both")
    lora_fx.save_adapter(both, tmp_path / "both", "both")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "both").eval()
    assert torch.equal(theirs(TAGS), both(TAGS))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"token_indices": []}, "token_indices: expected a list of integers ≥ 0, the rows that train"),
        ({"token_indices": {"table": [1]}}, "token_indices: expected a list of integers ≥ 0, the rows that train"),
        ({"token_indices": [1, 1]}, r"token_indices: expected each row once, found \[1, 1\]"),
        ({"token_indices": ["a"]}, "token_indices.*expected"),
        ({"token_indices": [9]}, "token_indices: 'table' has 9 rows, and 9 is none of them"),
        ({"token_indices": [4, 0], "target_modules": ["tabel"]}, "token_indices: no embedding is 'tabel'"),
        ({"token_indices": [4, 0], "r": 4}, "r: unknown key"),
        ({"token_indices": [4, 0, 1]}, r"expected shape \(3, 5\), rows of table.weight, got \(2, 5\)"),
        ({"token_indices": [4, 0], "target_modules": ["table", "head"]}, "head.* missing in"),
    ],
)
def test_a_config_of_tokens_alone_that_does_not_fit_is_refused_by_its_own_keys(
    untied: tuple[nn.Module, lora_fx.TracedGraphModule], said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, base = untied
    alone(tmp_path, copy.deepcopy(model), target_modules=["table"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(AdapterError, match=message):
        lora_fx.load_adapter(base, tmp_path)
    if "missing" not in message and "shape" not in message:
        with pytest.raises(RuleError, match=message):
            lora_fx.rewrite(base, path)
    with pytest.raises(RuleError, match="init_weights: expected true"):
        lora_fx.rewrite(base, {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "init_weights": False})
    with pytest.raises(RuleError, match="r: unknown key: found 3"):
        lora_fx.rewrite(
            base, {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["table"]}, rank=3
        )


def test_values_of_tied_rows_that_differ_in_a_file_are_refused(pair: Pair, tmp_path: Path) -> None:
    tensors = load_file(pair.directory / "adapter_model.safetensors")
    (key,) = (key for key in tensors if "trainable_tokens" in key and "lm_head" not in key)
    other = key.replace("model.embed_tokens", "lm_head")
    told = r"lm_head.*: other values than .*embed_tokens.*, for the rows of one weight" if pair.tied else "lm_head"
    tensors[other] = tensors[key] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(pair.directory / "adapter_config.json", tmp_path)
    with pytest.raises(AdapterError, match=told):
        lora_fx.load_adapter(pair.base, tmp_path)


def test_inspect_says_which_rows_an_adapter_of_tokens_has(tmp_path: Path) -> None:
    alone(tmp_path, Untied(), target_modules=["table"])
    found = overview_of(read_adapter(tmp_path)).data
    assert found["kind"] == "trainable tokens"
    assert found["rows of embeddings"] == ["table (2)"]
    assert found["trained whole"] == []
