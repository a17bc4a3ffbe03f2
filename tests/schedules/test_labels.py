import pytest

from distillkit.schedules.labels import label


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("q", "q"),
        ("beta", "β"),
        ("alpha_teacher", "α teacher"),
        ("lambda_", "λ"),
        ("1_Beta/beta", "1 Beta/β"),
        ("curator/replay", "curator/replay"),
        ("alphabet", "alphabet"),
    ],
)
def test_greek_letters_stand_for_their_names(name, shown):
    assert label(name) == shown
