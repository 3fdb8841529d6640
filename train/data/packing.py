"""A stream of documents, cut into windows whose attention stays inside a document.

The stream is the documents one after the other; where the source is text, one separator is put between two
of them and belongs to the end of the earlier one. A *prediction* is a place of the stream together with the
next place: place i is the input, place i + 1 the target, so that a stream of L tokens has L - 1 predictions
and every token but the very first is a target exactly once. That includes the first token of each later
document: it is predicted from the separator before it, which is how a model learns to begin a document
after a separator. Documents whose source has no separator (the parts of one text) have none at the border
either.

A window is S consecutive predictions. Inside it, a new segment begins at every document's first token, so the
separator is the last token of its segment. Letters: B windows of a batch, S places of a window.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenStream:
    """Documents in order, over token arrays that are in memory or mapped from files and never copied.

    Attributes:
      arrays: one-dimensional integer arrays; laid end to end they are the backing of the stream.
      starts: [documents + 1] int64, the place in the stream of each document's first token, then its length.
      origins: [documents] int64, the place in the backing of each document's first token.
    """

    arrays: tuple[np.ndarray, ...]
    starts: np.ndarray
    origins: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens, separators included."""
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents, empty ones not counted."""
        return len(self.origins)

    @property
    def num_predictions(self) -> int:
        """Tokens that have a token before them."""
        return max(0, self.num_tokens - 1)

    def read(self, document: np.ndarray, place: np.ndarray) -> np.ndarray:
        """int32 tokens at `place` of the stream, given the document each place lies in; shapes agree."""
        backing = place - self.starts[document] + self.origins[document]
        if len(self.arrays) == 1:
            return self.arrays[0][backing].astype(np.int32)
        flat = backing.reshape(-1)
        array_starts = np.cumsum([0, *(len(array) for array in self.arrays[:-1])])
        owner = np.searchsorted(array_starts, flat, side="right") - 1
        # Neighbours mostly share an array, so whole runs are read at once.
        edges = [0, *(np.flatnonzero(np.diff(owner)) + 1), len(flat)]
        tokens = np.empty(len(flat), np.int32)
        for begin, end in itertools.pairwise(edges):
            if end > begin:
                array = owner[begin]
                tokens[begin:end] = self.arrays[array][flat[begin:end] - array_starts[array]]
        return tokens.reshape(backing.shape)

    def tokens(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """int32 tokens of places begin … end of the stream, as one array in memory."""
        place = np.arange(begin, self.num_tokens if end is None else end)
        return self.read(np.searchsorted(self.starts, place, side="right") - 1, place)


def num_windows(stream: TokenStream, sequence_length: int) -> int:
    """Windows that hold every prediction once; the last one may be partly padding."""
    return -(-stream.num_predictions // sequence_length)


def cut_windows(
    stream: TokenStream, first_B: np.ndarray, count_B: np.ndarray, sequence_length: int
) -> dict[str, np.ndarray]:
    """Windows of the stream taken as a ring: after the last prediction the first, in a new segment.

    Args:
      stream: the documents; at least two tokens.
      first_B: the first prediction of each window, in [0, 2 * predictions).
      count_B: how many predictions each window has, in [0, S]; the rest is padding.
      sequence_length: S.

    Returns:
      `tokens`, `targets`, `segments`, `positions`, all [B, S] int32: segments count from 1 within a window,
      positions from 0 within a segment of a window. Padding has token 0, target -1, segment 0 and position 0.
    """
    ring = stream.num_predictions
    starts = stream.starts[:-1]
    # A last document of one token is only ever a target.
    documents = stream.num_documents - int(starts[-1] == ring)
    column_S = np.arange(sequence_length)

    def document_at(place: np.ndarray) -> np.ndarray:
        laps, place = np.divmod(place, ring)
        return laps * documents + np.searchsorted(starts[:documents], place, side="right") - 1

    # Documents are numbered on through the laps of the ring; all of a window but its first begin inside it.
    first_document_B = document_at(first_B)
    later_B = np.where(count_B > 0, document_at(first_B + np.maximum(count_B, 1) - 1) - first_document_B, 0)
    row_N = np.repeat(np.arange(len(first_B)), later_B)
    ordinal_N = np.arange(len(row_N)) - np.repeat(np.cumsum(later_B) - later_B, later_B) + 1
    laps_N, document_N = np.divmod(first_document_B[row_N] + ordinal_N, documents)
    begins_BS = np.zeros((len(first_B), sequence_length), np.int64)
    begins_BS[row_N, starts[document_N] + laps_N * ring - first_B[row_N]] = 1

    real_BS = column_S < count_B[:, None]
    ordinal_BS = np.cumsum(begins_BS, axis=1)
    document_BS = (first_document_B[:, None] + ordinal_BS) % documents
    place_BS = np.where(real_BS, (first_B[:, None] + column_S) % ring, starts[document_BS])
    ends_BS = place_BS + 1 == stream.starts[document_BS + 1]
    begin_BS = np.maximum.accumulate(begins_BS * column_S, axis=1)
    return {
        "tokens": np.where(real_BS, stream.read(document_BS, place_BS), 0),
        "targets": np.where(real_BS, stream.read(document_BS + (ends_BS & real_BS), place_BS + real_BS), -1),
        "segments": np.where(real_BS, ordinal_BS + 1, 0).astype(np.int32),
        "positions": np.where(real_BS, column_S - begin_BS, 0).astype(np.int32),
    }
