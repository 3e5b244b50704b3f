"""A directory that clients generate with: onnxruntime-genai, and optimum's ``ORTModelForCausalLM`` and ``ORTModelForSeq2SeqLM``.

    model.onnx                graph with a key-value cache, past_key_values.{i}.key → present.{i}.key
    encoder_model.onnx, decoder_model.onnx, decoder_with_past_model.onnx
                              of an encoder-decoder model in its place: past_key_values.{i}.decoder.key, ….encoder.key
    config.json               of the transformers model; optimum reads sizes of the cache from it
    generation_config.json    defaults of generation
    genai_config.json         what onnxruntime-genai needs to know: names and sizes; of a causal model
    past_key_values.safetensors   a prefix that acts, past_key_values.{i}.key (1, heads, tokens, size): the past of a first call, for each row of
                              the batch; the mask has ones for it, and positions begin behind it
    tokenizer files           where a tokenizer is given

The files are written beside their place, and moved there together once the model was compared with its graph.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lora_fx.adapters.activate import activate
from lora_fx.adapters.prefix import acting_past, keys_and_values
from lora_fx.errors import LoraFxError, first_line
from lora_fx.export.deliver import Exported
from lora_fx.export.onnx_file import onnx
from lora_fx.export.onnx_opset import DEFAULT_OPSET
from lora_fx.files.atomic import replacing
from lora_fx.files.safetensors import write_tensors
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.graph.adapter_states import acting
from lora_fx.graph.cached_graphs import (
    PAST,
    PRESENT,
    CachedGraphs,
    cache_layers,
    check_cache,
    generation_settings,
    takes_positions,
)
from lora_fx.graph.graph_module import TracedGraphModule

_logger = logging.getLogger("lora_fx.export")

MODEL = "model.onnx"
PART_FILES = {
    "encoder": "encoder_model.onnx",
    "first": "decoder_model.onnx",
    "later": "decoder_with_past_model.onnx",
}
"""File of each graph of an encoder-decoder model, as optimum calls them."""

PAST_FILE = f"{PAST}.safetensors"


def generation(
    graph_module: TracedGraphModule | CachedGraphs,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    slots: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    opset: int = DEFAULT_OPSET,
) -> Exported:
    """Write the directory that onnxruntime-genai and optimum generate with.

    Args:
        graph_module: traced with ``cache=True``; base, branched or folded. Not changed. Of a causal language model a graph, of one
            with an encoder and a decoder all graphs together.
        directory: to be made.
        tokenizer: of the model, an object with ``save_pretrained``, or a directory whose tokenizer files are copied. Without one,
            clients are given tokens.
        slots: see :func:`lora_fx.export.onnx`: adapters are loaded and switched by the client.
        overwrite: replace a directory that holds nothing but such files.
        verify: see :func:`lora_fx.export.onnx`.
        tolerance: see :func:`lora_fx.export.onnx`.
        opset: see :func:`lora_fx.export.onnx`.

    Raises:
        LoraFxError: the graph has no cache, or the directory exists or cannot be written.
        ExportError: see :func:`lora_fx.export.onnx`.
        VerifyError: the written model does not compute what the graph computes.
    """
    graphs: dict[str, TracedGraphModule]
    past: dict[str, torch.Tensor] = {}
    if isinstance(graph_module, CachedGraphs):
        graphs = {PART_FILES[part]: each for part, each in graph_module.parts.items()}
        if slots:
            raise LoraFxError(
                "slots=True: clients of encoder-decoder models load no adapters. Write their graphs one by one, each with its adapters: "
                "lora_fx.export.onnx(graphs.encoder, path, slots=True), and so for first and later."
            )
    else:
        check_cache(graph_module)
        past, graph_module = _first_past(graph_module)
        graphs = {MODEL: graph_module}
    main = next(iter(graphs.values()))
    genai = genai_config(main) if MODEL in graphs else None
    directory = Path(directory)
    source = Path(tokenizer) if isinstance(tokenizer, str | Path) else None
    _check_tokenizer(tokenizer, source)
    reads = () if source is None else (source,)
    settings = generation_settings(main)
    _check_settings(settings)
    with replacing(Target(directory, overwrite, reads, KIND)) as beside:
        beside.mkdir()
        written = {
            name: onnx(each, beside / name, slots=slots, verify=verify, tolerance=tolerance, opset=opset)
            for name, each in graphs.items()
        }
        main.config.save_pretrained(beside)
        settings.save_pretrained(beside)
        if past:
            write_tensors(beside / PAST_FILE, past, {"format": "pt"})
        if genai is not None:
            text = json.dumps(genai, indent=2)
            (beside / GENAI_CONFIG).write_text(text + "\n", encoding="utf-8")
        if source is not None:
            _copy_tokenizer(source, beside)
        elif tokenizer is not None:
            tokenizer.save_pretrained(beside)
        files = {
            directory / path.relative_to(beside): path.stat().st_size
            for path in sorted(beside.rglob("*"))
            if path.is_file()
        }
    return replace(_together(written), path=directory, files=files)


def _first_past(graph_module: TracedGraphModule) -> tuple[dict[str, torch.Tensor], TracedGraphModule]:
    """Return the past that a prefix is, by the names of inputs, and the graph in which it does not act."""
    adapter = acting_past(graph_module)
    if adapter is None:
        return {}, graph_module
    _logger.warning(
        "the prefix of adapter %r is in %s, for clients that take a first past; onnxruntime-genai and optimum begin without one.",
        adapter,
        PAST_FILE,
    )
    pairs = keys_and_values(graph_module, adapter)
    named = (
        (f"{PAST}.{index}.{part}", each)
        for index, pair in enumerate(pairs)
        for part, each in zip(_PARTS, pair, strict=True)
    )
    others = {name: strength for name, strength in acting(graph_module).items() if name != adapter}
    return {name: each[None].cpu().contiguous() for name, each in named}, activate(graph_module, others)


_PARTS = ("key", "value")


def _check_tokenizer(tokenizer: Any, source: Path | None) -> None:
    if source is None and tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise LoraFxError(
            f"tokenizer: expected a directory, or a tokenizer of transformers with save_pretrained, got a {type(tokenizer).__name__}."
        )
    if source is not None and not source.is_dir():
        raise LoraFxError(f"tokenizer: expected a directory with a tokenizer's files, or a tokenizer, got {tokenizer}.")


def _check_settings(settings: GenerationConfig) -> None:
    """Raise :class:`LoraFxError` for settings that transformers does not save: before the export, which takes long."""
    try:
        with tempfile.TemporaryDirectory() as aside:
            settings.save_pretrained(aside)
    except ValueError as error:
        raise LoraFxError(
            f"the graph's generation_config is not valid, so that transformers does not save it: {first_line(str(error), 'ValueError')}"
        ) from error


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted(path for path in (*source.glob("*"), *source.glob(f"{_TEMPLATES}*")) if path.is_file()):
        name = file.relative_to(source)
        if _is_tokenizer_file(name.as_posix()):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)


def _together(written: Mapping[str, Exported]) -> Exported:
    """Return the record of several files as one, with inputs and outputs called ``<file>:<name>``."""
    first, *others = written.values()
    if not others:
        return first
    inputs = {f"{file}:{name}": axes for file, each in written.items() for name, axes in each.inputs.items()}
    outputs = tuple(f"{file}:{name}" for file, each in written.items() for name in each.outputs)
    comparisons = tuple(comparison for each in written.values() for comparison in each.comparisons)
    return replace(first, inputs=inputs, outputs=outputs, comparisons=comparisons)


GENAI_CONFIG = "genai_config.json"


def genai_config(graph_module: TracedGraphModule) -> dict[str, Any]:
    """Return the configuration of onnxruntime-genai for a graph with a cache, as the file ``genai_config.json`` holds it."""
    config = graph_module.config.get_text_config()
    settings = generation_settings(graph_module)
    layers = cache_layers(graph_module)
    sizes = {(layer.heads, layer.key_size) for layer in layers} | {(layer.heads, layer.value_size) for layer in layers}
    if len(sizes) > 1:
        raise LoraFxError(
            f"expected keys and values of one size in all layers, which is all that genai_config.json can say, got (heads, size of a head) "
            f"{', '.join(map(str, sorted(sizes)))}. Write the model alone: lora_fx.export.onnx(graph, path)."
        )
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if takes_positions(graph_module):
        inputs["position_ids"] = "position_ids"
    inputs |= {"past_key_names": f"{PAST}.%d.key", "past_value_names": f"{PAST}.%d.value"}

    def token(kind: str, default: Any) -> Any:
        given = (getattr(source, f"{kind}_token_id", None) for source in (settings, config))
        return next((value for value in given if value is not None), default)

    end = token("eos", None) or 0
    if token("eos", None) in (None, []):
        _logger.warning(
            "the model has no eos_token_id, which %s needs: it says 0, and onnxruntime-genai stops at that token. Set "
            "graph.generation_config.eos_token_id to a token that ends a text, or that no text has.",
            GENAI_CONFIG,
        )
    length = getattr(config, "max_position_embeddings", None) or _LENGTH
    return {
        "model": {
            "bos_token_id": token("bos", 0),
            "eos_token_id": end,
            "pad_token_id": token("pad", end[0] if isinstance(end, list) else end),
            "vocab_size": config.vocab_size,
            "context_length": length,
            "type": "decoder",
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": layers[0].key_size,
                "hidden_size": config.hidden_size,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}.%d.key",
                    "present_value_names": f"{PRESENT}.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(layers),
                "num_key_value_heads": layers[0].heads,
            },
        },
        "search": _search(settings, length),
    }


def _search(settings: GenerationConfig, length: int) -> dict[str, Any]:
    """Return the settings of the search; genai's own where the model has none."""
    defaults = {
        "early_stopping": True,
        "length_penalty": 1.0,
        "min_length": 0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    said = {name: getattr(settings, name, None) for name in defaults}
    return {
        "do_sample": bool(settings.do_sample),
        **{name: default if said[name] is None else said[name] for name, default in defaults.items()},
        "max_length": length,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,  # the graph grows its cache, and does not write into a given one
    }


_LENGTH = 4096  # of a model whose positions have no end


def _is_tokenizer_file(name: str) -> bool:
    of_tokenizer = name.startswith("tokenizer") and name.endswith((".json", ".model"))
    return name in _TOKENIZER_FILES or of_tokenizer or name.startswith(_TEMPLATES)


_TEMPLATES = "additional_chat_templates/"
_TOKENIZER_FILES = (
    *("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
    *(
        "spiece.model",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "source.spm",
        "target.spm",
        "tekken.json",
        "bpe.codes",
    ),
    *("normalizer.json", "preprocessor_config.json", "processor_config.json", "chat_template.json"),
)


def _is_written(path: str) -> bool:
    models = (MODEL, *PART_FILES.values())
    return (
        path in (*models, PAST_FILE, "config.json", "generation_config.json", GENAI_CONFIG)
        or _is_tokenizer_file(path)
        or (path.startswith(tuple(f"{model}." for model in models)) and path.endswith(".data"))
    )


KIND = DirectoryKind("a directory for generation", _is_written)
