"""HTML report of a comparison: one self-contained file that needs no network."""

import base64
import html
from collections.abc import Mapping

from distillkit.comparison import markdown
from distillkit.comparison.plots import Picture
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
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: .5rem; }
.turns { margin: .6rem 0 0; color: var(--mute); white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .4rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; background: var(--soft); vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }
th:first-child, tr.baseline td { background: var(--soft); }
td small { display: block; font-size: .7rem; color: var(--mute); font-weight: 400; }
table.text td:first-child { min-width: 7rem; }
table.text td, summary, pre { overflow-wrap: anywhere; }
td small.sure { color: var(--ink); }
td b { color: var(--good); }
table.text td { text-align: left; white-space: normal; }
.failed, td small.failed { color: var(--bad); }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
img { width: 100%; max-width: 460px; height: auto; }
@media (max-width: 900px) {
  body { padding: 1rem 1rem 3rem; }
  table.cards tr:first-child { display: none; }
  table.cards, table.cards tbody, table.cards tr, table.cards td { display: block; width: 100%; }
  table.cards tr { border: 1px solid var(--line); margin: 0 0 .8rem; }
  table.cards td { display: flex; justify-content: space-between; gap: 1rem; white-space: normal; }
  table.cards td:first-child { position: static; background: var(--soft); }
  table.cards td:not(:first-child)::before { content: attr(data-label); color: var(--mute); }
  table.cards td:empty { display: none; }
  table.text td:first-child { min-width: 5.5rem; overflow-wrap: normal; }
}
"""


_BANDS = "A line is the mean over the seeds; its band reaches from the smallest value to the largest."


def page(results: Results, curves: Mapping[str, Picture], configs: Mapping[str, str]) -> str:
    """The report as one HTML page.

    Args:
        results: Summary of the comparison, as `summarise` returns it.
        curves: Pictures by heading.
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
        failed = [[name, str(seed), error] for name, seed, error in failures]
        parts += ['<h2 class="failed">Failed runs</h2>', _table(["method", "seed", "error"], failed)]
    shown = {title: picture for title, picture in curves.items() if picture.panels}
    parts += [f"<h2>{_escape(title)}</h2>{_charts(title, picture)}" for title, picture in shown.items()]
    if shown:
        parts.append(f'<p class="note">{_BANDS}</p>')
    heads = markdown.costs(results)
    names = ["method", *(head for _, head in heads)]
    rows = [
        _row(names, [_escape(text) for text in (method["name"], *(markdown.cost(method, name) for name, _ in heads))])
        for method in results["methods"]
    ]
    parts += ["<h2>Cost per run</h2>", _cards(names, rows)]
    parts += [f'<p class="note">{_escape(results["cost_note"])}</p>', "<h2>Answers side by side</h2>"]
    for row in results["answers"]:
        turns = "".join(
            f'<p class="turns"><b>{_escape(turn["role"])}</b> {_escape(turn["content"])}</p>' for turn in row["earlier"]
        )
        answers = [*markdown.references(row).items(), *row["answers"].items()]
        parts.append(f"<details open><summary>{_escape(row['prompt'])}</summary>{turns}{_pairs(answers)}</details>")
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


def _charts(title: str, picture: Picture) -> str:
    """The panels of a picture, as many in a line as there is room for."""
    data = [base64.b64encode(svg.encode()).decode() for svg in picture.panels]
    names = [*(f"{title}, panel {number}" for number in range(1, len(data))), f"{title}, legend"]
    images = [
        f'<img alt="{_escape(name)}" src="data:image/svg+xml;base64,{content}">'
        for name, content in zip(names, data, strict=True)
    ]
    return f'<div class="charts">{"".join(images)}</div>'


def _metrics_table(results: Results) -> str:
    """The main table: a row per method, a column per metric."""
    heads = ["method", *(markdown.heading(name) for name in results["metrics"])]
    rows = []
    start = markdown.before(results)
    if start:
        rows.append(_row(heads, ["<i>before training</i>", *map(_escape, start)]))
    for method in results["methods"]:
        state = markdown.status(method)
        label = _escape(method["name"]) + (f' <small class="failed">{_escape(state)}</small>' if state else "")
        cells = [_metric_cell(method["metrics"].get(name)) for name in results["metrics"]]
        rows.append(_row(heads, [label, *cells], "baseline" if method["name"] == results["baseline"] else ""))
    return _cards(heads, rows)


def _metric_cell(metric: MetricResult | None) -> str:
    """Content of a cell: the mean, bold if it is the best, with its difference from the baseline below."""
    if metric is None:
        return ""
    mean, _, deviation = _escape(markdown.value(metric)).partition(" ")
    text = f"<b>{mean}</b>" if metric["best"] else mean
    text += f"<small>{deviation}</small>" if deviation else ""
    extra = markdown.difference(metric)
    if not extra:
        return f"<div>{text}</div>"
    difference, _, interval = extra.removesuffix(" ●").partition(" ")
    kind, mark = (' class="sure"', "&nbsp;●") if extra.endswith("●") else ("", "")
    return f"<div>{text}<small{kind}>{_escape(difference)}{mark}<br>{_escape(interval)}</small></div>"


def _cards(heads: list[str], rows: list[str]) -> str:
    """A table of numbers, each row of which is a card with named values where there is no room for the columns."""
    cells = "".join(f"<th>{_escape(head).replace(' ↓', '&nbsp;↓').replace(' ↑', '&nbsp;↑')}</th>" for head in heads)
    return f'<div class="wide"><table class="cards"><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _row(heads: list[str], cells: list[str], kind: str = "") -> str:
    """A row of a table of numbers.

    Args:
        heads: Headings of the columns.
        cells: Contents of the cells, as HTML.
        kind: Class of the row.
    """
    first, *values = cells
    named = zip(heads[1:], values, strict=True)
    content = "".join(f'<td data-label="{_escape(head)}">{value}</td>' for head, value in named)
    return f"<tr{f' class={kind}' if kind else ''}><td>{first}</td>{content}</tr>"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of texts."""
    cells = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{_escape(cell)}</th>" for cell in heads)
    return f'<div class="wide"><table class="text"><tr>{names}</tr>{cells}</table></div>'


def _pairs(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{_escape(name)}</td><td>{_escape(text)}</td></tr>" for name, text in rows)
    return f'<div class="wide"><table class="text">{cells}</table></div>'


def _escape(text: str) -> str:
    """A text as HTML; control characters, which no page may contain, are written as escapes."""
    return html.escape(readable(text))
