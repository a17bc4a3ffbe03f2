"""Checks of a model family against a plain loop: one row at a time, no padding, no cache, eager attention.

Letters: T tokens, N response positions, V vocabulary.
"""

import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distillkit.data.collate import Layout, collate
from distillkit.errors import DistillKitError
from distillkit.generators.decoding import cache_use
from distillkit.generators.transformers import TransformersGenerator
from distillkit.models.capabilities import capabilities
from distillkit.models.checkpoint import quiet, read_model
from distillkit.models.copies import deep_copy
from distillkit.models.merging import merge_lora
from distillkit.models.scoring import score
from distillkit.models.structure import base_model
from distillkit.models.student import Lora, Student, check_trainable
from distillkit.testing.families import VARIANTS, VOCAB, tiny_family
from distillkit.types import Prompt, Prompts, Row, Sampling, Tokenizer

TOLERANCE = 1e-3
"""Largest difference, in nats or as a share of the largest gradient, that passes for float32 rounding."""

RIGHT = "right"
"""Result of a check that found no difference."""

LENGTHS = ((5, 12), (5, 7), (3, 2), (9, 19), (2, 4))
"""Tokens of each row's prompt and response; the first two have the same prompt."""

NEW_TOKENS = 10
END_IDS = (0, 1, 9, 18, 27, 36, 45, 54, 63)
"""Tokens that end a turn, so that some rows of a batch end before others."""


@dataclass(frozen=True)
class FamilyReport:
    """Results of the checks of one model type.

    Each is `right`, or begins with `refused: `, `differs: ` or `raises: `; empty if the check did not run.

    Args:
        name: The model type, or a variant of one.
        built: Whether the tiny model could be built and run by a plain loop.
        layout: Layout of rows: `packed`, `padded` or `single`.
        cache: Rows that the cache serves: `padded`, `equal` or `none`.
        reason: Why the layout is not `packed`.
        scores: Log-probabilities and gradients of padded, packed and shared rows.
        generation: Greedy responses and their log-probabilities.
        pruning: `keep_layers`, then scores, saving and reading.
        lora: Adapters on all linear layers: scores, gradients, and the merged model.
        export: The model after it was saved and read.
    """

    name: str
    built: str = ""
    layout: str = ""
    cache: str = ""
    reason: str = ""
    scores: str = ""
    generation: str = ""
    pruning: str = ""
    lora: str = ""
    export: str = ""

    @property
    def faults(self) -> list[str]:
        """Results that are neither right nor a refusal."""
        results = ((name, value) for name, value in asdict(self).items() if name not in ("name", "built"))
        return [f"{name} {value}" for name, value in results if value.startswith(("differs", "raises"))]


def check_family(name: str, model_type: str | None = None, **settings: Any) -> FamilyReport:
    """Runs all checks on a tiny random model of a type.

    Args:
        name: Name in the report; also one of `families.family_names`, if no type is given.
        model_type: A name of `families.causal_types`.
        settings: Further settings of its configuration.
    """
    report = FamilyReport(name)
    if model_type is None:
        model_type, variant = VARIANTS.get(name, (name, {}))
        settings = variant | settings
    try:
        model = cast(nn.Module, tiny_family(model_type, **settings))
        plain = plain_model(model)
        for row in make_rows():
            plain_log_probs(plain, row)
    except Exception as error:  # of any architecture
        return replace(report, built=_raised(error))
    report = replace(report, built=RIGHT)
    try:
        ability = capabilities(model)
    except DistillKitError as error:
        return replace(report, scores=f"refused: {error}")
    report = replace(report, layout=ability.layout, reason=ability.reason, cache=cache_use(model))
    with tempfile.TemporaryDirectory() as folder:
        checks = {
            "export": lambda: check_export(model, folder),
            "scores": lambda: check_scores(model, plain),
            "generation": lambda: check_generation(model, plain),
            "pruning": lambda: check_pruning(folder),
            "lora": lambda: check_lora(folder),
        }
        return replace(report, **{check: _result(run) for check, run in checks.items()})


def _result(check: Callable[[], object]) -> str:
    try:
        check()
    except DistillKitError as error:
        return f"refused: {error}"
    except AssertionError as error:
        return f"differs: {error}"
    except Exception as error:  # of any architecture
        return _raised(error)
    return RIGHT


# ── the plain loop ────────────────────────────────────────────────────────────────────────────────────────────────────


def plain_model(model: nn.Module) -> nn.Module:
    """A copy with transformers' eager attention, if it has one."""
    plain = deep_copy(model)
    base = base_model(plain)
    for attribute in [name for name in vars(base) if name.startswith("_distillkit")]:
        delattr(base, attribute)
    base.config._attn_implementation = "eager"
    return plain


def plain_log_probs(model: nn.Module, row: Row) -> Tensor:
    """`[N, V]` log-probabilities before each trained token of a row, run alone."""
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
    log_probs = logits[:, :VOCAB].log_softmax(-1)
    return torch.stack([log_probs[index - 1] for index, trained in enumerate(row.response_mask) if trained])


