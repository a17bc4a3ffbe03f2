"""The promises that every generator keeps, as tests: `check_generator` for one, `GeneratorContract` for pytest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from distillkit.data.chat import prompt_id
from distillkit.interfaces import Generator
from distillkit.types import Message, Prompt, Prompts, Response, Sampling

NUM_PROMPTS = 5


def check_generator(make: Callable[[], Generator]) -> None:
    """Checks every promise of `GeneratorContract`.

    Args:
        make: Makes the generator, each time anew.

    Raises:
        AssertionError: If a promise is broken; the message says which.
    """
    contract = GeneratorContract()
    contract.make = make  # type: ignore[method-assign]
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)()


class GeneratorContract:
    """What every `Generator` promises. Subclass it as `Test…`, and write `make`; pytest does the rest."""

    def make(self) -> Generator:
        """The generator under test, before its first `refresh`; a new one each time."""
        raise NotImplementedError("write make(), which returns the generator under test")

    def model(self, seed: int) -> nn.Module:
        """A model for `refresh`; override it for a generator that needs another kind."""
        from distillkit.testing.tiny import tiny_model

        model: nn.Module = tiny_model(len(self.tokenizer()), seed=seed)
        return model

    def tokenizer(self) -> Any:
        """The tokenizer for `refresh`."""
        from distillkit.testing.tiny import tiny_tokenizer

        return tiny_tokenizer()

    def prompts(self) -> Prompts:
        """Prompts of different lengths; override it for a generator that needs others."""
        tokenizer = self.tokenizer()
        questions = [f"Question {number}{', please' * (number % 3)}" for number in range(NUM_PROMPTS)]
        return Prompts(tuple(_prompt(tokenizer, question) for question in questions))

    def sampling(self) -> Sampling:
        """How it is asked to draw; override it for a generator that can't draw so."""
        return Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6)

    def test_answers_each_prompt_in_their_order(self) -> None:
        """One response per prompt, of 1 to `max_new_tokens` tokens; none for no prompt."""
        generator, prompts = self._refreshed(), self.prompts()
        found = self._generate(generator, prompts)
        names = [prompt.id for prompt in prompts]
        self._require([own.prompt_id for own in found] == names, "each prompt must get one response, in their order")
        limit = self.sampling().max_new_tokens
        lengths = [len(own.token_ids) for own in found]
        self._require(all(1 <= length <= limit for length in lengths), f"responses must have 1 to {limit} tokens")
        self._require(self._generate(generator, prompts[:0]) == [], "no prompt must get no response")

    def test_says_how_a_response_ended(self) -> None:
        """`finish` is `stop` or `length`, and the latter only where it is full."""
        limit = self.sampling().max_new_tokens
        for own in self._generate(self._refreshed(), self.prompts()):
            self._require(own.finish in ("stop", "length"), f"finish must be stop or length, got {own.finish!r}")
            full = own.finish == "stop" or len(own.token_ids) == limit
            self._require(full, f"a response of {len(own.token_ids)} tokens, of {limit} allowed, says it was cut")

    def test_says_how_likely_its_tokens_are_or_nothing(self) -> None:
        """`log_probs` is empty, or has a finite number of at most 0 for each token."""
        for own in self._generate(self._refreshed(), self.prompts()):
            fits = len(own.log_probs) in (0, len(own.token_ids))
            self._require(fits, f"{len(own.token_ids)} tokens have {len(own.log_probs)} log-probabilities")
            sound = all(math.isfinite(each) and each <= 0 for each in own.log_probs)
            self._require(sound, f"log-probabilities must be finite and at most 0, got {own.log_probs}")

    def test_writes_a_response_whatever_stands_beside_it(self) -> None:
        """A response depends on its own seed: alone it is what it is in a batch, and in another order too."""
        generator, prompts = self._refreshed(), self.prompts()
        found = self._generate(generator, prompts)
        alone = [self._generate(generator, prompts[place : place + 1])[0] for place in range(len(prompts))]
        self._require(alone == found, "a prompt alone must get the response that it gets in a batch")
        backwards = self._generate(generator, prompts[::-1])
        self._require(backwards[::-1] == found, "in another order prompts must get the same responses")

    def test_writes_the_same_again(self) -> None:
        """Nothing depends on the global random state, or on what was written before."""
        prompts, found = self.prompts(), []
        for seed in range(2):
            generator = self._refreshed()
            for state in (seed, seed + 1):
                torch.manual_seed(state)
                found.append(self._generate(generator, prompts))
        self._require(all(own == found[0] for own in found), "the same question must get the same responses")

    def test_writes_with_the_weights_that_it_took_last(self) -> None:
        """Given other weights and then the first again, it writes what it wrote at first."""
        generator, prompts = self._refreshed(), self.prompts()
        before = self._generate(generator, prompts)
        generator.refresh(self._models(generator, seed=2), self.tokenizer())
        other = self._generate(generator, prompts)
        reads = generator.models != ()
        self._require(not reads or other != before, "given other weights it must write with them")
        generator.refresh(self._models(generator, seed=1), self.tokenizer())
        self._require(self._generate(generator, prompts) == before, "given its first weights again it writes otherwise")

    def test_names_what_its_responses_depend_on(self) -> None:
        """`identity` is a text or None, the same for two that are made alike; `figures` are finite numbers."""
        first, second = (self.make().identity() for _ in range(2))
        self._require(first is None or isinstance(first, str), f"identity() must give a text or None, got {first!r}")
        self._require(first == second, "identity() must be the same for two that are made alike")
        generator = self._refreshed()
        self._generate(generator, self.prompts())
        figures = dict(generator.figures())
        self._require(all(map(math.isfinite, figures.values())), f"figures() must be finite numbers, got {figures}")

    def _refreshed(self) -> Generator:
        generator = self.make()
        generator.check(self.sampling())
        generator.refresh(self._models(generator, seed=1), self.tokenizer())
        return generator

    def _models(self, generator: Generator, seed: int) -> nn.Module:
        """What `refresh` is given: one model, or those that the generator names."""
        if not generator.models:
            return self.model(seed)
        return nn.ModuleDict({name: self.model(seed + 10 * place) for place, name in enumerate(generator.models)})

    def _generate(self, generator: Generator, prompts: Prompts) -> Sequence[Response]:
        return generator.generate(prompts, self.sampling())

    def _require(self, kept: bool, promise: str) -> None:
        if not kept:
            raise AssertionError(f"{type(self.make()).__name__} breaks its contract: {promise}.")


def _prompt(tokenizer: Any, question: str) -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": question},)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return Prompt(prompt_id(messages), messages, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
