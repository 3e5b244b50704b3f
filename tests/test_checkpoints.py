"""Checkpoints on disk: what is read and refused, that a changed one is exact and whole, and what is left when writing ends early."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import TRIALS, Server, check_killed, server
from safetensors.torch import load_file

from lora_fx.errors import FoldError, LoraFxError
from lora_fx.files import direct_io
from lora_fx.files.safetensors import TensorFile, write_tensors
from lora_fx.folding import checkpoint_write
from lora_fx.folding.checkpoint import INDEX, SINGLE, Changes, Checkpoint
from lora_fx.folding.checkpoint_write import write_merged
from lora_fx.numerics.lowrank_merge import Merge, measure, merge_into, rounded
from lora_fx.numerics.update import Factor, Update
from lora_fx.numerics.weight_view import SWAP, Step, View

Tensors = dict[str, torch.Tensor]
RANK = 4

# Checkpoints and what is to become of them.


def weights(seed: int = 1) -> Tensors:
    """Return weights of every dtype and layout that can be merged into, and others between them."""
    generator = torch.Generator().manual_seed(seed)

    def random_(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    return {
        "embed.weight": random_(300, 40).bfloat16(),
        "bf16.weight": random_(700, 500).bfloat16(),
        "f16.weight": random_(33, 50).half(),
        "f32.weight": random_(60, 50),
        "f64.weight": random_(20, 30).double(),
        "in_out.weight": random_(500, 61).bfloat16(),
        "square.weight": random_(64, 64).bfloat16(),
        "experts.weight": random_(3, 20, 50).bfloat16(),
        "norm.weight": random_(50),
        "norm.bias": random_(50).bfloat16(),
        "positions": torch.arange(7),
        "scale": torch.tensor(0.5),
        "nothing": torch.zeros(0, 4),
    }


def changes_for(tensors: Mapping[str, torch.Tensor], seed: int = 2) -> Changes:
    """Return a merge for each weight called so, and new values for the biases."""
    generator = torch.Generator().manual_seed(seed)
    merges, factors = {}, {}
    for key, weight in tensors.items():
        if not key.endswith(".weight") or key in ("embed.weight", "norm.weight"):
            continue
        view = View((SWAP,)) if key in ("in_out.weight", "square.weight") else View()
        rows, columns = tuple(reversed(weight.shape)) if view.steps else weight.shape[-2:]
        stack = weight.shape[:-2] if weight.dim() == 3 else ()
        factors[f"{key}.A"] = torch.randn(*stack, RANK, columns, generator=generator) * 0.05
        factors[f"{key}.B"] = torch.randn(*stack, rows, RANK, generator=generator) * 0.02
        update = Update((Factor(f"{key}.A"), Factor(f"{key}.B")), 0.5)
        merges[key] = Merge(f"module.{key}", (f"module.{key}",), (update,), view)
    values = {key: torch.full(t.shape, 1.7) for key, t in tensors.items() if key.endswith(".bias")}
    return Changes(merges, values, factors)


def merged(tensors: Mapping[str, torch.Tensor], changes: Changes) -> Tensors:
    """Return what is to come out."""
    made = {key: tensor.clone() for key, tensor in tensors.items()}
    for key, merge in changes.merges.items():
        merge_into(tensors[key], merge, changes.tensors, made[key])
    made.update({key: value.to(tensors[key].dtype) for key, value in changes.replacements.items()})
    return made


def write(directory: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """Write a checkpoint, and files that models have beside their weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.model").write_bytes(bytes(range(256)) * 9000)
    if shards == 1:
        write_tensors(directory / SINGLE, tensors, {"format": "pt"})
        return directory
    places = {key: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, key in enumerate(tensors)}
    for name in set(places.values()):
        own = {key: tensors[key] for key in tensors if places[key] == name}
        write_tensors(directory / name, own, {"format": "pt", "of": name})
    _write_index(directory, places)
    return directory


def _write_index(directory: Path, places: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _tensors_in(directory: Path) -> Tensors:
    return {k: tensor for path in sorted(directory.glob("*.safetensors")) for k, tensor in load_file(path).items()}


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)

    return one.keys() == other.keys() and all(same(tensor, other[key]) for key, tensor in one.items())


# Opening.


