"""From the name in a config, or from a run directory, to a tokenizer."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from train.config import TOKENIZER_NAMES, DataConfig
from train.data.huggingface import HuggingFaceTokenizer
from train.data.sources import find_files, read_documents
from train.data.tokenizer import KIND_KEY, TOKENIZER_FILE, ByteTokenizer, CharTokenizer, Tokenizer
from train.errors import ConfigError
from train.paths import with_home
from train.reading import reading, regular, without_panics

_FIELD = "data.tokenizer"
MAX_VOCABULARY = 1 << 24  # far beyond any in use; the library writes every id up to the largest


def build_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names; `char` reads the corpus for its vocabulary.

    Raises:
      ConfigError: unknown name, missing or unsound file, or `char` over data that is tokens already.
    """
    name = config.tokenizer
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        return _char_tokenizer(config)
    path = Path(with_home(name))
    path = path / TOKENIZER_FILE if os.path.isdir(path) else path
    if os.path.exists(path):
        return _read(path, name)
    if "/" in name or "\\" in name or path.suffix:
        raise ConfigError(_FIELD, name, "no such file; `bytes`, `char`, or the path of a tokenizer.json")
    near = difflib.get_close_matches(name.lower(), TOKENIZER_NAMES, n=1, cutoff=0.4)
    rule = "must be `bytes`, `char`, or the path of a tokenizer.json"
    raise ConfigError(_FIELD, name, rule + (f"; did you mean `{near[0]}`?" if near else ""))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into a run directory.

    Raises:
      ConfigError: there is none.
    """
    path = Path(directory, TOKENIZER_FILE)
    if not path.is_file():
        raise ConfigError("workdir", directory, f"has no {TOKENIZER_FILE}; is it the directory of a run?")
    return _read(path, str(path))


def _char_tokenizer(config: DataConfig) -> CharTokenizer:
    def documents():
        for field, path in (("data.path", config.path), ("data.validation_path", config.validation_path)):
            if field == "data.validation_path" and path is None:
                continue
            files = find_files(field, path)
            if files.are_shards:
                rule = "needs text, but the data is tokens already; name the tokenizer that made it"
                raise ConfigError(_FIELD, "char", rule)
            yield from read_documents(files, config.text_field)

    return CharTokenizer.of(documents())


def _read(path: Path, name: str) -> Tokenizer:
    with reading(_FIELD, name, "a tokenizer.json"):
        content = json.loads(Path(regular(path)).read_text(encoding="utf-8-sig"))
        kind = content.get(KIND_KEY) if isinstance(content, dict) else None
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "char":
            return CharTokenizer(content["characters"])
        with without_panics():
            tokenizer = HuggingFaceTokenizer.from_file(path)
        if tokenizer.vocab_size > MAX_VOCABULARY:
            raise ValueError(f"an id is beyond {MAX_VOCABULARY}")
        tokenizer.name = name
        return tokenizer
    raise AssertionError  # for mypy: `reading` lets nothing through
