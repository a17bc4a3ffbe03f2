"""Data types that the parts exchange: prompts, responses, rows, batches, scores and losses.

Letters: B rows, T tokens, V vocabulary, D hidden width, N response positions in the batch, C components of a loss.
p is the teacher and q the student, everywhere.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
