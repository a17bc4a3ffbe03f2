"""pass@k: the probability that at least one of k answers is correct."""

from collections.abc import Mapping, Sequence
from math import comb

from distillkit.interfaces import Generator, Verifier
from distillkit.types import Prompts, Sampling


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers is correct, sampled without replacement from n with c correct ones.

    Chen et al. 2021 (Codex), arXiv 2107.03374, equation 1: an unbiased estimate of 1 − (1 − p)^k.

    Args:
        samples: n, number of answers.
        correct: c, number of correct answers, at most n.
        k: Number of answers that are sampled, at most n.
    """
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def sampled_passes(
    generator: Generator, prompts: Prompts, verifiers: Mapping[str, Verifier], sampling: Sampling, samples: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Samples several answers to each prompt and scores them with the verifiers that give 0 or 1.

    Args:
        generator: Generates with the student's weights.
        prompts: The held-out prompts.
        verifiers: Verifiers by name; those that give other scores than 0 and 1 are left out.
        sampling: Sampling of the answers. Each of the n passes over the prompts uses different seeds.
        samples: n, answers per prompt.

    Returns:
        `NAME_pass_at_K` for K = 1, 2, 4 … up to n, means over prompts; and for each prompt the number of correct
        answers, as `NAME_passes`.
    """
    samples_by_round = [generator.generate(prompts.at_round(index), sampling) for index in range(samples)]
    metrics: dict[str, float] = {}
    rows: list[dict[str, float]] = [{} for _ in prompts]
    for name, verifier in verifiers.items():
        scores = [verifier.verify(prompts, answers) for answers in samples_by_round]  # [n][P]
        if not all(score in (0, 1) for round_scores in scores for score in round_scores):
            continue
        correct = [int(sum(prompt_scores)) for prompt_scores in zip(*scores, strict=True)]  # [P]
        for row, count in zip(rows, correct, strict=True):
            row[f"{name}_passes"] = float(count)
        for k in powers(samples):
            metrics[f"{name}_pass_at_{k}"] = sum(pass_at_k(samples, count, k) for count in correct) / len(correct)
    return metrics, rows


def powers(maximum: int) -> Sequence[int]:
    """Powers of two: 1, 2, 4 … up to `maximum`."""
    return [2**power for power in range(maximum.bit_length()) if 2**power <= maximum]
