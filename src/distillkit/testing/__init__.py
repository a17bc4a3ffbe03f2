"""Contract tests that every part of a kind must pass, built in or from a plugin.

Nothing in this package needs pytest: each `check_…` raises an AssertionError that names the broken promise. Each
`…Contract` class has the same checks as test methods.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
