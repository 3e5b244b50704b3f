"""Writers of graphs for other runtimes, one module per format; no module here may have the name of a public function.

The names stand in ``__init__.pyi`` and are imported on first use: :mod:`lora_fx.runtime` reads ``slot_table``, which needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
