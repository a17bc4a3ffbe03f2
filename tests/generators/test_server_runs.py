"""Whole runs whose responses a server writes, by the command."""

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.storage.responses import ResponseStore
from distillkit.storage.rows import stored_rows
from helpers.runs import QUIET, save_models, write_config, write_prompts
from helpers.served import KEY
from helpers.servers import Reply, chat, echo, serving

PROMPTS = 6

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


@pytest.fixture(autouse=True)
def log_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds a closed stream
    log = logging.getLogger("distillkit")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = before


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def write(models: tuple[str, str], tmp_path: Path) -> Callable[..., str]:
    """Writes the configuration of a run of three steps whose responses a generator of its own writes."""
    train = write_prompts(tmp_path / "train.jsonl", PROMPTS)

    def config(own: dict[str, Any], curator: str = "StrongerCurator", **model: Any) -> str:
        settings = {
            "trainer": QUIET
            | {
                "default_root_dir": str(tmp_path / "run"),
                "max_epochs": 1,
                "callbacks": [part("RunCheckpoint")],
            },
            "model": {
                "student": {"source": models[1], "lora": {"r": 2}},
                "loss": part("CrossEntropy"),
                "curator": part(curator, generator=own, sampling={"max_new_tokens": 24}),
            }
            | model,
            "data": {"train": train, "batch_size": 2},
        }
        return write_config(tmp_path / "run.yaml", settings)

    return config


def server(url: str, **settings: Any) -> dict[str, Any]:
    quick = {"backoff": 0.01, "retries": 1, "timeout": 10.0, "concurrency": 1}
    return part("ServerGenerator", url=url, model="strong", **(quick | settings))


def stored(folder: Path) -> dict[str, str]:
    """The texts in a run's store, by their prompts; each is there once."""
    store = ResponseStore(folder / "responses")
    found = [(row["prompt_id"], row["text"]) for row in stored_rows(store.catalog, list(store.catalog.provenances))]
    assert len(dict(found)) == len(found) == sum(shard["responses"] for shard in store.shards())
    return dict(found)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_run_that_had_to_give_up_goes_on_and_asks_nothing_twice(
    write: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def give_way(request: Any) -> Reply:
        return echo(request) if request.number < 4 else Reply(b"overloaded", 503)

    with serving(give_way) as broken:
        assert main(["fit", "--config", write(server(broken.url))]) == 1
    line = last_line(capfd)
    assert line.startswith(f"distillkit fit: error: {broken.url}/chat/completions: failed after 2 tries in 0 s")
    assert "status 503: overloaded. 4 of 6 responses were received and saved." in line
    assert len(stored(tmp_path / "run")) == 4

    with serving() as good:  # at another address
        assert main(["fit", "--config", write(server(good.url)), "--ckpt_path", "last"]) == 0
    answered = broken.questions()[:4] + good.questions()
    assert Counter(answered) == Counter(row["prompt"] for row in rows(tmp_path / "train.jsonl"))
    assert broken.questions()[4:] == [good.questions()[0]] * 2
    assert len(stored(tmp_path / "run")) == PROMPTS
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()

    with serving() as third:  # what is stored needs no server
        assert main(["curate", "--config", write(server(third.url))]) == 0
    assert third.requests == third.listed == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # connections that were cut
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_signal_within_a_call_of_the_server_keeps_what_it_has_answered(
    concurrency: int, write: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(request: Any) -> Reply:
        if request.number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return echo(request) if request.number < 4 else Reply(hang=True)

    with serving(stop) as broken:
        start = time.monotonic()
        assert main(["fit", "--config", write(server(broken.url, concurrency=concurrency))]) == 143
        assert time.monotonic() - start < 15, "the server hangs for 30 s"
    *_, saved, command = capfd.readouterr().err.splitlines()
    assert saved == f"distillkit fit: stopped by SIGTERM. Saved: the responses in {tmp_path / 'run' / 'responses'}."
    assert command.startswith("Go on with: distillkit fit --config ")
    assert command.endswith(" --ckpt_path last")
    kept = stored(tmp_path / "run")
    assert len(kept) == 4 if concurrency == 1 else len(kept) >= 2
    with serving() as good:
        assert main(["curate", "--config", write(server(good.url))]) == 0
    assert len(good.requests) == PROMPTS - len(kept)
    assert len(stored(tmp_path / "run")) == PROMPTS


def test_answers_that_are_not_to_be_trained_on_do_not_stop_a_run(
    write: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    replies = [chat(None, "content_filter"), chat("", "length"), chat(""), chat("It is so")]
    with serving(lambda request: replies[request.number % 4]) as some:
        assert main(["fit", "--config", write(server(some.url))]) == 0
    assert sorted(stored(tmp_path / "run").values()) == ["", "", "", "", "", "It is so"]
    assert "5 of 6 responses of the server are empty" in " ".join(capfd.readouterr().out.split())


def test_a_server_can_be_the_teacher_of_a_run_that_has_none_in_this_process(
    write: Callable[..., str], tmp_path: Path
) -> None:
    with serving() as teacher:
        assert main(["fit", "--config", write(server(teacher.url), "TeacherCurator")]) == 0
    assert {shard["writer"] for shard in ResponseStore(tmp_path / "run" / "responses").shards()} == {"teacher"}
    assert len(teacher.requests) == PROMPTS


def test_a_server_can_not_write_for_the_runs_own_models(
    write: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    own = server("http://127.0.0.1:1/v1")
    assert main(["curate", "--config", write(own, generator=own)]) == 1
    assert "a ServerGenerator generates with a model outside the run: set it as" in last_line(capfd)


@pytest.mark.parametrize("kind", ["FileGenerator", "LocalGenerator"])
def test_the_stronger_writer_may_be_a_file_or_a_model_of_its_own(
    kind: str, write: Callable[..., str], models: tuple[str, str], tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "strong.jsonl", PROMPTS + 2, response=True)
    settings = {"path": file} if kind == "FileGenerator" else {"source": models[0], "progress": False}
    assert main(["fit", "--config", write(part(kind, **settings))]) == 0
    shards = ResponseStore(tmp_path / "run" / "responses").shards()
    assert [(shard["writer"], shard["responses"]) for shard in shards] == [("stronger", PROMPTS)]
    if kind == "FileGenerator":
        assert set(stored(tmp_path / "run").values()) < {row["response"] for row in rows(Path(file))}


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_key_is_in_nothing_that_a_run_leaves_behind_or_says(
    status: int,
    write: Callable[..., str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STRONG_API_KEY", KEY)
    said = f"you sent {KEY}".encode()
    with serving(lambda request: echo(request) if status == 200 else Reply(said, status)) as strict:
        for verb in ("curate", "fit"):
            done = main([verb, "--config", write(server(strict.url, key_variable="STRONG_API_KEY"))])
            assert done == int(status != 200)
    assert strict.requests[0].headers["authorization"] == f"Bearer {KEY}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "STRONG_API_KEY" in (tmp_path / "run" / "config.yaml").read_text()
    if status == 200:
        assert {path.suffix for path in files} >= {".yaml", ".arrow", ".json", ".ckpt", ".csv"}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    captured = capfd.readouterr()
    assert strict.url in captured.err or status == 200
    assert KEY not in captured.out + captured.err
