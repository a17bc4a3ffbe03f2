"""Configuration files: their bases, their order, files of packages and streams, and what is no configuration."""

import os
from pathlib import Path

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.config import files as configs
from distillkit.config import packaged
from distillkit.errors import ConfigError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('a file is read without an import')\n")
    (folder / "method.yaml").write_text("base: below.yaml\nmodel: {loss: SkewKL}\n")
    (folder / "below.yaml").write_text("data: {batch_size: 3}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_file_of_a_package_is_read_without_importing_it(package: Path) -> None:
    assert configs.load("pkg:some_package/method.yaml") == {"data": {"batch_size": 3}, "model": {"loss": "SkewKL"}}


def test_it_may_be_the_base_of_another_file(package: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: [pkg:some_package/method.yaml]\ndata: {batch_size: 4}\n")
    assert configs.load(tmp_path / "mine.yaml") == {"data": {"batch_size": 4}, "model": {"loss": "SkewKL"}}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pkg:no_such_package/method.yaml", "is in the package 'no_such_package', which is not installed. pkg:PACKAGE"),
        ("pkg:../method.yaml", r"is in the package '\.\.', which is not installed"),
        ("pkg:some_package/none.yaml", r"some_package/none\.yaml does not exist"),
    ],
)
def test_what_is_not_there_is_said(path: str, message: str, package: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load(path)


def write(folder: Path, **texts: str) -> list[str]:
    """Config files by name, with their content; their paths."""
    paths = [folder / f"{name}.yaml" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def test_a_base_lies_under_its_file_and_files_lie_over_one_another_in_order(tmp_path: Path) -> None:
    write(tmp_path, below="{a: 1, b: 1, c: 1, d: 1}", beside="{b: 2, c: 2, d: 2}")
    paths = write(tmp_path, first="base: [below.yaml, beside.yaml]\nc: 3\nd: 3", second="d: 4")
    assert configs.load_all(paths).content == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert configs.load_all(paths[::-1]).content["d"] == 3


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        (
            "{class_path: A, init_args: {x: 1}}",
            "{init_args: {y: 2}}",
            {"class_path": "A", "init_args": {"x": 1, "y": 2}},
        ),
        ("{class_path: A, init_args: {x: 1}}", "{class_path: B}", {"class_path": "B"}),
        ("{class_path: A, init_args: {x: 1}}", "B", "B"),
        ("{class_path: A, init_args: {x: 1}}", "A", {"class_path": "A", "init_args": {"x": 1}}),
        ("A", "{init_args: {y: 2}}", {"class_path": "A", "init_args": {"y": 2}}),
        ("A", "{class_path: B, init_args: {y: 2}}", {"class_path": "B", "init_args": {"y": 2}}),
        ("data.jsonl", "{path: other.jsonl}", {"path": "other.jsonl"}),
    ],
)
def test_a_part_keeps_its_settings_unless_another_class_takes_its_key(
    below: str, above: str, merged: object, tmp_path: Path
) -> None:
    paths = write(tmp_path, below=f"part: {below}", above=f"part: {above}")
    assert configs.load_all(paths).content == {"part": merged}


@pytest.mark.parametrize("name", ["a\\0b", "\\ud83d.yaml"])
def test_a_base_that_no_file_can_be_named_is_refused(name: str, tmp_path: Path) -> None:
    (path,) = write(tmp_path, first=f'base: "{name}"')
    with pytest.raises(ConfigError, match="can't exist: no file has such a name"):
        configs.load(path)


def test_a_dotted_key_is_the_nested_one(tmp_path: Path) -> None:
    paths = write(tmp_path, first="trainer: {max_epochs: 1, devices: 1}", second="trainer.max_epochs: 3")
    assert configs.load_all(paths).content == {"trainer": {"max_epochs": 3, "devices": 1}}
    assert configs.load_all(paths[::-1]).content == {"trainer": {"max_epochs": 1, "devices": 1}}


