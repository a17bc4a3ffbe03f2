"""The Markdown tables, as `docs/benchmarks.md` has them."""

from collections.abc import Sequence
from typing import Any

from gpu_parts.cases import Outcome, Row

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "tests": {"test": ("test", ""), "result": ("status", ""), "s": ("seconds", ".1f"), "reason": ("reason", "")},
    "loss": {
        "divergence": ("divergence", ""),
        "N": ("positions", ""),
        "V": ("vocab", ""),
        "implementation": ("implementation", ""),
        "compiled": ("compiled", ""),
        "chunk": ("chunk_size", ""),
        "ms": ("ms", ".1f"),
        "extra GiB": ("extra_gib", ".2f"),
        "TFLOP/s": ("tflops", ".0f"),
        "deviation": ("deviation", ".0e"),
    },
    "step": {
        "trainer": ("trainer", ""),
        "shape": ("shape", ""),
        "loss": ("loss_name", ""),
        "layout": ("layout", ""),
        "cached": ("cached", ""),
        "precision": ("precision", ""),
        "rows": ("rows", ""),
        "tokens": ("row_tokens", ""),
        "micro-batches": ("micro_batches", ""),
        "ms/step": ("step_ms", ".0f"),
        "tokens/s": ("tokens_per_second", ".0f"),
        "response tok/s": ("response_tokens_per_second", ".0f"),
        "MFU %": ("mfu", ".1f"),
        "peak GiB": ("peak_gib", ".1f"),
        "step-1 loss": ("first_loss", ".6f"),
    },
    "generation": {
        "side": ("side", ""),
        "sampling": ("sampling", ""),
        "model": ("model", ""),
        "batch": ("batch", ""),
        "new tokens": ("new_tokens", ""),
        "s": ("seconds", ".2f"),
        "tokens/s": ("tokens_per_second", ".0f"),
    },
    "real": {
        "figure": ("metric", ""),
        "before": ("before", ".3f"),
        "after": ("after", ".3f"),
        "CPU before": ("cpu_before", ".2f"),
        "CPU after": ("cpu_after", ".2f"),
    },
    "compare": {
        "method": ("method", ""),
        "KL(p‖q) ↓": ("kl", ".3f"),
        "NLL ↓": ("nll", ".3f"),
        "acceptance ↑": ("acceptance", ".3f"),
        "ROUGE-L ↑": ("rouge_l", ".2f"),
        "distinct-2 ↑": ("distinct_2", ".3f"),
    },
}
"""Header to key and format of each part's rows; the first column tells rows of the table from others."""

PROFILE = {"kind of kernel": ("kind", ""), "share %": ("share", ".1f"), "ms": ("ms", ".1f")}

NOTES = {
    "loss": "Forward and backward in bfloat16, D as the results have it; medians. *extra GiB* is the peak over inputs "
    "and the two gradients, *deviation* the largest of value and gradient norms from the formula's.",
    "step": "Half of each row is prompt, half response; two rows share a prompt. A step has all rows, split into "
    "micro-batches. *tokens/s* counts all tokens of the rows. MFU is against the rate of a large product on the same "
    "device; padding, recomputation and a second copy of a shared prompt do not count as useful.",
    "generation": "One batch; tokens of the responses alone, after a warm-up.",
    "real": "Held-out figures of the run before and after training. ROUGE-L in %.",
    "compare": "Held-out figures of each method's student, one seed.",
}


def part_table(part: str, outcomes: Sequence[Outcome]) -> str:
    """The tables of a part, and a line for each case that did not pass."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    columns = COLUMNS.get(part)
    tables = [markdown(columns or {}, [row for row in rows if columns and next(iter(columns.values()))[0] in row])]
    if part == "loss":  # the bare products have no divergence
        first = next(iter(COLUMNS["loss"].values()))[0]
        tables = [markdown(COLUMNS["loss"], [row for row in rows if first in row or "tflops" in row])]
    if part == "step":
        tables.append(markdown(PROFILE, [row for row in rows if "kind" in row]))
    if columns is None:
        names = list(dict.fromkeys(key for row in rows for key in row if key not in ("detail", "figure")))
        tables = [markdown({name: (name, "") for name in names}, rows)]
    missing = [
        f"- {outcome.case}: {outcome.status}, {outcome.reason}" for outcome in outcomes if outcome.status != "passed"
    ]
    return "\n\n".join(filter(None, [*tables, "\n".join(missing)]))


def markdown(columns: dict[str, tuple[str, str]], rows: Sequence[Row]) -> str:
    """A table with the columns that some row fills; nothing without rows."""
    used = {header: entry for header, entry in columns.items() if any(row.get(entry[0]) is not None for row in rows)}
    if not rows or not used:
        return ""
    ruler = ["---", *("---:" for _ in list(used)[1:])]
    lines = [list(used), ruler, *([cell(row.get(key), form) for key, form in used.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any, form: str) -> str:
    """A value as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    return (format(value, form) if form else str(value)).replace("|", "\\|")
