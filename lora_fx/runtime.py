"""Serving a model with slots: one ``onnxruntime.InferenceSession``, and any number of adapters, one for each call.

Needs onnxruntime and numpy alone. onnxruntime itself can do all this, but checks nothing. It takes an adapter of
another base, the first of two that fill one slot, and none at all where inputs are bound (``run_with_iobinding``) or the call
does not wait (``run_async``); and it does not keep an adapter alive that it runs with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import numpy as np

from lora_fx.errors import AdapterError, ExportError, InputError, did_you_mean, shortened
from lora_fx.export.slot_table import FORMAT, MAX_PROBLEMS, SlotTable, onnxruntime_says

try:
    import onnxruntime
except ImportError as error:
    raise ImportError(f"lora_fx.runtime needs onnxruntime: pip install 'lora-fx[onnx]'. {error}") from error

__all__ = ["OnnxSession"]

Array = np.ndarray[Any, Any]


class OnnxSession:
    """A model that was exported with ``slots=True``, and adapters for it. Its methods may be called from any thread.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        slots: what the model says of its slots.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        options: onnxruntime.SessionOptions | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ) -> None:
        """Load a model.

        Args:
            path: of the file.
            options: of the session; by default those of onnxruntime, which warns once for every slot, without its warnings.
            providers: see ``onnxruntime.InferenceSession``.

        Raises:
            ExportError: onnxruntime does not load the model, or it has no slots, or an optimiser made constants of them.
        """
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} does not load {path}: {onnxruntime_says(error)}"
            ) from error
        self.slots = SlotTable.read(self.session.get_modelmeta().custom_metadata_map, str(path))
        self._slot_names = self.slots.names
        there = {value.name for value in self.session.get_overridable_initializers()}
        gone = sorted(self._slot_names - there)
        if gone:
            raise ExportError(
                f"{path}: {len(gone)} inputs of slots are not there any more, {gone[0]} the first: an optimiser took their defaults for "
                "constants. Use the file that lora_fx.export.onnx wrote."
            )
        self._inputs = tuple(value.name for value in self.session.get_inputs())
        self._outputs = tuple(value.name for value in self.session.get_outputs())
        self._adapters: dict[str, Any] = {}
        self._lock = Lock()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        with self._lock:
            return tuple(self._adapters)

    def load(self, name: str, path: str | Path) -> None:
        """Load an adapter; its file is mapped into memory, and must not be written to while it is loaded.

        Args:
            name: for calls.
            path: of a file that :func:`lora_fx.export.onnx_adapter` wrote.

        Raises:
            AdapterError: the name is taken, the file is none of an adapter, it is for another base, or it does not fit the
                slots of the model, or has NaN or infinity in it. All problems are named.
        """
        loaded = _loaded(Path(path), self.slots)
        with self._lock:
            if name in self._adapters:
                raise AdapterError(
                    str(path), [f"an adapter {name!r} is loaded already. Unload it, or choose another name"]
                )
            self._adapters[name] = loaded

    def unload(self, name: str) -> None:
        """Let go of an adapter. Calls that run with it go on to their end.

        Raises:
            InputError: no such adapter is loaded.
        """
        with self._lock:
            self._found(name)
            del self._adapters[name]

    def run(
        self, inputs: Mapping[str, Any], adapter: str | None = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: name → array, of all inputs of the model, in the shapes and dtypes that it was exported with.
            adapter: name of the one adapter to run with; by default none, which gives what the base gives.
            outputs: names of the outputs to return, by default all.

        Returns:
            Name → value, of the outputs.

        Raises:
            InputError: there is no such adapter, input or output, or onnxruntime does not take these values.
        """
        self._check(inputs, outputs)
        wanted = list(self._outputs if outputs is None else outputs)
        if not wanted:  # which onnxruntime takes for all
            return {}
        options = onnxruntime.RunOptions()
        loaded = None  # held until the run is over, whatever is unloaded meanwhile: the options do not
        if adapter is not None:
            with self._lock:
                loaded = self._found(adapter)
            options.add_active_adapter(loaded)
        try:
            found = self.session.run(wanted, dict(inputs), options)
        except Exception as error:
            raise InputError(
                f"onnxruntime does not run the model on these inputs: {onnxruntime_says(error)}"
            ) from error
        finally:
            del options, loaded
        return dict(zip(wanted, found, strict=True))

    def io_binding(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: onnxruntime ignores adapters where inputs are bound, or the call does not wait.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            "with bound inputs (run_with_iobinding) and in run_async onnxruntime ignores adapters, and the result would be that of the base. "
            "Call run. Without an adapter, OnnxSession.session has these methods."
        )

    run_with_iobinding = io_binding
    run_async = io_binding

    def _found(self, name: str) -> Any:
        if not isinstance(name, str):
            raise InputError(
                f"one adapter is expected, by its name, and this is {name!r}: of two that fill one slot onnxruntime would take the first. "
                'Make one of them: lora_fx.export.onnx_adapter(graph, path, {"a": 1.0, "b": 0.5}).'
            )
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise InputError(f"no adapter {name!r} is loaded{did_you_mean(name, self._adapters)}; loaded: {known}.")
        return self._adapters[name]

    def _check(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None) -> None:
        filled = sorted(self._slot_names.intersection(inputs))
        if filled:
            raise InputError(
                f"{filled[0]!r} is an input of a slot: an adapter would have precedence over it, in silence. Load the values as an adapter."
            )
        missing = [name for name in self._inputs if name not in inputs]
        unknown = [name for name in inputs if name not in self._inputs]
        if missing or unknown:
            told = f"no value for {', '.join(missing)}" if missing else f"no input {', '.join(unknown)}"
            raise InputError(f"{told}: the model takes {', '.join(self._inputs)}.")
        strange = [name for name in outputs or () if name not in self._outputs]
        if strange:
            raise InputError(f"the model has no output {strange[0]!r}; it has {', '.join(self._outputs)}.")


def _loaded(path: Path, slots: SlotTable) -> Any:
    """Return an adapter that was looked at."""
    try:
        before = _identity(path)
        read = onnxruntime.AdapterFormat.read_adapter(str(path))
        _check(path, read, slots)
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(path))
        same = _identity(path) == before
    except OSError as error:
        raise AdapterError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except (RuntimeError, ValueError) as error:  # ValueError: of a name in it, or its own, that is no text
        problem = f"expected a file of onnxruntime's adapter format: {onnxruntime_says(error)}. Write it: lora-fx export-adapter"
        raise AdapterError(str(path), [problem]) from error
    if not same:
        raise AdapterError(str(path), ["it was replaced while it was loaded. Load it again"])
    return adapter


def _identity(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check(path: Path, read: Any, slots: SlotTable) -> None:
    if read.get_adapter_version() != FORMAT:
        problem = f"expected an adapter of lora_fx, of version {FORMAT}, found version {read.get_adapter_version()}"
        raise AdapterError(str(path), [f"{problem}. Write it: lora-fx export-adapter PEFT_DIR MODEL.onnx OUT"])
    if read.get_model_version() != slots.version:
        raise AdapterError(
            str(path),
            [
                f"it is for the base {read.get_model_version()}, and this model is {slots.version}: other weights. Take the model that it "
                "was trained on, or make it anew from its PEFT directory: lora-fx export-adapter"
            ],
        )
    found = {name: (value.data_type(), tuple(value.shape())) for name, value in read.get_parameters().items()}
    problems = slots.problems(found) or _not_finite(read.get_parameters())
    if problems:
        raise AdapterError(str(path), problems)


def _not_finite(parameters: Mapping[str, Any]) -> list[str]:
    counts = {name: np.count_nonzero(~np.isfinite(value.numpy())) for name, value in sorted(parameters.items())}
    problems = [f"{name}: expected finite numbers, got {bad} that are not" for name, bad in counts.items() if bad]
    return shortened(problems, MAX_PROBLEMS, "problems")
