import hashlib
import json
import time

import numpy as np
import pytest

from train.config import DataConfig
from train.data import build_tokenizer, content_hash, load_corpus
from train.data.encoded import Encoded
from train.data.sources import find_files, read_documents
from train.errors import ConfigError


def load(path, **options):
    options = {"sequence_length": 2, **options}
    config = DataConfig(path=None if path is None else str(path), **options)
    return load_corpus(config, build_tokenizer(config))


def all_text(corpus):
    """The documents of both splits, in no order."""
    ids = [*corpus.train.tokens().tolist(), 256, *corpus.validation.tokens().tolist()]
    return sorted(bytes(part).decode() for part in split_at(ids, 256))


def split_at(ids, separator):
    parts = [[]]
    for token in ids:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def write_parquet(path, columns):
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


TEXTS = [f"document {number} says {'x' * number}" for number in range(30)]


@pytest.fixture(params=["folder", "glob", "jsonl", "parquet"])
def source(request, tmp_path):
    """The same thirty documents, and some empty ones, in every kind of source that holds several."""
    if request.param in ("folder", "glob"):
        (tmp_path / "deep").mkdir()
        for number, text in enumerate([*TEXTS, ""]):
            folder = tmp_path / "deep" if number % 3 == 0 else tmp_path
            (folder / f"{number:02}.txt").write_text(text)
        return tmp_path if request.param == "folder" else f"{tmp_path}/**/*.txt"
    path = tmp_path / f"data.{request.param}"
    if request.param == "jsonl":
        lines = [json.dumps({"id": 1, "text": text}) for text in ["", *TEXTS]]
        path.write_text("\n".join(lines[:9]) + "\n\n" + "\r\n".join(lines[9:]))
    else:
        write_parquet(path, {"id": list(range(31)), "text": [*TEXTS, ""]})
    return path


def test_several_documents(source):
    corpus = load(source)
    assert all_text(corpus) == sorted(TEXTS)
    assert corpus.train.num_documents + corpus.validation.num_documents == 30
    total = sum(map(len, TEXTS))
    held_out = len(bytes(t for t in corpus.validation.tokens().tolist() if t < 256))
    assert 0.1 * total <= held_out < 0.2 * total
    assert load(source).content_hash == corpus.content_hash
    assert content_hash(DataConfig(path=str(source))) == corpus.content_hash, "without tokens"
    assert load(source).validation.tokens().tolist() == corpus.validation.tokens().tolist()


def test_one_separator_between_documents_and_none_at_the_ends(source):
    corpus = load(source)
    for stream in (corpus.train, corpus.validation):
        ids = stream.tokens()
        assert (ids == 256).sum() == stream.num_documents - 1
        assert (stream.starts[1:-1] - 1).tolist() == np.flatnonzero(ids == 256).tolist()


@pytest.mark.parametrize("fraction, train", [(0.1, 90), (0.25, 75), (0.9, 10)])
def test_a_single_text_gives_its_end(tmp_path, fraction, train):
    text = "".join(chr(33 + number % 90) for number in range(100))
    (tmp_path / "a.txt").write_text(text)
    corpus = load(tmp_path / "a.txt", validation_fraction=fraction, tokenizer="char")
    tokenizer = build_tokenizer(DataConfig(path=str(tmp_path / "a.txt"), tokenizer="char"))
    assert tokenizer.decode(corpus.train.tokens()) == text[:train]
    assert tokenizer.decode(corpus.validation.tokens()) == text[train:]
    assert corpus.content_hash == hashlib.sha256(text.encode()).hexdigest()


