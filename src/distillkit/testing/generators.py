"""Contract tests of generators: `check_generator` for a single one, `GeneratorContract` for pytest."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from distillkit.data.chat import prompt_id
from distillkit.interfaces import Generator
from distillkit.testing.contract import broken, run_tests
from distillkit.types import Message, Prompt, Prompts, Response, Sampling, Tokenizer

NUM_PROMPTS = 5


def check_generator(make: Callable[[], Generator]) -> None:
    """Runs all tests of `GeneratorContract`.

    Args:
        make: Returns a new generator.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = GeneratorContract()
    run_tests(contract, make)


class GeneratorContract:
    """The contract of every `Generator` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest."""

    def make(self) -> Generator:
        """A new generator to test, before its first `refresh`."""
        raise NotImplementedError("write make(): it returns the generator under test")

    def model(self, seed: int) -> nn.Module:
        """A model for `refresh`; override it for a generator that needs another kind of model."""
        from distillkit.testing.tiny import tiny_model

        model: nn.Module = tiny_model(len(self.tokenizer()), seed=seed)
        return model

    def tokenizer(self) -> Tokenizer:
        """The tokenizer for `refresh`."""
        from distillkit.testing.tiny import tiny_tokenizer

        tokenizer: Tokenizer = tiny_tokenizer()
        return tokenizer

    def prompts(self) -> Prompts:
        """Prompts of different lengths; override it for a generator that needs different ones."""
        tokenizer = self.tokenizer()
        questions = [f"Question {i}{', please' * (i % 3)}" for i in range(NUM_PROMPTS)]
        return Prompts(tuple(_prompt(tokenizer, question) for question in questions))

    def sampling(self) -> Sampling:
        """Sampling of the tests; override it for a generator that does not support it."""
        return Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6)

    def test_answers_each_prompt_in_order(self) -> None:
        """One response per prompt, of 1 to `max_new_tokens` tokens; an empty list for no prompts."""
        generator, prompts = self._refreshed(), self.prompts()
        responses = self._generate(generator, prompts)
        in_order = [response.prompt_id for response in responses] == [prompt.id for prompt in prompts]
        self._require(in_order, "each prompt must get one response, in the order of the prompts")
        limit = self.sampling().max_new_tokens
        lengths = [len(response.token_ids) for response in responses]
        self._require(all(1 <= length <= limit for length in lengths), f"responses must have 1 to {limit} tokens")
        self._require(
            self._generate(generator, prompts[:0]) == [], "an empty list of prompts must get an empty list of responses"
        )

    def test_finish_is_stop_or_length(self) -> None:
        """`finish` is `stop` or `length`, and `length` only at `max_new_tokens` tokens."""
        limit = self.sampling().max_new_tokens
        for response in self._generate(self._refreshed(), self.prompts()):
            finish, length = response.finish, len(response.token_ids)
            self._require(finish in ("stop", "length"), f"finish must be stop or length, got {finish!r}")
            full = finish == "stop" or length == limit
            self._require(full, f"finish must be stop for a response of {length} tokens: {limit} are allowed")

    def test_log_probs_are_finite_or_empty(self) -> None:
        """`log_probs` is empty, or has one finite value per token, at most 0."""
        for response in self._generate(self._refreshed(), self.prompts()):
            log_probs, length = response.log_probs, len(response.token_ids)
            self._require(len(log_probs) in (0, length), f"{length} tokens have {len(log_probs)} log-probabilities")
            valid = all(math.isfinite(log_prob) and log_prob <= 0 for log_prob in log_probs)
            self._require(valid, f"log-probabilities must be finite and at most 0, got {log_probs}")

    def test_responses_do_not_depend_on_the_batch(self) -> None:
        """A response depends only on its own seed: it is the same alone, in a batch, and in another order."""
        generator, prompts = self._refreshed(), self.prompts()
        responses = self._generate(generator, prompts)
        alone = [self._generate(generator, prompts[i : i + 1])[0] for i in range(len(prompts))]
        self._require(alone == responses, "a prompt must get the same response alone and in a batch")
        backwards = self._generate(generator, prompts[::-1])
        self._require(backwards[::-1] == responses, "prompts must get the same responses in any order")

    def test_returns_the_same_responses_again(self) -> None:
        """Responses depend neither on the global random state nor on earlier calls."""
        prompts, runs = self.prompts(), []
        for seed in range(2):
            generator = self._refreshed()
            for state in (seed, seed + 1):
                torch.manual_seed(state)
                runs.append(self._generate(generator, prompts))
        self._require(all(run == runs[0] for run in runs), "the same prompts must always get the same responses")

    def test_uses_the_latest_weights(self) -> None:
        """`refresh` replaces the weights; refreshed with the first weights again, it generates the first responses."""
        generator, prompts = self._refreshed(), self.prompts()
        before = self._generate(generator, prompts)
        generator.refresh(self._models(generator, seed=2), self.tokenizer())
        after = self._generate(generator, prompts)
        reads_models = generator.needs_models != ()
        self._require(not reads_models or after != before, "after refresh it must generate with the new weights")
        generator.refresh(self._models(generator, seed=1), self.tokenizer())
        again = self._generate(generator, prompts)
        self._require(again == before, "refreshed with its first weights again, it must generate the same responses")

    def test_identity_and_metrics_are_valid(self) -> None:
        """`identity` is a string or None, equal for two identically constructed generators; `metrics` are finite."""
        first, second = (self.make().identity() for _ in range(2))
        self._require(
            first is None or isinstance(first, str), f"identity() must return a string or None, got {first!r}"
        )
        self._require(first == second, "identity() must be equal for two identically constructed generators")
        generator = self._refreshed()
        self._generate(generator, self.prompts())
        metrics = dict(generator.metrics())
        self._require(all(map(math.isfinite, metrics.values())), f"metrics() must be finite numbers, got {metrics}")

    def _refreshed(self) -> Generator:
        generator = self.make()
        generator.check(self.sampling())
        generator.refresh(self._models(generator, seed=1), self.tokenizer())
        return generator

    def _models(self, generator: Generator, seed: int) -> nn.Module:
        """The argument of `refresh`: one model, or those that the generator names."""
        if not generator.needs_models:
            return self.model(seed)
        return nn.ModuleDict({name: self.model(seed + 10 * i) for i, name in enumerate(generator.needs_models)})

    def _generate(self, generator: Generator, prompts: Prompts) -> Sequence[Response]:
        return generator.generate(prompts, self.sampling())

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise broken(self.make(), promise)


def _prompt(tokenizer: Tokenizer, question: str) -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": question},)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return Prompt(prompt_id(messages), messages, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