@pytest.mark.parametrize("name", ["a #b", "it's", "a: b", '"quoted"', "{x}", "${config_dir}", "a\\n", "50%"])
def test_the_folder_of_a_file_is_put_in_as_it_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    text = (
        "a: ${config_dir}/x\nb: \"${config_dir}/x\"\nc: '${config_dir}'\nd: {e: ${config_dir}/x, f: [${config_dir}]}\n"
    )
    (path,) = write(folder, run=text)
    assert configs.load(path) == {
        "a": f"{folder}/x",
        "b": f"{folder}/x",
        "c": str(folder),
        "d": {"e": f"{folder}/x", "f": [str(folder)]},
    }


def test_numbers_and_dates_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    text = "[1e-3, 1E5, -1.5e+2, .5, 1., -.inf, 7, 1_000, 2024-01-01, 1.2.3, abc1e5, '1e-3', 1e, e5, .nanx]"
    (path,) = write(tmp_path, run=f"a: {text}")
    expected = [
        1e-3,
        1e5,
        -150.0,
        0.5,
        1.0,
        float("-inf"),
        7,
        1000,
        "2024-01-01",
        "1.2.3",
        "abc1e5",
        "1e-3",
        "1e",
        "e5",
    ]
    values = configs.load(path)["a"]
    assert values == [*expected, ".nanx"]
    assert [type(value) for value in values[:4]] == [float] * 4


def stream(text: str) -> str:
    """The path of a pipe from which a text can be read once, as a shell's `<(command)` is."""
    read_end, write_end = os.pipe()
    os.write(write_end, text.encode())
    os.close(write_end)
    return f"/dev/fd/{read_end}"


def test_a_stream_is_read_and_its_bases_start_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, below="a: 1\nb: 1")
    assert configs.load(stream("base: below.yaml\nb: ${config_dir}")) == {"a": 1, "b": str(tmp_path)}


