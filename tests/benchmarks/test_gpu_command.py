"""The command of `benchmarks/gpu.py`: what goes wrong in a case is a line of the report, and the rest goes on."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

CASES = """
import math, os, time
from gpu_parts.cases import CaseError, LeftOutError, OutOfTimeError

def passes(settings, number=1):
    yield {"test": "first", "status": "passed", "number": number, "value": math.nan}
    yield {"figure": f"{number} of {settings.device}"}

def raises(settings):
    yield {"number": 7}
    raise ValueError("two is not three")

def dies(settings):
    yield {"number": 8}
    os._exit(3)

def hangs(settings):
    yield {"number": 9}
    time.sleep(600)

def is_wrong(settings):
    print("what was printed")
    raise CaseError("off by one")
    yield

def is_left_out(settings):
    raise LeftOutError("no such thing")
    yield

def is_late(settings):
    raise OutOfTimeError("half of it")
    yield
"""


@pytest.fixture(scope="module")
def gpu_parts() -> Iterator[ModuleType]:
    """The package, without its folder on the path: the scripts there have names that tests have too."""
    spec = importlib.util.spec_from_file_location(
        "gpu_parts",
        BENCHMARKS / "gpu_parts" / "__init__.py",
        submodule_search_locations=[str(BENCHMARKS / "gpu_parts")],
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["gpu_parts"] = package
    spec.loader.exec_module(package)
    for name in ("anchors", "cases", "gpu_tests", "kernels", "plan", "report", "runner", "tables"):
        setattr(package, name, importlib.import_module(f"gpu_parts.{name}"))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu_parts"]:
        del sys.modules[name]


@pytest.fixture
def make_part(gpu_parts, tmp_path, monkeypatch):
    """Makes a part of cases that are functions of a module on the child's path."""
    (tmp_path / "trial_cases.py").write_text(CASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(*names: str, part: str = "trial", share: float = 1.0, **options: Any) -> Any:
        cases = tuple(gpu_parts.cases.Case(name, f"trial_cases:{name}", **options) for name in names)
        return gpu_parts.cases.Part(part, f"The {part}", share, cases)

    return make


def run(gpu_parts, tmp_path, parts, seconds=60.0, report=None, **options):
    """The outcomes by case."""
    settings = gpu_parts.cases.Settings(str(tmp_path / "out"), "cpu", tiny=True)
    runner = gpu_parts.runner.Runner(settings, seconds, announce=lambda line: None, **options)
    runner.run(parts, report or (lambda outcomes: None))
    assert runner._worker is None
    return {outcome.case: outcome for outcome in runner.outcomes}


def test_every_end_of_a_case_is_reported_and_the_cases_after_it_run(gpu_parts, make_part, tmp_path):
    part = make_part("raises", "dies", "hangs", "is_wrong", "is_left_out", "is_late", "passes")
    outcomes = run(gpu_parts, tmp_path, [part], limit=1.5)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "failed",
        "is_wrong": "failed",
        "is_left_out": "left out",
        "is_late": "not run",
        "passes": "passed",
    }
    assert outcomes["raises"].reason == "ValueError: two is not three"
    assert "Traceback" in outcomes["raises"].detail
    assert outcomes["dies"].reason == "the process ended with exit status 3"
    assert outcomes["hangs"].reason == "took longer than its limit of 2 s"
    assert "what was printed" in outcomes["is_wrong"].detail
    assert [outcomes[name].rows[0]["number"] for name in ("raises", "dies", "hangs", "passes")] == [7, 8, 9, 1]
    assert outcomes["passes"].figure == "1 of cpu"


def test_cases_of_several_parts_share_a_process(gpu_parts, make_part, tmp_path, monkeypatch):
    started: list[Any] = []
    worker = gpu_parts.runner.Worker
    monkeypatch.setattr(gpu_parts.runner, "Worker", lambda log: started.append(log) or worker(log))
    outcomes = run(gpu_parts, tmp_path, [make_part("passes"), make_part("raises", "is_wrong", part="second")])
    assert len(outcomes) == 3
    assert len(started) == 1


@pytest.mark.parametrize(("fault", "reason"), [("fail", "RuntimeError: made to fail"), ("crash", "signal SIGKILL")])
def test_a_fault_that_was_ordered_is_met(gpu_parts, make_part, tmp_path, fault, reason):
    outcome = run(gpu_parts, tmp_path, [make_part("passes")], faults={"passes": fault})["passes"]
    assert outcome.status == "failed"
    assert reason in outcome.reason


def test_a_process_that_cannot_start_is_a_failure(gpu_parts, make_part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts.runner, "BENCHMARKS", tmp_path)  # there is no package
    outcome = run(gpu_parts, tmp_path, [make_part("passes")])["passes"]
    assert (outcome.status, outcome.reason) == ("failed", "the process ended with exit status 1 before the case began")


