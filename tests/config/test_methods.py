"""Methods: what their files say of them, those of plugins, names that are none, and `--method`."""

import importlib
from pathlib import Path

import pytest

from distillkit.cli.main import main
from distillkit.config import files as configs
from distillkit.config import methods
from distillkit.errors import ConfigError

ROOT = Path(__file__).parents[2]


def install(name: str, site: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str) -> None:
    """Installs a package of `plugins/` by its folder and its metadata, as an editable installation does."""
    information = site / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(entry_point)
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(ROOT / "plugins" / name)
    importlib.invalidate_caches()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = "[distillkit.losses]\nAlphaBeta = distillkit_abkd.loss:AlphaBeta\n"
    install("distillkit-abkd", tmp_path / "site", monkeypatch, point)


def test_a_method_is_described_by_its_file() -> None:
    gkd = methods.find("gkd")
    assert (gkd.loss, gkd.responses) == ("GeneralizedJSD", ("student/step", "dataset"))
    assert gkd.paper == "Agarwal et al. 2023, arXiv 2306.13649"
    assert gkd.short_paper == "Agarwal 2023"
    assert gkd.text == (ROOT / "configs" / "methods" / "gkd.yaml").read_text()
    assert methods.find("sft").paper == ""
    assert methods.find("seqkd").short_paper == "Kim 2016"


def test_a_method_with_a_base_has_its_loss_and_responses() -> None:
    method = methods.find("distillm2-as-released")
    assert (method.loss, method.responses) == ("DistiLLM2", ("teacher", "student/epoch"))
    assert methods.find("speculative_kd-on-policy").loss == "ForwardKL"


def test_every_method_of_the_folder_is_listed_with_loss_and_responses() -> None:
    listed = [method for method in methods.methods() if method.address.startswith("distillkit:")]
    assert [method.name for method in listed] == sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))
    assert all(method.loss and method.responses and method.summary for method in listed)
    assert [method.name for method in listed if not method.paper] == ["sft"]


def test_a_plugins_methods_are_listed_without_importing_it(plugin: None, tmp_path: Path) -> None:
    abkd = methods.find("abkd")
    assert (abkd.address, abkd.loss) == ("pkg:distillkit_abkd/abkd.yaml", "AlphaBeta")
    assert configs.load_all(configs.split_arguments(["--method", "abkd"])[0]).content["model"]["loss"]


def test_two_plugins_with_one_method_are_told_apart_by_their_files(
    plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "twin_part"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "abkd.yaml").write_text("# Another.\nmodel: {loss: SkewKL}\n")
    (folder / "broken.yaml").write_text("model: {loss: [\n")
    (folder / "prompts.yaml").write_text("data: {batch_size: 2}\n")
    monkeypatch.syspath_prepend(tmp_path)
    install("twin-part", tmp_path / "twin", monkeypatch, "[distillkit.losses]\nTwin = twin_part.loss:Twin\n")
    with pytest.raises(ConfigError, match=r"abkd is in pkg:distillkit_abkd/abkd\.yaml and pkg:twin_part/abkd\.yaml"):
        methods.find("abkd")
    assert not {"broken", "prompts"} & {method.name for method in methods.methods()}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gdk", "Did you mean gkd"), ("GKD", "Did you mean gkd"), ("no", "Run `distillkit methods`")],
)
def test_an_unknown_name_is_one_line_with_what_is_near(name: str, hint: str, capsys: pytest.CaptureFixture) -> None:
    for command in (["methods", name], ["fit", "--method", name], ["evaluate", f"--method={name}"]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"There is no method named {name!r}" in error
        assert hint in error


def test_a_method_lies_below_the_users_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {loss: {init_args: {beta: 0.1}}}\n")
    files, rest = configs.split_arguments(["--config", str(mine), "--data.seed=1", "--method", "gkd"])
    assert rest == ["--data.seed=1"]
    content = configs.load_all(files).content
    assert content["model"]["loss"] == {"class_path": "GeneralizedJSD", "init_args": {"beta": 0.1}}
    assert content["model"]["curator"]["class_path"] == "MixedCurator"


@pytest.mark.parametrize(
    ("text", "method", "message"),
    [
        ("model: {loss: SkewKL}", "gkd", r"mine\.yaml sets model\.loss to SkewKL, so the run would not be gkd"),
        ("base: distillkit:methods/sft.yaml", "kd", r"methods/sft\.yaml sets model\.loss to CrossEntropy"),
        ("base: distillkit:methods/sft.yaml", "seqkd", r"sets model\.curator to DatasetCurator"),
        ("base: distillkit:methods/distillm2.yaml", "gkd", r"remove model\.loss and model\.curator from the files"),
    ],
)
def test_a_method_that_the_files_leave_nothing_of_is_refused(
    text: str, method: str, message: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    arguments = ["--config", str(mine), "--method", method]
    with pytest.raises(ConfigError, match=message) as refusal:
        configs.split_arguments(arguments)
    advice = f"--config distillkit:methods/{method}.yaml"
    assert advice in str(refusal.value)
    files, _ = configs.split_arguments(["--config", str(mine), *advice.split()])
    model = configs.load_all(files).content["model"]
    assert methods.class_name(model["loss"]) == methods.find(method).loss


def test_a_file_may_replace_the_curator_of_a_method(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {curator: TeacherCurator}")
    files, _ = configs.split_arguments(["--config", str(mine), "--method", "kd"])
    assert methods.class_name(configs.load_all(files).content["model"]["curator"]) == "TeacherCurator"


@pytest.mark.parametrize("arguments", [["--method"], ["--method="], ["-c"], ["--config="]])
def test_a_flag_without_its_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="as its value"):
        configs.split_arguments(arguments)


def test_the_command_lists_them_and_prints_one(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "LOSS", "RESPONSES", "PAPER"]
    assert any(line.startswith("gkd ") and line.endswith("arXiv 2306.13649") for line in lines)
    assert main(["methods", "kd"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "methods" / "kd.yaml").read_text()


def test_a_terminal_of_80_columns_shows_whole_rows(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("  Agarwal 2023") for line in lines)
    assert all(len(line) <= 80 and not line.endswith("…") for line in lines)