@pytest.mark.parametrize("shards", [1, 3])
def test_all_tensors_of_a_checkpoint_are_found(tmp_path: Path, shards: int) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, shards)
    checkpoint = Checkpoint.open(base)
    assert checkpoint.directory == base
    assert checkpoint.index == (base / INDEX if shards > 1 else None)
    assert [file.path.name for file in checkpoint.files] == sorted(path.name for path in base.glob("*.safetensors"))
    assert checkpoint.size == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert _equal({key: checkpoint.read(key) for key in tensors}, tensors)
    file, entry = checkpoint.find("scale")
    assert file.entries["scale"] is entry
    with pytest.raises(LoraFxError) as caught:
        checkpoint.find("scales")
    assert str(caught.value) == f"{base} has no tensor 'scales' (did you mean 'scale'?)."


def _two_kinds(base: Path) -> str:
    _write_index(base, {})
    return (
        f"{base} has both model.safetensors and model.safetensors.index.json, which may hold different weights; transformers "
        "reads the former only. Remove the one that is not meant."
    )


def _pickled(base: Path) -> str:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return (
        f"{base} has its weights in pytorch_model.bin only, a pickle. Pickles are not read, since they can run any code. "
        "Convert it: AutoModel.from_pretrained(directory).save_pretrained(other, safe_serialization=True)."
    )


def _none(base: Path) -> str:
    (base / "model.safetensors").unlink()
    return f"{base} has no weights: model.safetensors or model.safetensors.index.json was expected."


def _other_name(base: Path) -> str:
    (base / "model.safetensors").rename(base / "models.safetensors")
    return f"{base} has no weights: model.safetensors or model.safetensors.index.json was expected (did you mean 'models.safetensors'?)."


def _damaged(base: Path) -> str:
    (base / "model.safetensors").write_bytes(b"")
    return (
        f"{base}/model.safetensors is cut off, or no safetensors file: the length of a header and '{{' were expected, "
        "it has 0 bytes only. Copy or download it again."
    )


@pytest.mark.parametrize("damage", [_two_kinds, _pickled, _none, _other_name, _damaged])
def test_a_directory_without_clear_weights_is_refused(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(1)})
    said = damage(base)
    with pytest.raises(LoraFxError) as caught:
        Checkpoint.open(base)
    assert str(caught.value) == said


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, kind in (("none", "does not exist"), ("file", "is not a directory")):
        with pytest.raises(LoraFxError) as caught:
            Checkpoint.open(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name} {kind}; a directory with model.safetensors or model.safetensors.index.json was expected."
        )


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {"a": ONE, "b": TWO}
INDEXES: dict[str, tuple[Any, str]] = {
    "missing": ({**GOOD, "c": "x.safetensors", "d": "y.safetensors"},
        "{base} lacks x.safetensors, y.safetensors, which model.safetensors.index.json lists. Download it again."),
    "not in its shard": ({**GOOD, "b": ONE}, "{index}: 'b' is to be in " + ONE + ", but it is in none. Write the checkpoint again."),
    "in another shard": ({"a": TWO, "b": ONE}, "{index}: 'a' is to be in " + TWO + ", but it is in " + ONE + ". Write the checkpoint again."),
    "in none": ({**GOOD, "c": ONE}, "{index}: 'c' is to be in " + ONE + ", but it is in none. Write the checkpoint again."),
    "no texts": ({"a": 3}, "{index} has no weight_map from the names of tensors to those of files. Download it again."),
    "no object": ([], "{index} has no weight_map from the names of tensors to those of files. Download it again."),
} | {
    f"outside: {name!r}": ({**GOOD, "c": name},
        "{index}: " + repr(name) + " is not the path of a file in its directory, and none elsewhere is read. Correct the weight_map.")
    for name in ("../x.safetensors", "/etc/passwd", "sub/../../x.safetensors", "..", ".", "", "a\\b", "a\0b")
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(1), "b": torch.ones(2)}, 2)
    places, said = INDEXES[kind]
    _write_index(base, places)
    with pytest.raises(LoraFxError) as caught:
        Checkpoint.open(base)
    assert str(caught.value) == said.format(base=base, index=base / INDEX)


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(1), "b": torch.ones(2)}, 2)
    write_tensors(base / ONE, {"a": torch.ones(1), "c": torch.ones(1)}, {})
    with pytest.raises(LoraFxError) as caught:
        Checkpoint.open(base)
    assert str(caught.value) == f"{base / INDEX} does not list 'c', which is in {ONE}. Write the checkpoint again."