def test_what_is_not_installed_is_left_out(gpu_parts, make_part, tmp_path):
    outcome = run(gpu_parts, tmp_path, [make_part("passes", needs=("no_such_module",))])["passes"]
    assert (outcome.status, outcome.reason) == ("left out", "no_such_module is not installed")


def test_time_that_is_up_ends_a_case_and_leaves_the_rest(gpu_parts, make_part, tmp_path):
    start = time.monotonic()
    parts = [make_part("hangs", "passes", least=0.5), make_part("is_wrong", part="second", least=30)]
    outcomes = run(gpu_parts, tmp_path, parts, seconds=6)
    assert time.monotonic() - start < 8
    assert {outcome.status for outcome in outcomes.values()} == {"not run"}
    assert outcomes["hangs"].reason == "out of time, stopped after 3 s"
    assert [row["number"] for row in outcomes["hangs"].rows] == [9]
    assert outcomes["passes"].reason == outcomes["is_wrong"].reason == "out of time"


def test_a_part_has_its_share_of_what_is_left(gpu_parts):
    assert gpu_parts.runner.share(100, [1, 3]) == 25
    assert gpu_parts.runner.share(75, [3]) == 75, "what the first part left over too"
    assert gpu_parts.runner.share(-1, [1]) == 0


def test_an_interrupt_still_reports_every_case(gpu_parts, make_part, tmp_path):
    seen: list[int] = []

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt("stopped by SIGTERM")

    settings = gpu_parts.cases.Settings(str(tmp_path / "out"), "cpu")
    runner = gpu_parts.runner.Runner(settings, 60, announce=interrupt)
    parts = [make_part("passes", "raises"), make_part("dies", part="second")]
    runner.run(parts, lambda outcomes: seen.append(len(outcomes)))
    statuses = [(outcome.case, outcome.status, outcome.reason) for outcome in runner.outcomes]
    stopped = ("not run", "stopped by SIGTERM")
    assert statuses == [("passes", "passed", ""), ("raises", *stopped), ("dies", *stopped)]
    assert seen == [2, 3]


