"""All that lies beside the weights of a checkpoint goes along with a folded one, or is named with the reason why it does not."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from typer.testing import CliRunner

from lora_fx.cli import app
from lora_fx.errors import LoraFxError
from lora_fx.folding.checkpoint import Changes, Checkpoint
from lora_fx.folding.checkpoint_files import companions_of, skipped_lines
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.folding.checkpoint_write import write_merged

ALONG = [
    ".gitattributes", "0_Extra/pytorch_model.bin", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "LICENSE", "README.md", "additional_chat_templates/tool_use.jinja", "assets/model.gguf", "chat_template.jinja",
    "colbert_linear.pt", "config.json", "config_sentence_transformers.json", "configuration_own.py", "eval/results.csv",
    "generation_config.json", "lora/adapter_config.json", "lora/adapter_model.safetensors", "merges.txt", "model_head.pkl",
    "modeling_own.py", "modules.json", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "speakers/one.npy", "spiece.model", "tokenizer.json", "tokenizer_config.json", "value_head.safetensors", "vocab.txt",
]  # fmt: skip
STATE = [
    "checkpoint-12/", "custom_checkpoint_0.pkl", "global_step12/", "optimizer.bin", "optimizer.pt", "optimizer_0/",
    "pytorch_model_fsdp.bin", "random_states_0.pkl", "rng_state.pth", "rng_state_3.pth", "runs/", "scaler.pt", "scheduler.bin",
    "scheduler.pt", "trainer_state.json", "training_args.bin",
]  # fmt: skip
OLD = [
    "consolidated.00.pth", "consolidated.safetensors", "coreml/", "flax_model.msgpack", "ggml-model-q4_0.bin", "gguf/", "metal/",
    "model-00001-of-00002.safetensors", "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.fp16.safetensors", "model.onnx",
    "model.onnx_data", "model.pt", "model.safetensors.index.fp16.json", "onnx/", "openvino/", "openvino_model.bin",
    "openvino_model.xml", "original/", "own-Q4_K_M.gguf", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "renamed.safetensors", "rust_model.ot", "tf_model.h5", "weights.npz",
]  # fmt: skip
SKIPPED = {
    **dict.fromkeys((".cache/", ".git/", "1_Pooling/__pycache__/", "__pycache__/"), "a repository or a cache"),
    **dict.fromkeys(STATE, "a training state"),
    **dict.fromkeys(
        ("adapter_config.json", "adapter_model.safetensors"), "an adapter, which transformers would add to the result"
    ),
    **dict.fromkeys(OLD, "old weights in another form"),
}


def put(directory: Path, *paths: str) -> None:
    """Make files that hold their own paths; a directory has one, so that it is not empty."""
    for path in paths:
        file = directory / (f"{path}config.json" if path.endswith("/") else path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)


def written(directory: Path) -> list[str]:
    """List all that is in a directory, at any depth."""
    return sorted(f"{path.relative_to(directory)}{'/' if path.is_dir() else ''}" for path in directory.rglob("*"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file({"a.weight": torch.ones(3, 2)}, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def test_of_a_directory_with_one_of_everything_all_goes_along_but_old_weights_and_training_states(base: Path) -> None:
    put(base, *ALONG, *SKIPPED)
    (base / "empty").mkdir()
    save_file({"a.weight": torch.zeros(3, 2), "b": torch.ones(1)}, base / "renamed.safetensors")
    save_file({"v_head.weight": torch.ones(1, 2)}, base / "value_head.safetensors")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    report = write_merged(Checkpoint.open(base), Changes(), base.parent / "out")
    directories = {f"{parent}/" for path in ALONG for parent in list(Path(path).parents)[:-1]}
    assert written(base.parent / "out") == sorted([*ALONG, *directories, "empty/", "model.safetensors"])
    assert all((base.parent / "out" / path).read_bytes() == before[base / path] for path in ALONG)
    assert report.skipped == SKIPPED
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_what_is_skipped_is_told_in_a_line_for_each_reason(base: Path) -> None:
    put(base, *SKIPPED)
    assert skipped_lines(companions_of(Checkpoint.open(base)).skipped) == [
        "not copied (a repository or a cache): .cache/, .git/, 1_Pooling/__pycache__/, __pycache__/",
        "not copied (an adapter, which transformers would add to the result): adapter_config.json, adapter_model.safetensors",
        "not copied (a training state): checkpoint-12/, custom_checkpoint_0.pkl, global_step12/, optimizer.bin, optimizer.pt, "
        "optimizer_0/, pytorch_model_fsdp.bin, random_states_0.pkl, rng_state.pth, rng_state_3.pth and 6 more",
        "not copied (old weights in another form): consolidated.00.pth, consolidated.safetensors, coreml/, flax_model.msgpack, "
        "ggml-model-q4_0.bin, gguf/, metal/, model-00001-of-00002.safetensors, model.ckpt.data-00000-of-00001, model.ckpt.index and 17 more",
    ]  # renamed.safetensors holds no tensors here


def test_links_are_followed_as_in_the_cache_of_the_hub(base: Path) -> None:
    blobs = base.parent / "blobs"
    put(blobs, "tokenizer", "pooling", "templates/tool.jinja")
    (base / "1_Pooling").mkdir()
    (base / "tokenizer.json").symlink_to("../blobs/tokenizer")
    (base / "1_Pooling" / "config.json").symlink_to("../../blobs/pooling")
    (base / "additional_chat_templates").symlink_to("../blobs/templates")
    write_merged(Checkpoint.open(base), Changes(), base.parent / "out")
    names = [
        "1_Pooling/",
        "1_Pooling/config.json",
        "additional_chat_templates/",
        "additional_chat_templates/tool.jinja",
    ]
    assert written(base.parent / "out") == [*names, "model.safetensors", "tokenizer.json"]
    assert not any(path.is_symlink() for path in (base.parent / "out").rglob("*"))
    assert (base.parent / "out" / "1_Pooling" / "config.json").read_text() == "pooling"


def test_what_cannot_be_read_is_an_error_before_anything_is_written(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(base, "1_Pooling/config.json", "secret.json", "closed/")
    (base / "tokenizer.json").symlink_to("../blobs/gone")
    (base / "1_Pooling" / "itself").symlink_to("itself")
    (base / "1_Pooling" / "back").symlink_to("..")
    (base / "1_Pooling" / "up").symlink_to(base.parent.parent)
    (base / "pytorch_model.bin").symlink_to("../blobs/never downloaded")  # which is skipped anyway
    os.mkfifo(base / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(base)
        opened.bind("socket")
    original, listing = os.open, Path.iterdir

    def denied(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith("secret.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *rest, **options)

    def closed(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(LoraFxError) as caught:
        write_merged(Checkpoint.open(base), Changes(), base.parent / "out")
    assert str(caught.value) == (
        f"{base} cannot be copied as a whole, and nothing was written: 1_Pooling/back/ is a link to {base}, which it is in: remove the "
        "link; 1_Pooling/itself is a broken link to itself: download the file again, or remove the link; 1_Pooling/up/ is a link to "
        f"{base.parent.parent}, which it is in: remove the link; closed/ cannot be read (Permission denied): see to that, or remove it; "
        "pipe is a pipe, a socket or a device, and no file: remove it; secret.json cannot be read (Permission denied): see to that, or "
        "remove it; socket is a pipe, a socket or a device, and no file: remove it; tokenizer.json is a broken link to ../blobs/gone: "
        "download the file again, or remove the link."
    )
    assert [path.name for path in base.parent.iterdir()] == ["base"]


def test_directories_that_link_to_each_other_are_an_error(base: Path) -> None:
    put(base, "one/file", "two/file")
    (base / "one" / "two").symlink_to("../two")
    (base / "two" / "one").symlink_to("../one")
    with pytest.raises(LoraFxError, match=r"one/two/one/ is a link to \S+/one, which it is in: remove the link"):
        companions_of(Checkpoint.open(base))


# With sentence-transformers.

TEXTS = ["small words", "a graph of words and longer ones"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Return a directory of sentence-transformers, an adapter, and the vectors of the texts with that merged by PEFT."""
    place = tmp_path_factory.mktemp("sentences")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "graph",
        "of",
        "small",
        "words",
        "and",
        "longer",
        "ones",
    ]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.BertModel(config).save_pretrained(place / "bert")
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(place / "bert")
    whole = SentenceTransformer(modules=[Transformer(str(place / "bert")), Pooling(24), Dense(24, 15)], device="cpu")
    whole.save_pretrained(str(place / "base"))
    before = whole.encode(TEXTS)
    wrapped = peft.get_peft_model(
        whole[0].auto_model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "dense"])
    )  # type: ignore[index, arg-type, union-attr]
    set_factors(wrapped)
    wrapped.save_pretrained(str(place / "adapter"))
    whole[0].auto_model = wrapped.merge_and_unload()  # type: ignore[index, union-attr, operator]
    vectors = whole.encode(TEXTS)
    assert abs(vectors - before).max() > 1e-2
    return place / "base", place / "adapter", vectors


