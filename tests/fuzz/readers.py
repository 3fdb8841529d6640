"""Every reader of files that others have written, with valid files to damage."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from train.config import DataConfig, TrainConfig
from train.config_io import load_config, save_config
from train.data import build_tokenizer, load_corpus
from train.data.tokenizer import ByteTokenizer
from train.errors import ConfigError
from train.inputs import read_began
from train.integrity import MANIFEST, find_fault, find_strays, hash_lines, write_manifest
from train.metrics import Metrics
from train.report.runs import read_run
from train.validation import validate

TEXT = "The quick brown fox jumps over the lazy dog, in plain words.\n" * 4


@dataclass(frozen=True)
class Reader:
    """A reader.

    Fields:
      name: of the file, below the folder that is given to `read`.
      seeds: valid files.
      read: reads the file; may raise a ConfigError and nothing else.
      structure: see `mutate`.
      prepare: puts what else must be there into the folder, once.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    structure: str | None = None
    prepare: Callable[[Path], object] = lambda folder: None


def _corpus(path: Path, tokenizer: str = "bytes") -> object:
    config = DataConfig(path=str(path), sequence_length=4, tokenizer=tokenizer)
    return load_corpus(config, build_tokenizer(config))


def _jsonl_seeds() -> list[bytes]:
    records = [{"id": i, "text": f"document {i}: {TEXT[i:]}", "tags": ["a", {"b": i / 7}]} for i in range(6)]
    return ["".join(json.dumps(r, ensure_ascii=a) + "\n" for r in records).encode() for a in (True, False)]


def _parquet_seeds() -> list[bytes]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    texts = [f"document {i % 5}: {TEXT[i:]} é漢" for i in range(12)]
    invalid = [None, pa.py_buffer(np.int32([0, 3, 6]).tobytes()), pa.py_buffer(b"ab\xffcde")]
    tables = [
        pa.table({"text": texts, "id": range(12)}),
        pa.table({"text": pa.array(texts).dictionary_encode(), "nested": [[{"a": i}] for i in range(12)]}),
        pa.table({"text": pa.array(texts, pa.large_string()), "none": [None] * 12}),
        pa.table({"text": pa.Array.from_buffers(pa.string(), 2, invalid)}),
    ]
    seeds = []
    for number, table in enumerate(tables):
        buffer = io.BytesIO()
        codec = ["none", "snappy", "zstd", "gzip"][number]
        pq.write_table(table, buffer, compression=codec, row_group_size=5, data_page_version="2.0")
        seeds.append(buffer.getvalue())
    return seeds


def _npy_seeds() -> list[bytes]:
    arrays = [
        *(np.arange(200).astype(dtype) for dtype in ("<u2", ">u4", "i8", "f4", "u1", "?")),
        *(np.zeros((4, 50), np.uint16), np.zeros(0, np.uint16), np.array(3), np.zeros(9, "u2,f4")),
    ]
    seeds = []
    for save, values in [(np.save, arrays + 3 * arrays[:3]), (np.savez, arrays[:1])]:
        for array in values:
            buffer = io.BytesIO()
            save(buffer, array)  # type: ignore[operator]
            seeds.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    return [*seeds, buffer.getvalue()]


@cache
def _tokenizer_seeds() -> tuple[bytes, ...]:
    import tokenizers as tk

    words, letters = sorted(set(TEXT.split())), sorted(set(TEXT))
    trained = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = tk.pre_tokenizers.ByteLevel()
    trained.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    trained.train_from_iterator([TEXT], trainer)
    by_word = tk.Tokenizer(tk.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    by_word.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    parts = [*letters, *(f"##{letter}" for letter in letters)]
    pieces = tk.Tokenizer(tk.models.WordPiece({"[UNK]": 0} | {part: i + 1 for i, part in enumerate(parts)}))
    pieces.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    pieces.normalizer = tk.normalizers.Sequence([tk.normalizers.NFKC(), tk.normalizers.Lowercase()])
    pieces.post_processor = tk.processors.TemplateProcessing("[UNK] $A", special_tokens=[("[UNK]", 0)])
    unigram = tk.Tokenizer(tk.models.Unigram([("<unk>", 0.0), *((c, -2.0) for c in letters)], 0, True))
    unigram.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r"\w+|\s"), "isolated")
    unigram.decoder = tk.decoders.Sequence([tk.decoders.Metaspace(), tk.decoders.Fuse()])
    ours = [{"moejax_tokenizer": "bytes"}, {"moejax_tokenizer": "char", "characters": "".join(letters)}]
    return (
        *(tokenizer.to_str().encode() for tokenizer in (trained, by_word, pieces, unigram)),
        *(json.dumps(content).encode() for content in ours),
    )