def _overlaid(base: Path, named: str, *, equal: bool) -> tuple[Tensors, Checkpoint]:
    """Return the tensors of the first shard, of which the second has two too; the index names one file for them."""
    tensors = {"square.weight": weights()["square.weight"], "norm.bias": weights()["norm.bias"]}
    base.mkdir()
    write_tensors(base / ONE, {**tensors, "one": torch.ones(3)}, {})
    write_tensors(
        base / TWO, {**(tensors if equal else {k: t + 1 for k, t in tensors.items()}), "two": torch.ones(2)}, {}
    )
    _write_index(base, {**dict.fromkeys(tensors, named), "one": ONE, "two": TWO})
    return tensors, Checkpoint.open(base)


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_changes(tmp_path: Path) -> None:
    tensors, checkpoint = _overlaid(tmp_path / "base", TWO, equal=False)
    newer = {key: tensor + 1 for key, tensor in tensors.items()}
    assert _equal({key: checkpoint.read(key) for key in tensors}, newer)
    changes = changes_for(newer)
    report = write_merged(checkpoint, changes, tmp_path / "out", verify=True, report=True)
    assert (tmp_path / "out" / ONE).read_bytes() == (tmp_path / "base" / ONE).read_bytes()
    assert _equal(load_file(tmp_path / "out" / TWO), {**merged(newer, changes), "two": torch.ones(2)})
    assert report.merged_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert len(report.weights) == 1


@pytest.mark.parametrize("named", [ONE, TWO])
def test_a_tensor_that_is_equal_in_two_shards_changes_in_both(tmp_path: Path, named: str) -> None:
    tensors, checkpoint = _overlaid(tmp_path / "base", named, equal=True)
    changes = changes_for(tensors)
    report = write_merged(checkpoint, changes, tmp_path / "out", verify=True, report=True)
    new = merged(tensors, changes)
    assert _equal(load_file(tmp_path / "out" / ONE), {**new, "one": torch.ones(3)})
    assert _equal(load_file(tmp_path / "out" / TWO), {**new, "two": torch.ones(2)})
    assert report.merged_bytes == 2 * sum(tensor.nbytes for tensor in tensors.values())
    assert len(report.weights) == 1


def test_an_index_that_names_another_value_than_transformers_loads_is_refused(tmp_path: Path) -> None:
    tensors, checkpoint = _overlaid(tmp_path / "base", ONE, equal=False)
    assert _refusal(checkpoint, changes_for(tensors), tmp_path / "out") == (
        f"{tmp_path / 'base'}: 'square.weight' is in {ONE}, and with another value in {TWO}; 'norm.bias' is in {ONE}, and with another "
        f"value in {TWO}. The index names the former; transformers reads files in the order of their names, and loads the latter. Write "
        "the checkpoint again, with the value that is meant alone."
    )
    write_merged(checkpoint, Changes(), tmp_path / "out")  # what is copied is loaded as before
    assert _same_directories(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize("links", [False, True])
def test_shards_in_a_directory_that_the_index_names_are_read_and_written_there(tmp_path: Path, links: bool) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, 3)
    places = {key: f"./parts//{name}" for key, name in json.loads((base / INDEX).read_text())["weight_map"].items()}
    (base / "parts").mkdir()
    for name in {Path(place).name for place in places.values()}:
        (base / name).rename(base / "parts" / name)
        if links:
            (base / "parts" / name).rename(tmp_path / name)
            (base / "parts" / name).symlink_to(Path("../..") / name)
    (base / "parts" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    _write_index(base, places)
    changes = changes_for(tensors)
    report = write_merged(Checkpoint.open(base), changes, tmp_path / "out", verify=True, report=True)
    assert report.skipped == {"parts/model-00009-of-00009.safetensors": "old weights in another form"}
    assert _equal(_tensors_in(tmp_path / "out" / "parts"), merged(tensors, changes))
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_path_that_leaves_the_directory_by_a_link_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(1)})
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (base / SINGLE).rename(tmp_path / "elsewhere" / "x.safetensors")
    (base / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    write_tensors(base / "x.safetensors", {"a": torch.ones(1)}, {})
    _write_index(base, {"a": "link/../x.safetensors"})
    with pytest.raises(LoraFxError, match=r"'link/\.\./x\.safetensors' is not the path of a file in its directory"):
        Checkpoint.open(base)
    (base / "link").unlink()
    (base / "link").mkdir()
    assert Checkpoint.open(base).shards == {"a": "x.safetensors"}


@pytest.mark.parametrize("text", ["{", "", "\xff", "[" * 100_000])
def test_an_index_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text, "latin-1")
    with pytest.raises(LoraFxError, match=r"index\.json is not JSON: .* Download it again"):
        Checkpoint.open(tmp_path)


