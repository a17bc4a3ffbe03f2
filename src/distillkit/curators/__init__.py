"""Curators: who writes the responses."""
