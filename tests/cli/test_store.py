"""The verb `store`: what it says of a store, joins and exports, on stores that were written for it."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distillkit.cli.main import main
from distillkit.data.records import Source
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.types import Prompt, Prompts, Response, Sampling
from helpers.stores import TEACHER, stored

STUDENT = Provenance("student", "0123456789abcdef", Sampling(temperature=0.0, max_new_tokens=4), 2)
SYSTEM = {"role": "system", "content": "Be short."}


def prompt(name: str, *before: dict[str, str]) -> Prompt:
    return Prompt(name, (*before, {"role": "user", "content": f"What is {name}?"}), (1, 2))


PROMPTS = [prompt("p1"), prompt("p2", SYSTEM), prompt("q3")]
BY_TEACHER = [
    Response("p1", (5, 6), "It is p1.", "stop", (-0.5, -1.5)),
    Response("p2", (7, 8, 9), "It is «p2»\nand long", "length", (-0.25, -0.5, -1.0)),
]
BY_STUDENT = [Response("p1", (5,), "One.", "stop"), Response("q3", (1,), "", "stop")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with three shards of responses: one of the teacher, two of the student."""
    store = ResponseStore(tmp_path / "store")
    store.write(TEACHER, BY_TEACHER, PROMPTS[:2], "TransformersGenerator")
    store.write(STUDENT, BY_STUDENT[:1], PROMPTS[:1], "ServerGenerator")
    store.write(STUDENT, BY_STUDENT[1:], PROMPTS[2:], "ServerGenerator")
    return tmp_path / "store"


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> list[str]:
    """What `distillkit store` prints, or its error."""
    assert main(["store", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return (captured.err if status else captured.out).splitlines()


# ── info and show ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_info_says_who_wrote_how_much(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = said(capsys, "info", folder)
    assert lines[0].split() == ["WRITER", "MODEL", "ROUND", "SAMPLING", "RESPONSES", "TOKENS", "CUT", "SHARDS", "SIZE"]
    assert lines[1].startswith("student  0123456789a…  2      greedy, 4 tokens, seed 0")
    assert lines[1].split()[-6:-2] == ["2", "2", "0", "2"]
    assert lines[2].startswith("teacher  abc           0      T 0.8, top-p 0.95, 256 tokens, seed 7")
    assert lines[2].split()[-6:-2] == ["2", "5", "1", "1"]
    assert lines[3].startswith("4 responses, ")
    assert lines[3].endswith("; the messages of 3 prompts")


@pytest.mark.parametrize("columns", [80, 140])
def test_info_fits_the_terminal(
    columns: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = said(capsys, "info", folder)
    assert max(map(len, lines)) <= columns
    assert ("SAMPLING" in lines[0]) == (columns == 140)
    assert any("seed" in line for line in lines)


def test_info_as_json_has_the_whole_provenance(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads("\n".join(said(capsys, "info", folder, "--json")))
    student, teacher = found["provenances"]
    files = list((folder / "shards").glob("student-*.arrow"))
    assert student["bytes"] == sum(path.stat().st_size for path in files)
    assert (student["model"], student["key"], student["generators"]) == (
        "0123456789abcdef",
        STUDENT.key,
        ["ServerGenerator"],
    )
    assert teacher["sampling"]["seed"] == 7
    assert found["prompts"] == 3


def test_show_prints_prompts_with_their_responses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "show", folder, "--writer", "teacher") == [
        "── teacher, round 0, prompt p1, 2 tokens, ended",
        "[user] What is p1?",
        "[teacher] It is p1.",
        "",
        "── teacher, round 0, prompt p2, 3 tokens, cut at 256",
        "[system] Be short.",
        "[user] What is p2?",
        "[teacher] It is «p2»",
        "and long",
    ]


def test_text_is_shown_where_the_terminal_is_not_utf_8(folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "distillkit", "store", "show", str(folder), "--limit", "10"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"It is \xabp2\xbb" in done.stdout


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        (("--limit", 1), ["student, round 2, prompt p1"]),
        (
            ("--prompt", "p"),
            ["student, round 2, prompt p1", "teacher, round 0, prompt p1", "teacher, round 0, prompt p2"],
        ),
        (("--round", 2), ["student, round 2, prompt p1", "student, round 2, prompt q3"]),
        (("--writer", "nobody"), []),
    ],
)
def test_show_chooses(
    options: tuple[Any, ...], heads: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, "show", folder, *options)
    assert [",".join(line[3:].split(",")[:3]) for line in lines if line.startswith("── ")] == heads
    assert heads or lines == ["no matching response"]


def test_the_verb_imports_neither_torch_nor_lightning(folder: Path) -> None:
    code = (
        f"import sys; from distillkit.cli.main import main; main(['store', 'info', {str(folder)!r}]);"
        f"main(['store', 'merge', {str(folder.parent / 'new')!r}, {str(folder)!r}]);"
        f"main(['store', 'export', {str(folder)!r}, {str(folder.parent / 'out.jsonl')!r}]);"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "3 responses" in done.stdout
    assert {"torch", "lightning", "transformers", "datasets"}.isdisjoint(done.stderr.split())


@pytest.mark.parametrize("verb", ["info", "show", "export", "merge"])
def test_what_is_no_store_is_refused(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    places = {"export": (tmp_path / "empty", tmp_path / "out.jsonl"), "merge": (tmp_path / "new", tmp_path / "empty")}
    (line,) = said(capsys, verb, *places.get(verb, (tmp_path / "empty",)), status=1)
    assert line == (
        f"distillkit store: error: {tmp_path / 'empty'} is no response store: it has no manifest that lists a shard. "
        "Correct the path."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# ── merge ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merge_makes_one_store_of_several(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ResponseStore(tmp_path / "other", part="2of2")
    third = Response("q3", (3,), "Three.", "stop", (-2.0,))
    other.write(TEACHER, [BY_TEACHER[0], third], [PROMPTS[0], PROMPTS[2]], "TransformersGenerator")
    lines = said(capsys, "merge", tmp_path / "target", folder, tmp_path / "other")
    assert lines == [
        f"{folder}: 4 responses and 3 prompts added, 0 responses were there already",
        f"{tmp_path / 'other'}: 1 responses and 0 prompts added, 1 responses were there already",
    ]
    merged = ResponseStore(tmp_path / "target")
    assert list(merged.read(TEACHER).values()) == [*BY_TEACHER, third]
    assert list(merged.read(STUDENT).values()) == BY_STUDENT
    assert len(merged.shards()) == 3, "the student's two shards became one"
    assert stored(tmp_path / "target") == stored(folder) | stored(tmp_path / "other")
    again = said(capsys, "merge", tmp_path / "target", folder)
    assert again == [f"{folder}: 0 responses and 0 prompts added, 4 responses were there already"]


def test_merged_shards_have_a_bounded_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["distillkit.storage.merge"], "MERGED_BYTES", 1)
    said(capsys, "merge", tmp_path / "target", folder)
    assert len(ResponseStore(tmp_path / "target").shards()) == 3
    assert stored(tmp_path / "target") == stored(folder)


def test_different_responses_of_one_provenance_are_refused_and_nothing_of_that_store_is_added(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ResponseStore(tmp_path / "other")
    other.write(TEACHER, [Response("q3", (3,), "Three.", "stop"), Response("p1", (5, 7), "It is p1.", "stop")])
    before = stored(folder)
    (line,) = said(capsys, "merge", folder, tmp_path / "other", status=1)
    assert line == (
        f"distillkit store: error: {tmp_path / 'other'} and {folder} hold different responses of teacher in round 0 to "
        f"prompt p1, so they can't be merged. Nothing of {tmp_path / 'other'} was added."
    )
    assert stored(folder) == before


def test_a_store_is_not_merged_into_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "merge", folder, f"file://{folder}", status=1)
    assert line.endswith(f"file://{folder} can't be merged into itself: name another TARGET.")


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["out.jsonl", "new/out.jsonl.gz"])
def test_exported_lines_are_data_to_train_on(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert said(capsys, "export", folder, out) == [f"{out}: 3 responses", "1 skipped: the response has no text"]
    records = Source(str(out)).records()  # what `data.train` reads
    assert [record.messages for record in records] == [
        (*asked.messages, {"role": "assistant", "content": text})
        for asked, text in ((PROMPTS[0], "One."), (PROMPTS[0], "It is p1."), (PROMPTS[1], "It is «p2»\nand long"))
    ]
    with gzip.open(out) if name.endswith(".gz") else out.open("rb") as file:
        rows = [json.loads(line) for line in file]
    assert [(row["writer"], row["model"], row["round"], row["finish"]) for row in rows] == [
        ("student", "0123456789abcdef", 2, "stop"),
        ("teacher", "abc", 0, "stop"),
        ("teacher", "abc", 0, "length"),
    ]
    assert rows[1]["sampling"]["seed"] == 7
    assert "token_ids" not in rows[0]


def test_export_chooses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    lines = said(capsys, "export", folder, out, "--writer", "teacher", "--round", 0, "--ended", "--tokens")
    assert lines == [f"{out}: 1 responses", "1 skipped: the response was cut off"]
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["token_ids"], row["log_probs"]) == ([5, 6], [-0.5, -1.5])


def test_an_exported_folder_is_loaded_by_datasets_and_by_data_train(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    out = tmp_path / "published"
    said(capsys, "export", folder, out, "--format", "datasets", "--tokens")
    rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [row["messages"][-1]["content"] for row in rows] == ["One.", "It is p1.", "It is «p2»\nand long"]
    assert rows[2]["log_probs"] == [-0.25, -0.5, -1.0]
    assert rows[0]["sampling"]["max_new_tokens"] == 4
    assert len(Source(str(out / "data" / "train.parquet")).records()) == 3
    assert "generated by student, teacher" in (out / "README.md").read_text().replace("\n", " ")


def test_references_of_held_out_prompts_are_exported_only_if_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ResponseStore(tmp_path / "run" / "responses")
    store.write(TEACHER, BY_TEACHER[:1], Prompts(tuple(PROMPTS[:1])))
    store.write(TEACHER, BY_TEACHER[1:], Prompts(tuple(PROMPTS[1:2]), purpose="reference"))
    said(capsys, "merge", tmp_path / "merged", tmp_path / "run" / "responses")
    for number, path in enumerate((tmp_path / "run", tmp_path / "merged")):
        assert "2 responses (1 to held-out prompts), " in said(capsys, "info", path)[-1]
        assert "held out" in said(capsys, "show", path, "--prompt", "p2")[0]
        lines = said(capsys, "export", path, tmp_path / f"{number}.jsonl")
        assert lines[1:] == ["1 skipped: the prompt is held out (--held-out exports it)"]
        (row,) = map(json.loads, (tmp_path / f"{number}.jsonl").read_text().splitlines())
        assert (row["prompt_id"], row["purpose"]) == ("p1", "training")
        said(capsys, "export", path, tmp_path / f"{number}-all.jsonl", "--held-out")
        assert len(Source(str(tmp_path / f"{number}-all.jsonl")).records()) == 2


def test_a_prompt_with_tools_is_not_stored_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = Prompt("p1", ({"role": "user", "content": "Hi", "tools": "[]"},), (1, 2))
    ResponseStore(tmp_path / "store").write(TEACHER, BY_TEACHER, [tools, PROMPTS[1]])
    lines = said(capsys, "export", tmp_path / "store", tmp_path / "out.jsonl")
    assert lines[1] == "1 skipped: the prompt is not in the store"


def test_a_response_whose_prompt_is_not_in_the_store_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ResponseStore(tmp_path / "store").write(TEACHER, BY_TEACHER, PROMPTS[:1])
    lines = said(capsys, "export", tmp_path / "store", tmp_path / "out.jsonl")
    assert lines[1] == "1 skipped: the prompt is not in the store"


@pytest.mark.parametrize("form", ["jsonl", "datasets"])
def test_nothing_to_export_is_an_error_and_leaves_no_file(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ResponseStore(tmp_path / "store").write(STUDENT, BY_STUDENT[1:], PROMPTS)
    lines = said(capsys, "export", tmp_path / "store", tmp_path / "out.jsonl", "--format", form, status=1)
    assert lines[0].endswith("store has no response to export; 1 skipped: the response has no text.")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_export_overwrites_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    (line,) = said(capsys, "export", folder, tmp_path / "out.jsonl", status=1)
    assert line.endswith("out.jsonl exists already: name another OUT, or remove it.")
    (line,) = said(capsys, "export", folder, tmp_path / "out.txt", status=1)
    assert "OUT must end in .jsonl or .jsonl.gz" in line
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_the_parquet_file_has_groups_of_bounded_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillkit.storage.export.ROWS_AT_ONCE", 2)
    said(capsys, "export", folder, tmp_path / "out", "--format", "datasets")
    assert pq.ParquetFile(tmp_path / "out" / "data" / "train.parquet").num_row_groups == 2
