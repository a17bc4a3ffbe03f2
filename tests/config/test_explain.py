"""Every mistake ends in one line that names the key or the file and row, before any model is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distillkit.cli.main import VERBS, main
from helpers.models import save_tiny

GOOD_ROWS = [{"prompt": f"What is {number}?", "response": "A number."} for number in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models: a teacher, a student, one of another tokenizer, one without a chat template."""
    root = tmp_path_factory.mktemp("models")
    for name in ("teacher", "student", "other", "bare"):
        save_tiny(root / name)
    tokenizer = root / "other" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.write_text(json.dumps(content))
    (root / "bare" / "chat_template.jinja").unlink()
    return root


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fails the test if a model is loaded before the error."""
    loaded: list[str] = []
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds a closed stream

    def refuse(source: str, *_: object, **__: object) -> None:
        loaded.append(source)
        pytest.fail(f"the model {source} was loaded before the error")

    for place in ("distillkit.models.loading.read_model", "distillkit.teachers.transformers.load_model"):
        monkeypatch.setattr(place, refuse)
    yield loaded
    assert not loaded


def run(
    folder: Path, models: Path, capsys: pytest.CaptureFixture[str], *arguments: str, rows: str = "", **edit: str
) -> str:
    """The one line that a faulty run prints."""
    data = folder / "train.jsonl"
    data.write_text(rows or "".join(json.dumps(row) + "\n" for row in GOOD_ROWS))
    config = {
        "trainer": {"default_root_dir": str(folder / "run"), "accelerator": "cpu", "max_epochs": 1, "logger": False},
        "model": {
            "teacher": {
                "class_path": "TransformersTeacher",
                "init_args": {"source": str(models / edit.get("teacher", "teacher"))},
            },
            "student": {"source": edit.get("source", str(models / edit.get("student", "student")))},
            "loss": {"class_path": "SkewKL"},
        },
        "data": {"train": str(data)},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(["fit", "--config", str(path), *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("distillkit fit: error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    assert "Traceback" not in "\n".join(lines)
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.los", "SkewKL"], ["model.los", "Did you mean loss?"]),
        (["--trainer.max_epoch", "1"], ["trainer.max_epoch", "Did you mean max_epochs?"]),
        (["--model.loss.init_args.alfa", "0.2"], ["model.loss.alfa", "Did you mean alpha?"]),
        (["--model.loss", "SkewLK"], ["model.loss", "SkewLK", "SkewKL"]),
        (["--model.loss.alpha", "1.5"], ["SkewKL.alpha", "[0, 1)", "1.5"]),
        (["--model.answers.temperature", "-1"], ["Sampling.temperature must be at least 0", "-1"]),
        (["--model.student.lora.r", "0"], ["Lora.r must be at least 1", "0"]),
        (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--data.batch_size", "0"], ["batch_size", "at least 1", "0"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--modell.loss", "SkewKL"], ["command line: unknown key modell.", "Did you mean model?"]),
        (["--model.student.lora.r", "x"], ["command line: model.student.lora.r must be an integer, got x."]),
        (["--trainer.max_epochs=x"], ["command line: trainer.max_epochs must be an integer or null, got x."]),
        (["--data.overlong=x"], ["command line: data.overlong must be error or drop, got x."]),
        (["--model.optimizer.lrr=1"], ["command line: unknown key model.optimizer.lrr. Did you mean lr?"]),
        (["--model.optimizer.lr=2e-5x"], ["command line: model.optimizer.lr must be a number", ", got 2e-5x."]),
        (["--model.optimizer=null"], ["command line: model.optimizer can't be null."]),
        (["--model.loss=null"], ["command line: model.loss can't be null."]),
        (["--trainer.plugins=foo"], ["command line: trainer.plugins must be the name of a part", "got foo."]),
        (["--trainer.max_epochs=null"], ["trainer.max_epochs must be set, or trainer.max_steps"]),
        (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches must be above 0, got 0."]),
        (["--trainer.strategy=ddp_spawn"], ["trainer.strategy: ddp_spawn can't be used on the command line"]),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/nll", "--trainer.callbacks.mode=up"],
            ["EarlyStopping refuses its settings: `mode` can be min, max, got up"],
        ),
        (
            ["--trainer.callbacks=LambdaCallback", "--trainer.callbacks.on_train_start=print"],
            ["command line: trainer.callbacks.on_train_start must be", "got print."],
        ),
        (["--seed_everything", "-1"], ["command line: seed_everything must lie in [0, 4294967295], got -1."]),
        (["--trainer.default_root_dir=null"], ["command line: trainer.default_root_dir is null."]),
        (["--model.optimiser.lr=1"], ["command line: unknown key model.optimiser. Did you mean optimizer?"]),
        (["--data.trains.limit=1"], ["command line: unknown key data.trains. Did you mean train?"]),
        (["--data.train", "nowhere.jsonl", "--data.train.limit=1"], ["there is no file nowhere.jsonl"]),
        (["--model.loss", "SkewLK"], ["command line: model.loss: No installed loss is named 'SkewLK'."]),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], words: list[str], tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = run(tmp_path, models, capsys, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {loss: {class_path: SkewKL, init_args: {alfa: 1}}}",
            "unknown key model.loss.alfa. Did you mean alpha?",
        ),
        ("model: {student: {sorce: x}}", "unknown key model.student.sorce. Did you mean source?"),
        ("data: {train: {path: x.jsonl, limmit: 3}}", "unknown key data.train.limmit. Did you mean limit?"),
        ("trainer: {max_epoch: 3}", "unknown key trainer.max_epoch. Did you mean max_epochs?"),
        ("modle: {loss: SkewKL}", "unknown key modle. Did you mean model?"),
        ("modle: {}", "unknown key modle. Did you mean model?"),
        (
            "trainer: {callbacks: [{class_path: RunCheckpoint, init_args: {every: 3}}]}",
            "unknown key trainer.callbacks.every. Did you mean every_n_steps?",
        ),
        (
            "model.loss: {class_path: DistiLLM2, init_args: {beta: {class_path: Constant, init_args: {constant: x}}}}",
            "model.loss.beta.constant must be a number, got x.",
        ),
        ("model: {loss: SkewLK}", "model.loss: No installed loss is named 'SkewLK'. Similar names: SkewKL."),
        ("model: {student: ./student}", "model.student must be the name of a part, got ./student."),
        ("model: {teacher: ./teacher}", "model.teacher must be the name of a part or null, got ./teacher."),
        ("data: {test: {limit: 2}}", "data.test.path must be set, in a config file or on the command line."),
        (
            "model: {student: {revision: 12e4567}}",
            "model.student.revision must be a text or null, got inf. Put it in quotes.",
        ),
        (
            "data: {train: {path: x.jsonl, prompt_column: no}}",
            "data.train.prompt_column must be a text, got False. Put it in quotes.",
        ),
        ("model:", "model must be a mapping of settings, got None. Leave it out to set none."),
        ("data: [1]", "data must be a mapping of settings, got [1]. Leave it out to set none."),
        ("trainer:", "trainer must be a mapping of settings, got None. Leave it out to set none."),
        ("seed_everything: -1", "seed_everything must lie in [0, 4294967295], got -1."),
        ("base:", "base must name a config file, or list several, got None."),
        (
            "class_path: SkewKL\ninit_args: {alpha: 0.3}",
            "this is the file of a part, not of a run. Name it where the part goes, as in --model.loss=FILE.",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_file(
    text: str, message: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(text)
    line = run(tmp_path, models, capsys, "--config", str(path))
    assert line.startswith(f"distillkit fit: error: {path}: {message}"), line


def test_a_missing_setting_is_named_without_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--trainer.max_epochs=1"]) == 1
    message = "model.student, model.loss, data.train must be set, in a config file or on the command line."
    assert capsys.readouterr().err == f"distillkit fit: error: {message}\n"


def test_arguments_lie_over_files_wherever_they_are(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text("data: {batch_size: 1, max_length: 1, bucket: 1, eval_batch_size: 1}")
    (tmp_path / "first.yaml").write_text("base: base.yaml\ndata: {max_length: 2, bucket: 2, eval_batch_size: 2}")
    (tmp_path / "second.yaml").write_text("data: {train: x.jsonl, bucket: 3, eval_batch_size: 3}")
    files = [f"--config={tmp_path / name}.yaml" for name in ("first", "second")]
    required = ["--model.loss=SkewKL", "--model.student.source=x"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--data.eval_batch_size=4", *files, *required, "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    sizes = [data[key] for key in ("batch_size", "max_length", "bucket", "eval_batch_size")]
    assert sizes == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "half', ["line 7", "JSON"]),
        ('{"question": "What?", "response": "That."}', ["line 7", "question", "prompt"]),
        ('{"prompt": "What?", "response": "  "}', ["line 7", "empty response"]),
        ('{"prompt": "What?"}', ["line 7", "no response"]),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(
    row: str, words: list[str], tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps(row) for row in GOOD_ROWS]
    line = run(tmp_path, models, capsys, rows="\n".join([*good[:6], row, *good[6:]]) + "\n")
    assert "train.jsonl" in line
    assert all(word in line for word in words), line


def test_tokenizers_that_differ_are_refused(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = run(tmp_path, models, capsys, student="other")
    assert "token" in line
    assert "10" in line


def test_a_missing_chat_template_is_named(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = run(tmp_path, models, capsys, student="bare")
    assert "chat template" in line
    assert "data.chat" in line


def test_a_missing_model_folder_is_named(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "./nowhere" in run(tmp_path, models, capsys, source="./nowhere")


def test_a_wheel_with_another_hash_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "tinywheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinywheel/model.gguf", b"GGUF")
        wheel.writestr("tinywheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
        wheel.writestr(
            "tinywheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tinywheel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    line = run(tmp_path, models, capsys, source=f"wheel:tinywheel==1.0/tinywheel/model.gguf#sha256={'0' * 64}")
    assert "sha256" in line
    assert "0" * 64 in line


def test_an_existing_run_folder_is_refused(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    line = run(tmp_path, models, capsys)
    assert str(tmp_path / "run") in line
    assert "--ckpt_path last" in line


def test_an_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean fit?" in error
    assert f"Use one of {', '.join(VERBS)}." in error


def test_an_argument_sets_something_of_a_source_that_a_file_names_by_its_path_alone(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text("data: {train: some.jsonl}")
    arguments = ["--config", str(tmp_path / "train.yaml"), "--data.train.limit=4", "--data.train.split", "test"]
    with pytest.raises(SystemExit):
        main(["fit", "--model.student.source=x", "--model.loss=CrossEntropy", *arguments, "--print_config"])
    source = yaml.safe_load(capsys.readouterr().out)["data"]["train"]["init_args"]
    assert (source["path"], source["limit"], source["split"]) == ("some.jsonl", 4, "test")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{path: a.jsonl, split: test}",
            "Source.split and Source.hub_config choose within a hub dataset, but a.jsonl is",
        ),
        ("{path: a.jsonl, limit: 0}", "Source.limit must be at least 1 (null reads all rows), got 0."),
        ("{path: []}", "Source.path is an empty list: name at least one file."),
    ],
)
def test_what_a_source_refuses_is_one_line_though_a_source_may_also_be_a_path(
    source: str, message: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(f"data: {{train: {source}}}")
    assert run(tmp_path, models, capsys, "--config", str(path)).startswith(f"distillkit fit: error: {message}")
