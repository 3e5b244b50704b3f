"""Opening of an adapter: its config, the headers of its tensors, and the base that it names. No graph is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_fx.adapters.peft_format.fingerprint import differences, recorded, recorded_dense, recorded_schemes
from lora_fx.adapters.peft_format.foreign_formats.foreign_file import ForeignFile, Sizes
from lora_fx.adapters.peft_format.foreign_formats.recognize import read_foreign
from lora_fx.adapters.peft_format.keys import base_name, beside_factors
from lora_fx.adapters.peft_format.prefix_files import PrefixFile, apart
from lora_fx.adapters.peft_format.stacks import LAYOUTS, StackLayout
from lora_fx.adapters.peft_format.tensors import AdapterTensors, open_tensors
from lora_fx.errors import AdapterError, FoldError, listed, option, shortened, warn
from lora_fx.graph.prefix_slot import NO_WEIGHTS_HOLD
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig
from lora_fx.rules.peft_config.read_config import read_config
from lora_fx.rules.validation import shown


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter that was opened.

    Attributes:
        directory: where it is; or its file, in a form of other tools.
        config: of the adapter.
        file: its tensors; values for rows of embeddings have the keys of a LoRA's file also where nothing else is adapted.
        stacks: the layout of the factors of stacked experts, if it was given.
        foreign: the file in a form of other tools, while config and tensors have the names that it has for modules.
        prefix: of prefix tuning; config and tensors are then of what trains beside it.
    """

    directory: Path
    config: AdapterConfig
    file: AdapterTensors
    stacks: StackLayout | None = None
    foreign: ForeignFile | None = None
    prefix: PrefixFile | None = None

    def placed(self, modules: Sizes) -> AdapterFiles:
        """Return the adapter by the names of a graph's modules, which a form of other tools has to be fitted to.

        Raises:
            AdapterError: they do not fit.
        """
        if self.foreign is None:
            return self
        config, file = self.foreign.placed(modules)
        return replace(self, config=config, file=file, foreign=None)

    def replaced(self, names: Collection[str]) -> set[str]:
        """Return which of these parameters of a model the adapter has trained values of, in modules that train as a whole."""
        found = {base_name(key, names) for key in self.file.entries if ".original_module." not in key}
        return {name for name in found if name is not None and self.config.saves_any(name)}


def read_adapter(
    directory: Path, stacks: StackLayout | None = None, ignore_config_keys: Collection[str] = ()
) -> AdapterFiles:
    """Open an adapter.

    Args:
        directory: with ``adapter_config.json``, and ``adapter_model.safetensors`` or ``adapter_model.bin``; or a file, or a directory
            with one, in diffusers' or kohya's form.
        stacks: the layout of the factors of stacked experts, where the directory does not tell it.
        ignore_config_keys: keys of the config that lora_fx does not know, and that have no effect on the result.

    Raises:
        AdapterError: something is missing or malformed, or of an unsupported kind.
    """
    if stacks is not None and stacks not in LAYOUTS:
        problem = f"stacks: expected {' or '.join(map(repr, LAYOUTS))}, got {shown(stacks)}"
        raise AdapterError(str(directory), [problem])
    if isinstance(ignore_config_keys, str):
        problem = f"ignore_config_keys: expected a list of keys, got {shown(ignore_config_keys)}"
        raise AdapterError(str(directory), [problem])
    if not (directory / CONFIG_NAME).is_file() and directory.is_dir():
        inner = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
        if inner:
            problem = f"expected {CONFIG_NAME}, found it in {', '.join(inner)}: give one of these directories"
            raise AdapterError(str(directory), [problem])
    if (foreign := read_foreign(directory, ignore_config_keys)) is not None:
        return AdapterFiles(directory, *foreign.as_written(), stacks, foreign)
    config, file = read_config(directory, ignore_config_keys), open_tensors(directory)
    if not isinstance(config, AdapterConfig):
        prefix, file = apart(file, config)
        return AdapterFiles(directory, config.beside, file, stacks, prefix=prefix)
    if config.has_rows_alone:
        file = replace(file, entries={beside_factors(key): entry for key, entry in file.entries.items()})
    return AdapterFiles(directory, config, file, stacks)


def foldable(files: AdapterFiles) -> AdapterFiles:
    """Return an adapter that weights can hold; raise :class:`FoldError` for a prefix."""
    if files.prefix is not None:
        raise FoldError(
            f"{files.directory}: {NO_WEIGHTS_HOLD[files.prefix.kind]}. Run it with PEFT, or export a graph with it."
        )
    return files


