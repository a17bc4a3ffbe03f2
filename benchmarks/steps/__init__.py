"""Parts of `benchmarks/step.py`: trainers, what they train on, and a clock."""
