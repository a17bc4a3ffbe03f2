"""Evaluation: held-out metrics, pass@k, lm-eval tasks, and reports of the results."""

__all__: list[str] = []
