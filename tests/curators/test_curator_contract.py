"""Every installed curator keeps the promises of `distillkit.testing`."""

import pytest

from distillkit import registry
from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.filters import TooLong
from distillkit.curators.mixed import MixedCurator
from distillkit.curators.replay import ReplayCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.schedules import Linear
from distillkit.testing import CuratorContract, check_curator
from distillkit.testing.curators import SeededGenerator
from distillkit.verifiers.length import TargetLength

# How to make a curator whose constructor asks for something.
ARGUMENTS = {
    "BestOfN": lambda: {"curator": TeacherCurator(), "verifier": TargetLength(3), "n": 3},
    "FilteredCurator": lambda: {"curator": StudentCurator()},
    "MixedCurator": lambda: {"parts": [StudentCurator(), DatasetCurator()], "shares": [0.4, 0.6]},
    "ReplayCurator": lambda: {"curator": StudentCurator(), "capacity": 15},
    "StrongerCurator": lambda: {"generator": SeededGenerator("stronger")},
}
INSTALLED = registry.available("curator")


def test_all_curators_of_this_package_are_installed():
    assert {"DatasetCurator", "PairedCurator", "TeacherCurator", *ARGUMENTS} <= set(INSTALLED)


@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_curator_keeps_the_contract(name):
    make = registry.get("curator", name)
    check_curator(make(**ARGUMENTS.get(name, dict)()))


class TestSchedules(CuratorContract):
    def make(self):
        mixed = MixedCurator([StudentCurator(), TeacherCurator()], Linear(0.0, 1.0))
        return ReplayCurator(mixed, Linear(0.2, 0.9), capacity=10)


class TestNested(CuratorContract):
    def make(self):
        return FilteredCurator(ReplayCurator(FilteredCurator(StudentCurator()), 0.5, capacity=12), [TooLong(5)])
