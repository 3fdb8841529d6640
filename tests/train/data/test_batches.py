import json
from collections import Counter

import numpy as np
import pytest

from tests.train.data import naive
from train.data import Corpus, TrainingBatches, validation_batches
from train.errors import ConfigError

FIELDS = ("tokens", "targets", "segments", "positions", "index")


def corpus_of(documents, validation=None, content_hash="a", tokenizer_hash="t"):
    held_out = naive.stream_of(validation or documents)
    return Corpus(naive.stream_of(documents), held_out, content_hash, tokenizer_hash)


# Every token is its own place, so that batches tell which predictions they hold.
DOCUMENTS = [list(range(0, 40)), list(range(40, 41)), list(range(41, 104)), list(range(104, 150))]


@pytest.fixture
def open_batches():
    """`TrainingBatches` whose reading ahead is stopped after the test."""
    opened = []

    def open_one(corpus, **options):
        opened.append(
            TrainingBatches(corpus, **{"batch_size": 4, "sequence_length": 7, "seed": 3, **options})
        )
        return opened[-1]

    yield open_one
    for batches in opened:
        batches.close()


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in FIELDS)


def rows_by_epoch(batches, epochs):
    """{epoch: rows}, where a row is (window, tokens, targets)."""
    count = batches._windows.count
    found = {epoch: [] for epoch in range(epochs)}
    while True:
        batch = next(batches)
        for row, window in enumerate(batch["index"]):
            if window >= epochs * count:
                return found
            item = (window % count, batch["tokens"][row].tolist(), batch["targets"][row].tolist())
            found[window // count].append(item)


def test_an_epoch_has_every_window_and_every_prediction_once(open_batches):
    epochs = rows_by_epoch(open_batches(corpus_of(DOCUMENTS)), 3)
    for rows in epochs.values():
        assert sorted(window for window, _, _ in rows) == list(range(22))  # ceil(149 / 7)
        pairs = Counter(
            (token, target)
            for _, tokens, targets in rows
            for token, target in zip(tokens, targets, strict=True)
            if target >= 0
        )
        assert pairs == Counter((token, token + 1) for token in range(149))


def test_epochs_differ_in_order_and_borders(open_batches):
    epochs = rows_by_epoch(open_batches(corpus_of(DOCUMENTS)), 6)
    orders = [[window for window, _, _ in rows] for rows in epochs.values()]
    assert len({tuple(order) for order in orders}) == 6
    assert all(order != sorted(order) for order in orders)
    first_tokens = {next(tokens[0] for window, tokens, _ in rows if window == 0) for rows in epochs.values()}
    assert len(first_tokens) > 2


def test_segments_and_positions_are_those_of_the_documents(open_batches):
    batches = open_batches(corpus_of(DOCUMENTS))
    starts = {0, 40, 41, 104}
    for _ in range(12):
        batch = next(batches)
        for tokens, segments, positions in zip(
            *(batch[n] for n in ("tokens", "segments", "positions")), strict=True
        ):
            real = segments > 0
            begins = [i == 0 or tokens[i] in starts for i in range(real.sum())]
            assert segments[real].tolist() == np.cumsum(begins).tolist()
            assert all((p == 0) == b for p, b in zip(positions, begins, strict=False))
            assert (np.diff(positions[real])[np.diff(segments[real]) == 0] == 1).all()


@pytest.mark.parametrize("after", [0, 1, 5, 13])  # an epoch is 5.5 batches
def test_resume_is_exact(open_batches, after):
    corpus = corpus_of(DOCUMENTS)
    batches = open_batches(corpus)
    for _ in range(after):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(8)]
    fresh = open_batches(corpus)
    next(fresh)  # what was read ahead must not leak into the restored order
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert all(equal(a, b) for a, b in zip([next(fresh) for _ in range(8)], expected, strict=True))
    batches.set_state(state)  # also backwards, on a used iterator
    assert equal(next(batches), expected[0])


def test_state_has_constant_size(open_batches):
    batches = open_batches(corpus_of(DOCUMENTS))
    for _ in range(30):
        next(batches)
    assert batches.get_state()["next_batch"] == 30
    assert len(json.dumps(batches.get_state())) < 300


