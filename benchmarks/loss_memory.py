"""Memory and time of the divergence alone, beside other libraries.

Measured is what a training step does after both models' bodies: two output heads, the divergence, its mean over the
positions, and the gradients of the student's hidden states and of its head. Inputs, weights and those two gradients
are not counted as memory: every implementation needs them.

    python benchmarks/loss_memory.py --grid small
    python benchmarks/loss_memory.py --grid full --dtype bfloat16 --device cuda

An implementation that isn't installed is left out. All must agree with the textbook before anything is said of speed.

Letters: N positions, V vocabulary, D hidden width. p teacher, q student.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measure import Inputs, Job, add_common_options, alternate, child_job, make_inputs, measured, report
from results import table, version, write_json
from torch import Tensor

from distillkit.chunked import OutputHead
from distillkit.interfaces import Loss
from distillkit.losses import ForwardKL, GeneralizedJSD, SkewKL, SkewReverseKL
from distillkit.types import Scores, Slicing

GRIDS = {"small": ((256, 1024), (32_768,)), "full": ((256, 1024, 8192), (32_768, 151_936))}
"""N and V."""

AGREEMENT = 1e-4
"""Largest relative deviation from the textbook in float32. In bfloat16 others round where the textbook does not."""

WARM_UP_POSITIONS = 16


@dataclass(frozen=True)
class Divergence:
    """One divergence: our loss, the paper's formula, and what the other libraries call it.

    Args:
        ours: Makes the loss.
        textbook: The formula, from log-probabilities p and q `[N, V]` to `[N]`.
        beta: The others' β, or None if they lack it. To TRL and Liger β is, as it is to us, the teacher's share of the
            mixture and the weight of KL(p‖m); at the ends they put KL(p‖q) (0) and KL(q‖p) (1), where ours vanishes.
    """

    ours: Callable[[], Loss]
    textbook: Callable[[Tensor, Tensor], Tensor]
    beta: float | None = None


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def _mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    return (share * first.exp() + (1 - share) * second.exp()).log()


def _jsd(logp: Tensor, logq: Tensor) -> Tensor:
    mixed = _mixed(logp, logq, 0.5)
    return 0.5 * _kl(logp, mixed) + 0.5 * _kl(logq, mixed)


DIVERGENCES = {
    "kl": Divergence(lambda: ForwardKL("token_mean"), _kl, 0.0),
    "jsd": Divergence(lambda: GeneralizedJSD(0.5, "token_mean"), _jsd, 0.5),
    "skl": Divergence(lambda: SkewKL(0.1, "token_mean"), lambda p, q: _kl(p, _mixed(p, q, 0.1))),
    "srkl": Divergence(lambda: SkewReverseKL(0.1, reduction="token_mean"), lambda p, q: _kl(q, _mixed(q, p, 0.1))),
}


def distillkit(inputs: Inputs, divergence: Divergence, compiled: bool = False) -> Tensor:
    vocab = inputs.student.out_features
    slicing = Slicing(compile=compiled)
    student = Scores(inputs.student_hidden, OutputHead(inputs.student, vocab), vocab, slicing=slicing)
    teacher = Scores(inputs.teacher_hidden, OutputHead(inputs.teacher, vocab), vocab)
    output = divergence.ours()(student, teacher, inputs.batch)
    return output.total / output.units


def textbook(inputs: Inputs, divergence: Divergence) -> Tensor:
    with torch.no_grad():
        logp = inputs.teacher(inputs.teacher_hidden).float().log_softmax(-1)
    logq = inputs.student(inputs.student_hidden).float().log_softmax(-1)
    return divergence.textbook(logp, logq).mean()


def trl(inputs: Inputs, divergence: Divergence) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = inputs.teacher(inputs.teacher_hidden)
    student = inputs.student(inputs.student_hidden)
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=divergence.beta, reduction="batchmean")


def trl_chunked(inputs: Inputs, divergence: Divergence) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student = (inputs.student_hidden, inputs.student.weight, None)
    teacher = (inputs.teacher_hidden, inputs.teacher.weight, None)
    values, _ = ChunkedDivergenceFunction.apply(*student, *teacher, divergence.beta, 1.0)
    return values.mean()


def liger(inputs: Inputs, divergence: Divergence, compiled: bool = False, chunk_size: int = 1024) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=divergence.beta, compiled=compiled, chunk_size=chunk_size
    )
    student = (inputs.student_hidden, inputs.student.weight)
    return loss(*student, inputs.teacher_hidden, inputs.teacher.weight, inputs.batch.targets, None, None)


@dataclass(frozen=True)
class Implementation:
    """One way to compute it.

    Args:
        run: The mean of the divergence, with a graph; some take keyword options besides.
        package: What has to be installed.
        tile: Positions and tokens past which its memory stops to grow; None where memory is bounded anyway.
    """

    run: Callable[..., Tensor]
    package: str
    tile: tuple[float, float] | None = None


INFINITE = float("inf")
IMPLEMENTATIONS = {
    "textbook": Implementation(textbook, "torch", (INFINITE, INFINITE)),
    "distillkit": Implementation(distillkit, "distillkit"),
    "trl": Implementation(trl, "trl", (INFINITE, INFINITE)),
    "trl-chunked": Implementation(trl_chunked, "trl", (4096, 32_768)),
    "liger": Implementation(liger, "liger-kernel", (1024, INFINITE)),
}


def measure(job: Job) -> Job:
    """The child: one implementation at one point of the grid, once."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    run, divergence = IMPLEMENTATIONS[job["implementation"]].run, DIVERGENCES[job["divergence"]]
    # Code pages, threads and compiled kernels come with the first call. Kernels are compiled for shapes.
    warm_up = job["positions"] if device.type == "cuda" else WARM_UP_POSITIONS
    run(make_inputs(warm_up, job["vocab"], job["width"], dtype, device), divergence).backward()
    inputs = make_inputs(job["positions"], job["vocab"], job["width"], dtype, device)

    def work() -> Tensor:
        value = run(inputs, divergence)
        value.backward()
        return value.detach()

    usage, value = measured(work, device)
    hidden_grad, weight_grad = inputs.student_hidden.grad, inputs.student.weight.grad
    assert hidden_grad is not None, "no gradient of the hidden states"
    assert weight_grad is not None, "no gradient of the head"
    return {
        "wall": usage.wall,
        "cpu": usage.cpu,
        "extra_bytes": usage.extra - inputs.gradient_bytes(),
        "memory_method": usage.method,
        "value": float(value),
        **fingerprint("hidden", hidden_grad),
        **fingerprint("head", weight_grad),
    }


