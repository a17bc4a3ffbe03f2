"""Speculative generation: the student drafts tokens, the teacher checks them."""
