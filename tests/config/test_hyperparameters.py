"""Settings as plain values, and the parts built from them again."""

import functools
import inspect
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.config.hyperparameters import NOT_RECORDED, build, describe
from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.filters import Empty, Repeated
from distillkit.curators.mixed import MixedCurator
from distillkit.curators.replay import ReplayCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.data.decontaminate import Decontamination
from distillkit.data.records import Source
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.server import ServerGenerator
from distillkit.losses import CrossEntropy, DistiLLM2, ForwardKL, SkewKL, WeightedSum
from distillkit.models.student import Lora, Student
from distillkit.schedules import AdaptiveAlpha, Linear
from distillkit.schedules.fixed import Piecewise
from distillkit.types import Sampling, Slicing
from distillkit.types.part import settings_of
from distillkit.verifiers.code import PythonTests
from distillkit.verifiers.distinct import Distinct

SHORT = Sampling(temperature=0.5, max_new_tokens=4)

VALUES = {
    "loss without a constructor": ForwardKL(rescale=True, temperature=2.0),
    "loss with schedules": DistiLLM2(AdaptiveAlpha(min=0.02), Linear(0.0, 1.0, until=0.5), detach_mixture=True),
    "loss of losses": WeightedSum([SkewKL(0.2), CrossEntropy()], [0.5, 1.0]),
    "curator of curators": MixedCurator([TeacherCurator(SHORT), StudentCurator(SHORT, {"every": 2})], Linear(0.0, 1.0)),
    "filters": FilteredCurator(TeacherCurator(SHORT), [Empty(), Repeated(ngram=3)]),
    "share": ReplayCurator(StudentCurator(SHORT, "epoch"), replay=Piecewise([(0.0, 0.5), (1.0, 0.25)])),
    "student": Student("./student", keep_layers=[0, 2], lora=Lora(r=2, target_modules=["q_proj"]), dtype="bfloat16"),
    "source": Source("train.jsonl", limit=3),
    "dataclasses": [Slicing(), Decontamination([Source("test.jsonl"), "more.jsonl"])],
    "server": ServerGenerator(
        "http://127.0.0.1:1/v1", "m", key_variable="SOME_API_KEY", extra={"min_p": {"a": [1, 2.5]}}
    ),
    "verifiers": {"d2": Distinct(2)},
    "plain": {"none": None, "yes": True, "one": 1, "half": 0.5, "text": "x", "list": [1, "a"]},
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_described_can_be_built_again(name: str) -> None:
    description = describe(VALUES[name])
    json.dumps(description, allow_nan=False)
    again = build(description)
    assert type(again) is type(VALUES[name])
    assert describe(again) == description
    assert NOT_RECORDED not in json.dumps(description)


@pytest.mark.parametrize("name", VALUES)
def test_a_description_is_read_by_torch_without_running_code(name: str) -> None:
    buffer = io.BytesIO()
    torch.save(describe(VALUES[name]), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == describe(VALUES[name])


def test_a_part_is_written_as_in_a_configuration_with_its_defaults() -> None:
    assert describe(SkewKL(0.2, temperature=2)) == {
        "class_path": "distillkit.losses.SkewKL",
        "init_args": {"alpha": 0.2, "reduction": "sequence_mean", "temperature": 2, "rescale": False},
    }


class Doubled(SkewKL):
    """Passes on what it does not know."""

    def __init__(self, factor: float, **rest: Any) -> None:
        super().__init__(alpha=0.1 * factor, **rest)


def test_settings_are_those_of_the_outermost_constructor() -> None:
    loss = Doubled(2.0, temperature=3.0)
    assert dict(settings_of(loss)) == {"factor": 2.0, "temperature": 3.0}
    assert (loss.alpha, loss.temperature) == (0.2, 3.0)
    assert dict(settings_of(DatasetCurator())) == {}


def test_constructors_keep_their_signature_and_their_errors() -> None:
    assert list(inspect.signature(ForwardKL).parameters) == ["reduction", "temperature", "rescale"]
    with pytest.raises(TypeError, match=r"SkewKL.__init__\(\) got an unexpected keyword argument 'bogus'"):
        SkewKL(bogus=0.1)
    with pytest.raises(TypeError, match="takes no arguments"):
        Empty(5)


OPTIMIZERS = {
    "class": torch.optim.SGD,
    "partial": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factories_of_optimizers_and_schedules_are_recorded(name: str) -> None:
    description = describe(OPTIMIZERS[name])
    again = build(description)
    assert describe(again) == description
    if name == "partial":
        assert description["class_path"] == "torch.optim.SGD"
        assert description["init_args"]["momentum"] == 0.9
        assert again([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5


@dataclass
class Unusual:
    """A dataclass of the user's own."""

    call: Any = len


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (lambda parameters: None, "builtins.function"),
        (torch.zeros(2), "torch.Tensor"),
        ({1: 2}, "builtins.dict"),
        (torch.float32, "torch.dtype"),
    ],
)
def test_what_is_no_plain_value_is_named_by_its_class_and_not_built(value: Any, name: str) -> None:
    assert describe(value) == f"{NOT_RECORDED}{name}"
    inside = describe({"a": [Unusual(value)]})
    assert inside["a"][0]["init_args"] == {"call": f"{NOT_RECORDED}{name}"}
    with pytest.raises(ModelError, match=f"not recorded, since it is no plain value: {name}"):
        build(inside)


@pytest.mark.parametrize("name", ["api_key", "API-KEY", "hf_token", "token", "auth_token", "client_secret", "password"])
def test_secrets_are_left_out(name: str) -> None:
    text = json.dumps(describe({"extra": {name: "sk-123"}, "parts": [Unusual({name: "sk-123"})]}))
    assert "sk-123" not in text


@pytest.mark.parametrize("name", ["key_variable", "length_key", "eos_token", "prompt_column", "tokens"])
def test_names_that_are_no_secrets_are_recorded(name: str) -> None:
    assert describe({name: "NAME"}) == {name: "NAME"}


def test_a_password_in_an_address_is_left_out() -> None:
    assert "pass" not in str(describe(["https://user:pass@example.org/v1"]))
    assert describe("s3://bucket/mail@example.org") == "s3://bucket/mail@example.org"


def test_a_description_does_not_decide_which_code_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"stranger.Loss is not part of an installed plugin. If you trust it, import"):
        build({"class_path": "stranger.Loss"})
    assert "stranger" not in sys.modules
    for path in ("subprocess.Popen", "os.system", "builtins.exec", "distillkit.cli.main.main", "distillkit.losses.X"):
        with pytest.raises(ModelError, match=f"{path} is not the class of a part"):
            build({"class_path": path, "init_args": {"args": ["true"]}})


def test_a_description_alone_does_not_let_code_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKIT_ALLOW", "code")
    description = describe(PythonTests(allow_execution=True))
    monkeypatch.delenv("DISTILLKIT_ALLOW")
    with pytest.raises(
        ConfigError, match=r"The setting allow_execution lets code of others run.* DISTILLKIT_ALLOW=code"
    ):
        build({"tests": description})
    with pytest.raises(ConfigError, match="DISTILLKIT_ALLOW=remote_code"):
        build({"engine": {"trust_remote_code": True}})
    assert build({"engine": {"trust_remote_code": False}}) == {"engine": {"trust_remote_code": False}}
    monkeypatch.setenv("DISTILLKIT_ALLOW", "code")
    assert isinstance(build({"tests": description})["tests"], PythonTests)


def test_settings_of_another_version_are_refused() -> None:
    with pytest.raises(ModelError, match=r"SkewKL can't be made with these settings: .*'gamma'"):
        build({"class_path": "distillkit.losses.SkewKL", "init_args": {"gamma": 1}})
