"""Concrete score distillation (CSD) as a distillkit loss."""
