"""Adaptive KL (AKL) as a distillkit loss."""
