"""HTML report of a comparison: one self-contained file that needs no network."""

import base64
import html
from collections.abc import Mapping

from distillkit.comparison import markdown
from distillkit.comparison.results import MetricResult, Results
from distillkit.errors import readable

_STYLE = """
:root { --line: #d8dde3; --soft: #f5f7f9; --ink: #1c2733; --mute: #5c6b7a; --good: #0b6b3a; --bad: #a11; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); background: #fff;
  margin: 0 auto; max-width: 1500px; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p.note { color: var(--mute); max-width: 75ch; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; background: var(--soft); vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }
td:first-child { white-space: nowrap; }
th:first-child, tr.baseline td { background: var(--soft); }
td small { display: block; font-size: .75rem; color: var(--mute); white-space: nowrap; font-weight: 400; }
td .v { white-space: nowrap; }
td small.sure { color: var(--ink); }
td b { color: var(--good); }
table.text td { text-align: left; white-space: normal; }
.failed, td small.failed { color: var(--bad); }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
img { max-width: 100%; height: auto; }
"""


def page(results: Results, curves: Mapping[str, str], configs: Mapping[str, str]) -> str:
    """The report as one HTML page.

    Args:
        results: Summary of the comparison, as `summarise` returns it.
        curves: SVG pictures by heading.
        configs: Configuration of each method's first run, as YAML.
    """
    parts = [
        f"<h1>{_escape(results['title'])}</h1>",
        _pairs([(name, text.strip("`")) for name, text in markdown.about(results)]),
        "<h2>Held-out metrics</h2>",
        _metrics_table(results),
        f'<p class="note">{_escape(markdown.explanation(results))}</p>',
    ]
    failures = markdown.failures(results)
    if failures:
        rows = [[name, str(seed), error] for name, seed, error in failures]
        parts += ['<h2 class="failed">Failed runs</h2>', _table(["method", "seed", "error"], rows, "text")]
    for title, svg in curves.items():
        if svg:
            data = base64.b64encode(svg.encode()).decode()
            parts += [
                f"<h2>{_escape(title)}</h2>",
                f'<img alt="{_escape(title)}" src="data:image/svg+xml;base64,{data}">',
            ]
    heads = markdown.costs(results)
    rows = [[method["name"], *(markdown.cost(method, name) for name, _ in heads)] for method in results["methods"]]
    parts += ["<h2>Cost per run</h2>", _table(["method", *(head for _, head in heads)], rows)]
    parts += [f'<p class="note">{_escape(results["cost_note"])}</p>', "<h2>Answers side by side</h2>"]
    for row in results["answers"]:
        answers = [("reference", row["reference"]), *row["answers"].items()]
        parts.append(f"<details open><summary>{_escape(row['prompt'])}</summary>{_pairs(answers)}</details>")
    parts.append("<h2>Configurations</h2>")
    parts += [
        f"<details><summary>{_escape(name)}</summary><pre>{_escape(config)}</pre></details>"
        for name, config in configs.items()
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_escape(results['title'])}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _metrics_table(results: Results) -> str:
    """The main table: a row per method, a column per metric."""
    rows = []
    for method in results["methods"]:
        cells = "".join(_metric_cell(method["metrics"].get(name)) for name in results["metrics"])
        state = markdown.status(method)
        label = _escape(method["name"]) + (f' <small class="failed">{_escape(state)}</small>' if state else "")
        is_baseline = method["name"] == results["baseline"]
        rows.append(f"<tr{' class=baseline' if is_baseline else ''}><td>{label}</td>{cells}</tr>")
    start = markdown.before(results)
    if start:
        cells = "".join(f"<td>{_escape(cell)}</td>" for cell in start)
        rows.insert(0, f"<tr><td><i>before training</i></td>{cells}</tr>")
    head = "".join(f"<th>{_escape(markdown.heading(name))}</th>" for name in results["metrics"])
    return f'<div class="wide"><table><tr><th>method</th>{head}</tr>{"".join(rows)}</table></div>'


def _metric_cell(metric: MetricResult | None) -> str:
    """A table cell: the mean, bold if it is the best, with its difference from the baseline below."""
    if metric is None:
        return "<td></td>"
    text = f"<b>{_escape(markdown.value(metric))}</b>" if metric["best"] else _escape(markdown.value(metric))
    extra = markdown.difference(metric)
    sure = ' class="sure"' if extra.endswith("●") else ""
    return f'<td><span class="v">{text}</span>{f"<small{sure}>{_escape(extra)}</small>" if extra else ""}</td>'


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table class="{kind}"><tr>{heads}</tr>{cells}</table></div>'


def _pairs(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{_escape(name)}</td><td>{_escape(text)}</td></tr>" for name, text in rows)
    return f'<div class="wide"><table class="text">{cells}</table></div>'


def _escape(text: str) -> str:
    """A text as HTML; control characters, which no page may contain, are written as escapes."""
    return html.escape(readable(text))
