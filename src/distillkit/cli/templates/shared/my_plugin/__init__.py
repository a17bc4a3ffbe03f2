"""MyPlugin, a my_kind for distillkit."""
