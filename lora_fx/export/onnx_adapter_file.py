"""Adapter files for a model with slots, in onnxruntime's format: from a graph, or from PEFT's directories."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.adapters.activate import ordered
from lora_fx.adapters.peft_format.fingerprint import fingerprint
from lora_fx.adapters.peft_format.keys import PREFIX, Slot, base_name, slots
from lora_fx.adapters.peft_format.ledger import KeyLedger
from lora_fx.adapters.peft_format.opening import AdapterFiles, check_base, read_adapter
from lora_fx.adapters.recorded import branches_of
from lora_fx.branches.lower import lower
from lora_fx.errors import ExportError, LoraFxError, did_you_mean, first_line, listed
from lora_fx.export.onnx_ops import onnx_package
from lora_fx.export.onnx_slots import check_slots
from lora_fx.export.slot_table import FORMAT, OnnxSlot, SlotTable, onnxruntime_says, version_of
from lora_fx.files.atomic import replacing
from lora_fx.files.target import Target
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, state_of
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.state import State
from lora_fx.numerics.lowrank_merge import concatenated, with_all_rows
from lora_fx.planning.plan import owners_of
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig
from lora_fx.rules.peft_config.name_matching import modules_of
from lora_fx.rules.plain_numbers import finite_number
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import Site, sites


@dataclass(frozen=True)
class ExportedAdapter:
    """A written adapter file. ``str(exported)`` is a summary of one line.

    Attributes:
        path: of the file.
        ranks: site → rank of the factors in its slot.
        model_version: a hash of its base, all that the file says of it.
    """

    path: Path
    ranks: Mapping[str, int]
    model_version: int

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return f"{self.path}: {len(self.ranks)} slots, {ranks}, for the base {self.model_version}"


def onnx_adapter(
    graph_module: TracedGraphModule,
    path: str | Path,
    adapter: str | Mapping[str, float] = "default",
    *,
    overwrite: bool = False,
) -> ExportedAdapter:
    """Write an adapter of a graph for the model that :func:`onnx` writes with ``slots=True``. Needs ``lora-fx[onnx]``.

    The file is in onnxruntime's adapter format, with the same bytes for equal adapters. Its ``model_version`` is a hash of the base.
    Several adapters become one, of the sum of their ranks: of two that fill one slot, onnxruntime takes the first.

    Args:
        graph_module: with the adapters; not changed.
        path: of the file to write.
        adapter: name of an adapter, written at its active strength; or adapter → strength.
        overwrite: replace a file that exists.

    Raises:
        PlanError: the graph has no such adapter.
        ExportError: the adapter has parts that no slot takes: a branch beside an embedding or a convolution, trained copies,
            half precision.
        WriteError: the path exists or cannot be written.
    """
    target = Target(Path(path), overwrite)
    target.check()
    graph_module = lower(as_traced(graph_module))
    strengths = {adapter: None} if isinstance(adapter, str) else ordered(graph_module, adapter)
    if not strengths:
        raise ExportError("expected at least one adapter, with its strength, got none.")
    check_slots(graph_module, tuple(strengths))
    site_of = {owner: site for site in sites(graph_module) for owner in owners_of(site)}
    products: dict[str, list[_ScaledPair]] = {}
    for name, strength in strengths.items():
        for _, branch in branches_of(graph_module, name).values():
            if strength is not None:
                branch = replace(branch, setting=replace(branch.setting, strength=strength))
            product = _of_branch(graph_module, name, branch, site_of[branch.owner])
            products.setdefault(branch.owner, []).append(product)
    return _write(target, products, version_of(fingerprint(state_of(graph_module))))


def onnx_adapter_from_peft(
    adapters: str | Path | Sequence[tuple[str | Path, float]],
    model: str | Path,
    path: str | Path,
    *,
    strict: bool = True,
    ignore_config_keys: Collection[str] = (),
    overwrite: bool = False,
) -> ExportedAdapter:
    """Write an adapter of PEFT's for a model with slots; of the model, only the ONNX file is read.

    Args:
        adapters: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``; or several, each with its strength,
            which become one adapter.
        model: written by :func:`onnx` with ``slots=True``.
        path: of the file to write.
        strict: whether an adapter that was trained on another base, as far as its file says, is an error; else a warning.
        ignore_config_keys: see :func:`lora_fx.load_adapter`.
        overwrite: replace a file that exists.

    Raises:
        AdapterError: a directory is malformed, of a kind for which there are no slots, or does not fit the model. All problems
            are named.
        ExportError: the model has no slots.
        WriteError: the path exists or cannot be written.
    """
    pairs = [(adapters, 1.0)] if isinstance(adapters, str | Path) else list(adapters)
    target = Target(Path(path), overwrite, (Path(model), *(Path(directory) for directory, _ in pairs)))
    target.check()
    if not pairs:
        raise ExportError("expected at least one adapter, with its strength, got none.")
    return from_peft(pairs, read_slots(Path(model)), target, strict=strict, ignore_config_keys=ignore_config_keys)


def from_peft(
    pairs: Sequence[tuple[str | Path, float]],
    table: SlotTable,
    target: Target,
    *,
    strict: bool,
    ignore_config_keys: Collection[str],
) -> ExportedAdapter:
    """Write an adapter of PEFT's for slots that were read: see :func:`onnx_adapter_from_peft`."""
    products: dict[str, list[_ScaledPair]] = {}
    for directory, given in pairs:
        strength = finite_number(given)
        if strength is None:
            raise ExportError(f"{directory}: expected a finite number as strength, got {given!r}.")
        files = read_adapter(Path(directory), ignore_config_keys=ignore_config_keys)
        if files.prefix is not None:
            raise ExportError(
                f"{directory}: a {files.prefix.kind} is no product of A and B, which slots take. Export the graph with it."
            )
        check_base(files, table.base, strict=strict)
        for site, product in _PeftReader(files, table).products().items():
            products.setdefault(site, []).append(replace(product, scale=product.scale * strength))
    return _write(target, products, table.version)


