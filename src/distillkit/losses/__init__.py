"""Losses: they compare the scores of two models on a batch and return a sum and a count."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