def check_base(files: AdapterFiles, found: Mapping[str, str | None], *, strict: bool) -> None:
    """Compare a base with the base that an adapter was trained on, if the adapter's file has its fingerprint.

    Args:
        files: of the adapter.
        found: fingerprint of the base, see :func:`lora_fx.adapters.peft_format.fingerprint.differences`; empty if its weights are not known.
        strict: whether a difference is an error, or else a warning.

    Raises:
        AdapterError: they differ; also without ``strict`` where the base is of another class, without most of the tensors.
    """
    trained_on, _ = recorded(files.file.metadata)
    found = {**found, **dict.fromkeys(files.replaced(found))}  # whose values in the base are of no matter
    dense = recorded_dense(files.file.metadata)
    found |= {name: None for name, told in dense.items() if found.get(name) == told}  # made dense: the same values
    unlike = list(differences(trained_on, found)) if trained_on and found else []
    source = str(files.directory)
    missing = [name for name in trained_on if name not in found] if unlike else []
    if 2 * len(missing) > len(trained_on):
        lacking = f"this base lacks {len(missing)} of the {len(trained_on)} tensors of that, such as {missing[0]}"
        raise AdapterError(source, [f"the adapter was trained on {_model_of(files.config)}, and {lacking}"])
    if unlike:
        if strict:
            advice = f"the adapter was trained on another base; {_remedy(files, found)}, or {option('strict=False', '--no-strict')}"
            raise AdapterError(source, [advice, *shortened(unlike, _MAX_NAMED, "tensors")])
        warn(f"{source}: the adapter was trained on another base:\n  " + "\n  ".join(unlike))


def _model_of(config: AdapterConfig) -> str:
    """Return the model that an adapter was trained on, as far as its config says."""
    known = (config.auto_mapping or {}).get("base_model_class") or config.base_model_name_or_path
    return str(known or f"another model{f', of the task {config.task_type}' if config.task_type else ''}")


def _remedy(files: AdapterFiles, found: Mapping[str, str | None]) -> str:
    """Return what to pass in place of another base than an adapter's own.

    Args:
        files: of the adapter.
        found: fingerprint of the base, in which quantised weights begin with their scheme.
    """
    quantised = recorded_schemes(files.file.metadata)
    schemes = sorted(set(quantised.values()))
    dtype = _other_dtype(recorded(files.file.metadata)[0], found)
    if not schemes:
        loaded = f", or this one loaded in {dtype}, for a fold on disk written so with save_pretrained"
        return f"pass that model{loaded if dtype else ''}"
    told = f"its weights were quantised ({' and '.join(schemes)})"
    kinds = {name: text.partition(" ")[0] for name, text in found.items() if text is not None}
    if any(kinds.get(name) == scheme for name, scheme in quantised.items()):
        dense = [name for name, scheme in quantised.items() if kinds.get(name, scheme) != scheme]
        more = [name for name, kind in kinds.items() if kind in schemes and name not in quantised]
        if not dense and not more and dtype:
            way = option(
                f"load it in {dtype}, or pass loaded_in={dtype!r} to a fold on disk", f"say --loaded-in {dtype}"
            )
            return f"{told} as in this base, and others were in {dtype}: {way}"
        if not dense and not more:
            return f"{told} as in this base, but other weights: pass that model"
        unlike = [f"{listed(dense, 3)} is not here"] * bool(dense) + [f"{listed(more, 3)} was not"] * bool(more)
        return f"{told}, and {' and '.join(unlike)}: {option('not_quantised', '--not-quantised')} names the modules that stay dense"
    if not schemes[0].startswith(_REPEATABLE):
        return f"{told}: pass the model quantised in that way"
    way = f"--quantised {schemes[0]}"
    pass_model = f"pass the model quantised in that way, or fold into its checkpoint with lora-fx fold {way}"
    return f"{told}: {option(pass_model, f'say {way}')}"


def _other_dtype(trained_on: Mapping[str, str], found: Mapping[str, str | None]) -> str | None:
    """Return the narrow dtype that all tensors with another one than in this base had where an adapter was trained, if there is one.

    Those that had float32 may have been made wide after they were loaded.
    """
    pairs = [(told.split(" "), (found.get(name) or "").split(" ")) for name, told in trained_on.items()]
    unlike = {was[0] for was, now in pairs if was[1:2] == now[1:2] and was[0] != now[0]}
    dtype = unlike.pop() if len(unlike) == 1 else ""
    return dtype if dtype in ("bfloat16", "float16") else None


_REPEATABLE = ("nf4", "fp4", "int")
"""Begin the texts of schemes that quantise a dense weight by the weight alone; other methods have chosen codes by more."""

_MAX_NAMED = 10
