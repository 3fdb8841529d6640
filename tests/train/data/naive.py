"""What packing means, said again as plainly as possible: lists and loops over documents."""

from __future__ import annotations

import itertools

import numpy as np

from train.data.packing import TokenStream


def stream_of(documents: list[list[int]], arrays: int = 1) -> TokenStream:
    """A stream over given documents; separators are ordinary tokens here.

    Its backing, cut into some arrays, has the documents backwards and a foreign token before each.
    """
    backing: list[int] = []
    origins = []
    for document in reversed(documents):
        backing.append(999)
        origins.append(len(backing))
        backing += document
    starts = np.cumsum([0, *(len(document) for document in documents)])
    return TokenStream(
        tuple(np.array_split(np.array(backing, np.uint16), arrays)), starts, np.array(origins[::-1])
    )


def predictions(documents: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """(token, target, document, place in the document) of every token that has a successor in the stream."""
    flat = [
        (token, number, place)
        for number, document in enumerate(documents)
        for place, token in enumerate(document)
    ]
    return [(here[0], after[0], here[1], here[2]) for here, after in itertools.pairwise(flat)]


def window(documents: list[list[int]], first: int, count: int, sequence_length: int) -> dict[str, list[int]]:
    """One window of the ring of predictions, by walking it."""
    ring = predictions(documents)
    result: dict[str, list[int]] = {"tokens": [], "targets": [], "segments": [], "positions": []}
    segment, position = 0, 0
    for step in range(count):
        token, target, _, place = ring[(first + step) % len(ring)]
        if step == 0 or place == 0:
            segment, position = segment + 1, 0
        for name, value in zip(result, (token, target, segment, position), strict=True):
            result[name].append(value)
        position += 1
    for name, value in (("tokens", 0), ("targets", -1), ("segments", 0), ("positions", 0)):
        result[name] += [value] * (sequence_length - count)
    return result
