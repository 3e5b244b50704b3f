"""A transformers that passes its cache by another name is refused before it generates."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import GenerationMixin

import lora_fx
from lora_fx.generation.cache_name import check_cache_name
from lora_fx.generation.prefixed_model import check_options
from lora_fx.generation.transformers_generator import Generator


def _renamed(self: Any, input_ids: Any, cache: Any = None, **kwargs: Any) -> dict[str, Any]:  # as of 5.24
    return {"input_ids": input_ids, "cache": cache, **kwargs}


def test_the_name_of_a_supported_transformers_is_taken() -> None:
    check_cache_name()


def test_a_cache_by_another_name_is_refused_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", _renamed)
    refused = rf"^transformers {transformers.__version__} passes the cache .* Install transformers 5\.4 to 5\.23\.$"
    with pytest.raises(lora_fx.InputError, match=refused):
        Generator.generate(Generator.__new__(Generator))
    with pytest.raises(lora_fx.InputError, match=refused):
        check_options(None, {}, "prefix")