@torch.no_grad()
def plain_response(model: nn.Module, prompt: Sequence[int], new_tokens: int) -> list[tuple[int, float]]:
    """Greedy tokens after a prompt and their log-probabilities, each from a forward pass over all tokens so far."""
    ids, response = list(prompt), []
    for _ in range(new_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        log_probs = logits[:VOCAB].log_softmax(-1)
        ids.append(int(log_probs.argmax()))
        response.append((ids[-1], float(log_probs[ids[-1]])))
        if ids[-1] in END_IDS:
            break
    return response


def make_rows(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[Row]:
    """Rows of random tokens; the first two share their prompt."""
    rows = []
    for index, (prompt, response) in enumerate(lengths):
        group = max(index, 1)
        ids = [*_random_ids(prompt, group), *_random_ids(response, 100 + index)]
        rows.append(Row(tuple(ids), (False,) * prompt + (True,) * response, "teacher", str(group)))
    return rows


def _random_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


# ── the checks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_scores(model: nn.Module, plain: nn.Module) -> None:
    """Asserts that every layout gives the log-probabilities and gradients of the plain loop, in training mode.

    Args:
        model: The model to check.
        plain: The same model, as `plain_model` makes it.
    """
    check_trainable(model)
    try:
        plain.train()
        expected = torch.cat([plain_log_probs(plain, row) for row in make_rows()])
        targets = _gradients(plain, expected)
        model.train()
        layouts: tuple[Layout, ...] = ("shared", "packed", "padded")
        for layout in layouts:
            log_probs = score(model, collate(make_rows(), 0, layout), VOCAB).log_probs()
            gap = float((log_probs.detach() - expected.detach()).abs().max())
            assert gap < TOLERANCE, f"log-probabilities of {layout} rows by {gap:.2g}"
            largest = max(float(value.abs().max()) for value in targets.values())
            for name, gradient in _gradients(model, log_probs).items():
                gap = float((gradient - targets[name]).abs().max()) / largest
                assert gap < TOLERANCE, f"the gradient of {name} of {layout} rows by {gap:.2g} of the largest"
    finally:
        model.eval()
        plain.eval()


def _gradients(model: nn.Module, log_probs: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum of the log-probabilities in which each has another weight."""
    weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    model.zero_grad()
    torch.autograd.backward((log_probs * weights).sum(), retain_graph=True)
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def check_generation(model: nn.Module, plain: nn.Module) -> None:
    """Asserts that greedy responses and their log-probabilities are those of the plain loop."""
    base_model(model).generation_config.eos_token_id = list(END_IDS)
    generator = TransformersGenerator(batch_size=4, progress=False)
    generator.refresh(model, cast(Tokenizer, _Ids()))
    ids = [row.input_ids[:length] for row in make_rows() for length in (3, len(row.input_ids) // 2)]
    prompts = Prompts(tuple(Prompt(str(index), (), prompt) for index, prompt in enumerate(ids)))
    for prompt, response in zip(prompts, generator.generate(prompts, _GREEDY), strict=True):
        expected = plain_response(plain, prompt.input_ids, NEW_TOKENS)
        first = next((i for i, (token, _) in enumerate(expected) if response.token_ids[i : i + 1] != (token,)), None)
        assert first is None, f"token {first} after a prompt of {len(prompt.input_ids)} tokens"
        gap = max(abs(value - other) for (_, value), other in zip(expected, response.log_probs, strict=True))
        assert gap < TOLERANCE, f"log-probabilities of generated tokens by {gap:.2g}"


_GREEDY = Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS)


class _Ids:
    """A tokenizer whose text is the token ids."""

    eos_token_id = 1
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {str(token_id): token_id for token_id in range(VOCAB)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def check_pruning(folder: str) -> None:
    """Asserts that a student with some of the layers of a saved model is trained, generates, and is saved like any."""
    model = Student(folder, keep_layers=[0, 2, 3]).load().eval()
    check_scores(model, plain_model(model))
    check_generation(model, plain_model(model))
    with tempfile.TemporaryDirectory() as pruned:
        check_export(model, pruned)


def check_lora(folder: str) -> None:
    """Asserts that adapters on all linear layers of a saved model give the plain loop's scores, and merge."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = Student(folder, lora=Lora(r=2)).load().eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    check_scores(model, plain_model(model))
    with tempfile.TemporaryDirectory() as merged:
        save(merge_lora(model), merged)
        check_reloaded(model, merged)


def check_export(model: nn.Module, folder: str) -> None:
    """Asserts that a model comes back the same from a folder, which it is saved to."""
    save(model, folder)
    check_reloaded(model, folder)


def save(model: nn.Module, folder: str) -> None:
    """Saves a model without adapters as a transformers folder."""
    with quiet():
        base_model(model).save_pretrained(folder)


@torch.no_grad()
def check_reloaded(model: nn.Module, folder: str) -> None:
    """Asserts that a saved model has the log-probabilities of this one."""
    plain, loaded = plain_model(model), plain_model(read_model(folder, folder, torch.float32))
    for row in make_rows():
        gap = float((plain_log_probs(loaded, row) - plain_log_probs(plain, row)).abs().max())
        assert gap < TOLERANCE, f"log-probabilities of the reloaded model by {gap:.2g}"


def _raised(error: Exception) -> str:
    return f"raises: {type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' …')}"
