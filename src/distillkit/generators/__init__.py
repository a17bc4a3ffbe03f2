"""Generators: they continue prompts."""
