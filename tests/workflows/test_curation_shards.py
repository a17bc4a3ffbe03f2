"""Curation by several processes, and by one that is killed again and again: always the responses of one left alone."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.errors import ConfigError
from distillkit.workflows.curation import parse_shard
from helpers.runs import QUIET, command, finish, process, save_models, write_config, write_prompts
from helpers.stores import counts, shard_files, stored

PROMPTS, HELD_OUT = 300, 2
"""Three groups of 128, 128 and 44 by each writer, and one for the held-out prompts."""


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    save_models(root)
    write_prompts(root / "val.jsonl", HELD_OUT)
    return root


def config(folder: Path, run: str, prompts: int = PROMPTS, **model: Any) -> str:
    """A run of one step with a response of the teacher and one of the student to each prompt."""
    train = folder / f"train-{prompts}.jsonl"
    if not train.exists():
        write_prompts(train, prompts)
    sampling = {"max_new_tokens": 3}
    settings = {
        "trainer": QUIET | {"default_root_dir": str(folder / run), "max_steps": 1, "callbacks": [part("Throughput")]},
        "model": {
            "student": {"source": str(folder / "student")},
            "teacher": part("TransformersTeacher", source=str(folder / "teacher"), dtype="float32"),
            "loss": part("DistiLLM2"),
            "curator": part(
                "PairedCurator",
                chosen=part("TeacherCurator", sampling=sampling),
                rejected=part("StudentCurator", sampling=sampling),
            ),
            "generator": part("TransformersGenerator", progress=False),
            "answers": {"temperature": 0.0, "max_new_tokens": 3},
        }
        | model,
        "data": {"train": str(train), "val": str(folder / "val.jsonl"), "batch_size": 2},
    }
    return write_config(folder / f"{run}.yaml", settings)


@pytest.fixture(scope="module")
def left_alone(folder: Path) -> Callable[[int], Path]:
    """The store that one process wrote without a break, for a number of prompts."""

    def run(prompts: int) -> Path:
        name = f"alone-{prompts}"
        if not (folder / name).exists():
            assert command(["curate", "--config", config(folder, name, prompts)]) == 0
        return folder / name / "responses"

    return run


def curate_shards(*arguments: list[str]) -> None:
    """Runs the command in several processes at the same time."""
    with ExitStack() as stack:
        children = [stack.enter_context(process(main, ["curate", *given])) for given in arguments]
        assert [finish(child) for child in children] == [0] * len(children)


def test_two_shards_in_one_folder_give_the_responses_of_one_process(
    folder: Path, left_alone: Callable[[int], Path]
) -> None:
    run = config(folder, "two")
    curate_shards(*(["--config", run, "--shard", f"{number}/2"] for number in (1, 2)))
    assert stored(folder / "two" / "responses") == stored(left_alone(PROMPTS))
    assert sum(stored(left_alone(PROMPTS)).values()) == 2 * PROMPTS + HELD_OUT
    names = {path.name for path in (folder / "two" / "responses").glob("manifest-*.json")}
    assert names == {"manifest-1of2.00000-00000.json", "manifest-2of2.00000-00000.json"}

    files = {path: path.read_bytes() for path in shard_files(folder / "two" / "responses")}
    assert command(["fit", "--config", run]) == 0
    assert {path: path.read_bytes() for path in shard_files(folder / "two" / "responses")} == files, "nothing was left"


def test_three_shards_in_folders_of_their_own_are_merged_to_those_of_one_process(
    folder: Path, left_alone: Callable[[int], Path]
) -> None:
    runs = [config(folder, f"third-{number}") for number in (1, 2, 3)]
    curate_shards(*(["--config", run, "--shard", f"{number}/3"] for number, run in enumerate(runs, start=1)))
    parts = [folder / Path(run).stem / "responses" for run in runs]
    shares = [sum(stored(path).values()) for path in parts]
    assert shares == [2 * 128 + HELD_OUT, 2 * 128, 2 * 44]
    assert main(["store", "merge", str(folder / "merged"), *map(str, parts)]) == 0
    assert stored(folder / "merged") == stored(left_alone(PROMPTS))


def test_a_shard_neither_waits_for_others_nor_fails_without_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds a closed stream
    run, store = config(folder, "reports", 140), folder / "reports" / "responses"
    said = []
    for number in (2, 1, 3):
        assert main(["curate", "--config", run, "--shard", f"{number}/3"]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert said[0][-1] == f"shard 2/3 is complete; {2 * 128 + HELD_OUT} responses of other shards are missing"
    assert said[1][-3:] == [
        f"{store}: 140 responses by the student, 12 of them were there already",
        f"{store}: 142 responses by the teacher, 12 of them were there already",
        "shard 1/3 is complete, and so are all others",
    ]
    assert said[2][-2] == f"{store}: 142 responses by the teacher, 142 of them were there already"


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "1/2/3", "-1/3", "1 / 3", ""])
def test_what_is_no_shard_is_refused_before_a_model_is_loaded(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)
    with pytest.raises(
        ConfigError, match=r"--shard must be i/n with 1 ≤ i ≤ n, such as 3/8 for the third of eight, got"
    ):
        parse_shard(text)
    if text in ("4/3", "3"):
        for place in ("distillkit.models.loading.read_model", "distillkit.teachers.transformers.load_model"):
            monkeypatch.setattr(place, lambda *_: pytest.fail("a model was loaded before the error"))
        assert main(["curate", "--config", config(folder, "refused"), f"--shard={text}"]) == 1
        assert f"error: --shard must be i/n with 1 ≤ i ≤ n, such as 3/8 for the third of eight, got {text!r}." in (
            capsys.readouterr().err
        )


def test_a_shard_is_the_number_from_zero_and_how_many_there_are() -> None:
    assert [parse_shard(text) for text in ("1/1", "3/8", "8/8", None)] == [(0, 1), (2, 8), (7, 8), (0, 1)]


def test_a_part_of_the_responses_is_not_scored(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)
    assert main(["curate", "--config", config(folder, "refused"), "--shard=1/2", "--score"]) == 1
    assert "--score needs all responses, but with --shard each process generates only a part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "kills"), [(PROMPTS, 3), pytest.param(2000, 20, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_whenever_it_is_killed_every_response_is_there_once_in_the_end(
    prompts: int, kills: int, folder: Path, left_alone: Callable[[int], Path]
) -> None:
    alone, run = left_alone(prompts), f"killed-{prompts}"
    moments, unfinished, start = random.Random(prompts), [], time.monotonic()
    store = folder / run / "responses"
    for _ in range(kills):
        after = moments.random() < 0.5  # half of them while files are written, which takes milliseconds
        delay = moments.uniform(0, 0.02 if after else 0.08)
        killer = part("helpers.killed.KilledSoon", call=moments.randint(1, 2), delay=delay, after=after, progress=False)
        status = command(["curate", "--config", config(folder, run, prompts, generator=killer)])
        assert status == -signal.SIGKILL, f"it ended before it could be killed, in {time.monotonic() - start:.0f} s"
        found = stored(store)
        assert found <= stored(alone), "what is there is right at any time"
        unfinished.append(sum(found.values()))
    assert unfinished == sorted(unfinished)
    assert command(["curate", "--config", config(folder, run, prompts)]) == 0
    assert stored(store) == stored(alone)
    assert set(counts(store).values()) == {1}
    assert len(counts(store)) == 2 * prompts + HELD_OUT
    assert unfinished[-1] < 2 * prompts + HELD_OUT, "or the last kills struck nothing"
    assert not list(store.rglob(".*.arrow.*")), "what was half-written is removed"
    assert set(store.rglob("*.arrow")) == set(shard_files(store))


def test_a_second_method_trains_on_the_store_of_the_first_and_writes_nothing(folder: Path) -> None:
    store = str(folder / "shared")
    epoch = ["--trainer.max_steps=-1", "--trainer.max_epochs=1"]
    first = config(folder, "first", 10, store=store)
    assert command(["fit", "--config", first, *epoch]) == 0
    before = {path: path.read_bytes() for path in shard_files(folder / "shared")}
    assert len(stored(folder / "shared")) == 2 * 10 + HELD_OUT
    nobody = part("helpers.killed.KilledGenerator", call=1, progress=False)  # whoever writes is killed
    settings = {"store": store, "generator": nobody}
    second = config(folder, "second", 10, **(settings | {"loss": part("SkewKL")}))
    assert command(["fit", "--config", second, *epoch, "--data.val=null"]) == 0  # validation's answers are not stored
    assert {path: path.read_bytes() for path in shard_files(folder / "shared")} == before
    losses = [(folder / run / "csv" / "version_0" / "metrics.csv").read_text() for run in ("first", "second")]
    assert losses[0] != losses[1], "or it was the same method"


def test_a_filter_judges_the_part_that_is_here(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)
    writes = part("TeacherCurator", sampling={"max_new_tokens": 3})
    cut = part("FilteredCurator", curator=writes, filters=["Truncated"])  # three tokens are cut, most of them
    run = config(folder, "filtered", 140, curator=cut, loss=part("SkewKL"))
    said = []
    for number in (2, 3, 1):  # 12 responses, none, and the other 128
        assert main(["curate", "--config", run, f"--shard={number}/3"]) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "; 128 prompts are pending on other processes" in said[0]
    assert "left out; of 140 rows" in said[2]
    assert "on other processes" not in said[2]

    none_left = part(
        "FilteredCurator", curator=writes, filters=[part("TooLong", max_tokens=1), "Empty"]
    )  # one is an end
    run = config(folder, "filtered-all", 140, curator=none_left, loss=part("SkewKL"))
    assert main(["curate", "--config", run, "--shard=1/2"]) == 0
    assert main(["curate", "--config", run, "--shard=2/2"]) == 1, "now all are here to be judged"
    assert "refused the responses to all 140 prompts of round 0" in capsys.readouterr().err
