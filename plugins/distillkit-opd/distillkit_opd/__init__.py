"""On-policy distillation (OPD), exact and by single samples, for distillkit."""
