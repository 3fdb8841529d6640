"""Token shards, `.npy` and `.bin`: mapped into memory, read through once for borders, never loaded whole."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from train.data.encoded import Encoded
from train.data.sources import Files
from train.data.tokenizer import Tokenizer
from train.errors import ConfigError
from train.reading import reading, regular

_CHUNK = 1 << 22


def map_shards(files: Files, tokenizer: Tokenizer, digest: Any) -> Encoded:
    """Maps the shards; a document ends with each separator and with each file.

    A `.bin` is little-endian uint16, or uint32 where the tokenizer's vocabulary exceeds 65,535.

    Args:
      files: of kind `npy` or `bin`.
      tokenizer: whose ids these are.
      digest: a hashlib object, updated with the tokens' bytes.

    Raises:
      ConfigError: an unsound file, or an id outside the vocabulary, with its offset.
    """
    arrays, ends, begin = [], [], 0
    for path in files.paths:
        array = _map_npy(files.field, path) if files.kind == "npy" else _map_bin(files.field, path, tokenizer)
        ends.append(begin + _document_ends(files.field, path, array, tokenizer, digest))
        arrays.append(array)
        begin += len(array)
    ends_D = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    origins_D = np.concatenate([[0], ends_D[:-1]]).astype(np.int64) if len(ends_D) else ends_D
    return Encoded(tuple(arrays), origins_D, ends_D - origins_D, separators_added=False)


def digest_shards(files: Files, digest: Any) -> None:
    """Update `digest` as `map_shards` does, which needs the tokenizer for it.

    Raises:
      ConfigError: an unsound file.
    """
    for path in files.paths:
        if files.kind == "npy":
            array = _map_npy(files.field, path)
            for begin in range(0, len(array), _CHUNK):
                digest.update(np.ascontiguousarray(array[begin : begin + _CHUNK]).data)
        else:
            with reading(files.field, path, "a file of tokens"), open(regular(path), "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)


def _map_npy(field: str, path: Path) -> np.ndarray:
    with reading(
        field, path, "a sound .npy file of integers: of another kind, or cut short; write it with numpy.save"
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # files that Python 2 wrote are as good
            array = np.lib.format.open_memmap(regular(path), mode="r")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        rule = f"must be a one-dimensional array of integers, is {array.dtype} of shape {array.shape}"
        raise ConfigError(field, path, rule)
    return array


def _map_bin(field: str, path: Path, tokenizer: Tokenizer) -> np.ndarray:
    dtype = np.dtype("<u4" if tokenizer.vocab_size > 65535 else "<u2")
    with reading(field, path, "a file of tokens"):
        size = os.stat(regular(path)).st_size
    if size % dtype.itemsize:
        rule = f"has {size} bytes, not a multiple of {dtype.itemsize} (it is read as {dtype.name}); save it as .npy"
        raise ConfigError(field, path, rule)
    if size == 0:
        return np.zeros(0, dtype)
    with reading(field, path, "a file of tokens"):
        return np.memmap(path, dtype, mode="r")


def _document_ends(
    field: str, path: Path, array: np.ndarray, tokenizer: Tokenizer, digest: Any
) -> np.ndarray:
    """The places after each separator and the array's end, after a check of every id."""
    ends = []
    for begin in range(0, len(array), _CHUNK):
        chunk = np.ascontiguousarray(array[begin : begin + _CHUNK])
        digest.update(chunk.data)
        if int(chunk.max()) >= tokenizer.vocab_size or int(chunk.min()) < 0:
            offset = int(np.argmax((chunk >= tokenizer.vocab_size) | (chunk < 0)))
            rule = (
                f"id {chunk[offset]} at token {begin + offset} must be from 0 to "
                f"{tokenizer.vocab_size - 1}, the vocabulary; does data.tokenizer name the tokenizer that made it?"
            )
            raise ConfigError(field, path, rule)
        ends.append(np.flatnonzero(chunk == tokenizer.separator) + begin + 1)
    ends_D = np.concatenate(ends).astype(np.int64) if ends else np.zeros(0, np.int64)
    if len(array) and (not len(ends_D) or ends_D[-1] != len(array)):
        ends_D = np.append(ends_D, len(array))
    return ends_D
