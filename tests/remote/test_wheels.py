import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from distillkit.errors import ConfigError, DistillKitError
from distillkit.remote import wheels as fetch
from distillkit.remote.wheels import cache_dir, check_wheel_form, is_wheel, wheel_file

CONTENT = b"what is inside"
MEMBER = "some_data/files/text.txt"
OTHER = "0" * 64


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with one real wheel, the only place where pip looks; and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "some_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "some_data-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_data/__init__.py", "raise SystemExit('a fetched wheel must never be imported')")
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def pin(wheels):
    return hashlib.sha256(next(wheels.glob("*.whl")).read_bytes()).hexdigest()


def kept(path: Path) -> list[str]:
    """What lies under `path`, locks aside."""
    return sorted(p.name for p in path.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_unpacks_the_named_file_and_keeps_nothing_else(pin):
    file = wheel_file(f"wheel:some-data==1.0/{MEMBER}#sha256={pin.upper()}")
    assert file.read_bytes() == CONTENT
    assert file.is_relative_to(cache_dir())
    assert kept(cache_dir()) == ["text.txt"]


def test_a_second_call_runs_no_pip(pin, monkeypatch):
    source = f"wheel:some-data==1.0/{MEMBER}#sha256={pin}"
    first = wheel_file(source)

    def refuse(*_, **__):
        raise AssertionError("pip was called again")

    monkeypatch.setattr(fetch.subprocess, "run", refuse)
    assert wheel_file(source) == first


def test_two_at_once_fetch_once(pin, monkeypatch):
    calls, download = [], fetch._download

    def counted(*args):
        calls.append(args)
        return download(*args)

    monkeypatch.setattr(fetch, "_download", counted)
    source = f"wheel:some-data==1.0/{MEMBER}#sha256={pin}"
    threads = [threading.Thread(target=wheel_file, args=[source]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert wheel_file(source).read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_nothing_is_kept(pin):
    with pytest.raises(DistillKitError, match=f"should be {OTHER}, got {pin}"):
        wheel_file(f"wheel:some-data==1.0/{MEMBER}#sha256={OTHER}")
    assert kept(cache_dir()) == []


def test_a_missing_pin_is_refused_with_the_hash_to_pin(pin):
    source = f"wheel:some-data==1.0/{MEMBER}"
    check_wheel_form(source)
    with pytest.raises(DistillKitError, match=f"append #sha256={pin}"):
        wheel_file(source)
    assert kept(cache_dir()) == []


def test_a_file_that_the_wheel_lacks_is_refused_with_one_that_it_has(pin):
    with pytest.raises(DistillKitError, match=rf"has no file 'some_data/text.txt'.* {MEMBER}"):
        wheel_file(f"wheel:some-data==1.0/some_data/text.txt#sha256={pin}")
    assert kept(cache_dir()) == []


@pytest.mark.usefixtures("wheels")
def test_pips_failure_is_one_line_with_its_reason():
    with pytest.raises(DistillKitError, match=r"pip says: ERROR: No matching distribution found for no-such") as caught:
        wheel_file(f"wheel:no-such-data==1.0/{MEMBER}#sha256={OTHER}")
    assert "\n" not in str(caught.value)


MALFORMED = [
    "wheel:",
    "wheel:name",
    "wheel:name==1.0",
    "wheel:name==1.0/",
    "wheel:name/file.txt",
    "wheel:name>=1.0/file.txt",
    "wheel:--index-url==1.0/file.txt",
    "wheel:name==1.0/file.txt#sha256=12",
    f"wheel:name==1.0/file.txt#md5={OTHER}",
    f"wheel:name==1.0/file.txt#sha256={OTHER}0",
    "wheel:name==1.0/../file.txt",
    "wheel:name==1.0/a/./file.txt",
    "wheel:name==1.0//etc/file.txt",
    "wheel:name==1.0/folder/",
    "wheel:name==1.0/a\\..\\file.txt",
]


@pytest.mark.parametrize("source", MALFORMED)
def test_a_malformed_source_is_told_the_form(source):
    assert is_wheel(source)
    for call in (check_wheel_form, wheel_file):
        with pytest.raises(ConfigError, match=r"wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=HEX"):
            call(source)


@pytest.mark.parametrize("source", ["org/model", "./wheel", "wheels/model.gguf"])
def test_other_sources_are_no_wheels(source):
    assert not is_wheel(source)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("DISTILLKIT_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "distillkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "distillkit"
