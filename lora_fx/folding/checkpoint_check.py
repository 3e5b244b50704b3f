"""Checks around the writing of a changed checkpoint: refusals before anything is written, and a comparison with float64 after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.errors import FoldError, did_you_mean, listed
from lora_fx.files.safetensors import TensorEntry, TensorFile, bytes_of, equal_in_files
from lora_fx.folding.checkpoint import Changes, Checkpoint
from lora_fx.numerics.lowrank_merge import FOLDABLE, Merge, exact_blocks, rounded
from lora_fx.numerics.update import Update

MISROUNDED = 1e-4
"""Largest share of the elements of a weight in half precision that may be the neighbour of the exact one rounded once."""


# Before anything is written.


def check_fits(checkpoint: Checkpoint, changes: Changes) -> None:
    """Refuse changes that do not fit the checkpoint: every problem is named."""
    problems = [f"{key!r} is to be both added to and replaced" for key in changes.merges if key in changes.replacements]
    for key in (*changes.merges, *changes.replacements):
        if key not in checkpoint.tensors:
            problems.append(f"there is no {key!r}{did_you_mean(key, checkpoint.tensors)}")
    for key, merge in changes.merges.items():
        if key in checkpoint.tensors:
            problems += _merge_problems(key, merge, checkpoint.tensors[key][1], changes.tensors)
    for key, value in changes.replacements.items():
        if key in checkpoint.tensors:
            problems += _replacement_problems(key, value, checkpoint.tensors[key][1])
    if problems:
        raise FoldError(f"{checkpoint.directory} cannot be changed so: {'; '.join(dict.fromkeys(problems))}.")


def _merge_problems(key: str, merge: Merge, entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if entry.dtype not in FOLDABLE:
        yield f"{key!r} is {entry.dtype}, to which nothing can be added: dequantise the checkpoint first"
        return
    if not merge.updates and not merge.writes:
        yield f"nothing is to be added to {key!r}"
    for write in merge.writes:
        values, wanted = tensors[write.values], (tensors[write.rows].numel(), entry.shape[-1])
        if values.is_meta:
            yield f"{write.values!r} is on the meta device: load it first"
        if tuple(values.shape) != wanted:
            yield f"the rows of {key!r} do not fit: they are {list(values.shape)}, and would be {list(wanted)}"
    for update in merge.updates:
        read = [name for name in update.names if name != merge.weight]
        lacking = [name for name in read if name not in tensors]
        yield from (f"{name!r}, which is to be added to {key!r}, is missing" for name in lacking)
        empty = [name for name in read if name in tensors and tensors[name].is_meta]
        yield from (f"{name!r} is on the meta device: load it first" for name in empty)
        if not lacking and not empty:
            problem = _shape_problem(merge, update, entry, tensors)
            if problem:
                yield f"what is to be added to {key!r} does not fit: {problem}"


def _shape_problem(merge: Merge, update: Update, entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return why the product of an update is not of the weight's shape; None if it is."""
    try:
        weight = merge.stack(torch.empty(entry.shape, device="meta"))
        product: torch.Tensor | None = None
        for factor in update.factors:
            if factor.computed is not None:
                return None  # its shape is that of its value
            shape = entry.shape if factor.name == merge.weight else tensors[factor.name].shape
            tensor = factor.view.apply(torch.empty(shape, device="meta"))
            tensor = tensor if tensor.dim() == 3 else tensor[None]
            product = tensor if product is None else tensor @ product
    except (RuntimeError, IndexError, ValueError) as error:
        return str(error).splitlines()[0]
    if product is None or product.dim() != 3:
        return "it is not a matrix or a stack of them"
    matrices, rows, columns = product.shape
    if update.places is not None:
        rows = tensors[update.places].numel()
    found = (matrices, columns, rows) if merge.layout == "in_out" else (matrices, rows, columns)
    return None if found == tuple(weight.shape) else f"it is {list(found)}, the weight {list(weight.shape)}"


def _replacement_problems(key: str, value: torch.Tensor, entry: TensorEntry) -> Iterator[str]:
    if tuple(value.shape) != entry.shape:
        yield f"the new value of {key!r} is {list(value.shape)}, the old one {list(entry.shape)}"
    if value.is_meta:
        yield f"the new value of {key!r} is on the meta device: load it first"
    if value.dtype != entry.dtype and not {value.dtype, entry.dtype} <= FOLDABLE:
        yield f"the new value of {key!r} is {value.dtype}, the old one {entry.dtype}: convert it first"


