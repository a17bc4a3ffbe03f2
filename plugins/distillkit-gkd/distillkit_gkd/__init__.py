"""Generalized knowledge distillation (GKD) for distillkit."""
