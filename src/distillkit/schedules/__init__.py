"""Numbers that move with training. Their clock is the optimizer step."""

from distillkit.schedules.adaptive import AdaptiveAlpha
from distillkit.schedules.fixed import Constant, Cosine, Linear, Piecewise

__all__ = ["AdaptiveAlpha", "Constant", "Cosine", "Linear", "Piecewise"]
