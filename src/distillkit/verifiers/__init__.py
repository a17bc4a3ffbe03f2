"""Verifiers: they judge a response."""