def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(LoraFxError, match=r"cannot read .*index\.json: Is a directory"):
        Checkpoint.open(tmp_path)


# Writing.


WAYS = ["past the page cache", "past it until it fails", "within the kernel", "through memory"]


def _go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bytes take this way only."""
    if way == "past it until it fails":
        original, calls = os.pwrite, iter(range(10**9))

        def pwrite(*arguments: Any) -> int:
            if next(calls) % 3 == 2:
                raise OSError(errno.EINVAL, "it cannot after all")
            return original(*arguments)

        monkeypatch.setattr(os, "pwrite", pwrite)
    elif way != "past the page cache":
        monkeypatch.delattr(os, "O_DIRECT")
    if way == "through memory":
        monkeypatch.delattr(os, "copy_file_range")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_changed_checkpoint_is_the_old_one_but_for_what_was_changed(
    tmp_path: Path, shards: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_write, "PIECE", 8192)
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    _go(way, monkeypatch)
    tensors = weights()
    base, out = write(tmp_path / "base", tensors, shards), tmp_path / "new" / "out"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    changes, done = changes_for(tensors), list[int]()
    checkpoint = Checkpoint.open(base)
    threads = torch.get_num_threads()
    report = write_merged(checkpoint, changes, out, verify=True, report=True, progress=done.append)
    assert torch.get_num_threads() == threads
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == sorted(before)
    assert _equal(_tensors_in(out), merged(tensors, changes))
    for file in checkpoint.files:
        written, old = (out / file.path.name).read_bytes(), before[file.path.name]
        assert len(written) == len(old)
        assert written.startswith(file.header)
        for key, entry in file.entries.items():
            place = slice(entry.start, entry.end)
            changed = key in changes.merges or key in changes.replacements
            assert (written[place] != old[place]) is changed
    for name in before.keys() - {file.path.name for file in checkpoint.files}:
        assert (out / name).read_bytes() == before[name]
    assert sum(done) == checkpoint.size
    new = sum(tensors[key].nbytes for key in (*changes.merges, *changes.replacements))
    assert (report.merged_bytes, report.copied_bytes) == (new, checkpoint.size - new)
    assert report.skipped == {}
    assert [entry.merge for entry in report.weights] == [
        changes.merges[key] for file in checkpoint.files for key in file.entries if key in changes.merges
    ]
    for weight in report.weights:
        key = weight.merge.weight.removeprefix("module.")
        assert f"torch.{weight.dtype}" == str(tensors[key].dtype)
        assert weight.merged == measure(tensors[key], weight.merge, changes.tensors, _tensors_in(out)[key])
    assert report.misrounded is not None
    assert report.misrounded <= 1e-4


def test_without_changes_a_checkpoint_is_copied(tmp_path: Path) -> None:
    base = write(tmp_path / "base", weights(), 2)
    report = write_merged(Checkpoint.open(base), Changes(), tmp_path / "out")
    assert (report.weights, report.merged_bytes, report.misrounded) == ((), 0, None)
    assert _same_directories(base, tmp_path / "out")


def test_files_of_a_cache_of_links_are_read_and_written_as_files(tmp_path: Path) -> None:
    tensors = weights()
    real = write(tmp_path / "blobs", tensors, 2)
    base = tmp_path / "snapshots" / "main"
    base.mkdir(parents=True)
    for path in real.iterdir():
        (base / path.name).symlink_to(Path("../../blobs") / path.name)
    changes = changes_for(tensors)
    write_merged(Checkpoint.open(base), changes, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in real.iterdir())
    assert _equal(_tensors_in(tmp_path / "out"), merged(tensors, changes))


@pytest.mark.parametrize(("others", "number"), [({}, 2), ({"large": torch.zeros(2, 2**21)}, 3)])
def test_at_most_three_changed_tensors_are_in_memory_and_two_if_they_are_the_largest(
    tmp_path: Path, others: Tensors, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_write, "_SPACE", 2**10)
    tensors = {f"{number}.weight": torch.randn(64, 64) for number in range(20)}
    base = write(tmp_path / "base", {**tensors, **others})
    places: set[int] = set()

    def merging(weight: torch.Tensor, *rest: Any) -> int:
        places.add(weight.data_ptr())
        assert rest[-1] is weight
        return merge_into(weight, *rest)

    monkeypatch.setattr(checkpoint_write, "merge_into", merging)
    write_merged(Checkpoint.open(base), changes_for(tensors), tmp_path / "out")
    assert len(places) <= number


# Refusals.


def _refusal(checkpoint: Checkpoint, changes: Changes, out: Path, **options: Any) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(FoldError) as caught:
        write_merged(checkpoint, changes, out, **options)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def _with(changes: Changes, key: str, *updates: Update, view: View = View()) -> Changes:  # noqa: B008
    return replace(changes, merges={key: Merge(key, (key,), updates, view)})


PAIR = Update((Factor("bf16.weight.A"), Factor("bf16.weight.B")))
CANNOT: dict[str, tuple[Callable[[Changes], Changes], str]] = {
    "unknown": (lambda c: _with(c, "bf16.weights", PAIR), "there is no 'bf16.weights' (did you mean 'bf16.weight' or 'f16.weight'"),
    "unknown value": (lambda c: replace(c, replacements={"x": torch.ones(1)}), "there is no 'x'"),
    "dtype": (lambda c: _with(c, "positions", PAIR), "'positions' is torch.int64, to which nothing can be added: dequantise the checkpoint first"),
    "shape of a value": (
        lambda c: replace(c, replacements={"norm.bias": torch.ones(51)}), "the new value of 'norm.bias' is [51], the old one [50]",
    ),
    "dtype of a value": (
        lambda c: replace(c, replacements={"positions": torch.ones(7)}),
        "the new value of 'positions' is torch.float32, the old one torch.int64: convert it first",
    ),
    "meta value": (
        lambda c: replace(c, replacements={"norm.bias": torch.ones(50, device="meta")}),
        "the new value of 'norm.bias' is on the meta device: load it first",
    ),
    "both": (
        lambda c: replace(c, replacements={"bf16.weight": torch.ones(700, 500)}), "'bf16.weight' is to be both added to and replaced",
    ),
    "no updates": (lambda c: _with(c, "bf16.weight"), "nothing is to be added to 'bf16.weight'"),
    "missing factor": (
        lambda c: _with(c, "bf16.weight", Update((Factor("A"),), places="p")),
        "'A', which is to be added to 'bf16.weight', is missing; 'p', which is to be added to 'bf16.weight', is missing",
    ),
    "meta factor": (
        lambda c: replace(c, tensors={**c.tensors, "bf16.weight.A": torch.ones(4, 500, device="meta")}),
        "'bf16.weight.A' is on the meta device: load it first",
    ),
    "shape": (
        lambda c: _with(c, "f32.weight", PAIR),
        "what is to be added to 'f32.weight' does not fit: it is [1, 700, 500], the weight [1, 60, 50]",
    ),
    "layout": (
        lambda c: _with(c, "bf16.weight", PAIR, view=View((SWAP,))),
        "what is to be added to 'bf16.weight' does not fit: it is [1, 500, 700], the weight [1, 700, 500]",
    ),
    "rank": (
        lambda c: replace(c, tensors={**c.tensors, "bf16.weight.B": torch.ones(700, 5)}),
        "what is to be added to 'bf16.weight' does not fit: ",
    ),
    "view": (
        lambda c: _with(c, "bf16.weight", PAIR, view=View((Step("reshape", (3, 3)),))),
        "what is to be added to 'bf16.weight' does not fit: shape '[3, 3]' is invalid",
    ),
    "no matrix": (
        lambda c: replace(_with(c, "bf16.weight", Update((Factor("v"),))), tensors={"v": torch.ones(3)}),
        "what is to be added to 'bf16.weight' does not fit: it is not a matrix or a stack of them",
    ),
    "no factors": (
        lambda c: _with(c, "bf16.weight", Update(())),
        "what is to be added to 'bf16.weight' does not fit: it is not a matrix or a stack of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CANNOT)
def test_changes_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, 2)
    change, said = CANNOT[kind]
    found = _refusal(Checkpoint.open(base), change(changes_for(tensors)), tmp_path / "out")
    assert found.startswith(f"{base} cannot be changed so: ")
    assert said in found
    assert found.endswith(".")


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(1)})
    changes = Changes({"b": Merge("b", ("b",), (PAIR,))}, {"c": torch.ones(1), "a": torch.ones(2)})
    assert _refusal(Checkpoint.open(base), changes, tmp_path / "out") == (
        f"{base} cannot be changed so: there is no 'b'; there is no 'c'; the new value of 'a' is [2], the old one [1]."
    )


def test_updates_of_parts_and_of_scales_fit(tmp_path: Path) -> None:
    tensors = {"fused.weight": torch.randn(9, 5)}
    base = write(tmp_path / "base", tensors)
    update = Update((Factor("a"), Factor("b")), 0.5, ("s",), "p")
    factors = {
        "a": torch.randn(2, 5),
        "b": torch.randn(3, 2),
        "s": torch.tensor(2.0),
        "p": torch.tensor([0, 3, 3, 1, 2, 3, 3, 3, 0]),
    }
    changes = Changes({"fused.weight": Merge("fused.weight", ("fused.weight",), (update,))}, {}, factors)
    write_merged(Checkpoint.open(base), changes, tmp_path / "out", verify=True)
    assert _equal(_tensors_in(tmp_path / "out"), merged(tensors, changes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_would_not_be_finite_is_refused_and_nothing_is_left(tmp_path: Path, bad: float) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, 2)
    changes = changes_for(tensors)
    changes.tensors["bf16.weight.B"][3, 2] = bad
    values = {"norm.bias": torch.full((50,), 1e39, dtype=torch.float64)}
    said = _refusal(Checkpoint.open(base), replace(changes, replacements=values), tmp_path / "out")
    assert set(said.partition(": ")[0].split("; ")) == {
        "folding makes 'bf16.weight' non-finite in 500 elements",
        "folding makes 'norm.bias' non-finite in 50 elements",
    }
    assert said.endswith(": the weight or an adapter has a NaN, an infinity, or too large a value.")


@pytest.mark.parametrize("verify", [True, False])
def test_a_new_value_is_rounded_once(tmp_path: Path, verify: bool) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(1, dtype=torch.float16), "n": torch.ones(2, dtype=torch.int64)})
    value = torch.tensor([1 + 2.0**-11 + 2.0**-30], dtype=torch.float64)
    changes = Changes({}, {"a": value, "n": torch.tensor([3, 4])})
    write_merged(Checkpoint.open(base), changes, tmp_path / "out", verify=verify)
    written = _tensors_in(tmp_path / "out")
    assert torch.equal(written["a"], rounded(value, torch.float16))
    assert written["a"].item() == 1 + 2.0**-10
    assert written["n"].tolist() == [3, 4]


def test_the_checkpoint_itself_is_not_replaced(tmp_path: Path) -> None:
    real = write(tmp_path / "a" / "b" / "real", weights())
    base = tmp_path / "base"
    base.mkdir()
    for path in real.iterdir():
        (base / path.name).symlink_to(path)
    for out in (base, tmp_path / "a", real, tmp_path / "a" / "b"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(LoraFxError, match=r"read to make the result.* Choose another name\."):
            write_merged(Checkpoint.open(base), Changes(), out, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before


def test_what_exists_is_replaced_only_if_asked(tmp_path: Path) -> None:
    tensors = weights()
    base, out = write(tmp_path / "base", tensors), tmp_path / "out"
    out.mkdir()
    (out / SINGLE).write_text("old")
    with pytest.raises(LoraFxError, match="out exists already"):
        write_merged(Checkpoint.open(base), Changes(), out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(SINGLE, "old")]
    write_merged(Checkpoint.open(base), Changes(), out, overwrite=True)
    assert _same_directories(base, out)


@pytest.mark.parametrize("kind", ["shorter", "longer", "gone"])
def test_a_checkpoint_that_changes_meanwhile_is_refused(tmp_path: Path, kind: str) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors)
    checkpoint, path = Checkpoint.open(base), base / SINGLE
    size = path.stat().st_size
    said = f"cannot read {path}: No such file or directory."
    if kind == "gone":
        path.unlink()
    else:
        os.truncate(path, size + (1 if kind == "longer" else -1))
        said = f"{path} changed while it was read: it had {size} bytes, and has {path.stat().st_size}. Fold once more."
    with pytest.raises(LoraFxError) as caught:
        write_merged(checkpoint, changes_for(tensors), tmp_path / "out")
    assert str(caught.value) == said
    assert [each.name for each in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("odd", [1, 2, 3])
def test_tensors_may_lie_at_odd_places_of_a_file(
    tmp_path: Path, odd: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _go(way, monkeypatch)
    tensors = weights()
    base = write(tmp_path / "base", tensors)
    path = base / SINGLE
    file = TensorFile.open(path)
    text = file.header[8:].rstrip()
    text += b" " * (odd - len(text) % 4 + 4)
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[len(file.header) :])
    changes = changes_for(tensors)
    write_merged(Checkpoint.open(base), changes, tmp_path / "out", verify=True)
    assert (tmp_path / "out" / SINGLE).read_bytes().startswith(len(text).to_bytes(8, "little") + text)
    assert _equal(_tensors_in(tmp_path / "out"), merged(tensors, changes))


@pytest.mark.parametrize("number", [0, errno.EXDEV])
def test_where_the_kernel_does_not_copy_it_is_done_here(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> int:
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "copy_file_range", fail)
    base = write(tmp_path / "base", weights(), 2)
    write_merged(Checkpoint.open(base), Changes(), tmp_path / "out")
    assert _same_directories(base, tmp_path / "out")


# Verification.


def _flipped(weight: torch.Tensor, bits: int, every: int) -> None:
    whole = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    whole.view(-1)[::every] ^= bits


@pytest.mark.parametrize(
    "key", ["bf16.weight", "f16.weight", "f32.weight", "f64.weight", "in_out.weight", "experts.weight"]
)
def test_a_wrong_element_is_found(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, 2)

    def corrupting(weight: torch.Tensor, merge: Merge, *rest: Any) -> int:
        report = merge_into(weight, merge, *rest)
        if merge.weight == f"module.{key}":
            last = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]).view(-1)
            last[-1] ^= 1 << 8 * weight.element_size() - 4  # of the exponent
        return report

    monkeypatch.setattr(checkpoint_write, "merge_into", corrupting)
    said = _refusal(Checkpoint.open(base), changes_for(tensors), tmp_path / "out", verify=True)
    row, column = (size - 1 for size in tensors[key].shape[-2:])
    assert said.startswith(f"{key!r} was not written as it should be: at row {row}, column {column} it is ")
    assert said.endswith(
        "Nothing was kept. Write again; if it happens again, memory or disk are faulty, or lora_fx is."
    )


def test_too_many_neighbours_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, 2)

    def corrupting(weight: torch.Tensor, *rest: Any) -> int:
        report = merge_into(weight, *rest)
        if weight.shape == (700, 500):
            _flipped(weight, 1, 1000)
        return report

    monkeypatch.setattr(checkpoint_write, "merge_into", corrupting)
    said = _refusal(Checkpoint.open(base), changes_for(tensors), tmp_path / "out", verify=True)
    assert said.startswith("'bf16.weight' was not written as it should be: 3")
    assert "of 350000 elements are not the exact ones rounded once" in said


def test_a_value_that_was_not_put_in_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors)
    original = checkpoint_write.write_at

    def losing(new: Any, buffer: memoryview, *rest: Any) -> None:
        original(new, memoryview(bytes(len(buffer))) if len(buffer) == 100 else buffer, *rest)

    monkeypatch.setattr(checkpoint_write, "write_at", losing)
    said = _refusal(Checkpoint.open(base), changes_for(tensors), tmp_path / "out", verify=True)
    assert said.startswith("'norm.bias' was not written as it should be: it is not the value that was to be put in.")


def test_what_cancels_is_not_taken_for_wrong(tmp_path: Path) -> None:
    """Where an update takes a weight away, what float32 leaves of it is many steps from the exact rest, and yet nothing."""
    generator = torch.Generator().manual_seed(3)
    factors = {"a": torch.randn(RANK, 300, generator=generator), "b": torch.randn(400, RANK, generator=generator)}
    weight = (-(factors["b"].double() @ factors["a"].double())).float()
    base = write(tmp_path / "base", {"x.weight": weight})
    update = Update((Factor("a"), Factor("b")))
    changes = Changes({"x.weight": Merge("x.weight", ("x.weight",), (update,))}, {}, factors)
    write_merged(Checkpoint.open(base), changes, tmp_path / "out", verify=True)
    assert not torch.equal(_tensors_in(tmp_path / "out")["x.weight"], torch.zeros(400, 300))


# Full disks.


@pytest.mark.parametrize("step", ["write_at", "copy_bytes", "write_back_early", "ENOSPC of copy_file_range", "mkdir"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "copy_bytes" or "copy_file_range" in step:
        monkeypatch.delattr(os, "O_DIRECT")
    if step == "mkdir":
        original = Path.mkdir
        monkeypatch.setattr(
            Path, "mkdir", lambda self, **options: (fail if self.name == "out" else original)(self, **options)
        )
    elif step.startswith("ENOSPC"):
        monkeypatch.setattr(os, "copy_file_range", fail)
    else:
        monkeypatch.setattr(direct_io if step == "write_back_early" else checkpoint_write, step, fail)
    tensors = weights()
    base, out = write(tmp_path / "base", tensors, 2), tmp_path / "new" / "out"
    for overwrite in (False, True):
        with pytest.raises(LoraFxError) as caught:
            write_merged(Checkpoint.open(base), changes_for(tensors), out, overwrite=overwrite)
        assert str(caught.value) == (
            f"cannot write {out}: No space left on device. Free some space, or write to another disk."
        )
        assert list(out.parent.iterdir()) == []


LIMITED = """
    import resource, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_checkpoints import *
    base, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    tensors = weights()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_merged(Checkpoint.open(base), changes_for(tensors), out)
    except LoraFxError as error:
        print(error)
    print(sorted(path.name for path in out.parent.iterdir()))
