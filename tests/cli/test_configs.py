"""Configuration files that installed packages hold."""

from pathlib import Path

import pytest

from distillkit.cli import configs
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


@pytest.mark.parametrize(("path", "message"), [
    ("pkg:no_such_package/method.yaml", "is in a package 'no_such_package', which is not installed: pkg:PACKAGE/FILE"),
    ("pkg:../method.yaml", r"is in a package '\.\.', which is not installed"),
    ("pkg:some_package/none.yaml", r"some_package/none\.yaml does not exist"),
])  # fmt: skip
def test_what_is_not_there_is_said(path: str, message: str, package: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load(path)