def read_slots(model: Path) -> SlotTable:
    """Read the slots of an ONNX model, without its weights.

    Raises:
        ExportError: it is not an ONNX model, or has no slots.
    """
    onnx = onnx_package("onnx")
    try:
        read = onnx.load(str(model), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ExportError(f"cannot read {model}: {error.strerror or error}.") from error
    except Exception as error:  # a file of unknown origin fails in any way
        raise ExportError(f"{model} is not an ONNX model: {first_line(str(error), type(error).__name__)}") from error
    return SlotTable.read({entry.key: entry.value for entry in read.metadata_props}, str(model))


@dataclass(frozen=True)
class _ScaledPair:
    """``scale · B A``, for all features of a site."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def _of_branch(graph_module: TracedGraphModule, adapter: str, branch: BranchSpec, site: Site) -> _ScaledPair:
    """Return the product of a branch, with rows of zeros for features that it leaves alone."""
    a, b = branch.factors(adapter, state_of(graph_module).tensors)
    return _ScaledPair(a, with_all_rows(b, branch.features, site.out_features), branch.setting.scale)


def _combined(products: Sequence[_ScaledPair]) -> _ScaledPair:
    """Return one product that is the sum of several: ``[B₁ B₂] [s₁ A₁; s₂ A₂]``. A scale that all have stays one."""
    scales = {product.scale for product in products}
    if len(scales) == 1:
        return _ScaledPair(*concatenated([(product.a, product.b) for product in products]), scales.pop())
    return _ScaledPair(*concatenated([(product.a * product.scale, product.b) for product in products]), 1.0)


def _write(target: Target, products: Mapping[str, Sequence[_ScaledPair]], version: int) -> ExportedAdapter:
    runtime = onnx_package("onnxruntime")
    filled = {site: _combined(products[site]) for site in sorted(products)}
    values: dict[str, np.ndarray[Any, Any]] = {}
    for site, product in filled.items():
        slot = OnnxSlot(site, site, "", "", product.a.shape[1], product.b.shape[0])
        tensors = (product.a, product.b, torch.tensor([product.scale], dtype=torch.float32))
        for name, tensor in zip(slot.names, tensors, strict=True):
            values[name] = np.ascontiguousarray(tensor.detach().cpu().numpy())
            if not np.isfinite(values[name]).all():
                raise ExportError(f"{name}: expected finite numbers, got NaN or infinity. Look at the training run.")
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(FORMAT)
    adapter.set_model_version(version)
    adapter.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    with replacing(target) as beside:
        try:
            adapter.export_adapter(str(beside))
        except RuntimeError as error:
            raise LoraFxError(
                f"cannot write {target.path}: {onnxruntime_says(error)}. Write elsewhere, or free some space."
            ) from error
    return ExportedAdapter(target.path, {site: product.a.shape[0] for site, product in filled.items()}, version)


class _PeftReader:
    """Reader of a directory of PEFT's into slots. It collects problems and raises them together."""

    def __init__(self, files: AdapterFiles, table: SlotTable) -> None:
        modules: dict[str, tuple[int, int] | None] = {path: None for name in table.base for path in modules_of(name)}
        modules |= {slot.module: (slot.in_features, slot.out_features) for slot in table.slots}
        self._files, self._table = files.placed(modules), table
        self._config = self._files.config
        self._ledger = KeyLedger(self._files)

    def products(self) -> dict[str, _ScaledPair]:
        """Return the product for each slot, by its site."""
        self._ledger.problems += [*_unslotted(self._config), *self._attentions()]
        self._ledger.stop_if_wrong()
        chosen = [slot for slot in self._table.slots if self._ledger.selects(_site(slot))]
        weights = self._ledger.weights_of(map(_site, chosen))
        reasons = [slot.apart_as_weight if slot.module in weights else slot.apart for slot in chosen]
        self._ledger.problems += filter(None, reasons)
        self._ledger.stop_if_wrong()
        placed = slots([_site(slot) for slot in chosen], self._table.base, weights)
        settings = {slot.module: self._ledger.setting_of(placed[slot.module]) for slot in chosen}
        self._ledger.problems += _split(settings)
        self._ledger.stop_if_wrong()
        products = {slot.site: self._product(placed[slot.module], settings[slot.module]) for slot in chosen}
        self._check_rest()
        if not chosen:
            self._ledger.problems.append(f"{CONFIG_NAME} selects no site at which the model has a slot")
        self._ledger.stop_if_wrong()
        return {site: product for site, product in products.items() if product is not None}

    def _attentions(self) -> Iterator[str]:
        """Yield for each ``nn.MultiheadAttention`` with factors in the file that they are not read into slots."""
        modules = (key.removeprefix(PREFIX).partition(".lora_")[0] for key in self._ledger.unread if ".lora_" in key)
        for module in dict.fromkeys(module.removesuffix(".base_layer.out_proj") for module in modules):
            weight = f"{module}.in_proj_weight"
            if weight in self._table.base and not self._config.selects_parameter(weight):
                yield (
                    f"{module}: factors of an nn.MultiheadAttention, which PEFT adds to both of its weights at once, are not read from a "
                    "directory into slots. Write them from a graph: lora_fx.export.onnx_adapter(lora_fx.from_adapter(model, directory), path)"
                )

    def _product(self, slot: Slot, setting: Setting) -> _ScaledPair | None:
        shapes = slot.shapes(BranchSpec(slot.site.name, setting))
        a, b = (self._read(key, shape, slot) for key, shape in zip(slot.keys, shapes, strict=True))
        return None if a is None or b is None else _ScaledPair(*slot.converted(a, b), setting.scale)

    def _read(self, key: str, shape: tuple[int, ...], slot: Slot) -> torch.Tensor | None:
        features = f"of {slot.site.in_features} and {slot.site.out_features} features"
        entry = self._ledger.take(key, shape, f"{CONFIG_NAME} selects {slot.name!r}", features)
        if entry is None:
            return None
        if not entry.dtype.is_floating_point or torch.promote_types(entry.dtype, torch.float32) != torch.float32:
            self._ledger.problems.append(
                f"{key}: expected float32, or a dtype that converts to it exactly, got {entry.dtype}"
            )
            return None
        return self._files.file.read(key).to(torch.float32)

    def _check_rest(self) -> None:
        """Collect every key that no slot takes, except copies of the model's own tensors."""
        modules = {slot.module for slot in self._table.slots}
        for key in self._ledger.unread:
            name = base_name(key, self._table.base)
            if name is None:
                module = key.removeprefix(PREFIX).partition(".lora_")[0]
                self._ledger.problems.append(
                    f"{key}: the model has no slot for it{did_you_mean(module, modules - {module})}. Export the model with rules that "
                    "choose its site too"
                )
            elif fingerprint(State({name: self._files.file.read(key)})) != {name: self._table.base[name]}:
                self._ledger.problems.append(
                    f"{key}: another value than the model's {name!r}, and slots take A and B alone"
                )


def _unslotted(config: AdapterConfig) -> Iterator[str]:
    advice = "has no slot. Fold the adapter (lora-fx fold), or train without"
    if config.modules_to_save:
        yield f"{CONFIG_NAME}: modules_to_save: a module that trains as a whole {advice}: got {', '.join(config.modules_to_save)}"
    if config.trainable_token_indices:
        yield f"{CONFIG_NAME}: trainable_token_indices: rows of an embedding that train {advice.replace('has no', 'have no')}"
    if config.layer_replication:
        yield f"{CONFIG_NAME}: layer_replication: slots do not say which layers they are of. Fold the adapter in memory"
    if config.alora_invocation_tokens:
        yield f"{CONFIG_NAME}: alora_invocation_tokens: a branch that acts from its invocation tokens on (aLoRA) has no slot. Train without them"
    if config.use_dora or config.lora_bias:
        kind = "use_dora: DoRA" if config.use_dora else "lora_bias: a bias in B"
        yield f"{CONFIG_NAME}: {kind} {advice}"
    if config.bias != "none":
        yield f"{CONFIG_NAME}: bias: a bias that trains {advice}: got {config.bias!r}"


def _split(settings: Mapping[str, Setting]) -> Iterator[str]:
    """Yield what is wrong with a start that took its factors from the weight, which the model with slots still has as a whole."""
    found = [module for module, setting in settings.items() if BranchSpec(module, setting).splits]
    if found:
        yield (
            f"init_lora_weights: the adapter started by splitting the weights of {listed(found, 3)} ({settings[found[0]].init!r}), and slots "
            "are beside whole weights. Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )


def _site(slot: OnnxSlot) -> Site:
    """Return a call site with the fields that decide where PEFT keeps its factors."""
    return Site(
        slot.site, slot.module, "", "linear", "", slot.weight,
        "in_out" if slot.layout == "in_out" else "out_in", slot.in_features, slot.out_features,
    )  # fmt: skip
