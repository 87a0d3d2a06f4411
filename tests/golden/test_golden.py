"""The published code's own numbers on shared weights: float64 to 1e-11, float32 to rounding."""

import warnings

import pytest

from golden import parity
from golden.cases import CASES, LEAST
from golden.differences import DIFFERENCES, REFUSED
from golden.measure import imported, kinds, verdict

HELD = [(case, kind) for case in CASES for kind in kinds(case)]
CHECKPOINTS = [case for case in CASES if case.checkpoint]


@pytest.mark.parametrize("case, kind", HELD, ids=lambda x: str(x))
def test_undertow_makes_the_published_numbers(case, kind):
    assert not verdict(case, kind)


@pytest.mark.parametrize("case", CHECKPOINTS, ids=str)
def test_published_folders_are_imported_or_refused(case):
    if case.name in REFUSED:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            imported(case)
        assert REFUSED[case.name] in str(error.value)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert imported(case) < LEAST


def test_every_difference_has_a_case():
    for difference in DIFFERENCES:
        assert any(difference.shows(case) for case in CASES), difference.name


def test_the_page_is_what_the_command_prints():
    text = parity.PAGE.read_text()
    assert text == parity.page(), f"run {parity.COMMAND}"
    assert all(f"`{case}`" in text for case in CASES)