def test_state_of_other_data_or_sizes_is_refused(open_batches):
    state = open_batches(corpus_of(DOCUMENTS)).get_state()
    with pytest.raises(ConfigError, match=r"data.path = .*content of the data has changed"):
        open_batches(corpus_of(DOCUMENTS, content_hash="b")).set_state(state)
    with pytest.raises(ConfigError, match=r"data.tokenizer = .*is not the tokenizer"):
        open_batches(corpus_of(DOCUMENTS, tokenizer_hash="u")).set_state(state)
    for option, field in (("batch_size", "data.batch_size"), ("sequence_length", "data.sequence_length")):
        with pytest.raises(ConfigError, match=f"^{field} = 5: must stay"):
            open_batches(corpus_of(DOCUMENTS), **{option: 5}).set_state(state)
    with pytest.raises(ConfigError, match=r"^seed = 5: must stay 3"):
        open_batches(corpus_of(DOCUMENTS), seed=5).set_state(state)


def test_rows_of_processes_make_up_the_global_batch(open_batches):
    corpus = corpus_of(DOCUMENTS)
    whole = open_batches(corpus)
    parts = [open_batches(corpus, rows=slice(begin, begin + 2)) for begin in (0, 2)]
    for _ in range(10):
        a, b = (next(part) for part in parts)
        joined = {name: np.concatenate([a[name], b[name]]) for name in FIELDS}
        assert equal(joined, next(whole))
    assert parts[0].get_state() == whole.get_state()


def test_seed_decides_the_order(open_batches):
    corpus = corpus_of(DOCUMENTS)
    indices = [
        [next(batches)["index"].tolist() for _ in range(5)]
        for batches in (open_batches(corpus, seed=seed) for seed in (3, 3, 4, -1))
    ]
    assert indices[0] == indices[1]
    assert len({str(order) for order in indices}) == 3


def test_a_batch_may_hold_several_epochs(open_batches):
    """Three windows, batch of eight: no window is lost or shown twice in an epoch."""
    batches = open_batches(corpus_of([list(range(20))]), batch_size=8)
    windows = np.concatenate([next(batches)["index"] for _ in range(3)])
    assert sorted(windows) == list(range(24))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
@pytest.mark.parametrize("sequence_length", [1, 7, 149])
def test_validation_counts_every_target_once(batch_size, sequence_length):
    batches = list(validation_batches(corpus_of([[1, 2]], DOCUMENTS), batch_size, sequence_length))
    for batch in batches:
        assert all(batch[name].shape == (batch_size, sequence_length) for name in FIELDS[:4])
    tokens, targets, segments = (np.concatenate([batch[n].ravel() for batch in batches]) for n in FIELDS[:3])
    real = targets >= 0
    assert targets[real].tolist() == list(range(1, 150))
    assert (tokens[real] + 1 == targets[real]).all()
    assert (segments[~real] == 0).all()
    assert (segments[real] > 0).all()
    indices = np.concatenate([batch["index"] for batch in batches])
    windows = -(-149 // sequence_length)
    assert indices[:windows].tolist() == list(range(windows))
    assert (indices[windows:] == -1).all()
    assert len(indices) - windows < batch_size


def test_validation_may_stop_early_and_repeats():
    corpus = corpus_of([[1, 2]], DOCUMENTS)
    whole = list(validation_batches(corpus, 4, 7))
    assert len(whole) == 6
    early = list(validation_batches(corpus, 4, 7, max_batches=2))
    assert len(early) == 2
    assert all(equal(a, b) for a, b in zip(early, whole, strict=False))
    assert len(list(validation_batches(corpus, 4, 7, max_batches=99))) == 6


def test_errors_name_the_field():
    corpus = corpus_of([[1, 2, 3]])
    with pytest.raises(ConfigError, match=r"data.sequence_length = 3: .* training split has 3;"):
        TrainingBatches(corpus, batch_size=1, sequence_length=3, seed=0)
    with pytest.raises(ConfigError, match=r"data.sequence_length = 3: .* validation split has 3;"):
        validation_batches(corpus, 1, 3)
    with pytest.raises(ConfigError, match=r"data.sequence_length = 0"):
        validation_batches(corpus, 1, 0)
    with pytest.raises(ConfigError, match=r"data.batch_size = 0"):
        TrainingBatches(corpus, batch_size=0, sequence_length=1, seed=0)
    with pytest.raises(ConfigError, match=r"data.batch_size = -1"):
        validation_batches(corpus, -1, 1)
