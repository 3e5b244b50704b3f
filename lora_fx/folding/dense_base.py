"""Dense weights of a quantised base, for a fold on disk: those that a quantised checkpoint stands for, and a dense one quantised as in training.

An adapter that was trained beside quantised weights learned beside ``dense(q(W))``, the values that their codes stand for. So what it is
added to is that, and not W. Either way the base is seen as a checkpoint of dense tensors, each of which is computed as it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_fx.adapters.peft_format.fingerprint import matches
from lora_fx.errors import FoldError, listed, option, printable
from lora_fx.files.computed_file import Computed, ComputedFile
from lora_fx.files.quantised_checkpoints import DTYPES, QuantisedTensor, quantised_tensors
from lora_fx.files.safetensors import TensorEntry, TensorFile
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.folding.checkpoint_places import Places
from lora_fx.numerics.lowrank_merge import FOLDABLE
from lora_fx.numerics.packed_integers import in_awq_order, unpacked
from lora_fx.numerics.schemes import CodebookScheme, Scheme, UniformScheme, codebook_values, parse_scheme, scheme_text
from lora_fx.tracing.transformers_models import KeyConversions


@dataclass(frozen=True)
class DenseBase:
    """A base whose quantised weights are read as dense ones.

    Attributes:
        checkpoint: of dense tensors.
        schemes: text of the scheme by the keys of the weights that are, or were, quantised.
        stored: whether the checkpoint itself is quantised, and its config says so.
        loaded_in: the dtype into which the weights were loaded before they were quantised, if that is not theirs.
        loading_known: whether that was said, or is seen by what an adapter was trained beside.
    """

    checkpoint: Checkpoint
    schemes: Mapping[str, str]
    stored: bool
    loaded_in: torch.dtype | None = None
    loading_known: bool = False

    @property
    def dropped_config(self) -> tuple[str, ...]:
        """Keys of config.json that are not true of the dense checkpoint."""
        return ("quantization_config",) if self.stored else ()

    @property
    def line(self) -> str | None:
        """What becomes of the quantised weights, in a line; None if there are none."""
        if not self.schemes:
            return None
        kinds = listed(list(dict.fromkeys(self.schemes.values())), _MAX_NAMED)
        if self.stored:
            dtypes = {str(self.checkpoint.find(key)[1].dtype).removeprefix("torch.") for key in self.schemes}
            return (
                f"{len(self.schemes)} quantised weights ({kinds}) become dense ones in {' and '.join(sorted(dtypes))}; config.json has no "
                "quantization_config then"
            )
        own = {self.checkpoint.find(key)[1].dtype for key in self.schemes}
        of = {self.loaded_in} if self.loaded_in is not None else own
        loaded = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in of))
        line = f"{len(self.schemes)} weights are quantised ({kinds}) from {loaded} and made dense again, as they were beside the adapter in training"
        if self.loading_known or own != {torch.float32}:
            return line
        narrow = option("loaded_in='bfloat16'", "--loaded-in bfloat16")
        return (
            f"{line}. If the model was loaded in another dtype there, its codes are others: pass {narrow}, for example"
        )


_MAX_NAMED = 5


def dense_base(
    checkpoint: Checkpoint,
    model: Any,
    quantised: str | None,
    not_quantised: Collection[str] | None,
    loaded_in: str | None = None,
    trained_on: Sequence[Mapping[str, str]] = (),
) -> tuple[DenseBase, Places]:
    """Return a base of dense weights, and where the tensors of a model are in it.

    Args:
        checkpoint: to read, of dense or of quantised tensors.
        model: without weights, of its config; ``quantization_config`` is taken out of that.
        quantised: text of the scheme by which the checkpoint was quantised in training; None if it was not, or is.
        not_quantised: see :func:`quantised_as_trained`.
        loaded_in: name of the dtype into which the model was loaded there; None: as ``trained_on`` tells, or that of the checkpoint.
        trained_on: fingerprints of the bases of the adapters, as far as they are known.

    Raises:
        FoldError: the checkpoint is quantised already, or cannot be quantised so, or the dtype is none.
    """
    if loaded_in is not None and quantised is None:
        told = option("loaded_in", "--loaded-in")
        raise FoldError(f"{told} goes with {option('quantised', '--quantised')}: name the scheme too.")
    if loaded_in is not None and loaded_in not in DTYPES:
        raise FoldError(f"loaded_in: expected {', '.join(DTYPES)}, got {printable(repr(loaded_in))}.")
    base = stored_dense(checkpoint, model)
    places = Places.of(model, base.checkpoint)
    if quantised is not None:
        base = quantised_as_trained(base, places, model, parse_scheme(quantised), not_quantised, loaded_in, trained_on)
    return base, replace(places, checkpoint=base.checkpoint)


# A checkpoint that is quantised.


def stored_dense(checkpoint: Checkpoint, model: Any) -> DenseBase:
    """Return a checkpoint as it is, or, if its config says that it is quantised, that of the dense tensors that it stands for.

    Args:
        checkpoint: to read.
        model: without weights, of its config; ``quantization_config`` is taken out of that.

    Raises:
        LoraFxError: the method is not known, or tensors do not fit each other or the model.
    """
    settings = _settings(model.config)
    if settings is None:
        return DenseBase(checkpoint, {}, False)
    del model.config.quantization_config
    entries = {key: entry for key, (_, entry) in checkpoint.tensors.items()}
    found = quantised_tensors(str(checkpoint.model), settings, entries, checkpoint.read)
    problems = [
        f"{part} is in {len(others) + 1} files"
        for each in found
        for part in each.parts.values()
        if (others := checkpoint.others_with(part))
    ]
    own = getattr(model.config, "dtype", None)
    conversions, state = KeyConversions.of(model), model.state_dict()
    computed: dict[str, Computed] = {}
    for each in found:
        name, converter = conversions.applied(each.key, state)
        is_conv1d = name in state and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        shape = (each.shape[1], each.shape[0]) if is_conv1d else each.shape
        if each.key in entries and each.key not in each.parts.values():
            problems.append(f"{each.key} is there both dense and quantised")
        if name in state and converter is None and tuple(state[name].shape) != shape:
            problems.append(f"{each.key}: expected {list(state[name].shape)} as in the model, got {list(shape)}")
        dtype = own if own in FOLDABLE else each.dtype
        scheme = parse_scheme(each.scheme)
        elements = partial(_stored_elements, checkpoint, each, scheme) if isinstance(scheme, CodebookScheme) else None
        matrix = partial(_stored_matrix, checkpoint, each, scheme)
        computed[each.key] = Computed(dtype, shape, each.scheme, is_conv1d, matrix, elements)
    if problems:
        raise FoldError(f"{checkpoint.model}: {listed(problems, _MAX_NAMED, '; ')}. Download it again.")
    dropped = {part for each in found for part in each.parts.values()}
    homes = {each.key: checkpoint.tensors[each.parts["codes"]][0] for each in found}
    files = tuple(
        ComputedFile.of(file, dropped, {key: computed[key] for key in computed if homes[key] is file})
        for file in checkpoint.files
    )
    shards = {}
    if checkpoint.index is not None:
        shards = {key: path for key, path in checkpoint.shards.items() if key not in dropped}
        shards |= {key: checkpoint.name_of(file) for key, file in homes.items()}
    dense = Checkpoint(checkpoint.directory, checkpoint.model, files, checkpoint.index, shards)
    return DenseBase(dense, {each.key: each.scheme for each in found}, True)


def _settings(config: Any) -> Mapping[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    if hasattr(found, "to_dict"):
        found = found.to_dict()
    return found if isinstance(found, dict) else {}


def _stored_matrix(checkpoint: Checkpoint, tensor: QuantisedTensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Return the dense matrix ``(out, in)`` that a quantised tensor stands for."""
    return scheme.dequantise(_stored_tensors(checkpoint, tensor, scheme), tensor.shape, dtype)