def fingerprint(name: str, grad: Tensor) -> dict[str, float]:
    """Norm of a gradient `[n, D]`, and its product with random vectors from both sides, which tells its direction."""
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=draw).to(grad.device) for size in grad.shape)
    return {
        f"{name}_norm": float(torch.linalg.vector_norm(grad, dtype=torch.float32)),
        f"{name}_probe": float(left @ (grad @ right.to(grad.dtype)).float()),
    }


def deviation(result: Job, expected: Job) -> float:
    """Largest relative difference of value, gradient norms and probes (these relative to the norm)."""
    scales = {"value": "value", "hidden_norm": "hidden_norm", "head_norm": "head_norm"}
    scales |= {"hidden_probe": "hidden_norm", "head_probe": "head_norm"}
    return max(abs(result[name] - expected[name]) / abs(expected[scale]) for name, scale in scales.items())


def run_point(job: Job, names: Sequence[str], repeats: int) -> dict[str, Job]:
    """One divergence at one point of the grid: one row for each of `names`."""
    rows = alternate(__file__, {name: {**job, "implementation": name} for name in names}, repeats)
    measured_rows = [row for row in rows.values() if "value" in row]
    for row in measured_rows:  # the first is the textbook, or where that is too large the next
        row["deviation"] = deviation(row, measured_rows[0])
    return rows


def check_agreement(rows: dict[str, Job]) -> None:
    """Ends the run if an implementation computes something else."""
    for name, row in rows.items():
        if not row.get("deviation", 0.0) <= AGREEMENT:
            sys.exit(f"{name} differs from {next(iter(rows))} by {row['deviation']:.1e} on {row['divergence']}: {row}")


