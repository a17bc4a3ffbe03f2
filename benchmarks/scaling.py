"""Scaling of a loss's time and memory with the number of tokens and the size of the vocabulary.

Two losses, `ForwardKL` and `DistiLLM2`, with the gradients of the student's hidden states and head; and a whole step on
two small random Llama models: both models' scores, the loss, the gradient of every parameter. For each sweep the
exponent b of a fit y = a·xᵇ is printed. Against tokens, time should have exponent 1, and the memory of a loss 0.
The gradients that a step ends with are not counted as memory.

    python benchmarks/scaling.py --plot scaling.png

Letters: B rows, T tokens of a row, N positions, V vocabulary, D hidden width.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Job, add_common_options, alternate, child_job, make_inputs, measured, report, slope
from results import table, write_json
from torch import Tensor, nn

from distillkit.chunked import OutputHead
from distillkit.interfaces import Loss
from distillkit.losses import DistiLLM2, ForwardKL
from distillkit.models import score
from distillkit.testing import make_batch
from distillkit.types import Batch, Scores

LOSSES: dict[str, Callable[[], Loss]] = {"ForwardKL": ForwardKL, "DistiLLM2": DistiLLM2}
WIDTH = 256
SMALL_SIZES = {"positions": 16, "rows": 2, "tokens": 16}
"""Of the first call, which is not counted."""


@dataclass(frozen=True)
class Sweep:
    """One size that grows while the others stay.

    Args:
        part: What is measured: a loss, or `step`.
        axis: The size that grows.
        sizes: Its values for each grid.
        fixed: The other sizes.
        time: Exponent expected of time, as text.
        memory: Exponent expected of memory, as text.
    """

    part: str
    axis: str
    sizes: dict[str, tuple[int, ...]]
    fixed: dict[str, int]
    time: str
    memory: str


# Below some hundred positions a loss takes them all at once: what is asked is how it goes on from there.
_POSITIONS = {"two": (64, 128), "small": (1024, 2048, 4096), "full": (1024, 2048, 4096, 8192, 16_384)}
_VOCAB = {
    "two": (1024, 2048),
    "small": (8192, 16_384, 32_768, 65_536),
    "full": (16_384, 32_768, 65_536, 131_072, 262_144),
}
_ROWS = {"two": (1, 2), "small": (2, 4, 8), "full": (2, 4, 8, 16, 32)}
_TOKENS = {"two": (16, 32), "small": (64, 128, 256), "full": (128, 256, 512, 1024, 2048)}
SWEEPS = (
    *(Sweep(part, "positions", _POSITIONS, {"vocab": 32_768}, "1", "0") for part in LOSSES),
    # A head's gradient has V·D entries and is accumulated: memory grows with V, though not with N·V.
    *(Sweep(part, "vocab", _VOCAB, {"positions": 512}, "1", "0 to 1") for part in LOSSES),
    # The bodies' activations grow with the tokens.
    Sweep("step", "rows", _ROWS, {"tokens": 256, "vocab": 32_768}, "1", "up to 1"),
    Sweep("step", "tokens", _TOKENS, {"rows": 4, "vocab": 32_768}, "1", "up to 1"),
)


def loss_work(job: Job, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A loss with its gradients, and the tensors that get one."""
    vocab = job["vocab"]
    inputs = make_inputs(job["positions"], vocab, WIDTH, dtype, device)
    loss = LOSSES[job["part"]]().to(device)
    student = Scores(inputs.student_hidden, OutputHead(inputs.student, vocab), vocab)
    teacher = Scores(inputs.teacher_hidden, OutputHead(inputs.teacher, vocab), vocab)
    return lambda: _backward(loss, student, teacher, inputs.batch), [inputs.student_hidden, inputs.student.weight]


