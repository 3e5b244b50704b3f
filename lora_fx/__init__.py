"""LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, and fold them back into its weights.

What there is stands in ``__init__.pyi``. Each name is imported when it is first asked for: torch and transformers take seconds,
and ``lora-fx --help`` and a server with :mod:`lora_fx.runtime` need neither.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
