"""A document on its way from a file to a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from train.errors import ConfigError


@dataclass(frozen=True)
class Document:
    """The bytes of one document and where they come from.

    Attributes:
      field: the config field that named the source, for errors.
      name: the file, and the place in it where it holds several documents.
      raw: the text in UTF-8, unchecked where the source is a text file.
    """

    field: str
    name: str
    raw: bytes

    def text(self) -> str:
        """The decoded text; a ConfigError gives the offset of the first invalid byte."""
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            rule = f"invalid UTF-8 at byte {error.start}; data.tokenizer = bytes reads any bytes as they are"
            raise ConfigError(self.field, self.name, rule) from error