def _read_tokenizer(path: Path) -> object:
    config = DataConfig(path=str(path.parent / "text.txt"), sequence_length=4, tokenizer=str(path))
    tokenizer = build_tokenizer(config)
    load_corpus(config, tokenizer)
    return tokenizer


def _prepare_tokenizer(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    (folder / "tokenizer.json").write_bytes(_tokenizer_seeds()[0])


def _config_seeds() -> list[bytes]:
    whole = asdict(TrainConfig())
    parts = [whole, {"steps": 7}, {"data": whole["data"], "seed": 1}, {"model": whole["model"]}]
    return [yaml.safe_dump(part, sort_keys=False).encode() for part in parts]


def _read_config(path: Path) -> object:
    config = load_config(path)
    validate(config, 1)
    save_config(config, path.with_name("again.yaml"))
    return config


def _metrics_seeds() -> list[bytes]:
    lines = []
    for step in range(1, 5):
        layers = {"moe/layers/load": [[3, 4.5], [1, "NaN"]], "moe/layers/dead": [0, 1]}
        lines.append(
            {"step": step, "tokens": 64 * step, "loss": 5.5 / step, "grad_norm": "Infinity", **layers}
        )
        lines.append({"step": step, "eval/loss": 5.0})
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def _read_metrics(path: Path) -> object:
    run = None
    try:
        run = read_run(path.parent)
    finally:
        metrics = Metrics(path)  # what a run does that goes on
        metrics.truncate_after(2)
        metrics.close()
    read_run(path.parent) if path.stat().st_size else None
    return run


def _prepare_checkpoint(folder: Path) -> None:
    for name, content in (("record.json", "{}"), ("state/d/a", "numbers"), ("state/manifest.ocdbt", "m")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    write_manifest(folder, hash_lines(folder))


@cache
def _manifest_seed() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _prepare_checkpoint(Path(folder))
        return (Path(folder) / MANIFEST).read_bytes()


def _read_manifest(path: Path) -> object:
    strays, fault = find_strays(path.parent), find_fault(path.parent)
    if fault is not None:
        raise ConfigError("workdir", path, fault)  # as a run does whose checkpoints are all like this one
    assert _is_whole(path), "damage was not noticed"
    return strays


def _is_whole(path: Path) -> bool:
    """Whether it has every line, but for the last one, which older versions did not write."""
    return {*path.read_bytes().splitlines()} >= {*_manifest_seed().splitlines()[:-1]}


def _record_seeds() -> list[bytes]:
    extra = {"content_hash": "00ff", "tokens": 64, "run_directory": "/run", "eval/loss": 2.5}
    record = {
        "step": 3,
        "data_state": {"tokenizer_hash": "ff00", "next_batch": 3},
        "extra": extra,
        "leaves": {},
    }
    return [json.dumps(record).encode()]


def _read_record(path: Path) -> object:
    write_manifest(path.parent, hash_lines(path.parent))  # else it would only be passed over
    if (began := read_began(path.parents[2])) is None:
        raise ConfigError("workdir", path, "has no record")  # as a run does that goes on all the same
    return began


def _with_config(folder: Path) -> None:
    save_config(TrainConfig(), folder / "config.yaml")


READERS = {
    "jsonl": Reader("data.jsonl", _jsonl_seeds, _corpus, "jsonl"),
    "parquet": Reader("data.parquet", _parquet_seeds, _corpus),
    "npy": Reader("data.npy", _npy_seeds, _corpus),
    "bin": Reader("data.bin", lambda: [(np.arange(300) % 257).astype("<u2").tobytes()], _corpus),
    "text": Reader(
        "data.txt", lambda: [TEXT.encode(), "é漢🙂 ".encode() * 40], lambda path: _corpus(path, "char")
    ),
    "tokenizer": Reader(
        "tokenizer.json", lambda: [*_tokenizer_seeds()], _read_tokenizer, "json", _prepare_tokenizer
    ),
    "tokenizer_config": Reader(
        "tokenizer_config.json",
        lambda: [b'{"eos_token": "</s>"}', b'{"eos_token": {"content": "</s>", "special": true}}'],
        lambda path: _read_tokenizer(path.with_name("tokenizer.json")),
        "json",
        _prepare_tokenizer,
    ),
    "config": Reader("config.yaml", _config_seeds, _read_config, "yaml"),
    "metrics": Reader("metrics.jsonl", _metrics_seeds, _read_metrics, "jsonl", _with_config),
    "manifest": Reader(MANIFEST, lambda: [_manifest_seed()], _read_manifest, None, _prepare_checkpoint),
    "record": Reader("run/checkpoints/3/record.json", _record_seeds, _read_record, "json"),
}
assert ByteTokenizer.vocab_size == 257, "the ids of the valid .bin"
