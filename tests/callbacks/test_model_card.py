"""Answers in the model card and below the curves, and what to do after a run."""

from pathlib import Path

from distillkit.callbacks.export import next_steps
from distillkit.callbacks.model_card import as_cell
from distillkit.callbacks.plots import curves
from distillkit.evaluation.examples import Example


def test_an_answer_is_one_cell_whatever_it_contains() -> None:
    assert as_cell("a | b\n\n<b>`c`</b>\x1b[1m") == "a \\| b &lt;b&gt;\\`c\\`&lt;/b&gt;\\x1b[1m"


def test_the_figure_has_the_answers_in_full_lines_or_cut_with_a_mark() -> None:
    rows = [Example("Why $x$?", "Because.", "No", "yes " * 200), Example("b", "c", "d", "e")]
    figure = curves({"train/loss": [(0, 1.0), (1, 0.5)]}, "run", (), rows)
    texts = [text.get_text() for text in figure.subfigs[1].axes[0].texts]
    assert texts[:4] == ["prompt", "reference", "student before", "student after"]
    assert texts[4:7] == ["Why $x$?", "Because.", "No"]
    assert texts[7].startswith("yes yes")
    assert texts[7].endswith(" …")
    assert len(texts[7].splitlines()) == 4
    assert len(figure.subfigs[0].axes) == 6
    figure.canvas.draw()  # a dollar sign is no formula
    assert not curves({"train/loss": [(0, 1.0)]}, "run", ()).subfigs


def test_the_next_steps_are_commands_for_the_shell() -> None:
    lines = next_steps(Path("my runs/a"), Path("my runs/a/export")).splitlines()
    assert lines[0] == "Next:"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "distillkit chat 'my runs/a/export'",
        "distillkit evaluate --run 'my runs/a'",
        "vllm serve 'my runs/a/export'",
    ]
