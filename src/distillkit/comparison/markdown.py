"""Markdown report of a comparison, and the wording that it shares with the HTML report."""

import math
import re

from distillkit.comparison.results import AnswerRow, MethodResult, MetricResult, Results
from distillkit.comparison.statistics import COVERAGE
from distillkit.comparison.summary import LOWER_IS_BETTER, WITHOUT_DIRECTION
from distillkit.errors import readable

_DIGEST = re.compile(r"#sha256=[0-9a-f]+")  # dropped for legibility; results.json keeps it

HEADINGS = {
    "kl": "KL(p‖q) ↓",
    "nll": "NLL ↓",
    "acceptance": "acceptance ↑",
    "rouge_l": "ROUGE-L ↑",
    "gold_nll": "NLL of the data ↓",
    "gold_rouge_l": "ROUGE-L to the data ↑",
    "length": "length",
    "finished": "finished",
    "distinct_2": "distinct-2 ↑",
}
COSTS = {
    "spent_tokens": "tokens trained on",
    "distinct_tokens/teacher": "distinct, by the teacher",
    "distinct_tokens/student": "distinct, by the student",
    "distinct_tokens/speculative": "distinct, speculative",
    "distinct_tokens/stronger": "distinct, by the stronger model",
    "distinct_tokens/dataset": "distinct, from the dataset",
    "teacher_tokens": "tokens scored by the teacher",
    "spent_seconds": "seconds of training and curation",
    "curation_seconds": "of these, curation",
    "wall_seconds": "seconds in total, with validation",
    "peak_memory_gb": "peak memory, GB",
}
EXPLANATION = (
    "Values are means over the seeds ± their standard deviation. In brackets is the difference from {baseline} on the "
    "same prompts and seeds, with a {coverage} % bootstrap interval over prompts{and_seeds}; ● marks an interval that "
    "excludes 0. A metric is bold if it is the best and its interval against every other method excludes 0. The "
    "intervals are not corrected for the number of comparisons."
)
ONE_SEED = (
    " There is one seed, so the intervals leave out how much a method differs from seed to seed, and too many "
    "exclude 0: set two or more `seeds`."
)


def heading(metric: str) -> str:
    """The column heading of a metric, with an arrow towards better values."""
    arrow = "" if metric in WITHOUT_DIRECTION else " ↓" if metric in LOWER_IS_BETTER else " ↑"
    return HEADINGS.get(metric, metric + arrow)


def value(metric: MetricResult) -> str:
    """A mean with its standard deviation."""
    deviation = metric["deviation"]
    return f"{_short(metric['mean'])}" + ("" if math.isnan(deviation) else f" ± {_short(deviation)}")


def before(results: Results) -> list[str]:
    """One cell per metric of the common initial student; empty if none of them is available."""
    cells = [_short(results["start"][name]) if name in results["start"] else "" for name in results["metrics"]]
    return cells if any(cells) else []


def difference(metric: MetricResult) -> str:
    """The difference from the baseline with its interval; empty for the baseline."""
    if "difference" not in metric:
        return ""
    mean, low, high = (_short(metric["difference"][key], sign=True) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" + (" ●" if metric["difference"]["sure"] else "")


def _short(value: float, sign: bool = False) -> str:
    """A number with three or four significant digits."""
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:{'+' if sign else ''}.{digits}f}"


def status(method: MethodResult) -> str:
    """The number of runs of each status; empty if all runs are done."""
    kinds = list(method["runs"].values())
    return "" if set(kinds) == {"done"} else ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def explanation(results: Results) -> str:
    """The note on how to read the table of metrics."""
    several = len(results["seeds"]) > 1
    text = EXPLANATION.format(
        baseline=results["baseline"], coverage=round(100 * COVERAGE), and_seeds=" and seeds" if several else ""
    )
    return text if several else text + ONE_SEED


