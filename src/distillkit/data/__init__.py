"""Prompts: sources, chat templates, batches."""