def test_validation_path(tmp_path):
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.txt").write_text("validation text")
    corpus = load(tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt"))
    assert bytes(corpus.train.tokens().tolist()) == b"training text"
    assert bytes(corpus.validation.tokens().tolist()) == b"validation text"
    places = DataConfig(path=str(tmp_path / "a.txt"), validation_path=str(tmp_path / "b.txt"))
    assert content_hash(places) == corpus.content_hash
    (tmp_path / "b.txt").write_text("validation test")
    assert (
        load(tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt")).content_hash != corpus.content_hash
    )


def test_hash_tells_contents_apart(tmp_path):
    hashes = set()
    for number, texts in enumerate([["ab", "cd"], ["abc", "d"], ["abcd", "e"], ["cd", "ab"]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text + "-----"}) for text in texts))
        hashes.add(load(path).content_hash)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "lengths, fraction",
    [
        ([5, 5], 0.1),
        ([5, 5], 0.9),
        ([100, 3, 3], 0.2),
        ([3] * 100, 0.3),
        ([1, 2, 3, 4, 90], 0.5),
        ([7] * 9, 0.99),
    ],
)
def test_split_of_documents(lengths, fraction):
    """Both splits get documents, each document goes to one, and long ones do not swell the share."""
    lengths = np.array(lengths)
    encoded = Encoded(
        (np.repeat(np.arange(len(lengths)), lengths),),
        np.cumsum(lengths) - lengths,
        lengths,
        separators_added=False,
    )
    train, validation = encoded.split(fraction)
    assert train.num_documents > 0
    assert validation.num_documents > 0
    kept, held_out = set(train.tokens().tolist()), set(validation.tokens().tolist())
    assert kept | held_out == set(range(len(lengths)))
    assert not kept & held_out
    assert train.num_tokens + validation.num_tokens == lengths.sum()
    fitting = lengths[lengths <= fraction * lengths.sum()]
    assert validation.num_tokens <= max(fraction * lengths.sum() + fitting.max(initial=0), lengths.min())


def test_raw_bytes_are_legal_with_the_byte_tokenizer(tmp_path):
    raw = b"caf\xe9 " * 20
    (tmp_path / "latin.txt").write_bytes(raw)
    corpus = load(tmp_path / "latin.txt")
    assert bytes([*corpus.train.tokens(), *corpus.validation.tokens()]) == raw


@pytest.mark.parametrize(
    ("content", "is_warned"),
    [
        (b"caf\xe9 au lait " * 20, False),
        ("naïve Ελληνικά 漢字 ".encode() * 20, False),
        (bytes(range(128, 256)) * 9, True),
        (b"text\0" * 9, True),
    ],
)
def test_bytes_that_are_no_text_give_a_warning(tmp_path, caplog, content, is_warned):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(content)
    load(tmp_path)
    expected = f"data.path: {tmp_path / 'a.txt'} does not look like text; it is read as it is"
    assert caplog.messages == [expected] * is_warned, "once for all files"


