"""Training batches in an endless, resumable order, and the validation split from end to end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from train.data.corpus import Corpus, require_length
from train.data.order import key_of, mix64, shuffled
from train.data.packing import TokenStream, cut_windows, num_windows
from train.errors import ConfigError

Batch = dict[str, np.ndarray]


class TrainingBatches(Iterator[Batch]):
    """Endless batches of the training split; the state is one number and what must not change beside it.

    A batch is a dict of int32 arrays `tokens`, `targets`, `segments`, `positions` [B, S] (see `packing`)
    and `index` [B] int64, the global window id: epoch * windows + window. Each epoch has an order and a
    first place of its own, so that the borders of windows move; both follow from the seed and the sizes
    alone. A batch may end one epoch and begin the next.
    """

    def __init__(
        self, corpus: Corpus, *, batch_size: int, sequence_length: int, seed: int, rows: slice | None = None
    ):
        """Begin with the first batch; `set_state` goes on elsewhere.

        Args:
          corpus: from `load_corpus`.
          batch_size: B, windows of the global batch.
          sequence_length: S, predictions of a window.
          seed: decides the order and the offset of every epoch.
          rows: the rows of the global batch to read (this process's share); unset: all. Order and state do not
            depend on it.

        Raises:
          ConfigError: no window of S predictions fits the training split, or B < 1.
        """
        # grain brings jax and orbax along: only a run that trains pays for the import.
        import grain

        require_length(corpus.train, sequence_length, "training")
        if batch_size < 1:
            raise ConfigError("data.batch_size", batch_size, "must be at least 1")
        self._windows = _Windows(corpus.train, batch_size, sequence_length, seed, rows or slice(None))
        self._identity: dict[str, Any] = {
            "content_hash": corpus.content_hash,
            "tokenizer_hash": corpus.tokenizer_hash,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "seed": seed,
        }
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        batches = grain.MapDataset.range(sys.maxsize).map(self._windows.batch)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __next__(self) -> Batch:
        """The next batch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """A small JSON-serialisable dict; batches read ahead but not handed out do not count."""
        return {"next_batch": self._iterator.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch that was handed out last before `get_state`.

        Raises:
          ConfigError: the state belongs to other data, another tokenizer, other sizes or another seed.
        """
        if state["content_hash"] != self._identity["content_hash"]:
            rule = (
                "the content of the data has changed since the run began; a run resumes only on the same data"
            )
            raise ConfigError("data.path", "sha256 " + self._identity["content_hash"][:16], rule)
        if state["tokenizer_hash"] != self._identity["tokenizer_hash"]:
            rule = "is not the tokenizer with which the run began: the ids would mean something else"
            raise ConfigError("data.tokenizer", "sha256 " + self._identity["tokenizer_hash"][:16], rule)
        for name, field in (
            ("batch_size", "data.batch_size"),
            ("sequence_length", "data.sequence_length"),
            ("seed", "seed"),
        ):
            if state[name] != self._identity[name]:
                rule = f"must stay {state[name]}, with which the run began"
                raise ConfigError(field, self._identity[name], rule)
        self._iterator.set_state({"next_index": state["next_batch"]})

    def close(self) -> None:
        """Stop reading ahead. Closing twice is harmless."""
        self._iterator.close()


class _Windows:
    """The batch with a given number, as a pure function of seed and sizes."""

    def __init__(self, stream: TokenStream, batch_size: int, sequence_length: int, seed: int, rows: slice):
        self.stream, self.batch_size, self.sequence_length, self.rows = (
            stream,
            batch_size,
            sequence_length,
            rows,
        )
        self.count = num_windows(stream, sequence_length)
        self.order_key, self.offset_key = key_of("order", seed), key_of("offset", seed)

    def batch(self, number: int) -> Batch:
        """Rows `rows` of global batch `number`."""
        place_B = number * self.batch_size + np.arange(self.batch_size)[self.rows]
        epoch_B, place_B = np.divmod(place_B, self.count)
        salt_B = epoch_B.astype(np.uint64)
        window_B = shuffled(place_B, self.count, mix64(self.order_key ^ mix64(salt_B)))
        offset_B = (mix64(self.offset_key ^ mix64(salt_B)) % np.uint64(self.sequence_length)).astype(np.int64)
        begin_B = window_B * self.sequence_length
        left_B = np.minimum(self.stream.num_predictions - begin_B, self.sequence_length)
        batch = cut_windows(self.stream, begin_B + offset_B, left_B, self.sequence_length)
        return {**batch, "index": epoch_B * self.count + window_B}


def validation_batches(
    corpus: Corpus,
    batch_size: int,
    sequence_length: int,
    max_batches: int | None = None,
    rows: slice | None = None,
) -> Iterator[Batch]:
    """The validation split once, in order, in windows that do not share a prediction.

    Every token of the split but its first is a target exactly once. The last window and the last batch are
    filled up with padding (target -1, index -1), so that all batches have one shape. Batches are as those
    of training.

    Args:
      corpus: from `load_corpus`.
      batch_size: B.
      sequence_length: S.
      max_batches: stop after so many; unset: the whole split.
      rows: the rows of each batch to read (this process's share); unset: all.

    Raises:
      ConfigError: no window of S predictions fits the validation split, or B < 1.
    """
    stream = corpus.validation
    require_length(stream, sequence_length, "validation")
    if batch_size < 1:
        raise ConfigError("data.batch_size", batch_size, "must be at least 1")
    numbers = range(num_validation_batches(corpus, batch_size, sequence_length, max_batches))
    rows_B = np.arange(batch_size)[rows or slice(None)]
    return (_validation_batch(stream, number * batch_size + rows_B, sequence_length) for number in numbers)


def num_validation_batches(
    corpus: Corpus, batch_size: int, sequence_length: int, max_batches: int | None = None
) -> int:
    """How many `validation_batches` gives."""
    batches = -(-num_windows(corpus.validation, sequence_length) // batch_size)
    return batches if max_batches is None else min(batches, max_batches)


def _validation_batch(stream: TokenStream, window_B: np.ndarray, sequence_length: int) -> Batch:
    count_B = np.clip(stream.num_predictions - window_B * sequence_length, 0, sequence_length)
    first_B = np.where(count_B > 0, window_B * sequence_length, 0)
    batch = cut_windows(stream, first_B, count_B, sequence_length)
    return {**batch, "index": np.where(count_B > 0, window_B, -1)}