"""


def _run(base: Path, out: Path, limit: int, *before: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(LIMITED).format(tests=str(Path(__file__).parent))
    command = [*before, sys.executable, "-c", script, str(base), str(out), str(limit)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_limit_on_the_size_of_files_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    base, out = write(tmp_path / "base", weights()), tmp_path / "new" / "out"
    out.parent.mkdir()
    done = _run(base, out, 700_000)
    assert done.stdout.splitlines() == [
        f"cannot write {out}: File too large. Files of that size are not allowed there: raise the limit (ulimit -f), or write to another "
        "disk.",
        "[]",
    ], done.stderr


def test_a_real_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """On a file system of 2 MB where one may be mounted, else under a limit on the size of files."""
    base, place = write(tmp_path / "base", weights()), tmp_path / "small"
    place.mkdir()
    mounted = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', str(place)]
    can = (
        shutil.which("unshare") and subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode == 0
    )
    done = _run(base, place / "out", 0, *mounted) if can else _run(base, place / "out", 700_000)
    reason = "No space left on device. Free some space, or" if can else "File too large. "
    said, left = done.stdout.splitlines()
    assert said.startswith(f"cannot write {place / 'out'}: {reason}"), done.stderr
    assert left == "[]"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    tensors = weights()
    base = write(tmp_path / "base", tensors, 2)

    def interrupt(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_merged(Checkpoint.open(base), changes_for(tensors), tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Killed at any moment.

SETUP = """
from test_checkpoints import *
torch.set_num_threads(1)
checkpoint = Checkpoint.open(Path(sys.argv[1]))
changes = changes_for({key: torch.empty(entry.shape) for key, (_, entry) in checkpoint.tensors.items()})

