"""The command's verbs as Python functions: `evaluate` and `curate` take configuration files, `export` a checkpoint."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
