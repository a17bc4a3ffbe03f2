"""The parts of `benchmarks/gpu.py`, and the machinery that runs them in a process of their own."""