def act(out, overwrite):
    write_merged(checkpoint, changes, out, overwrite=overwrite)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 20 MB."""
    generator = torch.Generator().manual_seed(9)
    tensors = {
        f"{number}.{kind}": (torch.randn(1024, 1024, generator=generator) * 0.02).bfloat16()
        for number in range(5)
        for kind in ("weight", "kept")
    }
    return write(tmp_path_factory.mktemp("large") / "base", tensors, 4)


@pytest.fixture(scope="module")
def act(large: Path) -> Iterator[Server]:
    with server(SETUP, large) as merging:
        yield merging


def _same_directories(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_that_is_killed_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, large: Path, act: Server, overwrite: bool, trials: int
) -> None:
    old, new, place = tmp_path / "old", tmp_path / "new", tmp_path / "place"
    write(old, {"a": torch.ones(3)})
    place.mkdir()
    assert act(new, overwrite=False)[0] == 0
    check_killed(
        act,
        place,
        overwrite=overwrite,
        old=lambda out: shutil.copytree(old, out),
        new=lambda out: _same_directories(out, new),
        same_as_old=lambda out: _same_directories(out, old),
        remove=shutil.rmtree,
        trials=trials,
    )
    assert _equal(_tensors_in(place / "out"), merged(_tensors_in(large), changes_for(_tensors_in(large))))
