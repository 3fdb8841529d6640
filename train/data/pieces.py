"""Characters that a byte-pair encoding has no token for: the library drops them without a word."""

from __future__ import annotations

import re
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
        # Special tokens are text where a text spells them, the other added ones are not.
        added = [
            token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special
        ]
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")

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
        """The first character of the text that would be lost, or that it becomes; None where all are kept.

        Characters may combine, so the whole text is normalised. A character by itself only tells whether to look
        closely: it may be part of an added token, or one that is taken out between words.
        """
        new = set(self._normal(text)) - self._usable
        doubtful = {character for character in new if self._lost(character)}
        self._usable |= new - doubtful
        if not doubtful:
            return None
        lost: set[str] = set().union(*map(self._lost, self._added.split(text)))
        if not lost:
            return None
        return next((character for character in text if lost & self._lost(character)), min(lost))

    def _lost(self, text: str) -> set[str]:
        return {letter for letter in set(self._letters(text)) if not self._has(letter)}

    def _has(self, letter: str) -> bool:
        return any(prefix + letter + suffix in self._vocabulary for prefix, suffix in self._affixes)

    def _normal(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def _letters(self, text: str) -> str:
        """What the model sees of a text."""
        normal = self._normal(text)
        if self._pre_tokenizer is None:
            return normal
        return "".join(part for part, _ in self._pre_tokenizer.pre_tokenize_str(normal))

    def _is_of_bytes(self) -> bool:
        """Whether every character becomes bytes, so that all are known when all bytes are."""
        return self._letters("é").removeprefix("Ġ") == "Ã©"
