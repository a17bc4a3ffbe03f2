"""A comparison as Markdown."""

import math
import re
from collections.abc import Mapping
from typing import Any

from distillkit.comparison.statistics import COVERAGE
from distillkit.comparison.summary import LOWER_IS_BETTER, WITHOUT_DIRECTION

_DIGEST = re.compile(r"#sha256=[0-9a-f]+")  # results.json has it

HEADINGS = {
    "kl": "KL(p‖q) ↓", "nll": "NLL ↓", "acceptance": "acceptance ↑", "rouge_l": "ROUGE-L ↑", "length": "length",
    "finished": "finished", "distinct_2": "distinct-2 ↑",
}  # fmt: skip
COSTS = {
    "spent_tokens": "tokens trained on",
    "distinct_tokens/teacher": "distinct, by the teacher",
    "distinct_tokens/student": "distinct, by the student",
    "distinct_tokens/speculative": "distinct, speculative",
    "distinct_tokens/stronger": "distinct, by the stronger model",
    "distinct_tokens/dataset": "distinct, of the data",
    "teacher_tokens": "tokens through the teacher",
    "spent_seconds": "seconds of training and curation",
    "curation_seconds": "of these, curation",
    "wall_seconds": "seconds in all, validation included",
    "peak_memory_gb": "peak memory, GB",
}
EXPLANATION = (
    "Means over the seeds ± their standard deviation. In brackets is the difference from {baseline} on the same "
    "prompts and seeds, with a {coverage} % bootstrap interval over prompts{and_seeds}; ● marks one that excludes 0. A "
    "figure is bold if it is the best and its interval against every other method excludes 0. The intervals are not "
    "corrected for the number of comparisons."
)


def heading(figure: str) -> str:
    """The head of a figure's column, with an arrow to its better side."""
    arrow = "" if figure in WITHOUT_DIRECTION else " ↓" if figure in LOWER_IS_BETTER else " ↑"
    return HEADINGS.get(figure, figure + arrow)


def value(found: Mapping[str, Any]) -> str:
    """A mean with its deviation."""
    deviation = found["deviation"]
    return f"{_short(found['mean'])}" + ("" if math.isnan(deviation) else f" ± {_short(deviation)}")


def before(found: Mapping[str, Any]) -> list[str]:
    """A cell for each figure of the student that all methods begin with; empty if that is not known."""
    cells = [_short(found["start"][name]) if name in found["start"] else "" for name in found["figures"]]
    return cells if any(cells) else []


def difference(found: Mapping[str, Any]) -> str:
    """A difference with its interval; empty for the baseline."""
    own = found.get("difference")
    if own is None:
        return ""
    mark = " ●" if own["sure"] else ""
    return f"{_short(own['mean'], sign=True)} [{_short(own['low'], sign=True)}, {_short(own['high'], sign=True)}]{mark}"


def _short(number: float, sign: bool = False) -> str:
    """Three or four digits that matter."""
    digits = 3 if abs(number) < 10 else 2 if abs(number) < 100 else 1
    return f"{number:{'+' if sign else ''}.{digits}f}"


def status(method: Mapping[str, Any]) -> str:
    """Whether its runs are done."""
    kinds = list(method["runs"].values())
    return "" if set(kinds) == {"done"} else ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def explanation(found: Mapping[str, Any]) -> str:
    """How the table is to be read."""
    several = len(found["seeds"]) > 1
    return EXPLANATION.format(
        baseline=found["baseline"], coverage=round(100 * COVERAGE), and_seeds=" and seeds" if several else ""
    )


def about(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, on what, with what."""
    budget = ", ".join(f"{amount:,} {unit}" for unit, amount in found["budget"].items())
    return [
        ("teacher", _DIGEST.sub("", str(found["teacher"]))),
        ("student", _DIGEST.sub("", str(found["student"]))),
        ("budget of each run", budget),
        ("seeds", ", ".join(map(str, found["seeds"]))),
        ("held-out prompts", f"{found['num_prompts']} of data.{found['split']}"),
        ("baseline", found["baseline"]),
        ("date", found["date"]),
        ("machine", found["machine"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("commit", found["commit"] or "not in a repository"),
        ("command", f"`{found['command']}`"),
    ]


def costs(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The costs that some method has, as (name, heading)."""
    return [(name, head) for name, head in COSTS.items() if any(name in own["cost"] for own in found["methods"])]


def cost(method: Mapping[str, Any], name: str) -> str:
    """A cost, as a number."""
    number = method["cost"].get(name)
    return "" if number is None else f"{number:,.2f}" if number < 100 and number != int(number) else f"{number:,.0f}"


def failures(found: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Method, seed and error of every run that failed."""
    return [(own["name"], seed, error) for own in found["methods"] for seed, error in own["errors"].items()]


def markdown(found: Mapping[str, Any]) -> str:
    """The whole comparison."""
    names = found["figures"]
    lines = [f"# {found['title']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in about(found)]
    lines += ["", "## Held-out figures", "", f"| method | {' | '.join(map(heading, names))} |"]
    lines += ["| --- |" + " --- |" * len(names)]
    start = before(found)
    lines += [f"| *before training* | {' | '.join(start)} |"] if start else []
    for method in found["methods"]:
        cells = []
        for name in names:
            own = method["figures"].get(name)
            text = "" if own is None else f"**{value(own)}**" if own["best"] else value(own)
            extra = "" if own is None else difference(own)
            cells.append(f"{text}<br>{extra}" if extra else text)
        label = method["name"] + (f" ({status(method)})" if status(method) else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", explanation(found), ""]
    if failures(found):
        lines += ["## Runs that failed", "", "| method | seed | error |", "| --- | --- | --- |"]
        lines += [f"| {name} | {seed} | {_cell(error)} |" for name, seed, error in failures(found)] + [""]
    heads = costs(found)
    lines += ["## Cost of a run", "", f"| method | {' | '.join(head for _, head in heads)} |"]
    lines += ["| --- |" + " --- |" * len(heads)]
    lines += [f"| {own['name']} | {' | '.join(cost(own, name) for name, _ in heads)} |" for own in found["methods"]]
    lines += ["", found["cost_note"], "", "## Answers", ""]
    for row in found["answers"]:
        lines += [
            f"**{_cell(row['prompt'])}**",
            "",
            "| | |",
            "| --- | --- |",
            f"| *reference* | {_cell(row['reference'])} |",
        ]
        lines += [f"| {name} | {_cell(text)} |" for name, text in row["answers"].items()] + [""]
    lines += [
        "Curves, α and β are in `report.html`; every number is in `results.json`, `results.csv` and `curves.csv`.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
