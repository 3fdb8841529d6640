import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data import naive
from train.data.packing import cut_windows, num_windows

DOCUMENTS = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=9), min_size=1, max_size=8).filter(
    lambda documents: sum(map(len, documents)) > 1
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 3), st.data())
def test_windows_equal_the_naive_restatement(documents, sequence_length, arrays, data):
    stream = naive.stream_of(documents, arrays)
    ring = stream.num_predictions
    sequence_length = min(sequence_length, ring)
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(0, 2 * ring - 1), st.integers(0, sequence_length)), min_size=1, max_size=4
        )
    )
    first, count = np.array(rows).T
    result = cut_windows(stream, first, count, sequence_length)
    for row, (begin, real) in enumerate(rows):
        for name, expected in naive.window(documents, begin, real, sequence_length).items():
            assert result[name][row].tolist() == expected, name
            assert result[name].dtype == np.int32


@pytest.mark.parametrize("documents", [[[1, 2], [3, 4], [5]], [[1], [2]], [[1], [2], [3]], [[1, 2, 3]]])
def test_every_window_of_small_streams(documents):
    """Above all those that go round the ring, also where the last document is only ever a target."""
    stream = naive.stream_of(documents)
    ring = stream.num_predictions
    for first in range(2 * ring):
        for count in range(ring + 1):
            result = cut_windows(stream, np.array([first]), np.array([count]), ring)
            expected = naive.window(documents, first, count, ring)
            assert {name: value[0].tolist() for name, value in result.items()} == expected, (first, count)


def test_borders_by_hand():
    """Two documents with separator 9 between them: it ends the first, and the second is predicted from it."""
    stream = naive.stream_of([[1, 2, 9], [3, 4]])
    result = cut_windows(stream, np.array([0]), np.array([4]), 5)
    assert result["tokens"].tolist() == [[1, 2, 9, 3, 0]]
    assert result["targets"].tolist() == [[2, 9, 3, 4, -1]]
    assert result["segments"].tolist() == [[1, 1, 1, 2, 0]]
    assert result["positions"].tolist() == [[0, 1, 2, 0, 0]]


def test_a_separator_in_the_text_is_no_border():
    stream = naive.stream_of([[1, 9, 2, 9], [3]])
    assert cut_windows(stream, np.array([0]), np.array([4]), 4)["segments"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("arrays", [1, 2, 5])
def test_tokens_reads_across_arrays(arrays):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8]]
    stream = naive.stream_of(documents, arrays)
    assert stream.tokens().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert stream.tokens(2, 6).tolist() == [3, 4, 5, 6]
    assert (stream.num_tokens, stream.num_documents, stream.num_predictions) == (8, 3, 7)
    assert (num_windows(stream, 7), num_windows(stream, 6), num_windows(stream, 2)) == (1, 2, 4)