def changed_in_files(checkpoint: Checkpoint, changes: Changes) -> dict[str, frozenset[str]]:
    """Return the changed tensors of each file, by its path in the directory; those that are computed are among them.

    Of several tensors of one name, the index names the one that counts. Others of its value are changed with it, so that all who
    read the result find one value; a different one is left as it is.

    Raises:
        FoldError: another value is in a file that transformers reads later, and so would load instead. All such are named.
    """
    changed = {
        checkpoint.name_of(file): {key for key in file.entries if file.is_computed(key)} for file in checkpoint.files
    }
    problems = []
    for key in (*changes.merges, *changes.replacements):
        named = checkpoint.tensors[key]
        places = [named[0], *checkpoint.others_with(key)]
        same = [file for file in places if file is named[0] or equal_in_files(named, (file, file.entries[key]))]
        last = max(places, key=checkpoint.name_of)
        if last not in same:
            problems.append(
                f"{key!r} is in {checkpoint.name_of(named[0])}, and with another value in {checkpoint.name_of(last)}"
            )
        for file in same:
            changed[checkpoint.name_of(file)].add(key)
    if problems:
        raise FoldError(
            f"{checkpoint.directory}: {listed(problems, _MAX_NAMED, '; ')}. The index names the former; transformers reads files in the "
            "order of their names, and loads the latter. Write the checkpoint again, with the value that is meant alone."
        )
    return {name: frozenset(keys) for name, keys in changed.items()}


_MAX_NAMED = 3


# After all is written.


def misrounded_share(
    checkpoint: Checkpoint, changes: Changes, changed: Mapping[str, frozenset[str]], directory: Path
) -> float:
    """Return the largest share of a weight in half precision that is not the exact result rounded once; refuse wrong values."""
    largest = 0.0
    for file in checkpoint.files:
        name = checkpoint.name_of(file)
        written = TensorFile.open(directory / name)
        for key, entry in written.entries.items():
            if key not in changed[name]:
                continue
            if key in changes.replacements:
                expected = changes.new_value(entry)
                if bytes_of(expected) != bytes_of(written.read(key)):
                    raise FoldError(_wrong(key, "it is not the value that was to be put in"))
            elif key not in changes.merges and bytes_of(file.read(key)) != bytes_of(written.read(key)):
                raise FoldError(_wrong(key, "it is not the dense value of its codes"))
            if key in changes.merges:
                merge = changes.merges[key]
                old = file.read(key)
                share = _share(key, old, written.read(key), merge, changes.factors_of(merge, old))
                largest = max(largest, share)
    return largest


def _share(key: str, old: torch.Tensor, new: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor]) -> float:
    wrong, stack = 0, merge.stack(new)
    source = merge.stack(old)
    for index, rows, exact in exact_blocks(old, merge, tensors):
        found = stack[index, rows]
        if not found.numel():
            continue
        steps = (_steps(found) - _steps(rounded(exact, new.dtype))).abs()
        wrong += int(steps.count_nonzero())
        update = (exact - source[index, rows].double()).abs().max()
        far = (steps > 1) & ((found.double() - exact).abs() > UNITS * update)
        if far.any():
            # Terms of an update may cancel each other, as where an adapter has its own start taken off: float32 is off by a part of each.
            far &= (found.double() - exact).abs() > UNITS * _largest_terms(old, merge, tensors, index, rows)
        if far.any():
            row, column = (int(place) for place in far.nonzero()[0])
            where = f"row {rows.start + row}, column {column}"
            raise FoldError(
                _wrong(key, f"at {where} it is {found[row, column].item()}, exactly {exact[row, column].item()}")
            )
    if new.dtype.itemsize > 2:
        return 0.0  # its sums are formed in its own precision, and are not exact to the last digit
    elements = max(1, new.numel())
    if wrong > MISROUNDED * elements + MAX_MISROUNDED_ELEMENTS:
        raise FoldError(_wrong(key, f"{wrong} of {elements} elements are not the exact ones rounded once"))
    return wrong / elements


def _largest_terms(
    weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor], index: int, rows: slice
) -> torch.Tensor:
    """Return the largest sum of the sizes of all terms that are added to an element of a block."""
    sizes = {name: tensor.abs() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    updates = tuple(replace(update, scaling=abs(update.scaling)) for update in merge.updates)
    every = exact_blocks(torch.zeros_like(weight), replace(merge, updates=updates, writes=()), sizes)
    return next(total for number, block, total in every if (number, block) == (index, rows)).max()


UNITS = 2.0**-18
"""Part of the largest update of a block by which float32 may be off: where old value and update cancel, of many steps."""

MAX_MISROUNDED_ELEMENTS = 4
"""Elements that may be the neighbour of the correctly rounded one in a weight of any size, however small."""


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Return whole numbers of which neighbouring values of a floating-point type have neighbouring ones; -0 is 0."""
    bits = values.contiguous().view(_INTEGERS[values.dtype.itemsize]).long()
    least = torch.iinfo(_INTEGERS[values.dtype.itemsize]).min
    return torch.where(bits < 0, least - bits, bits)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _wrong(key: str, problem: str) -> str:
    return (
        f"{key!r} was not written as it should be: {problem}. Nothing was kept. Write again; if it happens again, "
        "memory or disk are faulty, or lora_fx is."
    )