def estimate(name: str, job: Job, rows: Sequence[Job]) -> float:
    """Bytes that `name` will need, from its first measured point: memory goes with N·V, up to the size of its tile."""
    tile = IMPLEMENTATIONS[name].tile
    same = (row for row in rows if row["implementation"] == name and row["divergence"] == job["divergence"])
    measured = next((row for row in same if "extra_bytes" in row), None)
    if tile is None or measured is None:
        return 0.0
    cells, measured_cells = (min(at["positions"], tile[0]) * min(at["vocab"], tile[1]) for at in (job, measured))
    return measured["extra_bytes"] * cells / measured_cells


def as_table(rows: Sequence[Job], markdown: bool) -> str:
    """The rows, with memory against the textbook's and time against TRL's at the same point."""
    at = {(row["divergence"], row["positions"], row["vocab"], row["implementation"]): row for row in rows}

    def ratio(row: Job, other: str, name: str) -> str:
        base = at.get((row["divergence"], row["positions"], row["vocab"], other), {}).get(name)
        return f"{row[name] / base:.2f}" if base else "–"

    lines = []
    for row in rows:
        line = [row["divergence"], str(row["positions"]), str(row["vocab"]), row["implementation"]]
        if "skipped" in row:
            lines.append([*line, "", "", row["skipped"], "", "", "", ""])
            continue
        line += [f"{row['wall']:.2f}", f"{row['cpu']:.2f}", f"{row['extra_bytes'] / 2**20:.0f}"]
        line += [ratio(row, "textbook", "extra_bytes"), ratio(row, "trl", "wall"), ratio(row, "trl", "cpu")]
        lines.append([*line, f"{row['deviation']:.0e}" if "deviation" in row else "–"])
    header = ("divergence", "N", "V", "implementation", "wall s", "CPU s", "extra MiB")
    return table((*header, "memory/textbook", "wall/trl", "CPU/trl", "deviation"), lines, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, "loss_memory.json")
    parser.add_argument("--grid", choices=tuple(GRIDS), default="small", help="which sizes N and V")
    parser.add_argument("--positions", type=int, nargs="+", help="N, instead of the grid's")
    parser.add_argument("--vocab", type=int, nargs="+", help="V, instead of the grid's")
    parser.add_argument("--width", type=int, default=896, help="D")
    parser.add_argument("--losses", nargs="+", choices=tuple(DIVERGENCES), default=tuple(DIVERGENCES))
    parser.add_argument("--implementations", nargs="+", choices=tuple(IMPLEMENTATIONS), default=tuple(IMPLEMENTATIONS))
    parser.add_argument("--limit", type=float, default=16.0, help="GiB past which an implementation is not run")
    options = parser.parse_args()
    requested = [name for name in IMPLEMENTATIONS if name in options.implementations]
    installed = [name for name in requested if version(IMPLEMENTATIONS[name].package)]
    for name in set(requested) - set(installed):
        print(f"{name}: {IMPLEMENTATIONS[name].package} is not installed, left out", file=sys.stderr)
    all_positions, all_vocab = GRIDS[options.grid]
    all_positions, all_vocab = options.positions or all_positions, options.vocab or all_vocab
    points = [(positions, vocab) for vocab in sorted(all_vocab) for positions in sorted(all_positions)]
    rows: list[Job] = []
    for positions, vocab in points:
        for divergence in options.losses:
            job = {"positions": positions, "vocab": vocab, "width": options.width, "divergence": divergence}
            job |= {"device": options.device, "dtype": options.dtype}
            beta = DIVERGENCES[divergence].beta
            names = [name for name in installed if name in ("textbook", "distillkit") or beta is not None]
            if not names:
                print(f"{divergence}: no implementation that was asked for has it", file=sys.stderr)
                continue
            too_large = [name for name in names if estimate(name, job, rows) > options.limit * 2**30]
            print(f"{divergence} N={positions} V={vocab}", file=sys.stderr)
            results = run_point(job, [name for name in names if name not in too_large], options.repeats)
            if (positions, vocab) == points[0]:
                is_wide = options.dtype == "float32"
                check_agreement(results if is_wide else run_point({**job, "dtype": "float32"}, names, 1))
            skipped = {"skipped": f"> {options.limit:g} GiB (est.)"}
            rows += [results.get(name, {**job, "implementation": name, **skipped}) for name in names]
            write_json(options.json, rows, vars(options))
    print(as_table(rows, options.markdown))


if __name__ == "__main__":
    job = child_job()
    if job is None:
        main()
    else:
        report(measure(job))
