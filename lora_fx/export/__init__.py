"""Writers of graphs for other runtimes: TorchScript, ONNX (with slots for adapters), torch.export's pt2, AOTInductor, ExecuTorch.

Each written file is loaded and compared with its graph before it is moved to its path. ``__init__.pyi`` lists the names, which are
imported when they are first used.
"""

# No module here may have the name of a public function: importing it would replace the function.

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
