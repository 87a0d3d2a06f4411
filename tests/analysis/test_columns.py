"""Cells of tables of results."""

import pytest

from undertow.analysis.columns import number


def test_a_word_for_a_number_is_one_line():
    cell = number("tokens", "{:.1f}".format)
    assert cell([{"tokens": 1}, {"tokens": 2}]) == "1.5 ± 0.7" and cell([{}]) == "-"
    with pytest.raises(ValueError, match="^a result's tokens is 'x': must be a number$"):
        cell([{"tokens": "x"}])
