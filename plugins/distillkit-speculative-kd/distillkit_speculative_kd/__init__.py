"""Speculative knowledge distillation (SKD) for distillkit."""
