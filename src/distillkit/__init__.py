"""distillkit: distillation of large language models on Lightning.

The public names of this package, and of each package in it, are those in `__init__.pyi` beside its `__init__.py`. They
are imported when they are first used, so that `import distillkit` costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
