"""DistiLLM's adaptive off-policy training for distillkit."""
