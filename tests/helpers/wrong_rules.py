"""Mistakes in rejection sampling that look like it; the tests of its distribution must find each."""

import torch

from distillkit.generators.speculative.acceptance import Check, Exact, residual


class AcceptsAll(Exact):
    def accepts(self, check):
        return torch.ones_like(check.tokens, dtype=torch.bool)


class Swapped(Exact):
    def accepts(self, check):
        return super().accepts(Check(check.tokens, check.logits, check.log_q, check.log_p, check.uniform))


class DrawsFromTheTeacher(Exact):
    def replacement(self, log_p, log_q):
        return log_p


class WithoutMaximum(Exact):
    def replacement(self, log_p, log_q):
        weights = (log_p.exp() - log_q.exp()).abs()
        return (weights / weights.sum(-1, keepdim=True)).log()


class SwappedResidual(Exact):
    def replacement(self, log_p, log_q):
        return residual(log_q, log_p)


WRONG_RULES = [AcceptsAll, Swapped, DrawsFromTheTeacher, WithoutMaximum, SwappedResidual]