@pytest.mark.parametrize("module", ["", "0_Transformer"])
def test_a_directory_of_sentence_transformers_loads_and_encodes_as_with_the_merge_inside_it(
    module: str, sentences: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    base, adapter, vectors = sentences
    if module:  # the layout of older releases: nothing of the transformer at the top
        base = shutil.copytree(base, tmp_path / "base")
        (base / module).mkdir()
        own = [
            path
            for path in base.iterdir()
            if path.is_file() and path.name not in ("modules.json", "README.md", "config_sentence_transformers.json")
        ]
        for path in own:
            path.rename(base / module / path.name)
        modules = json.loads((base / "modules.json").read_text())
        modules[0]["path"] = module
        (base / "modules.json").write_text(json.dumps(modules))
        put(base, f"{module}/pytorch_model.bin")
    report = fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "out", verify=True)
    assert report.skipped == ({f"{module}/pytorch_model.bin": "old weights in another form"} if module else {})
    assert written(tmp_path / "out") == [path for path in written(base) if path not in report.skipped]
    merged = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    assert abs(merged - vectors).max() < 1e-6


def test_a_trial_shows_what_is_copied_and_what_is_skipped(sentences: tuple[Path, Path, Any], tmp_path: Path) -> None:
    base, adapter, _ = sentences
    base = shutil.copytree(base, tmp_path / "base")
    put(base, "pytorch_model.bin", "runs/", "onnx/")
    skipped = [
        "not copied (old weights in another form): onnx/, pytorch_model.bin",
        "not copied (a training state): runs/",
    ]
    call = ["fold", str(base), str(adapter), str(tmp_path / "out")]
    trial = CliRunner().invoke(app, [*call, "--dry-run"])
    assert trial.exit_code == 0, trial.output
    assert trial.stdout.splitlines()[-4:-1] == [
        "copied too: 1_Pooling/config.json, 2_Dense/config.json, 2_Dense/model.safetensors, README.md, config.json, "
        "config_sentence_transformers.json, modules.json, sentence_bert_config.json, tokenizer.json, tokenizer_config.json",
        *skipped,
    ]
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, call)
    assert done.stdout.splitlines()[:-1] == skipped, done.output
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to("gone")
    refused = CliRunner().invoke(app, [*call[:-1], str(tmp_path / "other")])
    assert refused.exit_code == 3
    assert "tokenizer.json is a broken link to gone: download the file again, or remove the link" in refused.output
    assert not (tmp_path / "other").exists()


def test_a_directory_of_modules_without_one_transformer_is_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    for text in (
        "[]",
        "{}",
        '[{"type": "x.Transformer", "path": ".."}]',
        '[{"type": "x.Transformer", "path": "gone"}]',
    ):
        (base / "modules.json").write_text(text)
        with pytest.raises(LoraFxError, match=r"base has no weights: model\.safetensors or"):
            Checkpoint.open(base)
    (base / "modules.json").write_text("[")
    with pytest.raises(LoraFxError, match=r"modules\.json is not JSON: .* Download it again\."):
        Checkpoint.open(base)
