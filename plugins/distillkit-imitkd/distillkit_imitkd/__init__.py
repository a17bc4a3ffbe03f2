"""Imitation-based knowledge distillation (ImitKD) for distillkit."""
