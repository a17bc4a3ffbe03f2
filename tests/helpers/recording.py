"""A generator that records the prompts of each call."""

from distillkit.testing import SeededGenerator


class RecordingGenerator(SeededGenerator):
    """Records the round and the prompt ids of each call in `calls`."""

    def __init__(self, writer):
        super().__init__(writer)
        self.calls = []

    def generate(self, prompts, sampling):
        self.calls.append((prompts.round, [prompt.id for prompt in prompts]))
        return super().generate(prompts, sampling)
