"""A whole source as tokens, and its parts as streams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.documents import Document
from train.data.order import mix64
from train.data.packing import TokenStream
from train.data.tokenizer import Tokenizer
from train.reading import reading

# Documents are handed to the tokenizer in groups, so that it can use all cores.
_GROUP_DOCUMENTS = 1024
_GROUP_BYTES = 1 << 24


@dataclass(frozen=True)
class Encoded:
    """Documents as tokens.

    Attributes:
      arrays: as in `TokenStream`.
      origins: [documents] int64, the place in the backing of each document's first token.
      lengths: [documents] int64, tokens of each, the separator at its end included; none is zero.
      separators_added: every document ends with a separator that is not part of its source.
    """

    arrays: tuple[np.ndarray, ...]
    origins: np.ndarray
    lengths: np.ndarray
    separators_added: bool

    def stream(self, chosen: np.ndarray | None = None) -> TokenStream:
        """The chosen documents (numbers in order; unset: all); added separators are only between two."""
        chosen = np.arange(len(self.origins)) if chosen is None else chosen
        lengths = self.lengths[chosen]
        if self.separators_added and len(lengths):
            lengths[-1] -= 1
        return TokenStream(self.arrays, np.concatenate([[0], np.cumsum(lengths)]), self.origins[chosen])

    def split(self, fraction: float) -> tuple[TokenStream, TokenStream]:
        """Training and validation streams; what is held out depends on the source and fraction alone.

        A single document gives its end, several give whole documents.
        """
        if len(self.origins) == 1:
            whole = self.stream()
            train = math.floor(whole.num_tokens * (1 - fraction) + 1e-9)
            return tuple(  # type: ignore[return-value]
                TokenStream(self.arrays, np.array([0, end - begin]), self.origins + begin)
                for begin, end in ((0, train), (train, whole.num_tokens))
            )
        held_out = np.zeros(len(self.origins), bool)
        held_out[_choose(self.lengths, fraction)] = True
        return self.stream(np.flatnonzero(~held_out)), self.stream(np.flatnonzero(held_out))


def _choose(lengths_D: np.ndarray, fraction: float) -> np.ndarray:
    """Numbers of documents, in the order of a fixed hash of the number, until they hold the share of tokens.

    Documents longer than the share stay in training; where all are, the shortest is held out. At least one
    document stays in training.
    """
    share = fraction * lengths_D.sum()
    order = np.argsort(mix64(np.arange(len(lengths_D), dtype=np.uint64)), kind="stable")
    fitting = order[lengths_D[order] <= share]
    if not len(fitting):
        return order[[np.argmin(lengths_D[order])]]
    needed = int(np.searchsorted(np.cumsum(lengths_D[fitting]), share)) + 1
    return fitting[: min(needed, len(lengths_D) - 1)]


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer, digest: Any) -> Encoded:
    """Documents in memory as tokens, a separator after each; empty ones are left out.

    Args:
      documents: from `read_documents`.
      tokenizer: must know every character of them.
      digest: a hashlib object, updated with the documents' bytes and 0xFF (in no UTF-8 text) between two.

    Raises:
      ConfigError: a document that the tokenizer cannot encode.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    separator = np.array([tokenizer.separator], dtype)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    for group in _groups(digested(documents, digest)):
        with reading("data.tokenizer", tokenizer.name, "a tokenizer for this data"):
            encoded = tokenizer.encode_documents(group)
        for ids in encoded:
            parts += [ids.astype(dtype), separator]
            lengths.append(len(ids) + 1)
    backing = np.concatenate(parts) if parts else np.zeros(0, dtype)
    lengths_D = np.array(lengths, np.int64)
    return Encoded((backing,), np.cumsum(lengths_D) - lengths_D, lengths_D, separators_added=True)


def digested(documents: Iterable[Document], digest: Any) -> Iterator[Document]:
    """The documents that are not empty; `digest` is updated with their bytes and 0xFF between two."""
    is_first = True
    for document in documents:
        if document.raw:
            digest.update(document.raw if is_first else b"\xff" + document.raw)
            is_first = False
            yield document


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.raw)
        if len(group) == _GROUP_DOCUMENTS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