def test_the_files_are_whole_after_each_part(gpu_parts, make_part, tmp_path):
    out = tmp_path / "out"
    parts = [make_part("passes", "raises"), make_part("hangs", part="second")]
    out.mkdir()
    report = gpu_parts.report.Report(out, gpu_parts.report.gather_facts("cpu", {"tiny": True}), parts)
    counts: list[int] = []

    def check(outcomes: Any) -> None:
        report.write(outcomes)
        counts.append(len(json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)["outcomes"]))

    run(gpu_parts, tmp_path, parts, report=check, faults={"hangs": "crash"})
    assert counts == [2, 3]
    results = json.loads((out / "results.json").read_text())
    assert results["versions"]["torch"]
    assert results["outcomes"][0]["rows"][0]["value"] is None, "no number"
    log = (out / "gpu.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "ValueError: two is not three" in log
    tables = (out / "tables.md").read_text()
    assert "## The second" in tables
    assert "- raises: failed, ValueError: two is not three" in tables


def test_the_last_screen_fits_a_terminal(gpu_parts):
    parts = gpu_parts.plan.make_parts("cuda", False, "model.gguf")
    figure = "1,234.5 ms, 12.34 GiB extra, dev 1e-03"
    outcomes = [
        gpu_parts.cases.Outcome(part.name, case.name, "passed", rows=[{"figure": figure}], anchor=case.anchor)
        for part in parts
        for case in part.cases
    ]
    outcomes[-2].rows = [{"figure": "KL 7.73→3.23, acc. 0.05→0.30, R-L 2.6→16.8, 12.3k tok/s"}]
    outcomes[0].status, outcomes[0].reason = "failed", "9 of 99 tests failed"
    outcomes[0].rows = [{"test": f"test_{i}", "status": "failed", "reason": "no" * 99} for i in range(9)]
    report = gpu_parts.report.Report(Path("out"), gpu_parts.report.gather_facts("cpu", {}), parts)
    lines = report.screen(outcomes).splitlines()
    assert len(lines) <= 64, "60 and the failed tests"
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("  passed ") for line in lines) == len(outcomes) - 1
    assert any("and 3 more" in line for line in lines)
    assert all(anchor.text in "\n".join(lines) for anchor in gpu_parts.anchors.ANCHORS.values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tiny", [False, True])
def test_every_case_names_a_function_that_is_there(gpu_parts, device, tiny):
    cases = [case for part in gpu_parts.plan.make_parts(device, tiny, None) for case in part.cases]
    assert len({case.name for case in cases}) == len(cases) > 40
    for case in cases:
        module, _, name = case.function.partition(":")
        text = (BENCHMARKS / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {name}(" in text
        assert case.anchor is None or case.anchor in gpu_parts.anchors.ANCHORS


def test_a_trial_has_the_cases_of_a_measurement(gpu_parts):
    full, tiny = (gpu_parts.plan.make_parts("cuda", tiny, "model.gguf") for tiny in (False, True))
    for part, trial in zip(full, tiny, strict=True):
        if part.name in ("loss", "step", "real", "compare"):
            assert [case.name for case in part.cases] == [case.name for case in trial.cases]


def test_each_test_is_written_when_it_is_done(gpu_parts, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest, signal\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip(reason='why')\n"
        "def test_c(): pass\n"
        "def test_d(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_e(): pass\n"
    )
    report, tests = tmp_path / "rows.jsonl", gpu_parts.gpu_tests
    path = str(BENCHMARKS / "gpu_parts" / "plugin")
    env = os.environ | {tests.FILE: str(report), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", tests.PLUGIN, "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run([*command, "test_some.py"], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    rows = tests.read(report)
    assert [(row["test"], row["status"]) for row in rows] == [
        ("test_some.py::test_a", "passed"),
        ("test_some.py::test_b", "failed"),
        ("test_some.py::test_c", "skipped"),
    ]
    assert rows[1]["reason"].startswith("AssertionError: no")
    assert "assert 1 == 2" in rows[1]["detail"]
    assert rows[2]["reason"] == "why"
    assert tests.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<...>", "softmax and elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "softmax and elementwise"),
        ("ncclDevKernel_AllGather", "other"),
    ],
)
def test_a_kernel_has_a_kind(gpu_parts, kernel, kind):
    assert gpu_parts.kernels.kind_of(kernel) == kind


def test_kernels_that_overlap_are_counted_once(gpu_parts):
    assert gpu_parts.kernels.union([(5, 9), (0, 2), (1, 3), (6, 7)]) == 7
    assert gpu_parts.kernels.union([]) == 0


def command(tmp_path: Path, *options: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path), *options]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_trial_reaches_every_part(tmp_path):
    done = subprocess.run(command(tmp_path), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert {outcome["part"] for outcome in outcomes} == {"tests", "loss", "step", "generation", "real", "compare"}
    assert {outcome["status"] for outcome in outcomes} <= {"passed", "left out"}
    for part in ("tests", "loss", "step", "generation", "real", "compare"):
        assert any(row["status"] == "passed" for row in outcomes if row["part"] == part)
    tables = (tmp_path / "tables.md").read_text()
    for header in ("| test |", "| divergence |", "| trainer |", "| kind of kernel |", "| side |", "| method |"):
        assert header in tables
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_cases_that_fail_die_and_hang_do_not_stop_the_others(tmp_path):
    faults = [
        "--fail",
        "8k×128k kl formula",
        "--crash",
        "8k×128k jsd formula",
        "--hang",
        "8k×128k kl distillkit",
    ]
    options = ["--parts", "loss", "generation", "real", "--limit", "30", "--minutes", "2.2", *faults]
    done = subprocess.run(command(tmp_path, *options), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {row["case"]: row for row in json.loads((tmp_path / "results.json").read_text())["outcomes"]}
    assert outcomes["8k×128k kl formula"]["reason"] == "RuntimeError: made to fail by --fail"
    assert outcomes["8k×128k jsd formula"]["reason"].startswith("the process ended with signal SIGKILL")
    assert outcomes["8k×128k kl distillkit"]["reason"] in (
        "took longer than its limit of 30 s",
        "out of time, stopped after 30 s",
    )
    assert outcomes["8k×128k jsd distillkit"]["status"] == outcomes["tiny generate"]["status"] == "passed"
    assert "FAILED   8k×128k kl formula" in done.stdout
    assert 'raise RuntimeError("made to fail by --fail")' in (tmp_path / "gpu.log").read_text()
    assert len((tmp_path / "tables.md").read_text().splitlines()) > 10


@pytest.mark.slow
def test_a_budget_that_runs_out_is_no_failure(tmp_path):
    options = ["--parts", "loss", "step", "compare", "--minutes", "0.3", "--hang", "8k×128k jsd distillkit"]
    start = time.monotonic()
    done = subprocess.run(command(tmp_path, *options), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert time.monotonic() - start < 25
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert {row["part"] for row in outcomes if row["status"] == "not run"} == {"loss", "step", "compare"}
    assert "not run  8k×128k jsd distillkit" in done.stdout


@pytest.mark.slow
def test_a_command_that_is_terminated_reports(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--parts", "loss", "--hang", "8k×128k jsd distillkit"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert "matrix products: passed" in line
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM" in output
    assert json.loads((tmp_path / "results.json").read_text())["outcomes"][0]["status"] == "passed"


def test_a_case_that_is_not_there_is_refused(tmp_path):
    options = ["--fail", "8k×128k kl formulas"]
    done = subprocess.run(command(tmp_path, *options), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no case '8k×128k kl formulas'" in done.stderr
