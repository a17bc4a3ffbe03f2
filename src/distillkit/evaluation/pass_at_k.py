"""How often one of several answers is right."""

from collections.abc import Mapping, Sequence
from math import comb

from distillkit.interfaces import Generator, Verifier
from distillkit.types import Prompts, Sampling


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k answers is right, drawn without replacement from n, c of which are right.

    Chen et al. 2021 (Codex), arXiv 2107.03374, equation 1: an estimate without bias of 1 − (1 − p)^k.

    Args:
        samples: n, number of answers.
        right: c, how many of them are right, at most n.
        k: At most n.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def sampled_passes(
    generator: Generator, prompts: Prompts, verifiers: Mapping[str, Verifier], sampling: Sampling, samples: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Draws several answers to each prompt and has them judged by 0 or 1.

    Args:
        generator: Writes with the student's weights.
        prompts: The held-out prompts.
        verifiers: Judges by name; those that give other numbers than 0 and 1 are left out.
        sampling: How answers are drawn. Each round has seeds of its own.
        samples: n, answers to each prompt.

    Returns:
        `NAME_pass_at_K` for K = 1, 2, 4 … up to n, means over prompts; and for each prompt the number of right answers,
        as `NAME_passes`.
    """
    drawn = [generator.generate(prompts.at_round(number), sampling) for number in range(samples)]
    figures: dict[str, float] = {}
    rows: list[dict[str, float]] = [{} for _ in prompts]
    for name, verifier in verifiers.items():
        judged = [verifier.verify(prompts, answers) for answers in drawn]  # [n][P]
        if not all(number in (0, 1) for numbers in judged for number in numbers):
            continue
        right = [int(sum(numbers)) for numbers in zip(*judged, strict=True)]  # [P]
        for row, count in zip(rows, right, strict=True):
            row[f"{name}_passes"] = float(count)
        for k in powers(samples):
            figures[f"{name}_pass_at_{k}"] = sum(pass_at_k(samples, count, k) for count in right) / len(right)
    return figures, rows


def powers(most: int) -> Sequence[int]:
    """1, 2, 4 … up to `most`."""
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
