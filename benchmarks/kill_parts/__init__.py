"""The verbs that `kills.py` kills."""
