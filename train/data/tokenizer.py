"""Tokenizers: text to ids and back, whole or as a stream."""

from __future__ import annotations

import abc
import codecs
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from train.data.documents import Document
from train.errors import ConfigError
from train.writing import replace_text

TOKENIZER_FILE = "tokenizer.json"
# The key by which a file of ours differs from a Hugging Face tokenizer.json, which may have the same name.
KIND_KEY = "moejax_tokenizer"


class StreamDecoder(abc.ABC):
    """Turns ids into text one at a time and holds back what is not yet a whole character."""

    @abc.abstractmethod
    def push(self, token: int) -> str:
        """The text that is certain after one more id; may be empty."""

    @abc.abstractmethod
    def finish(self) -> str:
        """The text of what was held back, with U+FFFD for incomplete characters; then it is as new."""


class Tokenizer(abc.ABC):
    """Ids in [0, vocab_size); `separator` ends a document and decodes to nothing.

    Ids that stand for nothing (a model's vocabulary may be padded) decode to U+FFFD.
    """

    vocab_size: int
    separator: int
    name: str = TOKENIZER_FILE
    """The file that it came from, for errors."""
    encoding_changes: Mapping[int, str] = {}
    """Since which rules the same file gives other ids, and to which text; the first rules are number 1."""

    @property
    def encoding_rules(self) -> int:
        """Number of the rules by which moejax makes ids with such a tokenizer."""
        return max(self.encoding_changes, default=1)

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """[tokens] int32 ids of the text, without a separator."""

    def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The ids of each document."""
        return [self.encode(document.text()) for document in documents]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; invalid sequences become U+FFFD."""
        decoder = self.decoder()
        return "".join([decoder.push(int(token)) for token in ids] + [decoder.finish()])

    @abc.abstractmethod
    def decoder(self) -> StreamDecoder:
        """A new incremental decoder."""

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write into a directory all that `load_tokenizer` needs to build it again."""

    def fingerprint(self) -> str:
        """sha256 of all that `save` writes, in hex: other ids for the same text give another one."""
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            for path in sorted(Path(folder).iterdir()):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are bytes, 256 is the separator. Raw: text that is no valid UTF-8 is legal."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> np.ndarray:
        """[bytes] int32; bytes smuggled through a command line by `surrogateescape` come out as they were."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The bytes of each document as they are."""
        return [np.frombuffer(document.raw, np.uint8) for document in documents]

    def decoder(self) -> StreamDecoder:
        """Holds back incomplete UTF-8 sequences."""
        return _ByteDecoder()

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json`."""
        _write(directory, {KIND_KEY: "bytes"})


class _ByteDecoder(StreamDecoder):
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if 0 <= token < ByteTokenizer.separator:
            return self._decoder.decode(bytes([token]))
        return self.finish() + ("" if token == ByteTokenizer.separator else "\ufffd")

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class CharTokenizer(Tokenizer):
    """One id per character, in the order of code points; the separator comes last."""

    def __init__(self, characters: str):
        """The vocabulary is the given characters."""
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters) + 1
        self.separator = len(self.characters)
        codes = _code_points(self.characters)
        self._ids = np.full(int(codes.max(initial=0)) + 1, -1, np.int32)
        self._ids[codes] = np.arange(len(codes), dtype=np.int32)

    @classmethod
    def of(cls, documents: Iterable[Document]) -> CharTokenizer:
        """The vocabulary is every character of the documents."""
        seen = np.zeros(0x110000, bool)
        for document in documents:
            seen[_code_points(document.text())] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    def encode(self, text: str) -> np.ndarray:
        """[characters] int32; a ConfigError names a character that is not in the vocabulary."""
        codes = _code_points(text)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = (codes >= len(self._ids)) | (ids < 0)
        if unknown.any():
            offset = int(np.argmax(unknown))
            raise ConfigError(
                "data.tokenizer",
                "char",
                f"character {text[offset]!r} (U+{int(codes[offset]):04X}) at place {offset} is not in the "
                f"vocabulary of {len(self.characters)} characters; data.tokenizer = bytes encodes any text",
            )
        return ids

    def decoder(self) -> StreamDecoder:
        """Holds nothing back."""
        return _CharDecoder(self.characters)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json`."""
        _write(directory, {KIND_KEY: "char", "characters": self.characters})


class _CharDecoder(StreamDecoder):
    def __init__(self, characters: str):
        self._characters = characters

    def push(self, token: int) -> str:
        if 0 <= token < len(self._characters):
            return self._characters[token]
        return "" if token == len(self._characters) else "\ufffd"

    def finish(self) -> str:
        return ""


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _write(directory: str | Path, content: dict) -> None:
    replace_text(Path(directory, TOKENIZER_FILE), json.dumps(content))
