"""Tokenizers in the Hugging Face `tokenizer.json` format, through the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import tokenizers

from train.data.documents import Document
from train.data.pieces import Pieces
from train.data.tokenizer import TOKENIZER_FILE, StreamDecoder, Tokenizer
from train.errors import ConfigError
from train.writing import replace_text

CONFIG_FILE = "tokenizer_config.json"
# End-of-text tokens of the tokenizers in use, looked for where no tokenizer_config.json names one.
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# A character has at most four bytes, hence at most four ids: what is not whole after many more is noise,
# and is let out so that an endless run of it costs no more per id.
_MOST_HELD_BACK = 32


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; the separator is its end-of-text token, or else one id after its last."""

    encoding_changes = MappingProxyType({2: "text that spells a special token, such as <|im_start|>"})

    def __init__(self, content: str, end_token: str | None = None, name: str = TOKENIZER_FILE):
        """Builds the tokenizer.

        Args:
          content: the text of a `tokenizer.json`.
          end_token: the end-of-text token, where known.
          name: the file, for errors.

        Raises:
          ValueError: the content is not a tokenizer.
        """
        self.name = name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(str(error)) from error
        # What a serving set-up left in the file must not cut or fill the training text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text is text: where it spells a special token it must not end a document.
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_ids = max(ids.values(), default=-1) + 1
        self.end_token = next((token for token in (end_token, *_END_TOKENS) if token in ids), None)
        self.separator = ids[self.end_token] if self.end_token is not None else self.num_ids
        if self.end_token is not None:
            self._tokenizer.add_special_tokens([self.end_token])
        self.vocab_size = max(self.num_ids, self.separator + 1)
        self._pieces = Pieces.of(json.loads(content), self._tokenizer)

    @classmethod
    def from_file(cls, path: Path) -> HuggingFaceTokenizer:
        """Reads a `tokenizer.json` and, if its folder has a config, the end-of-text token named there."""
        end_token = None
        config = path.with_name(CONFIG_FILE)
        if config.is_file():
            end_token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            end_token = end_token.get("content") if isinstance(end_token, dict) else end_token
        return cls(path.read_text(encoding="utf-8"), end_token, str(path))

    def encode(self, text: str) -> np.ndarray:
        """[tokens] int32, without the special tokens a post-processor would add."""
        ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        self._refuse_lost("the text", text, ids)
        return ids

    def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """All documents at once, on all cores."""
        texts = [document.text() for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        everything = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        for document, text, ids in zip(documents, texts, everything, strict=True):
            self._refuse_lost(document.name, text, ids)
        return everything

    def _refuse_lost(self, name: str, text: str, ids: np.ndarray) -> None:
        """A ConfigError where the ids of a text would not give the text back."""
        if self.end_token is not None and (ids == self.separator).any():
            rule = f"{name} holds {self.end_token} as text, which this tokenizer cannot tell from the end of a document"
            raise ConfigError("data.tokenizer", self.end_token, rule)
        if self._pieces is not None and (character := self._pieces.first_unknown(text)) is not None:
            place = text.find(character)  # -1: the normaliser has made it
            where = f"at place {place} of {name}" if place >= 0 else f"to which {name} is normalised"
            rule = (
                f"has no token for {character!r} (U+{ord(character):04X}), {where}, and no unknown token; "
                "it would be lost. data.tokenizer = bytes encodes any text"
            )
            raise ConfigError("data.tokenizer", self.name, rule)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens other than the separator spelled out."""
        text, run = "", []
        for token in map(int, [*ids, self.separator]):
            if 0 <= token < self.num_ids and token != self.separator:
                run.append(token)
            else:
                text += self._tokenizer.decode(run, skip_special_tokens=False)
                text += "" if token == self.separator else "\ufffd"
                run = []
        return text

    def decoder(self) -> StreamDecoder:
        """Holds back ids until their text can no longer change."""
        return _HuggingFaceDecoder(self)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as other tools read them."""
        replace_text(Path(directory, TOKENIZER_FILE), self._tokenizer.to_str())
        replace_text(Path(directory, CONFIG_FILE), json.dumps({"eos_token": self.end_token}))


class _HuggingFaceDecoder(StreamDecoder):
    """The text of an id may depend on those before it (leading spaces, bytes of one character).

    So the last ids whose text is out are decoded together with the new ones, and the difference is new text.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self._done: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        if token == self._tokenizer.separator:
            return self.finish()
        if not 0 <= token < self._tokenizer.num_ids:
            return self.finish() + "\ufffd"
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._held) < _MOST_HELD_BACK:
            return ""
        self._done, self._held = self._held, []
        return text

    def finish(self) -> str:
        text = self._new_text() if self._held else ""
        self._done, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._done)
        return self._tokenizer.decode(self._done + self._held)[len(before) :]