def _stored_elements(
    checkpoint: Checkpoint, tensor: QuantisedTensor, scheme: CodebookScheme, positions: torch.Tensor
) -> torch.Tensor:
    return scheme.elements(_stored_tensors(checkpoint, tensor, scheme), positions)


def _stored_tensors(checkpoint: Checkpoint, tensor: QuantisedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Return the tensors of the scheme of a quantised tensor."""
    parts = {name: checkpoint.read(key) for name, key in tensor.parts.items()}
    match tensor.packing:
        case "blocks":
            tensors = _blocks(tensor, scheme, parts)
        case "rows":
            if "format" in parts and int(parts["format"]) != 0:
                raise FoldError(f"{tensor.parts['format']}: expected rows (0), got the format {int(parts['format'])}.")
            tensors = {"codes": parts["codes"], "scale": parts["scale"][:, None] / 127}
        case _:
            assert isinstance(scheme, UniformScheme)
            tensors = _words(tensor, scheme, parts)
            middle = 2 ** (scheme.bits - 1)
            if tensor.symmetric and not bool((tensors["zero"] == middle).all()):
                file, _ = checkpoint.find(tensor.parts["zero"])
                raise FoldError(
                    f"{file.path}: {tensor.parts['zero']}: expected zero points of {middle}, as sym in quantization_config says, got "
                    f"{listed(list(map(str, tensors['zero'].unique().tolist())), _MAX_NAMED)} in the format {tensor.packing}. Correct sym or "
                    "checkpoint_format in config.json."
                )
    return tensors


def _blocks(tensor: QuantisedTensor, scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert isinstance(scheme, CodebookScheme)
    table = parts["map"]
    if not torch.equal(table, codebook_values(scheme.codebook)):
        raise FoldError(
            f"{tensor.parts['map']}: expected the table of {scheme.codebook}, got {[round(value, 4) for value in table.tolist()]}."
        )
    tensors = {name: part for name, part in parts.items() if name not in ("map", "state")}
    tensors["codes"] = parts["codes"].reshape(-1).view(torch.uint8)
    return {**tensors, "offset": torch.tensor(tensor.offset, dtype=torch.float32)} if scheme.nested else tensors


def _words(
    tensor: QuantisedTensor, scheme: UniformScheme, parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a uniform scheme, with the output features first."""
    outputs, inputs = tensor.shape
    awq = tensor.packing == "awq"
    codes = unpacked(parts["codes"], scheme.bits, 1 if awq else 0, outputs if awq else inputs)
    zero = _zero_points(tensor, scheme.bits, parts["zero"])
    if awq:
        codes = in_awq_order(codes)
    tensors = {"codes": codes.T.contiguous(), "zero": zero.T.contiguous(), "scale": parts["scale"].T.contiguous()}
    columns, groups = parts.get("columns"), len(parts["scale"])
    if columns is not None and not bool(((columns >= 0) & (columns < groups)).all()):
        raise FoldError(f"{tensor.parts['columns']}: expected groups from 0 to {groups - 1}, got others.")
    if groups > 1 and (columns is None or not bool(columns.any())):  # g_idx of zeros alone: some programs never fill it
        assert scheme.group is not None
        columns = torch.arange(inputs) // scheme.group
    return tensors if columns is None else {**tensors, "columns": columns}


def _zero_points(tensor: QuantisedTensor, bits: int, words: torch.Tensor) -> torch.Tensor:
    """Return zero points of shape ``(groups, out)``; the first format of GPTQ has one less.

    That one was taken from whole words, so that a zero point of 0 borrows from the next; 3 bits do not fit evenly into words, and each
    of these has its own one less.
    """
    outputs = tensor.shape[0]
    if tensor.packing == "gptq" and 32 % bits == 0:
        ones = sum(1 << place for place in range(0, 32, bits))
        words = ((words.long() + ones + 2**31) % 2**32 - 2**31).to(torch.int32)
    zero = unpacked(words, bits, 1, outputs)
    if tensor.packing == "gptq" and 32 % bits:
        zero = zero.short() + 1
    return in_awq_order(zero) if tensor.packing == "awq" else zero


# A checkpoint that is to be quantised as it was in training.


def quantised_as_trained(
    base: DenseBase,
    places: Places,
    model: Any,
    scheme: Scheme,
    skipped: Collection[str] | None = None,
    loaded_in: str | None = None,
    trained_on: Sequence[Mapping[str, str]] = (),
) -> DenseBase:
    """Return a dense base in which each linear that transformers quantises on loading has the values that its codes stand for.

    Args:
        base: the checkpoint.
        places: of the model's tensors in it.
        model: without weights.
        scheme: of the quantisation.
        skipped: modules that stay as they are, as ``llm_int8_skip_modules`` of ``BitsAndBytesConfig`` names them; None for those that
            transformers skips by itself: output embeddings, tied ones and the last module.
        loaded_in: see :func:`dense_base`.
        trained_on: see :func:`dense_base`.

    Raises:
        FoldError: the checkpoint is quantised in another way already, no linear is left, or one is not stored as the model has it.
    """
    text = scheme_text(scheme)
    if base.stored:
        if set(base.schemes.values()) != {text}:
            raise FoldError(
                f"{base.checkpoint.model} is quantised already ({listed(list(dict.fromkeys(base.schemes.values())), _MAX_NAMED)}), got {text} to "
                "quantise it with. Leave that out, or give the checkpoint that it was made of."
            )
        if loaded_in is not None:
            raise FoldError(
                f"{base.checkpoint.model} is quantised already, so that its codes are known: leave out "
                f"{option('loaded_in', '--loaded-in')}."
            )
        return base
    linears = _quantised_linears(model, scheme, skipped)
    shared = [pair for name in linears if (pair := _shared(model, places, name)) is not None]
    if shared:
        named = option(f"not_quantised=[{shared[0][0]!r}, …]", f"--not-quantised {shared[0][0]}")
        told = listed([f"{name} reads {other}" for name, other in shared], _MAX_NAMED)
        raise FoldError(
            f"{base.checkpoint.model} cannot be quantised as {text}: {told}, which is stored once and stays dense, since it is an embedding too. "
            f"transformers leaves such layers out by itself; among modules that you name, name them too: {named}."
        )
    transposed = {key: is_conv1d for name, is_conv1d in linears.items() for key in places.of_names((f"{name}.weight",))}
    problems = [problem for key in transposed for problem in _problems(base.checkpoint, key, transposed[key], scheme)]
    if not transposed:
        conv1d = any(isinstance(module, Conv1D) for module in model.modules())
        problems.append(
            f"no linear is left to quantise{' (torchao takes no Conv1D)' if conv1d and not linears else ''}"
        )
    if problems:
        told = listed(problems, _MAX_NAMED, "; ")
        raise FoldError(f"{base.checkpoint.model} cannot be quantised as {text}: {told}.")
    given = None if loaded_in is None else DTYPES[loaded_in]
    loaded, is_known = (given, True) if given else _loaded_in(places, transposed, scheme, trained_on)
    files = tuple(_quantised_file(file, transposed, scheme, loaded) for file in base.checkpoint.files)
    return DenseBase(
        replace(base.checkpoint, files=files), dict.fromkeys(transposed, text), False, loaded, loading_known=is_known
    )


def _shared(model: Any, places: Places, name: str) -> tuple[str, str] | None:
    """Return a linear whose weight is stored under the name of another module's, and that name; None for any other linear."""
    own, weight = f"{name}.weight", model.get_submodule(name).weight
    if not places.lacks((own,)):
        return None
    tied = getattr(model, "all_tied_weights_keys", {})
    others = [
        other for other, each in model.named_parameters(remove_duplicate=False) if each is weight and other != own
    ]
    other = next((other for other in (*others, tied.get(own)) if other in places.plain), None)
    return None if other is None else (name, other)


def _loaded_in(
    places: Places, transposed: Mapping[str, bool], scheme: Scheme, trained_on: Sequence[Mapping[str, str]]
) -> tuple[torch.dtype | None, bool]:
    """Return the dtype into which weights were loaded, None if none or as they are stored, and whether that is known.

    It is the one in which weights have the codes that an adapter was trained beside, the smallest of them first. Where some have the same
    codes in several dtypes, it is the one of these in which most of the dense weights have the values that they had there.
    """
    own = {name: key for name, key in places.plain.items() if key in transposed}
    for told in trained_on:
        known = [name for name in own if told.get(name, "").startswith(f"{scheme_text(scheme)} ")]
        found = {name: places.checkpoint.find(own[name]) for name in known}
        left: list[torch.dtype] = []
        for name in sorted(known, key=lambda name: math.prod(found[name][1].shape))[:_MAX_TRIED]:
            file, entry = found[name]
            tried = left or dict.fromkeys((entry.dtype, *DTYPES.values()))
            of = {dtype: _quantised(file, entry, transposed[own[name]], scheme, dtype) for dtype in tried}
            left = [dtype for dtype, computed in of.items() if matches(told[name], computed)] or left
            if len(left) < 2:
                break
        if left:
            one = left[0]
            if len(left) > 1:
                one = max(left, key=lambda dtype: len(places.same_values(told, dict.fromkeys(told, ""), dtype)))
            return (None if {entry.dtype for _, entry in found.values()} == {one} else one), True
    return None, False


_MAX_TRIED = 16
"""How many weights are quantised in several dtypes, at most, to see in which of these they have their codes."""


def _problems(checkpoint: Checkpoint, key: str, transposed: bool, scheme: Scheme) -> Iterator[str]:
    """Yield why a weight cannot be quantised."""
    _, entry = checkpoint.find(key)
    if entry.dtype not in FOLDABLE or len(entry.shape) != 2:
        yield f"{key}: expected a matrix of floating-point numbers, got {entry.dtype} {list(entry.shape)}"
    elif isinstance(scheme, UniformScheme) and scheme.group and entry.shape[not transposed] % scheme.group:
        yield f"{key}: expected input features in groups of {scheme.group}, got {entry.shape[not transposed]}"


def _quantised_file(
    file: TensorFile, transposed: Mapping[str, bool], scheme: Scheme, loaded_in: torch.dtype | None
) -> TensorFile:
    own = {
        key: _quantised(file, entry, transposed[key], scheme, loaded_in or entry.dtype)
        for key, entry in file.entries.items()
        if key in transposed
    }
    return ComputedFile.of(file, (), own) if own else file


def _quantised(
    file: TensorFile, entry: TensorEntry, transposed: bool, scheme: Scheme, loaded_in: torch.dtype
) -> Computed:
    """Return a weight as its codes have it, computed when it is read."""
    read = partial(_loaded_matrix, file, entry.name, transposed, loaded_in)
    elements = partial(_elements_as_trained, read, scheme) if isinstance(scheme, CodebookScheme) else None
    matrix = partial(_as_trained, read, scheme)
    return Computed(entry.dtype, entry.shape, scheme_text(scheme), transposed, matrix, elements)


def _loaded_matrix(file: TensorFile, key: str, transposed: bool, loaded_in: torch.dtype) -> torch.Tensor:
    """Return the matrix ``(out, in)`` of a weight; the input features are along the rows as they are quantised."""
    dense = file.read(key).to(loaded_in)
    return dense.T.contiguous() if transposed else dense


def _as_trained(read: Callable[[], torch.Tensor], scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix as its codes have it."""
    matrix = read()
    shape, tensors = matrix.shape, scheme.quantise(matrix)
    del matrix  # so that no two of them are in memory
    return scheme.dequantise(tensors, shape, dtype)


def _elements_as_trained(
    read: Callable[[], torch.Tensor], scheme: CodebookScheme, positions: torch.Tensor
) -> torch.Tensor:
    return scheme.elements_quantised(read(), positions)


def _quantised_linears(model: Any, scheme: Scheme, skipped: Collection[str] | None) -> dict[str, bool]:
    """Return the modules that transformers quantises as it loads a model; of each whether it is one of GPT-2, stored the other way round.

    Those of GPT-2 are quantised by bitsandbytes alone: torchao knows none but ``nn.Linear``.
    """
    named = None if skipped is None else list(skipped)
    kept = HfQuantizer.get_modules_to_not_convert(model, named, getattr(model, "_keep_in_fp32_modules", None))
    linears = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if type(module) is nn.Linear or (isinstance(module, Conv1D) and isinstance(scheme, CodebookScheme))
    }
    try:
        return {name: is_conv1d for name, is_conv1d in linears.items() if should_convert_module(name, kept)}
    except re.error as error:
        raise FoldError(
            f"modules that are not quantised: expected names or regular expressions, got {named}: {error}."
        ) from error