def step_work(job: Job, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Both models' scores, forward KL and the gradient of all of the student, and the tensors that get one."""
    vocab, rows = job["vocab"], job["rows"]
    student, teacher = (_tiny_llama(vocab, seed).to(device, dtype) for seed in (0, 1))
    batch = make_batch([job["tokens"]] * rows, ["teacher"] * rows, range(rows), vocab).to(device)
    loss = ForwardKL().to(device)

    def work() -> Tensor:
        with torch.no_grad():
            expected = score(teacher, batch, vocab)
        return _backward(loss, score(student, batch, vocab), expected, batch)

    return work, list(student.parameters())


def _backward(loss: Loss, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
    output = loss(student, teacher, batch)
    total = (output.total / output.units).sum()
    total.backward()
    return total.detach()


def _tiny_llama(vocab: int, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


def measure(job: Job) -> Job:
    """The child: one point of a sweep, once."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    make = step_work if job["part"] == "step" else loss_work
    warm_up = job if device.type == "cuda" else {**job, **SMALL_SIZES}
    make(warm_up, dtype, device)[0]()
    work, trained = make(job, dtype, device)
    usage, value = measured(work, device)
    return {
        "wall": usage.wall,
        "cpu": usage.cpu,
        "extra_bytes": usage.extra - sum(tensor.nbytes for tensor in trained),
        "memory_method": usage.method,
        "value": float(value),
    }


def run_sweep(sweep: Sweep, options: argparse.Namespace) -> Job:
    """The points of a sweep, and the exponents."""
    fixed = {"part": sweep.part, **sweep.fixed, "device": options.device, "dtype": options.dtype}
    sizes = sweep.sizes[options.grid]
    points = alternate(__file__, {str(size): {**fixed, sweep.axis: size} for size in sizes}, options.repeats)
    done = [row for row in points.values() if "skipped" not in row]
    x = [row[sweep.axis] for row in done]
    exponents = {
        f"{name}_exponent": slope(x, [row[key] for row in done]) if done else float("nan")
        for name, key in (("wall", "wall"), ("cpu", "cpu"), ("memory", "extra_bytes"))
    }
    expected = {"time_expected": sweep.time, "memory_expected": sweep.memory}
    return {"part": sweep.part, "axis": sweep.axis, **exponents, **expected, "points": list(points.values())}


def points_table(sweeps: Sequence[Job], markdown: bool) -> str:
    """Each point of each sweep."""
    lines = []
    for sweep in sweeps:
        for row in sweep["points"]:
            line = [f"{sweep['part']} by {sweep['axis']}", str(row[sweep["axis"]])]
            if "skipped" in row:
                lines.append([*line, "", "", row["skipped"]])
            else:
                lines.append([*line, f"{row['wall']:.3f}", f"{row['cpu']:.3f}", f"{row['extra_bytes'] / 2**20:.0f}"])
    return table(("sweep", "size", "wall s", "CPU s", "extra MiB"), lines, markdown)


def exponents_table(sweeps: Sequence[Job], markdown: bool) -> str:
    """The exponents beside what is expected."""
    header = ("sweep", "wall exponent", "CPU exponent", "expected", "memory exponent", "expected")
    lines = []
    for sweep in sweeps:
        wall, cpu, memory = (f"{sweep[f'{name}_exponent']:.2f}" for name in ("wall", "cpu", "memory"))
        name = f"{sweep['part']} by {sweep['axis']}"
        lines.append([name, wall, cpu, sweep["time_expected"], memory, sweep["memory_expected"]])
    return table(header, lines, markdown)


def plot(sweeps: Sequence[Job], path: Path) -> None:
    """Time and memory of each sweep, both axes logarithmic; a dotted line has exponent 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    axes_names = list(dict.fromkeys(sweep["axis"] for sweep in sweeps))
    figure, grid = pyplot.subplots(2, len(axes_names), figsize=(4 * len(axes_names), 6), squeeze=False)
    kinds = (("wall", 1.0, "seconds", "wall"), ("extra_bytes", 2**20, "MiB over the gradients", "memory"))
    for panels, (key, unit, label, name) in zip(grid, kinds, strict=True):
        for panel, axis in zip(panels, axes_names, strict=True):
            for sweep in (sweep for sweep in sweeps if sweep["axis"] == axis):
                done = [row for row in sweep["points"] if "skipped" not in row]
                x, y = [row[axis] for row in done], [row[key] / unit for row in done]
                text = f"{sweep['part']}, exponent {sweep[f'{name}_exponent']:.2f}"
                (line,) = panel.loglog(x, y, "o-", label=text)
                if name == "wall" and x:
                    panel.loglog(x, [y[-1] * size / x[-1] for size in x], ":", color=line.get_color())
            sizes = sorted({row[axis] for sweep in sweeps if sweep["axis"] == axis for row in sweep["points"]})
            panel.set(xlabel=axis, ylabel=label if panel is panels[0] else "", xticks=sizes, xticklabels=sizes)
            panel.minorticks_off()
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, high / 100), high * 1.5)  # a flat line should look flat
            panel.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, "scaling.json")
    parser.add_argument("--grid", choices=("two", "small", "full"), default="small", help="which sizes")
    parser.add_argument("--parts", nargs="+", choices=(*LOSSES, "step"), default=(*LOSSES, "step"))
    parser.add_argument("--plot", type=Path, help="where a picture goes")
    options = parser.parse_args()
    sweeps: list[Job] = []
    for sweep in (sweep for sweep in SWEEPS if sweep.part in options.parts):
        print(f"{sweep.part} by {sweep.axis}", file=sys.stderr)
        sweeps.append(run_sweep(sweep, options))
        write_json(options.json, sweeps, vars(options))
    print(points_table(sweeps, options.markdown), exponents_table(sweeps, options.markdown), sep="\n\n")
    if options.plot is not None:
        plot(sweeps, options.plot)


if __name__ == "__main__":
    job = child_job()
    if job is None:
        main()
    else:
        report(measure(job))
