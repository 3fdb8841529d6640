"""Damaged files end in one line with exit code 2, or are read: a few here, 10,000 per reader among the slow tests."""

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.run import damaged, fuzz, fuzz_here


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name):
    outcome = fuzz_here(name, 0, 100)
    assert not outcome.findings
    assert outcome.refused >= 5 and outcome.read + outcome.refused == 100


def test_inputs_can_be_made_again():
    assert damaged("config", 7) == damaged("config", 7) != damaged("config", 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_files(name):
    assert not fuzz(name, 10_000).findings
