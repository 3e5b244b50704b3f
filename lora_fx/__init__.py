"""LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, and fold them back into its weights.

:func:`rewrite` traces a model and adds branches; :func:`from_adapter` and :func:`save_adapter` read and write PEFT's adapters;
:func:`fold` merges branches into weights; :mod:`lora_fx.export` writes files for other runtimes. Functions return new graphs and do
not change their arguments, unless their documentation says so. Every error is a :class:`LoraFxError`.

Names are imported when they are first used: torch and transformers take seconds to import, and ``lora-fx --help`` and a server
with :mod:`lora_fx.runtime` need neither. ``__init__.pyi`` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