def test_a_folder_leaves_out_the_unknown_and_the_hidden(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.py", "c.md", "picture.png", "Makefile", ".hidden.txt", ".git/d.txt"):
        (tmp_path / name).write_text("text of " + name)
    corpus = load(tmp_path)
    assert all_text(corpus) == ["text of a.txt", "text of b.py", "text of c.md"]
    assert corpus.ignored_files == 2


def test_standard_library():
    """The default corpus: there, large enough, plain UTF-8 text, the same at every reading, and quick."""
    began = time.perf_counter()
    corpus = load(None)
    seconds = time.perf_counter() - began
    assert seconds < 10
    assert corpus.train.num_tokens + corpus.validation.num_tokens >= 5_000_000
    assert 0.09 < corpus.validation.num_tokens / corpus.train.num_tokens < 0.15
    again = load(None)
    assert again.content_hash == corpus.content_hash
    assert np.array_equal(again.validation.tokens(), corpus.validation.tokens())
    documents = list(read_documents(find_files("data.path", None), "text"))
    names = [document.name.replace("\\", "/") for document in documents]
    assert any(name.endswith("/argparse.py") for name in names)
    assert any(name.endswith("/asyncio/tasks.py") for name in names)
    for part in ("/test/", "/tests/", "/idle_test/", "site-packages", "dist-packages", "_sysconfigdata"):
        assert not any(part in name for name in names), part
    assert all(document.raw.decode("utf-8") is not None for document in documents)


class TestErrors:
    def check(self, path, pattern, **options):
        with pytest.raises(ConfigError, match=pattern) as info:
            load(path, **options)
        assert info.value.exit_code == 2
        assert "\n" not in str(info.value)

    def test_nothing_there(self, tmp_path):
        self.check(tmp_path / "no.txt", r"^data.path = .*no.txt: no such file")
        self.check(tmp_path, r"^data.path = .*no file in this folder")
        self.check(tmp_path / "*.txt", r"^data.path = .*: no file matches")
        (tmp_path / "a.txt").write_text("some text")
        self.check(
            tmp_path / "a.txt",
            r"^data.validation_path = .*: no such file",
            validation_path=str(tmp_path / "b.txt"),
        )

    def test_empty(self, tmp_path):
        for name in ("a.txt", "b.jsonl", "c.bin"):
            (tmp_path / name).write_bytes(b"")
            self.check(tmp_path / name, r"^data.path = .*: is empty")
        np.save(tmp_path / "d.npy", np.zeros(0, np.uint16))
        self.check(tmp_path / "d.npy", r"^data.path = .*: is empty")
        self.check(tmp_path / "*.txt", r"^data.path = .*: is empty")

    def test_kinds(self, tmp_path):
        (tmp_path / "a.zip").write_bytes(b"PK")
        self.check(tmp_path / "a.zip", r"^data.path = .*a.zip: unknown file type .zip; must be text, .jsonl")
        self.check(tmp_path / "*", r"unknown file type .zip")
        (tmp_path / "a.zip").rename(tmp_path / "Thumbs.db")
        (tmp_path / "._b.jsonl").write_text("left by a Mac")
        (tmp_path / "lost+found").mkdir()
        (tmp_path / "lost+found" / "b.jsonl").write_text("left by a repair")
        (tmp_path / "b.txt").write_text("some text" * 9)
        for path in (tmp_path, tmp_path / "*"):
            assert load(path).ignored_files == 0
        (tmp_path / "b.txt").write_text("some text")
        (tmp_path / "c.jsonl").write_text('{"text": "a"}')
        self.check(tmp_path, r"several kinds \(jsonl, text\)")

    def test_invalid_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"abc\xff" + b"d" * 30)
        self.check(
            tmp_path / "a.txt",
            r"^data.path = .*a.txt: invalid UTF-8 at byte 3; data.tokenizer = bytes",
            tokenizer="char",
        )

    @pytest.mark.parametrize(
        "line, pattern",
        [
            (b"{oops", r"line 3: is not JSON"),
            (b"[" * 100_000, r"line 3: is not JSON"),
            (b"[1]", r"line 3: must be a JSON object, is list"),
            (b'{"text": "\xff"}', r"line 3: is not JSON: invalid UTF-8 at byte 10"),
            (b'{"text": "\\ud800"}', r"line 3: half a surrogate pair"),
            (b'{"body": "a", "id": 1}', r"^data.text_field = text: is not in .*line 3, which has: body, id"),
            (b'{"text": null}', r"^data.text_field = text: must be a string in .*line 3, is NoneType"),
        ],
    )
    def test_jsonl(self, tmp_path, line, pattern):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
        self.check(tmp_path / "a.jsonl", pattern)

    def test_jsonl_as_editors_write_it(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(
            b'\xef\xbb\xbf{"text": "one two"}\r\n\r\n \n{"text": "three four"}\r\n\r\n'
        )
        assert all_text(load(tmp_path / "a.jsonl")) == ["one two", "three four"]

    def test_parquet(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
        self.check(
            tmp_path / "a.parquet", r"^data.text_field = text: is not in .*a.parquet, which has: body, id"
        )
        self.check(
            tmp_path / "a.parquet",
            r"^data.text_field = id: must be a string in .*row 0, is int",
            text_field="id",
        )
        write_parquet(tmp_path / "b.parquet", {"text": ["a", None]})
        self.check(tmp_path / "b.parquet", r"must be a string in .*row 1, is NoneType")
        import pyarrow

        buffers = [None, pyarrow.py_buffer(np.int32([0, 3, 6]).tobytes()), pyarrow.py_buffer(b"ab\xffcde")]
        write_parquet(
            tmp_path / "d.parquet", {"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)}
        )
        self.check(
            tmp_path / "d.parquet", r"^data.path = .*d.parquet row 0: is not text: invalid UTF-8 at byte 2"
        )
        (tmp_path / "c.parquet").write_bytes(b"not parquet at all")
        self.check(tmp_path / "c.parquet", r"^data.path = .*c.parquet: is not a sound Parquet file")

    def test_sequence_longer_than_a_split(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 100)
        load(tmp_path / "a.txt", sequence_length=9)
        self.check(
            tmp_path / "a.txt", r"^data.sequence_length = 10: .* validation split has 10;", sequence_length=10
        )
        self.check(
            tmp_path / "a.txt", r"^data.sequence_length = 95: .* training split has 90;", sequence_length=95
        )

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
    def test_fraction(self, tmp_path, fraction):
        (tmp_path / "a.txt").write_text("x" * 100)
        self.check(
            tmp_path / "a.txt", r"^data.validation_fraction = .*must be above 0", validation_fraction=fraction
        )
