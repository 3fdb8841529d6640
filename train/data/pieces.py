"""Characters that a byte-pair encoding has no token for: the library drops them without a word."""

from __future__ import annotations

from typing import Any

import tokenizers

# Characters of one and two bytes, then one for each first byte of a longer character: every byte that UTF-8 has.
_LONGER = (0x800, *range(0x1000, 0x10000, 0x1000), 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)
_EVERY_BYTE = "".join(map(chr, (*range(0x800), *_LONGER)))


class Pieces:
    """The characters that a BPE model without unknown token and without byte fallback can encode.

    Args:
      model: the `model` of a `tokenizer.json`.
      tokenizer: the tokenizer made of it.
    """

    def __init__(self, model: dict[str, Any], tokenizer: tokenizers.Tokenizer):
        self._normalizer, self._pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        affixes = [("", ""), (prefix, ""), ("", suffix), (prefix, suffix)]
        self._vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._affixes = list(dict.fromkeys(affixes))
        self._usable: set[str] = set()

    @classmethod
    def of(cls, content: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> Pieces | None:
        """Those of a `tokenizer.json`; None where nothing can be lost."""
        model = content.get("model") or {}
        is_bpe = model.get("type", "BPE" if "merges" in model else None) == "BPE"
        if not is_bpe or model.get("unk_token") is not None or model.get("byte_fallback"):
            return None
        pieces = cls(model, tokenizer)
        return None if pieces._is_of_bytes() and pieces.first_unknown(_EVERY_BYTE) is None else pieces

    def first_unknown(self, text: str) -> str | None:
        """The lowest character of the text that would be lost; None where all are kept."""
        new = sorted(set(text) - self._usable)
        for character in new:
            if not self._can(character):
                return character
        self._usable.update(new)
        return None

    def _can(self, character: str) -> bool:
        return all(
            any(prefix + letter + suffix in self._vocabulary for prefix, suffix in self._affixes)
            for letter in self._letters(character)
        )

    def _letters(self, character: str) -> str:
        """What the model sees of a character."""
        normal = self._normalizer.normalize_str(character) if self._normalizer else character
        if self._pre_tokenizer is None:
            return normal
        return "".join(part for part, _ in self._pre_tokenizer.pre_tokenize_str(normal))

    def _is_of_bytes(self) -> bool:
        """Whether every character becomes bytes, so that all are known when all bytes are."""
        return self._letters("é").removeprefix("Ġ") == "Ã©"
