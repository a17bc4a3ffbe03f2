"""What a report says of outcomes whose figures are known."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from distillkit.comparison import html as page
from distillkit.comparison import markdown, plots
from distillkit.comparison.outcome import Outcome
from distillkit.comparison.report import json_safe
from distillkit.comparison.summary import difference_between, summarise

PROMPTS = 40
ABOUT = {
    "title": "A & B",
    "budget": {"tokens": 4000},
    "seeds": [0, 1],
    "split": "val",
    "student": "small",
    "date": "today",
    "machine": "m",
    "commit": "",
    "command": "distillkit compare --config x.yaml",
    "cost_note": "Means.",
}


def outcome(method: str, seed: int, kl: float, rouge: float = 10.0, spread: float = 0.1) -> Outcome:
    """A run that is done; a prompt's figures are spread around these."""
    answers = [
        {
            "prompt_id": f"p{i}",
            "prompt": f"<b>Question</b> {i} | ?",
            "reference": "Yes.",
            "tokens": i,
            "student": f"{method} says {i}",
            "finish": "stop" if i % 2 else "length",
            "positions": 1 + i % 3,
            "metrics": {"kl": kl + spread * (-1) ** i, "rouge_l": rouge + spread * (-1) ** i},
        }
        for i in range(PROMPTS)
    ]
    positions = sum(row["positions"] for row in answers)
    figures = {
        "rouge_l": sum(row["metrics"]["rouge_l"] for row in answers) / PROMPTS,
        "kl": sum(row["positions"] * row["metrics"]["kl"] for row in answers) / positions,
        "length": sum(row["tokens"] for row in answers) / PROMPTS,
    }
    found = {"metrics": figures, "num_prompts": PROMPTS, "teacher": "large", "versions": {"torch": "2"}}
    series = {
        "val/kl": [(0, 7.0), (1, kl)],
        "train/spent_tokens": [(0, 100.0), (1, 210.0)],
        "train/spent_seconds": [(0, 1.5), (1, 2.5)],
        "train/beta": [(0, 0.5), (1, 0.6)],
    }
    usage = {"spent_tokens": 210, "spent_seconds": 2.5 + seed, "distinct_tokens": {"teacher": 50}}
    return Outcome(method, seed, "done", "", found, answers, usage, series, ("beta",))


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(method for method in found["methods"] if method["name"] == name)


def three(best: float = 1.0) -> dict[str, Any]:
    outcomes = [
        outcome(name, seed, kl + 0.01 * seed) for name, kl in (("a", 2.0), ("b", best), ("c", 3.0)) for seed in (0, 1)
    ]
    return summarise(outcomes, "a", ABOUT)


