"""Losses: they compare two models' scores of a batch and return a sum and a count."""

from distillkit.losses.cross_entropy import CrossEntropy
from distillkit.losses.distillm2 import DistiLLM2
from distillkit.losses.dpkd import DPKD
from distillkit.losses.jsd import GeneralizedJSD
from distillkit.losses.kl import ForwardKL, JeffreysKL, ReverseKL
from distillkit.losses.skew import SkewKL, SkewReverseKL
from distillkit.losses.token import TokenLoss
from distillkit.losses.tvd import TotalVariation
from distillkit.losses.weighted_sum import WeightedSum

__all__ = [
    "DPKD",
    "CrossEntropy",
    "DistiLLM2",
    "ForwardKL",
    "GeneralizedJSD",
    "JeffreysKL",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TokenLoss",
    "TotalVariation",
    "WeightedSum",
]
