"""A cache is passed by the name of the transformers that is installed, and one by a name that is not known is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import GenerationMixin

import lora_fx
from lora_fx.generation.prefixed_model import check_options
from lora_fx.generation.transformers_generator import Generator
from lora_fx.transformers_releases import check_cache_name


def _renamed(self: Any, input_ids: Any, keys: Any = None, **kwargs: Any) -> dict[str, Any]:
    return {"input_ids": input_ids, "keys": keys, **kwargs}


def test_the_name_of_a_supported_transformers_is_taken() -> None:
    check_cache_name()


def test_a_cache_by_another_name_is_refused_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", _renamed)
    refused = rf"^transformers {transformers.__version__} passes the cache .* Install transformers 5\.4 to 5\.24\.$"
    with pytest.raises(lora_fx.InputError, match=refused):
        Generator.generate(Generator.__new__(Generator))
    with pytest.raises(lora_fx.InputError, match=refused):
        check_options(None, {}, "prefix")
