"""Which files a path means, and the documents in them: text, JSONL, Parquet, or the standard library."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.documents import Document
from train.data.stdlib import read_stdlib
from train.errors import ConfigError
from train.fields import shown
from train.paths import with_home
from train.reading import reading, regular
from train.strays import is_stray

_TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .log .csv .tsv .html .htm .xml .yaml .yml .toml .ini .cfg "
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala .js .jsx .ts .tsx .css .sh .sql "
    ".rb .pl .php .swift .hs .ml .lisp .el .clj .lua .jl .r .f90 .tokens".split()
)
_KIND_OF_SUFFIX = {".jsonl": "jsonl", ".parquet": "parquet", ".npy": "npy", ".bin": "bin"}
_KINDS_ALLOWED = "text, .jsonl, .parquet, .npy or .bin"
_PARQUET_ROWS = 1024
_LOOKED_AT = 1 << 16  # bytes at the beginning of a text file

log = logging.getLogger("moejax")


@dataclass(frozen=True)
class Files:
    """The files of a source, all of one kind.

    Attributes:
      field: the config field that named them, for errors.
      path: its value; None is the standard library.
      kind: `stdlib`, `text`, `jsonl`, `parquet`, `npy` or `bin`.
      paths: sorted by their names relative to the folder.
      ignored: files of a folder that are of no known kind.
    """

    field: str
    path: str | None
    kind: str
    paths: tuple[Path, ...] = ()
    ignored: int = 0

    @property
    def are_shards(self) -> bool:
        """Whether they hold tokens, not text."""
        return self.kind in ("npy", "bin")


def find_files(field: str, path: str | None) -> Files:
    """The files that a file name, folder or glob means; None is the source text of the standard library.

    A folder means all files below it that are of a known kind, hidden ones left out.

    Raises:
      ConfigError: nothing there, an unknown file type, or files of several kinds.
    """
    if path is None:
        return Files(field, None, "stdlib")
    with reading(field, path, "a path"):
        found, ignored = _find(field, path)
    for file in found:
        if _kind(file) is None:
            raise ConfigError(field, file, f"unknown file type {file.suffix}; must be {_KINDS_ALLOWED}")
    kinds = sorted({str(_kind(file)) for file in found})
    if len(kinds) > 1:
        rule = (
            f"holds files of several kinds ({', '.join(kinds)}); name one kind with a glob, such as '…/*.txt'"
        )
        raise ConfigError(field, path, rule)
    return Files(field, path, kinds[0], tuple(found), ignored)


def _find(field: str, path: str) -> tuple[list[Path], int]:
    """The files that a path means, and how many of its folder were left out. `os.path` takes any text for a path."""
    root = Path(with_home(path))
    ignored = 0
    if os.path.isdir(root):
        below = _files_below(root)
        found = [file for file in below if file.suffix and _kind(file) is not None]
        ignored = len(below) - len(found)
        if not found:
            raise ConfigError(field, path, f"no file in this folder is {_KINDS_ALLOWED}")
    elif os.path.exists(root):
        found = [root]
    elif glob.has_magic(str(root)):
        matches = sorted(
            Path(match) for match in glob.glob(str(root), recursive=True) if os.path.isfile(match)
        )
        found = [match for match in matches if not is_stray(match.name)]
        if not found:
            raise ConfigError(field, path, "no file matches")
    else:
        raise ConfigError(field, path, "no such file or folder")
    return found, ignored


def read_documents(files: Files, text_field: str) -> Iterator[Document]:
    """The documents of text sources in order, empty ones included.

    Args:
      files: of a kind that holds text.
      text_field: where JSONL and Parquet records have their text.

    Raises:
      ConfigError: a file or record that cannot be read, with its place.
    """
    if files.kind == "stdlib":
        yield from read_stdlib(files.field)
        return
    warned = False
    for path in files.paths:
        with reading(files.field, path, f"a sound {files.kind} file"):
            regular(path)
            if files.kind == "text":
                content = path.read_bytes()
                if not warned and not _looks_like_text(content):
                    log.warning("%s: %s does not look like text; it is read as it is", files.field, path)
                    warned = True  # not for each of thousands
                yield Document(files.field, str(path), content)
            elif files.kind == "jsonl":
                yield from _read_jsonl(files.field, path, text_field)
            else:
                yield from _read_parquet(files.field, path, text_field)


def _looks_like_text(content: bytes) -> bool:
    """Whether the beginning has no NUL byte and is, but for a tenth of its characters, UTF-8."""
    begin = content[:_LOOKED_AT]
    text = begin.decode("utf-8", "replace")
    return b"\0" not in begin and text.count("\ufffd") <= len(text) / 10


def _kind(file: Path) -> str | None:
    suffix = file.suffix.lower()
    return _KIND_OF_SUFFIX.get(suffix, "text" if suffix in _TEXT_SUFFIXES or not suffix else None)


def _files_below(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not is_stray(name)]
        found += [Path(folder, name) for name in names if not is_stray(name)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _read_jsonl(field: str, path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            name = f"{path} line {number}"
            if not line.strip():
                continue
            with reading(field, name, "JSON"):
                record = json.loads(line)
            if not isinstance(record, dict):
                raise ConfigError(field, name, f"must be a JSON object, is {type(record).__name__}")
            yield _document(field, name, record.get(text_field), text_field, list(record))


def _read_parquet(field: str, path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow.parquet

    with reading(field, path, "a sound Parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise _missing_field(text_field, str(path), names)
        row = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
            for text in _texts(field, path, row, batch.column(0)):
                yield _document(field, f"{path} row {row}", text, text_field, names)
                row += 1


def _texts(field: str, path: Path, first: int, column: Any) -> list[object]:
    """The values of a column; where they cannot be taken all at once, the row that is at fault is named."""
    try:
        return column.to_pylist()
    except ValueError:
        for row, value in enumerate(column, first):
            with reading(field, f"{path} row {row}", "text"):
                value.as_py()
        raise


def _document(field: str, name: str, text: object, text_field: str, available: list[str]) -> Document:
    if text_field not in available:
        raise _missing_field(text_field, name, available)
    if not isinstance(text, str):
        raise ConfigError(
            "data.text_field", text_field, f"must be a string in {name}, is {type(text).__name__}"
        )
    try:
        return Document(field, name, text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ConfigError(
            field, name, f"half a surrogate pair at character {error.start} of the text"
        ) from error


def _missing_field(text_field: str, name: str, available: list[str]) -> ConfigError:
    return ConfigError(
        "data.text_field", text_field, f"is not in {name}, which has: {shown(', '.join(available))}"
    )
