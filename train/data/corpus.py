"""The corpus of a run: its training and validation tokens, and the hash by which it is known again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from train.config import DataConfig
from train.data.encoded import Encoded, digested, encode_documents
from train.data.packing import TokenStream
from train.data.shards import digest_shards, map_shards
from train.data.sources import find_files, read_documents
from train.data.tokenizer import Tokenizer
from train.errors import ConfigError


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out.

    Attributes:
      train: `train.num_tokens`, `train.num_documents` tell its size.
      validation: disjoint from it, unless the config names the same file twice.
      content_hash: sha256 of what the files hold, in hex; of a single text file, what `sha256sum` prints.
      tokenizer_hash: `Tokenizer.fingerprint` of what made ids of it.
      ignored_files: files below the named folders that are of no known kind.
    """

    train: TokenStream
    validation: TokenStream
    content_hash: str
    tokenizer_hash: str
    ignored_files: int = 0


def load_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Reads, encodes (or maps) and splits the data that the config names.

    Raises:
      ConfigError: anything wrong with the data, naming the field to change.
    """
    if not 0 < config.validation_fraction < 1:
        rule = "must be above 0 and below 1"
        raise ConfigError("data.validation_fraction", config.validation_fraction, rule)
    digest = hashlib.sha256()
    encoded, ignored = _load("data.path", config.path, config, tokenizer, digest)
    if config.validation_path is None:
        train, validation = encoded.split(config.validation_fraction)
    else:
        digest.update(b"\xff")
        held_out, more_ignored = _load(
            "data.validation_path", config.validation_path, config, tokenizer, digest
        )
        train, validation, ignored = encoded.stream(), held_out.stream(), ignored + more_ignored
    require_length(train, config.sequence_length, "training")
    require_length(validation, config.sequence_length, "validation")
    return Corpus(train, validation, digest.hexdigest(), tokenizer.fingerprint(), ignored)


def content_hash(config: DataConfig) -> str:
    """`Corpus.content_hash` of the data that the config names, without a tokenizer and without tokens.

    Raises:
      ConfigError: the data cannot be read.
    """
    digest = hashlib.sha256()
    _digest("data.path", config.path, config, digest)
    if config.validation_path is not None:
        digest.update(b"\xff")
        _digest("data.validation_path", config.validation_path, config, digest)
    return digest.hexdigest()


def _digest(field: str, path: str | None, config: DataConfig, digest: Any) -> None:
    files = find_files(field, path)
    if files.are_shards:
        digest_shards(files, digest)
    else:
        for _ in digested(read_documents(files, config.text_field), digest):
            pass


def require_length(stream: TokenStream, sequence_length: int, split: str) -> None:
    """A ConfigError unless at least one whole window fits the split."""
    if sequence_length < 1:
        raise ConfigError("data.sequence_length", sequence_length, "must be at least 1")
    if stream.num_predictions < sequence_length:
        rule = (
            f"must be below the number of tokens, but the {split} split has {stream.num_tokens}; "
            "shorten the sequence or give more data"
        )
        raise ConfigError("data.sequence_length", sequence_length, rule)


def _load(
    field: str, path: str | None, config: DataConfig, tokenizer: Tokenizer, digest: Any
) -> tuple[Encoded, int]:
    files = find_files(field, path)
    if files.are_shards:
        encoded = map_shards(files, tokenizer, digest)
    else:
        encoded = encode_documents(read_documents(files, config.text_field), tokenizer, digest)
    if not len(encoded.lengths):
        raise ConfigError(field, path, "is empty")
    return encoded, files.ignored
