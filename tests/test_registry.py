"""Real packages, built and installed by pip into a temporary folder that is then put on sys.path."""

import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from distillkit import registry
from distillkit.errors import PluginError
from distillkit.interfaces import Loss
from helpers.packages import install, write_package

A_LOSS = '''
    """A module."""
    import torch
    from distillkit.interfaces import Loss

    class {name}(Loss):
        """{summary}

        More about it.
        """

        def forward(self, student, teacher, batch): ...

        def units(self, batch):
            return torch.zeros(())
'''

# Distribution and version: its losses, its files.
PACKAGES = {
    "acme-loss 1.2": (
        ["AcmeKL = 'acme_loss.acme:AcmeKL'", "Twin = 'acme_loss.twin:Twin'", "Plain = 'acme_loss.plain:Plain'"],
        {
            "acme_loss/acme.py": A_LOSS.format(name="AcmeKL", summary="Acme's divergence."),
            "acme_loss/twin.py": A_LOSS.format(name="Twin", summary="Acme's twin."),
            "acme_loss/plain.py": "class Plain:\n    pass\n",
        },
    ),
    "rival-loss 0.3": (
        ["Twin = 'rival_loss:Twin'"],
        {"rival_loss/__init__.py": A_LOSS.format(name="Twin", summary="The rival's twin.")},
    ),
    "broken-loss 2.0": (
        ["NeedsMissing = 'broken_loss.needs:NeedsMissing'", "BadSyntax = 'broken_loss.bad:BadSyntax'"],
        {
            "broken_loss/needs.py": "import os\n\nimport no_such_module_anywhere\n",
            "broken_loss/bad.py": "class BadSyntax\n    pass\n",
        },
    ),
    "loud-loss 4.0": (
        [
            "Loud = 'loud_loss.inner.part:Loud'",
            "Reexported = 'loud_loss.inner.api:Reexported'",
            "Silent = 'loud_loss.inner.part:Silent'",
            "Absent = 'loud_loss.inner.part:Absent'",
            "Nowhere = 'loud_loss.nowhere:Nowhere'",
            "BelowModule = 'loud_loss.inner.api.rival_loss:Twin'",
        ],
        {
            "loud_loss/__init__.py": "print('loud_loss was imported')\nraise SystemExit('loud_loss was imported')\n",
            "loud_loss/inner/api.py": "try:\n    from .again import Other as Reexported\nexcept KeyError:\n    raise\n",
            "loud_loss/inner/again.py": "from ..inner.part import Loud as Other\n",
            # No loud_loss/inner/__init__.py: a namespace package inside of a package that can't be imported.
            "loud_loss/inner/part.py": A_LOSS.format(name="Loud", summary="Lists without being imported, \\d.")
            + "\n    class Silent(Loss):\n        x = 1\n",
        },
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with all of PACKAGES installed."""
    sources = tmp_path_factory.mktemp("sources")
    target = tmp_path_factory.mktemp("site")
    folders = [write_package(sources / release, release, *package) for release, package in PACKAGES.items()]
    return install(folders, target)


@pytest.fixture
def installed(site, monkeypatch):
    """The packages are importable in this process until the test ends."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(registry, "_warned", set())
    importlib.invalidate_caches()
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_loss")]:
        del sys.modules[name]
    gc.collect()  # a class that lives on as a subclass of Loss would be offered to later tests by a path that is gone


def entry(name):
    return next(entry for entry in registry.entries("loss") if entry.name == name)


def test_the_fixed_names_are_available():
    names = "ForwardKL ReverseKL SkewKL SkewReverseKL DPKD DistiLLM2 CrossEntropy WeightedSum"
    assert set(registry.available("loss")) >= set(names.split())
    assert set(registry.available("schedule")) >= {"Constant", "Linear", "Cosine", "Piecewise", "AdaptiveAlpha"}
    kinds = ["loss", "curator", "schedule", "generator", "teacher", "verifier", "source", "filter"]
    assert list(registry.KINDS) == kinds
    assert (registry.find("SkewKL"), registry.find("NoSuchPart")) == (["loss"], [])


def test_a_built_in_part_comes_by_name_and_by_path():
    constant = registry.get("schedule", "Constant")
    assert constant.__name__ == "Constant"
    assert registry.get("schedule", f"{constant.__module__}.Constant") is constant


def test_an_installed_loss_is_used_by_name(installed):
    acme = registry.get("loss", "AcmeKL")
    assert issubclass(acme, Loss)
    assert Path(sys.modules[acme.__module__].__file__).is_relative_to(installed)
    assert "rival_loss" not in sys.modules


def test_entries_name_distribution_and_version_of_every_part(installed):
    assert entry("AcmeKL") == registry.Entry("AcmeKL", "loss", "acme_loss.acme:AcmeKL", "acme-loss", "1.2")
    assert registry.entries(None) == [entry for kind in registry.KINDS for entry in registry.entries(kind)]
    names = [entry.name for entry in registry.entries("loss")]
    assert names.count("Twin") == 2
    assert registry.available("loss") == tuple(sorted(set(names)))


@pytest.mark.parametrize(
    ("word", "near"),
    [("skewkl", "SkewKL"), ("SkewLK", "SkewKL"), ("JSD", "GeneralizedJSD"), ("ForwardKLLoss", "ForwardKL")],
)
def test_an_unknown_name_says_what_is_near_and_how_to_list(word, near):
    with pytest.raises(
        PluginError, match=rf"loss is named '{word}'\. Similar names: .*{near}.*distillkit plugins loss` to list"
    ):
        registry.get("loss", word)


def test_an_unknown_name_with_nothing_near_says_how_to_list():
    with pytest.raises(PluginError, match=r"is named 'Zzzz'\. Run `distillkit plugins loss` to list them all\."):
        registry.get("loss", "Zzzz")


def test_a_name_of_another_kind_says_which():
    with pytest.raises(
        PluginError, match=r"No installed loss is named 'Cosine'\. There is a schedule with that name\."
    ):
        registry.get("loss", "Cosine")


@pytest.mark.parametrize(
    "call", [registry.available, registry.entries, registry.load_all, lambda kind: registry.get(kind, "X")]
)
def test_an_unknown_kind_says_which_is_near(call):
    with pytest.raises(PluginError, match=r"no kind of part named 'losses'\. Did you mean loss\?"):
        call("losses")
    with pytest.raises(
        PluginError, match=r"'zzz'\. The kinds are loss, curator, schedule, generator, .* verifier, source, filter\."
    ):
        call("zzz")


@pytest.mark.parametrize(
    ("name", "origin", "error", "place"),
    [
        ("NeedsMissing", "broken-loss 2.0", "ModuleNotFoundError", "broken_loss/needs.py:3"),
        ("BadSyntax", "broken-loss 2.0", "SyntaxError", "broken_loss/bad.py:1"),
        ("Loud", "loud-loss 4.0", "SystemExit: loud_loss was imported", "loud_loss/__init__.py:2"),
    ],
)
def test_a_broken_part_is_an_error_with_file_and_line(installed, name, origin, error, place):
    place = re.escape(str(installed / place))
    with pytest.raises(PluginError, match=rf"'{name}' of {origin} .* can't be imported: {error}.* at {place}\.$"):
        registry.get("loss", name)


def test_a_full_path_that_leads_nowhere_is_an_error():
    with pytest.raises(PluginError, match=r"of distillkit\.errors:Gone can't be imported: AttributeError: .*'Gone'\.$"):
        registry.get("loss", "distillkit.errors.Gone")
    with pytest.raises(PluginError, match=r"ModuleNotFoundError: No module named 'nowhere'\.$"):
        registry.get("loss", "nowhere.Gone")


def test_a_class_without_the_interface_is_an_error_that_quotes_the_contract(installed):
    contract = r"distillkit\.interfaces\.Loss \(\"Compares .*which requires forward\(student, teacher, batch\), units\("
    with pytest.raises(PluginError, match=rf"'Plain' of acme-loss 1\.2 .* is not a subclass of {contract}"):
        registry.get("loss", "Plain")


def test_a_part_of_another_kind_is_an_error():
    with pytest.raises(PluginError, match=r"is not a subclass of distillkit\.interfaces\.Teacher"):
        registry.get("teacher", "distillkit.interfaces.Loss")


def test_two_parts_of_one_name_are_an_error_only_when_it_is_used(installed):
    with pytest.raises(
        PluginError, match=r"named 'Twin', from acme-loss 1\.2 \(.*\) and rival-loss 0\.3 \(.*full path"
    ):
        registry.get("loss", "Twin")
    assert registry.get("loss", "AcmeKL").__name__ == "AcmeKL"
    assert registry.get("loss", "rival_loss.Twin").__module__ == "rival_loss"


def test_one_distribution_listed_twice_is_one_part(installed, tmp_path, monkeypatch):
    copy = shutil.copytree(next(installed.glob("acme_loss-*.dist-info")), tmp_path / "Acme.Loss-1.3.dist-info")
    text = (copy / "METADATA").read_text()
    (copy / "METADATA").write_text(text.replace("acme-loss", "Acme.Loss").replace("1.2", "1.3"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert entry("AcmeKL").version == "1.3"
    assert registry.get("loss", "AcmeKL").__name__ == "AcmeKL"


def test_load_all_skips_each_unusable_part_with_one_warning(installed):
    with pytest.warns(registry.PluginWarning) as caught:
        parts = registry.load_all("loss")
    assert set(parts) >= {"AcmeKL", "ForwardKL"}
    texts = [str(warning.message) for warning in caught if "broken-loss" in str(warning.message)]
    assert len(texts) == 2
    assert any("ModuleNotFoundError" in text and "needs.py:3" in text for text in texts)
    assert any("SyntaxError" in text and "bad.py:1" in text for text in texts)
    assert sum("'Twin'" in str(warning.message) for warning in caught) == 1
    assert not {"NeedsMissing", "BadSyntax", "Twin", "Plain"} & set(parts)
    assert all(issubclass(part, Loss) for part in parts.values())


def test_load_all_warns_once_per_process(installed):
    with pytest.warns(registry.PluginWarning):
        first = registry.load_all("loss")
    with warnings.catch_warnings(action="error"):
        assert registry.load_all("loss") == first


def test_a_summary_is_the_first_line_of_the_docstring(installed):
    assert registry.summary(entry("AcmeKL")) == "Acme's divergence."
    assert registry.summary(entry("Silent")) == ""


def test_a_summary_follows_reexports_and_namespaces(installed):
    assert registry.summary(entry("Loud")) == "Lists without being imported, \\d."
    assert registry.summary(entry("Reexported")) == "Lists without being imported, \\d."


@pytest.mark.parametrize("name", ["Absent", "Nowhere", "BelowModule", "BadSyntax"])
def test_a_summary_without_source_says_so(installed, name):
    assert registry.summary(entry(name)) == registry.NO_SOURCE


def test_reexports_in_a_circle_end(tmp_path, monkeypatch):
    (tmp_path / "circle_loss.py").write_text("from circle_loss import Round\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.summary(registry.Entry("Round", "loss", "circle_loss:Round")) == registry.NO_SOURCE


def test_a_summary_is_read_through_the_finder_of_an_editable_install(tmp_path, monkeypatch):
    class EditableFinder:
        """As setuptools installs one: it maps a package to its source folder."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            return PathFinder.find_spec(name, [str(tmp_path)]) if name == "editable_loss" else None

    (tmp_path / "editable_loss").mkdir()
    (tmp_path / "editable_loss" / "__init__.py").write_text("raise ImportError\n")
    (tmp_path / "editable_loss" / "part.py").write_text('class Part:\n    """From an editable install."""\n')
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, EditableFinder])
    part = registry.Entry("Part", "loss", "editable_loss.part:Part")
    assert registry.summary(part) == "From an editable install."


def test_listing_imports_neither_torch_nor_a_plugin(site, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    code = """
        import sys
        from distillkit import registry
        summaries = {entry.name: registry.summary(entry) for entry in registry.entries(None)}
        assert summaries["Reexported"] and summaries["AcmeKL"] and summaries["SkewKL"], summaries
        assert "AcmeKL" in registry.available("loss") and registry.find("Loud") == ["loss"]
        heavy = {"torch", "lightning", "distillkit.interfaces", "distillkit.losses"}
        print([name for name in sys.modules if name in heavy or name.partition(".")[0].endswith("_loss")])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
