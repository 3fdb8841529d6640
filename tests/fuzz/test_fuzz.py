"""Damaged files end in one line, exit code 2, or are read: a few here, 10,000 by `python -m tests.fuzz`."""

import json

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from tests.fuzz.readers import READERS
from tests.fuzz.run import damaged, fuzz_here, result_of


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name):
    outcome = fuzz_here(name, 0, 100)
    assert not outcome.findings
    assert outcome.refused >= 5 and outcome.read + outcome.refused == 100


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
RECORDS = {
    "jsonl": st.lists(st.fixed_dictionaries({"text": VALUES | st.text()}) | VALUES, max_size=4),
    "metrics": st.lists(st.fixed_dictionaries({"step": VALUES, "loss": VALUES}), max_size=4),
    "record": VALUES | st.fixed_dictionaries({"extra": VALUES, "data_state": VALUES}),
    "tokenizer": st.fixed_dictionaries({"moejax_tokenizer": st.just("char"), "characters": VALUES}),
    "tokenizer_config": VALUES | st.fixed_dictionaries({"eos_token": VALUES}),
    "config": st.fixed_dictionaries(
        {"steps": VALUES, "data": VALUES, "model": st.fixed_dictionaries({"moe": VALUES})}
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_values_of_any_type_are_read_or_refused_in_one_line(name, tmp_path):
    reader = READERS[name]
    reader.prepare(tmp_path)
    path = tmp_path / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(content=RECORDS[name])
    def check(content):
        if reader.structure == "yaml":
            path.write_text(yaml.safe_dump(content))
        elif reader.structure == "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))
        assert result_of(reader, path) in ("read", "refused")

    check()


def test_inputs_can_be_made_again():
    assert damaged("config", 7) == damaged("config", 7) != damaged("config", 8)
