"""A comparison as one HTML file that opens without a network."""

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from distillkit.comparison import text

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


def page(found: Mapping[str, Any], curves: Mapping[str, str], configs: Mapping[str, str]) -> str:
    """The whole comparison.

    Args:
        found: What `summarise` gives.
        curves: SVG pictures by their headings.
        configs: The configuration of each method's first run, as YAML.
    """
    parts = [
        f"<h1>{escape(found['title'])}</h1>",
        _pairs([(name, shown.strip("`")) for name, shown in text.about(found)]),
        "<h2>Held-out figures</h2>", _figures(found), f'<p class="note">{escape(text.explanation(found))}</p>',
    ]  # fmt: skip
    failures = text.failures(found)
    if failures:
        rows = [[name, str(seed), error] for name, seed, error in failures]
        parts += ['<h2 class="failed">Runs that failed</h2>', _table(["method", "seed", "error"], rows, "text")]
    for title, svg in curves.items():
        if svg:
            data = base64.b64encode(svg.encode()).decode()
            parts += [
                f"<h2>{escape(title)}</h2>",
                f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">',
            ]
    heads = text.costs(found)
    rows = [[own["name"], *(text.cost(own, name) for name, _ in heads)] for own in found["methods"]]
    parts += ["<h2>Cost of a run</h2>", _table(["method", *(head for _, head in heads)], rows)]
    parts += [f'<p class="note">{escape(found["cost_note"])}</p>', "<h2>Answers side by side</h2>"]
    for row in found["answers"]:
        answers = [("reference", row["reference"]), *row["answers"].items()]
        parts.append(f"<details open><summary>{escape(row['prompt'])}</summary>{_pairs(answers)}</details>")
    parts.append("<h2>Configurations</h2>")
    parts += [
        f"<details><summary>{escape(name)}</summary><pre>{escape(config)}</pre></details>"
        for name, config in configs.items()
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(found['title'])}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _figures(found: Mapping[str, Any]) -> str:
    """The main table."""
    rows = []
    for method in found["methods"]:
        cells = []
        for name in found["figures"]:
            own = method["figures"].get(name)
            if own is None:
                cells.append("<td></td>")
                continue
            shown = f"<b>{escape(text.value(own))}</b>" if own["best"] else escape(text.value(own))
            extra = text.difference(own)
            sure = ' class="sure"' if extra.endswith("●") else ""
            cells.append(
                f'<td><span class="v">{shown}</span>{f"<small{sure}>{escape(extra)}</small>" if extra else ""}</td>'
            )
        state = text.status(method)
        label = escape(method["name"]) + (f' <small class="failed">{escape(state)}</small>' if state else "")
        is_baseline = method["name"] == found["baseline"]
        rows.append(f"<tr{' class=baseline' if is_baseline else ''}><td>{label}</td>{''.join(cells)}</tr>")
    start = text.before(found)
    if start:
        rows.insert(
            0, f"<tr><td><i>before training</i></td>{''.join(f'<td>{escape(cell)}</td>' for cell in start)}</tr>"
        )
    head = "".join(f"<th>{escape(text.heading(name))}</th>" for name in found["figures"])
    return f'<div class="wide"><table><tr><th>method</th>{head}</tr>{"".join(rows)}</table></div>'


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table class="{kind}"><tr>{heads}</tr>{cells}</table></div>'


def _pairs(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(shown)}</td></tr>" for name, shown in rows)
    return f'<div class="wide"><table class="text">{cells}</table></div>'