def test_figures_are_means_over_seeds_with_their_deviation() -> None:
    found = of(three(), "a")["metrics"]
    values = [outcome("a", seed, 2.0 + 0.01 * seed).metrics["kl"] for seed in (0, 1)]
    assert found["kl"]["values"] == values
    assert found["kl"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["kl"]["deviation"] == pytest.approx(0.01 / math.sqrt(2))
    assert three()["metrics"][:2] == ["kl", "rouge_l"]


def test_differences_are_from_the_baseline_and_it_has_none() -> None:
    found = three()
    assert "difference" not in of(found, "a")["metrics"]["kl"]
    against = of(found, "c")["metrics"]["kl"]["difference"]
    assert against["mean"] == pytest.approx(1.0)
    assert against["sure"]
    assert not of(found, "c")["metrics"]["rouge_l"]["difference"]["sure"]


@pytest.mark.parametrize(("best", "sure"), [(1.0, True), (2.0, False)])
def test_the_best_is_bold_only_where_all_intervals_say_so(best: float, sure: bool) -> None:
    found = three(best)
    assert [of(found, name)["metrics"]["kl"]["best"] for name in "abc"] == [False, sure, False]
    assert not any(of(found, name)["metrics"]["rouge_l"]["best"] for name in "abc")
    assert not any(of(found, name)["metrics"]["length"]["best"] for name in "abc"), "no better side"


def test_higher_is_better_for_all_but_divergences() -> None:
    found = summarise([outcome("a", 0, 2.0, rouge=10), outcome("b", 0, 2.0, rouge=20)], "a", ABOUT)
    assert [of(found, name)["metrics"]["rouge_l"]["best"] for name in "ab"] == [False, True]


def test_only_seeds_that_both_have_are_compared() -> None:
    runs, others = [outcome("a", 0, 5.0), outcome("a", 1, 1.0)], [outcome("b", 1, 2.0), outcome("b", 2, 9.0)]
    found = difference_between("kl", runs, others)
    assert found is not None
    assert found.mean == pytest.approx(-1.0)
    assert difference_between("kl", runs[:1], others) is None
    assert difference_between("nothing", runs, others) is None


def test_a_run_that_failed_is_a_row_that_says_so() -> None:
    outcomes = [
        outcome("a", 0, 2.0),
        Outcome("b", 0, "failed", "The loss was nan in step 3"),
        Outcome("c", 0, "unfinished"),
    ]
    found = summarise(outcomes, "a", ABOUT)
    assert markdown.status(of(found, "b")) == "1 failed"
    assert markdown.status(of(found, "c")) == "1 unfinished"
    assert markdown.failures(found) == [("b", 0, "The loss was nan in step 3")]
    for report in (markdown.markdown(found), page.page(found, {}, {})):
        assert "The loss was nan in step 3" in report
        assert "1 failed" in report


def test_a_comparison_of_which_nothing_is_done_has_a_report() -> None:
    found = summarise([Outcome("a", 0, "unfinished")], "a", ABOUT)
    assert "1 unfinished" in markdown.markdown(found)
    assert "1 unfinished" in page.page(found, {"Learning curves": plots.learning_curves([])}, {})


def test_curves_say_when_a_figure_was_taken() -> None:
    own = outcome("a", 0, 2.0)
    assert own.curve("val/kl") == [(0, 0.0, 0.0, 7.0), (2, 210.0, 2.5, 2.0)]
    assert own.curve("train/beta") == [(1, 100.0, 1.5, 0.5), (2, 210.0, 2.5, 0.6)]


def test_the_student_that_all_begin_with_has_a_row() -> None:
    found = three()
    assert found["start"] == {"kl": 7.0}
    assert "| *before training* | 7.000 |  |  |" in markdown.markdown(found)
    row = r'<i>before training</i></td><td data-label="KL\(p‖q\) ↓">7\.000</td><td data-label="[^"]*"></td>'
    assert re.search(row, page.page(found, {}, {}))
    other = replace(outcome("b", 0, 2.0), series={"val/kl": [(0, 6.0)]})
    assert summarise([outcome("a", 0, 2.0), other], "a", ABOUT)["start"] == {}, "they begin with different ones"


def test_of_one_seed_it_is_said_what_the_intervals_leave_out() -> None:
    one = summarise([outcome("a", 0, 2.0), outcome("b", 0, 1.0)], "a", ABOUT | {"seeds": [0]})
    assert "too many exclude 0: set two or more `seeds`" in markdown.markdown(one)
    assert "too many exclude 0" in page.page(one, {}, {})
    assert "too many exclude 0" not in markdown.markdown(three()) + page.page(three(), {}, {})


def test_costs_are_means_over_seeds() -> None:
    found = of(three(), "a")["cost"]
    assert found == {"spent_tokens": 210, "spent_seconds": 3.0, "distinct_tokens/teacher": 50}


def test_the_page_needs_nothing_from_elsewhere_and_says_text_as_text() -> None:
    found = three()
    pictures = {"Learning curves": plots.learning_curves([outcome("a", 0, 2.0)]), "Nothing": plots.Picture()}
    html = page.page(found, pictures, {"a": "model: {x: <y>}"})
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "<script" not in html
    assert "&lt;b&gt;Question&lt;/b&gt;" in html
    assert "<b>Question" not in html
    assert "A &amp; B" in html
    assert html.count("data:image/svg+xml;base64,") == 4, "steps, tokens, seconds, and the legend"
    assert "b says 0" in html
    assert "model: {x: &lt;y&gt;}" in html


def test_the_text_has_whole_rows() -> None:
    report = markdown.markdown(three())
    tables = [line for line in report.splitlines() if line.startswith("|")]
    widths = {line.count("|") - line.count("\\|") for line in tables if line.startswith("| a ")}
    assert widths == {len(three()["metrics"]) + 2, 5, 3}, "figures, costs and answers"
    assert "\\<b>Question\\</b> 0 \\| ?" in report
    assert "**1.0" in report


def test_the_legend_names_each_method_once() -> None:
    *panels, legend = plots.learning_curves([outcome(name, seed, 2.0) for name in "ab" for seed in (0, 1)]).panels
    assert len(re.findall(r">\s*a\s*</text>", legend)) == 1
    assert not any(re.search(r">\s*a\s*</text>", panel) for panel in panels)
    (panel, _) = plots.schedule_curves([outcome("a", 0, 2.0)]).panels
    assert len(re.findall(r">\s*β\s*</text>", panel)) == 1
    assert plots.schedule_curves([Outcome("a", 0, "unfinished")]).panels == ()


def test_a_method_is_one_line_in_a_band_over_its_seeds() -> None:
    runs = [outcome("a", seed, kl) for seed, kl in ((0, 1.0), (1, 2.0), (2, 6.0))]
    assert plots._band(runs, "a", "val/kl", 0) == [(0, 7.0, 7.0, 7.0), (2, 3.0, 1.0, 6.0)]
    assert plots._band(runs, "a", "val/kl", 1)[1] == (210.0, 3.0, 1.0, 6.0), "against tokens"
    assert plots._band(runs[:1], "a", "val/kl", 0)[1] == (2, 1.0, 1.0, 1.0), "the band of one seed has no width"


def test_what_a_loss_reports_has_a_panel_by_itself() -> None:
    run = outcome("a", 0, 2.0)
    series = run.series | {"train/entropy": [(0, 0.5), (1, 0.4)], "train/lr": [(0, 0.1)], "train/grad_norm": [(0, 1.0)]}
    panel, _ = plots.reported_curves([replace(run, series=series)]).panels
    assert re.search(r">\s*entropy\s*</text>", panel)
    assert plots.reported_curves([run]).panels == ()


def test_a_conversation_is_shown_from_its_start() -> None:
    turns = [{"role": "user", "content": "Who <wrote> it?\x07"}, {"role": "assistant", "content": "She did."}]
    run = outcome("a", 0, 2.0)
    run.answers[:] = [row | {"earlier": turns, "gold": "No."} for row in run.answers]
    found = summarise([run], "a", ABOUT)
    html, text = page.page(found, {}, {}), markdown.markdown(found)
    assert "<b>user</b> Who &lt;wrote&gt; it?\\x07" in html
    assert html.index("Who &lt;wrote&gt; it?") < html.index("She did.") < html.index("<td>No.</td>")
    assert "assistant: She did." in text
    assert "| *the data's answer* | No. |" in text


def test_numbers_are_whole_in_json() -> None:
    assert json.dumps(json_safe({"a": math.nan, 1: [math.inf, 2]}), allow_nan=False) == '{"a": null, "1": [null, 2]}'


HOSTILE = "<img src=http://x/y> ![a](http://x/y) `code` [b](c) &lt;script> \x1b[31m\x07 | end"


def test_what_a_model_says_is_shown_and_never_obeyed() -> None:
    runs = [outcome(name, seed, 2.0) for name in "ab" for seed in (0, 1)]
    for run in runs:
        run.answers[:] = [row | {"prompt": HOSTILE, "reference": HOSTILE, "student": HOSTILE} for row in run.answers]
    for outcomes in (runs, [*runs, Outcome("c", 0, "failed", HOSTILE)]):
        found = summarise(outcomes, "a", ABOUT)
        report = markdown.markdown(found)
        for text in (report, page.page(found, {}, {})):
            assert "\\x1b" in text
            assert not {"\x1b", "\x07"} & set(text)
            assert "<img src=http" not in text.replace("\\<", "")
        assert "![a](" not in report
        assert "\\`code\\`" in report
