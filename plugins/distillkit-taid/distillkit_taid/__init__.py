"""Temporally adaptive interpolated distillation (TAID) as a distillkit loss."""