def about(results: Results) -> list[tuple[str, str]]:
    """The setup of the comparison as (name, text) rows: models, budget, seeds, prompts, versions, command."""
    budget = ", ".join(f"{amount:,} {unit}" for unit, amount in results["budget"].items())
    return [
        ("teacher", _DIGEST.sub("", str(results["teacher"]))),
        ("student", _DIGEST.sub("", str(results["student"]))),
        ("budget of each run", budget),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("held-out prompts", f"{results['num_prompts']} of data.{results['split']}"),
        ("baseline", results["baseline"]),
        ("date", results["date"]),
        ("machine", results["machine"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        ("commit", results["commit"] or "not in a repository"),
        ("command", f"`{results['command']}`"),
    ]


def costs(results: Results) -> list[tuple[str, str]]:
    """The costs that at least one method has, as (name, heading)."""
    methods = results["methods"]
    return [(name, head) for name, head in COSTS.items() if any(name in method["cost"] for method in methods)]


def cost(method: MethodResult, name: str) -> str:
    """One cost of a method, formatted; empty if the method does not have it."""
    amount = method["cost"].get(name)
    if amount is None:
        return ""
    return f"{amount:,.2f}" if amount < 100 and amount != int(amount) else f"{amount:,.0f}"


def failures(results: Results) -> list[tuple[str, int, str]]:
    """Method, seed and error of every failed run."""
    return [(method["name"], seed, error) for method in results["methods"] for seed, error in method["errors"].items()]


def references(row: AnswerRow) -> dict[str, str]:
    """The answers that those of the methods are compared with, by name."""
    return {"reference": row["reference"]} | ({"the data's answer": row["gold"]} if row["gold"] else {})


def markdown(results: Results) -> str:
    """The report as one Markdown text."""
    lines = [f"# {results['title']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in about(results)]
    lines += _metrics_table(results)
    if failures(results):
        lines += ["## Failed runs", "", "| method | seed | error |", "| --- | --- | --- |"]
        lines += [f"| {name} | {seed} | {_quoted(error)} |" for name, seed, error in failures(results)] + [""]
    heads = costs(results)
    lines += ["## Cost per run", "", f"| method | {' | '.join(head for _, head in heads)} |"]
    lines += ["| --- |" + " --- |" * len(heads)]
    lines += [
        f"| {method['name']} | {' | '.join(cost(method, name) for name, _ in heads)} |" for method in results["methods"]
    ]
    lines += ["", results["cost_note"], "", "## Answers", ""]
    for row in results["answers"]:
        lines += [f"{_quoted(turn['role'])}: {_quoted(turn['content'])}\n" for turn in row["earlier"]]
        lines += [f"**{_quoted(row['prompt'])}**", "", "| | |", "| --- | --- |"]
        lines += [f"| *{name}* | {_quoted(text)} |" for name, text in references(row).items()]
        lines += [f"| {name} | {_quoted(text)} |" for name, text in row["answers"].items()] + [""]
    lines += [
        "Curves and schedules are in `report.html`; every number is in `results.json`, `results.csv` and `curves.csv`.",
        "",
    ]
    return "\n".join(lines)


def _metrics_table(results: Results) -> list[str]:
    names = results["metrics"]
    lines = ["", "## Held-out metrics", "", f"| method | {' | '.join(map(heading, names))} |"]
    lines += ["| --- |" + " --- |" * len(names)]
    start = before(results)
    lines += [f"| *before training* | {' | '.join(start)} |"] if start else []
    for method in results["methods"]:
        cells = []
        for name in names:
            metric = method["metrics"].get(name)
            if metric is None:
                cells.append("")
                continue
            text = f"**{value(metric)}**" if metric["best"] else value(metric)
            extra = difference(metric)
            cells.append(f"{text}<br>{extra}" if extra else text)
        label = method["name"] + (f" ({status(method)})" if status(method) else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, "", explanation(results), ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _quoted(text: str) -> str:
    """A text from a model, a data file or an error, of which a page shows the characters: no tags, links or images."""
    return re.sub(r"[\\`<\[|&]", r"\\\g<0>", readable(" ".join(text.split())))
