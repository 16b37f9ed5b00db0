"""The border of the delay: a value per family of optimizers, and what is said above it."""

import pytest
from timm.optim import list_optimizers

from petra_zoo.settings.delay import BORDER_OF_OTHERS, BORDERS, FAMILIES, above_border, border, family


@pytest.mark.parametrize(
    ("opt", "most"), [("muon", 3), ("lookahead_muon", 3), ("nmuon", 3), ("sgd", 2), ("momentum", 2), ("nadamw", 2)]
)
def test_a_familys_optimizers_share_its_border(opt: str, most: float) -> None:
    assert border(opt) == most


def test_what_was_not_measured_has_the_most_careful_border() -> None:
    assert family("lion") is None
    assert border("lion") == BORDER_OF_OTHERS == min(BORDERS.values())


def test_families_have_timms_names() -> None:
    assert {name for names in FAMILIES.values() for name in names} <= set(list_optimizers())


@pytest.mark.parametrize(
    ("opt", "words"),
    [
        ("muon", "D_0 = 6 updates, and above 3 with opt=muon training is expected to lose accuracy"),
        ("lion", "D_0 = 6 updates, and above 2 with opt=lion, which was not measured, training is expected to lose"),
        (None, "D_0 = 6 updates, and above 2 (muon: 3) training is expected to lose accuracy"),
    ],
)
def test_the_warning_names_optimizer_and_border(opt: str | None, words: str) -> None:
    assert str(above_border(6.0, opt)).startswith(words)


def test_at_the_border_nothing_is_said() -> None:
    assert above_border(3.0, "muon") is None
    assert above_border(2.0, None) is None
