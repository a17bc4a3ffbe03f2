"""A generator that remembers what it was asked for."""

from distillkit.testing import SeededGenerator


class Asked(SeededGenerator):
    """Keeps what it was asked for."""

    def __init__(self, writer):
        super().__init__(writer)
        self.asked = []

    def generate(self, prompts, sampling):
        self.asked.append((prompts.round, [prompt.id for prompt in prompts]))
        return super().generate(prompts, sampling)
