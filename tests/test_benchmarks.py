"""Each benchmark runs, at a size that says nothing about speed: it is the parity that they assert which is tested."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STEP = ["--shape", "tiny", "--steps", "1", "--warmup", "1", "--repeats", "1"]


def run(tmp_path, name, *arguments):
    """What the benchmark wrote."""
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / name), *arguments, "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(file.read_text())


def test_the_time_of_help_and_lists_is_measured(tmp_path):
    result = run(tmp_path, "startup.py", "--repeats", "1", "--skip-fit")
    assert [row["command"] for row in result["rows"]][:2] == ["--help", "--version"]
    assert all(row["seconds"] > 0 for row in result["rows"])


def test_a_fact_is_right_if_its_word_is_in_the_answer(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    is_right = runpy.run_path(str(BENCHMARKS / "quickstart.py"))["is_right"]
    assert is_right("They turn into Butterflies.", "butterfl")
    assert is_right("The symbol is O.", "O")
    assert not is_right("Oxygen, or no other", "O")
    assert not is_right("It is overheard.", "heard")


@pytest.mark.slow
def test_the_step_is_the_same_in_a_plain_loop_and_here(tmp_path):
    names = ("textbook", "distillkit", "distillkit-padded", "distillkit-cached")
    found = run(tmp_path, "step.py", *STEP, "--variants", *names)
    assert all(name in json.dumps(found) for name in names)


@pytest.mark.slow
def test_the_loss_is_the_textbooks(tmp_path):
    sizes = ["--positions", "32", "--vocab", "512", "--repeats", "1"]
    found = run(tmp_path, "loss_memory.py", "--losses", "kl", "jsd", "skl", "srkl", *sizes)
    assert "srkl" in json.dumps(found)


@pytest.mark.slow
def test_layouts_give_the_same_loss(tmp_path):
    found = run(tmp_path, "layouts.py", *STEP)
    assert all(lengths in json.dumps(found) for lengths in ("prompt", "even", "response"))


@pytest.mark.slow
def test_a_cache_of_the_real_teacher_loses_what_the_chain_rule_says(tmp_path):
    found = run(tmp_path, "teacher_cache.py", "--prompts", "2", "--tokens", "8", "--k", "16", "--repeats", "1")
    assert "hidden" in json.dumps(found)


@pytest.mark.slow
def test_a_store_gives_back_what_was_written(tmp_path):
    found = run(tmp_path, "store.py", "--responses", "600", "--tokens", "4", "--log-probs")
    assert [row["count"] for row in found["rows"]] == [600] * 8
    assert found["settings"]["files"] == 5 + 1 + 1, "shards, the manifest and its lock"
    assert 600 * 36 < found["settings"]["bytes"] * 600 < 600 * 400


@pytest.mark.slow
def test_encoding_is_measured_with_the_same_rows_in_each_phase(tmp_path):
    found = run(tmp_path, "encoding.py", "--rows", "2100", "--words", "4")
    assert [row["count"] for row in found["rows"]] == [2100] * 5


@pytest.mark.long
def test_every_family_gives_what_a_plain_loop_gives(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made by benchmarks/families.py -->\nold\n<!-- end -->\nafter\n")
    command = [sys.executable, str(BENCHMARKS / "families.py"), "--table", str(page)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " types, 0 faults" in done.stdout
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert "| `llama` | packed | cache | yes | yes | yes |  |" in written


@pytest.mark.slow
def test_a_family_that_takes_too_long_is_a_fault(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "families.py"), "--types", "llama", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "llama: scores raises: no result in 0.01 s" in done.stdout


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    found = run(tmp_path, "kills.py", "--kills", "3", "--terms", "2")
    assert {row["verb"] for row in found["rows"]} == {"fit", "curate", "evaluate", "merge", "export", "compare"}
    assert all(row["kills"] > 0 and not row["faults"] for row in found["rows"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="needs Linux and a C compiler")
def test_on_a_full_disk_a_command_ends_with_one_line_and_goes_on(tmp_path):
    found = run(tmp_path, "full_disk.py")
    assert len(found["rows"]) > 40
    assert not [fault for row in found["rows"] for fault in row["faults"]]


@pytest.mark.slow
def test_flipped_bits_are_noticed(tmp_path):
    found = run(tmp_path, "bit_flips.py", "--flips", "100")
    assert len(found["rows"]) == 8
    assert all(row["noticed"] >= 90 and not row["silent"] for row in found["rows"])


@pytest.mark.slow
def test_the_reports_of_a_comparison_grow_with_its_runs(tmp_path):
    found = run(tmp_path, "compare_report.py", "--methods", "2", "4", "--seeds", "1", "--prompts", "4", "--steps", "5")
    assert [row["runs"] for row in found["rows"]] == [2, 4]


@pytest.mark.slow
def test_growth_is_fitted(tmp_path):
    found = run(tmp_path, "scaling.py", "--parts", "step", "--grid", "two", "--repeats", "1")
    assert "step" in json.dumps(found)


@pytest.mark.slow
def test_all_sides_write_the_same_tokens(tmp_path):
    sizes = ["--prompts", "6", "--tokens", "6", "--layers", "4", "--repeats", "1", "--threads", "1"]
    found = run(tmp_path, "generation.py", *sizes, "--dtypes", "float32")["rows"]
    assert {(row["side"], row["sampling"]) for row in found} >= {
        (side, sampling) for side in ("plain", "transformers") for sampling in ("greedy", "sampled")
    }
    assert all(row["agreement"] >= 0.95 for row in found if row["sampling"] == "greedy")


@pytest.mark.slow
def test_the_share_of_drawing_is_measured_beside_an_earlier_version(tmp_path):
    source = BENCHMARKS.parent / "src"
    choice = ["--models", "flat", "--samplings", "top-p 0.9", "--tokens", "4", "--repeats", "1"]
    (row,) = run(tmp_path, "drawing.py", *choice, "--earlier", str(source))["rows"]
    assert 0 < row["draw"] < 1
    assert row["ratio"] > 0


@pytest.mark.slow
def test_the_layers_that_cost_least_are_found(tmp_path):
    rows = run(tmp_path, "layers.py", "--prompts", "1", "--tokens", "4", "--smallest", "29")["rows"]
    greedy, by_rule = rows[0], rows[1:]
    assert greedy["layers"] == 29
    assert all(greedy["kl"] < row["kl"] for row in by_rule)
