"""The `distillkit` command."""
