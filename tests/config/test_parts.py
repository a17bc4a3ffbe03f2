"""Parts are found by the types of constructors' parameters: a third party's package is used as a built-in one is."""

import importlib
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit import registry
from distillkit.callbacks.plots import curves
from distillkit.cli.main import main
from distillkit.comparison import outcome, plots
from distillkit.config.command import Command
from distillkit.config.files import MergedConfig
from distillkit.config.parts import import_parts, items, members, part_types
from distillkit.curators.mixed import MixedCurator
from distillkit.errors import ConfigError, PluginError
from distillkit.interfaces import Curator, Schedule, Verifier
from distillkit.losses.distillm2 import DistiLLM2
from distillkit.run_folder import read_metrics
from distillkit.training.datamodule import DistillData
from distillkit.training.module import DistillModule
from helpers.packages import install, write_package
from helpers.runs import QUIET, save_models, write_config

PARTS = '''
    """Parts of a third party, with parameters that are called as none of the built-in ones."""

    import torch
    from distillkit import TokenLoss
    from distillkit.curators.base import WrappedCurator
    from distillkit.interfaces import Curator, PromptSource, ResponseFilter, Schedule, Verifier
    from distillkit.types import Record


    class Halving(Schedule):
        """Half as much after each step."""

        def __init__(self, first: float) -> None:
            super().__init__()
            self.register_buffer("current", torch.tensor(first))

        @property
        def value(self):
            return self.current

        def update(self, progress, metrics):
            self.current.fill_(0.5 ** progress.step)


    class Scaled(TokenLoss):
        """q times the total variation."""

        def __init__(self, q: Schedule | float) -> None:
            super().__init__()
            self.q = q

        def divergence(self, logp, logq):
            return self.q.value * 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


    class Long(ResponseFilter):
        """Refuses nothing."""

        reason = "long"

        def refuses(self, row):
            return False


    class Screened(WrappedCurator):
        """The rows of another curator."""

        def __init__(
            self, inner: Curator, screens: "list[ResponseFilter] | None", judges: dict[str, "Verifier"] | None = None
        ) -> None:
            super().__init__(inner)
            self.screens, self.judges = screens, judges

        def curate(self, prompts, generators):
            assert [type(screen).__name__ for screen in self.screens] == ["Long", "Empty"]
            assert type(self.judges["words"]).__name__ == "Distinct"
            return self.curator.curate(prompts, generators)


    class Greetings(PromptSource):
        """A few greetings."""

        path = "greetings"

        def __init__(self, count: int) -> None:
            self.count = count

        def records(self):
            turns = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."})
            return [
                Record(({**turns[0], "content": f"Hello {index}."}, turns[1]), f"greeting {index}")
                for index in range(self.count)
            ]
'''
GROUPS = {
    "distillkit.schedules": ["Halving = 'foreign_parts:Halving'"],
    "distillkit.curators": ["Screened = 'foreign_parts:Screened'"],
    "distillkit.filters": ["Long = 'foreign_parts:Long'"],
    "distillkit.sources": ["Greetings = 'foreign_parts:Greetings'"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package."""
    root = tmp_path_factory.mktemp("foreign")
    files = {"foreign_parts.py": PARTS}
    source = write_package(root / "source", "foreign-parts 1.0", ["Scaled = 'foreign_parts:Scaled'"], files, GROUPS)
    return install([source], root / "site")


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def configuration(models: tuple[str, str], folder: Path) -> dict[str, Any]:
    teacher, student = models
    return {
        "trainer": {**QUIET, "default_root_dir": str(folder / "run"), "max_epochs": 1},
        "model": {
            "student": {"source": student},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": teacher, "dtype": "float32"}},
            "loss": {
                "class_path": "Scaled",
                "init_args": {"q": {"class_path": "Halving", "init_args": {"first": 1.0}}},
            },
            "curator": {
                "class_path": "Screened",
                "init_args": {
                    "inner": "DatasetCurator",
                    "screens": ["Long", {"class_path": "Empty"}],
                    "judges": {"words": {"class_path": "Distinct", "init_args": {"n": 2}}},
                },
            },
        },
        "data": {"train": {"class_path": "Greetings", "init_args": {"count": 6}}, "batch_size": 2},
    }


def test_parts_of_a_package_train_by_their_short_names_and_its_schedule_is_logged_and_drawn(
    installed: None, models: tuple[str, str], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", configuration(models, tmp_path))
    assert main(["fit", "--config", config]) == 0
    run = tmp_path / "run"
    series = read_metrics(run)
    assert [value for _, value in series["train/q"]] == [1.0, 0.5, 0.25], "the values that the steps were taken with"
    assert json.loads((run / "schedules.json").read_text()) == ["q"]
    panel = curves(series, "a run", ["q"]).axes[-1]
    assert [line.get_label() for line in panel.lines] == ["q"]
    svg, _ = plots.schedule_curves([outcome.read(run, "scaled", 0)]).panels
    assert ">q</text>" in svg.replace(" ", "").replace("\n", "")
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert saved["loss"]["init_args"]["q"]["class_path"] == "foreign_parts.Halving"
    assert saved["curator"]["init_args"]["inner"]["class_path"].endswith(".DatasetCurator")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--model.loss.q=Halvin",
            r"model\.loss\.q: No installed schedule is named 'Halvin'\. Similar names: Halving\.",
        ),
        ("--model.loss.init_args.q=Halvin", r"model\.loss\.q: No installed schedule is named 'Halvin'"),
        (
            "--model.curator.inner=Empty",
            r"model\.curator\.inner: No installed curator is named 'Empty'.*There is a filter",
        ),
        ("--model.curator.screens=[Long, Lng]", r"model\.curator\.screens\[1\]: No installed filter is named 'Lng'"),
        ("--model.curator.screens+=Lng", r"model\.curator\.screens\[2\]: No installed filter is named 'Lng'"),
        ("--model.curator.judges.words=Distnct", r"model\.curator\.judges\.words: No installed verifier is named"),
        ("--data.train.class_path=Greting", r"data\.train: No installed source is named 'Greting'"),
        ("--data.decontaminate.against=[{class_path: X}]", r"data\.decontaminate\.against\[0\]: No installed source"),
    ],
)
def test_a_wrong_name_is_refused_by_the_kind_that_its_parameter_takes(
    argument: str, message: str, installed: None, models: tuple[str, str], tmp_path: Path
) -> None:
    roots = {"model": DistillModule, "data": DistillData}
    config = MergedConfig(configuration(models, tmp_path))
    import_parts(Command(config, (), roots))
    with pytest.raises(PluginError, match=f"^command line: {message}"):
        import_parts(Command(config, tuple(argument.split("=", 1)), roots))
    with pytest.raises(PluginError, match=f"^command line: {message}"):
        import_parts(Command(config, (argument, "--print_config"), roots))


@pytest.mark.parametrize("value", [None, 0.3, "0.3", "1e-3", "./part.yaml", "no_module.Part", [], {}, True])
def test_a_value_that_names_no_part_is_left_to_the_parser(value: object) -> None:
    config = MergedConfig({"model": {"loss": {"class_path": "DistiLLM2", "init_args": {"alpha": value}}, "x": value}})
    import_parts(Command(config, (), {"model": DistillModule}))


@pytest.mark.parametrize(
    "config", [{"data": {"train": "Broken"}}, {"out": "Broken"}, {"nothing": {"here": ["Broken"]}}]
)
def test_a_text_that_is_no_part_is_no_name(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = registry.Entry("Broken", "source", "no_such_module:Broken")
    monkeypatch.setattr(registry, "entries", lambda kind=None: [broken])
    import_parts(Command(MergedConfig(config), (), {"data": DistillData}))
    with pytest.raises(PluginError, match="no_such_module"):
        import_parts(Command(MergedConfig({"data": {"train": {"class_path": "Broken"}}}), (), {"data": DistillData}))


def test_a_part_in_a_file_of_its_own_is_found(tmp_path: Path) -> None:
    (tmp_path / "loss.yaml").write_text("class_path: SkewLK")
    config = MergedConfig({"model": {"loss": str(tmp_path / "loss.yaml")}})
    with pytest.raises(PluginError, match=r"^model\.loss: No installed loss is named 'SkewLK'"):
        import_parts(Command(config, (), {"model": DistillModule}))


def test_types_of_parameters() -> None:
    class Child(DistiLLM2):
        """Its constructor hands on what it doesn't know, and names a type that doesn't exist."""

        def __init__(self, extra: "Schedule", missing: "Nowhere", **settings: Any) -> None:  # type: ignore[name-defined]  # noqa: F821
            super().__init__(**settings)

    types = part_types(Child)
    assert types["extra"] is Schedule
    assert set(members(types["alpha"])) == {Schedule, float, type(None)}
    assert "missing" not in types
    assert items(part_types(MixedCurator)["parts"]) is Curator
    assert items(part_types(MixedCurator)["shares"]) is float
    assert not list(members(typing.Callable)), "a function of which no more is said"


def test_help_lists_and_explains_installed_parts(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help.all"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("foreign_parts.Scaled", "Greetings", "TransformersTeacher", "VLLMGenerator"))
    assert main(["fit", "--model.loss.help", "Scaled"]) == 0
    assert "\n  q: " in capsys.readouterr().out


def test_types_that_are_texts_are_read_where_a_part_is_defined() -> None:
    class Own(Verifier):
        """A part, whose constructor is wrapped by a function of another module."""

        def __init__(self, schedule: "Schedule", curator: "Curator | None" = None) -> None:
            self.schedule = schedule

        def verify(self, prompts: Any, responses: Any) -> list[float]:
            return [0.0 for _ in responses]

    types = part_types(Own)
    assert types["schedule"] is Schedule
    assert set(members(types["curator"])) == {Curator, type(None)}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"model": {"loss": {"class_path": "SkewKL", "init_args": {"alpha": None}}}}, "model.loss.alpha"),
        ({"model": {"answers": {"max_new_tokens": None}}}, "model.answers.max_new_tokens"),
        ({"model": {"optimizer": None}}, "model.optimizer"),
        ({"data": {"max_length": None}}, "data.max_length"),
        (
            {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": None}}}},
            "model.optimizer.lr",
        ),
    ],
)
def test_a_null_in_a_setting_that_has_none_is_refused_by_its_key(content, key):
    roots = {"model": DistillModule, "data": DistillData}
    with pytest.raises(ConfigError, match=rf"a.yaml: {re.escape(key)} can't be null"):
        import_parts(Command(MergedConfig(content, (("a.yaml", content),)), (), roots))
    argument = f"--{key}=null"
    with pytest.raises(ConfigError, match=rf"command line: {re.escape(key)} can't be null"):
        import_parts(Command(MergedConfig(content, (("a.yaml", content),)), (argument,), roots))


def test_a_null_that_an_argument_replaces_or_that_a_setting_has_is_none():
    content = {
        "model": {"teacher": None, "warmup": None, "answers": {"seed": None}, "generator": None},
        "data": {"max_length": None, "val": None, "train": {"path": "a.jsonl", "limit": None}},
    }
    roots = {"model": DistillModule, "data": DistillData}
    import_parts(Command(MergedConfig(content, (("a.yaml", content),)), ("--data.max_length=5",), roots))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--model.teacher.source=x",
            r"command line: model\.teacher has settings \(source\) but no class\. Name it too, by ",
        ),
        ("--model.teacher.source=x", r"--model\.teacher=NAME or .* These have them: .*TransformersTeacher"),
        ("--model.generator.url=x", r"model\.generator has settings \(url\).* These have them: ServerGenerator\."),
        ("--model.metrics={m: {nothing: 1}}", r"model\.metrics\.m has settings \(nothing\).* There are Distinct, "),
    ],
)
def test_settings_of_a_part_without_its_class_are_told_what_to_name(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_parts(Command(MergedConfig(), (argument,), {"model": DistillModule}))


def test_settings_of_a_part_that_another_file_names_are_fine() -> None:
    config = MergedConfig({"model": {"teacher": "TransformersTeacher"}})
    import_parts(Command(config, ("--model.teacher.source=x",), {"model": DistillModule}))