def test_a_stream_that_was_read_before_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Config file /dev/fd/\d+ is empty\. A stream is read once"):
        configs.load(stream(""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base:\n", r"run\.yaml: base must name a config file, or list several, got None\."),
        ("base: ''\n", "base must name a config file, or list several, got ''"),
        ("base: 3\n", "base must name a config file, or list several, got 3"),
        ("base: {a: b}\n", "base must name a config file, or list several, got {'a': 'b'}"),
        ("base: [run2.yaml, null]\n", r"base must name a config file, or list several, got \['run2.yaml', None\]"),
        ("base: none.yaml\n", r"none\.yaml, the base of \S*run\.yaml, does not exist\. Check the path\."),
        ("base: run.yaml\n", r"run\.yaml is its own base: \S*run\.yaml\."),
        ("a: {null: 1}\n", r"run\.yaml is not valid YAML: line 1, column 5: an empty key\."),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: the key 'c' a second time"),
        ("1: a\n", r"run\.yaml has the key 1, which is no text\. Write the name of a setting\."),
        ("a: [1\n", "is not valid YAML: line 2, column 1: while parsing a flow sequence"),
        ("a: &b [*b]\n", "is not valid YAML: it is nested too deeply, or an anchor contains itself"),
        (f"a: {'[' * 3000}{']' * 3000}\n", "is not valid YAML: it is nested too deeply"),
        (f"a: {'1' * 5000}\n", "is not valid YAML: Exceeds the limit"),
        ("a: !!python/object:os.system 1\n", "is not valid YAML: line 1, column 4: could not determine a constructor"),
        ("- a\n", "must be a YAML mapping, got list"),
        ("text\n", "must be a YAML mapping, got str"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (path,) = write(tmp_path, run=text)
    with pytest.raises(ConfigError, match=message):
        configs.load(path)


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text \(.*\)\. Save it as UTF-8\."):
        configs.load(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"can't be read: Is a directory\."):
        configs.load(tmp_path)
    with pytest.raises(ConfigError, match=r"can't be read: File name too long\."):
        configs.load("a" * 5000)


def test_the_file_that_sets_a_key_is_named(tmp_path: Path) -> None:
    write(tmp_path, below="model: {loss: {class_path: A, init_args: {alpha: 1, beta: 1}}, parts: [{x: 1}, {y: 1}]}")
    paths = write(tmp_path, first="base: below.yaml\nmodel: {loss: {init_args: {beta: 2}}}", second="data: null")
    merged = configs.load_all(paths)
    origins = {key: Path(merged.origin(key)).stem for key in ("data", "model.parts.y", "model.loss.alpha", "nothing")}
    assert origins == {"data": "second", "model.parts.y": "below", "model.loss.alpha": "below", "nothing": ""}
    assert Path(merged.origin("model.loss.beta")).stem == "first"
    assert Path(merged.origin("model.loss.gamma")).stem == "first", "the last file that has the nearest key above it"


def test_a_file_replaces_the_class_of_a_default_with_its_arguments(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  student: {source: s}\n  loss: {class_path: ForwardKL}\n"
        "  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}\ndata: {train: x.jsonl}\n"
    )
    for arguments, loss in ([], "ForwardKL"), (["--model.loss=SkewKL", "--model.loss.alpha=0.2"], "SkewKL"):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={file}", *arguments, "--print_config"])
        model = yaml.safe_load(capsys.readouterr().out)["model"]
        assert model["optimizer"]["class_path"] == "torch.optim.SGD"
        assert model["optimizer"]["init_args"]["lr"] == 0.5
        assert "betas" not in model["optimizer"]["init_args"]
        assert model["loss"]["class_path"].endswith(f".{loss}")


def test_settings_of_a_source_lie_over_its_path_alone():
    below = {"data": {"train": "a.jsonl", "val": ["b.jsonl", "c.jsonl"], "test": "d.jsonl"}}
    above = {"data": {"train": {"limit": 4}, "val": {"invalid": "drop"}, "test": {"path": "e.jsonl", "limit": 1}}}
    assert configs.merge(below, above) == {
        "data": {
            "train": {"path": "a.jsonl", "limit": 4},
            "val": {"path": ["b.jsonl", "c.jsonl"], "invalid": "drop"},
            "test": {"path": "e.jsonl", "limit": 1},
        }
    }
    assert configs.merge(below, {"data": {"train": {"class_path": "ReasoningGym"}}})["data"]["train"] == {
        "class_path": "ReasoningGym"
    }


def test_a_file_that_comes_with_distillkit_is_named_by_its_prefix(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: [distillkit:base.yaml, distillkit:methods/gkd.yaml]\n")
    content = configs.load(tmp_path / "mine.yaml")
    assert content["model"]["loss"]["class_path"] == "GeneralizedJSD"
    assert content["trainer"]["precision"] == "bf16-mixed"
    merged = configs.load_all(["distillkit:quickstart.yaml"])
    assert Path(merged.content["data"]["train"]).is_file()
    assert [name for name, _ in merged.files] == [
        "distillkit:base.yaml",
        "distillkit:methods/distillm2.yaml",
        "distillkit:quickstart.yaml",
    ]


def test_every_file_of_the_folder_comes_with_distillkit() -> None:
    root = Path(__file__).parents[2] / "configs"
    assert packaged.names() == sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))
    assert len(packaged.names()) > 15
    for name in packaged.names():
        assert configs.load(f"distillkit:{name}")


def test_an_installed_package_has_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "distillkit"
    monkeypatch.setattr(packaged, "__file__", str(installed / "config" / "packaged.py"))
    assert packaged.folder() == installed / "configs"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("distillkit:methods/gdk.yaml", r"Did you mean distillkit:methods/gkd\.yaml"),
        ("distillkit:gkd.yaml", r"Did you mean distillkit:methods/gkd\.yaml"),
        ("distillkit:methods/gkd", r"Did you mean distillkit:methods/gkd\.yaml"),
        ("distillkit:../pyproject.toml", r"does not come with distillkit\. .*These do: base\.yaml, "),
        ("distillkit:", r"does not come with distillkit\. These do: base\.yaml, "),
    ],
)
def test_an_address_of_nothing_lists_what_there_is(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load_all([address])
    (tmp_path / "mine.yaml").write_text(f"base: {address!r}\n")
    with pytest.raises(ConfigError, match=message):
        configs.load(tmp_path / "mine.yaml")
