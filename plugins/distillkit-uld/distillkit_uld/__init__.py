"""Universal logit distillation (ULD) from a teacher with another tokenizer, for distillkit."""
