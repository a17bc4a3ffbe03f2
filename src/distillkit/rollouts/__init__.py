"""Rounds of responses: one generator per writer behind the response store, and the batches made from a round."""

__all__: list[str] = []
