"""Generation by graphs with a key-value cache."""

from lora_fx.generation.transformers_generator import generator

__all__ = ["generator"]
