import numpy as np
import pytest
import tokenizers

from train.config import DataConfig
from train.data import TrainingBatches, build_tokenizer, content_hash, load_corpus, shards, validation_batches
from train.errors import ConfigError

# Byte-tokenizer ids: nine documents of ten letters, each ended by the separator.
TOKENS = np.concatenate([[65 + number] * 10 + [256] for number in range(9)]).astype(np.uint16)


def load(path, **options):
    config = DataConfig(path=str(path), sequence_length=4, **options)
    corpus = load_corpus(config, build_tokenizer(config))
    assert content_hash(config) == corpus.content_hash
    return corpus


@pytest.fixture(params=["npy", "bin", "two npy"])
def path(request, tmp_path):
    if request.param == "bin":
        TOKENS.tofile(tmp_path / "a.bin")
        return tmp_path / "a.bin"
    if request.param == "npy":
        np.save(tmp_path / "a.npy", TOKENS.astype(np.int64))
        return tmp_path / "a.npy"
    np.save(tmp_path / "a.npy", TOKENS[:44])
    np.save(tmp_path / "b.npy", TOKENS[44:])
    return tmp_path


@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_documents_end_with_the_separator(path, chunk, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", chunk)
    corpus = load(path)
    assert (corpus.train.num_documents, corpus.validation.num_documents) == (8, 1)
    assert (corpus.train.starts == np.arange(9) * 11).all()
    both = np.concatenate([corpus.train.tokens(), corpus.validation.tokens()])
    assert sorted(both.tolist()) == sorted(TOKENS.tolist())
    assert all(len(set(document)) == 2 for document in np.split(corpus.train.tokens(), 8))


def test_they_are_mapped_not_loaded(path):
    corpus = load(path)
    assert all(isinstance(array, np.memmap) for array in (*corpus.train.arrays, *corpus.validation.arrays))


def test_batches_are_those_of_the_same_documents_as_text(path, tmp_path):
    """Only the separator after the last document, which text has not, is one more prediction."""
    corpus = load(path)
    real = [batch["targets"] >= 0 for batch in validation_batches(corpus, 2, 4)]
    assert sum(map(np.sum, real)) == corpus.validation.num_tokens - 1 == 10
    batches = TrainingBatches(corpus, batch_size=6, sequence_length=4, seed=0)
    for batch in (next(batches), next(batches)):
        inside = batch["tokens"] != 256
        seen = batch["targets"][inside & (batch["segments"] > 0)]
        tokens = batch["tokens"][inside & (batch["segments"] > 0)]
        assert ((seen == tokens) | (seen == 256)).all()
    batches.close()


def test_without_separator_one_document(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint8))
    corpus = load(tmp_path / "a.npy")
    assert corpus.train.tokens().tolist() == list(range(90))
    assert corpus.validation.tokens().tolist() == list(range(90, 100))


def test_bin_is_uint32_for_a_large_vocabulary(tmp_path):
    vocabulary = {f"w{number}": number for number in range(65_535)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokens = np.arange(65_400, 65_500)
    tokens.astype("<u4").tofile(tmp_path / "a.bin")
    corpus = load(tmp_path / "a.bin", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.train.tokens().tolist() == tokens[:90].tolist()


@pytest.mark.parametrize("chunk", [1 << 22, 7])
@pytest.mark.parametrize("bad", [257, 65_535, -1])
def test_an_id_outside_the_vocabulary(tmp_path, monkeypatch, bad, chunk):
    monkeypatch.setattr(shards, "_CHUNK", chunk)
    tokens = TOKENS.astype(np.int32)
    tokens[[60, 80]] = bad
    np.save(tmp_path / "a.npy", tokens)
    pattern = rf"^data.path = .*a.npy: id {bad} at token 60 must be from 0 to 256, the vocabulary"
    with pytest.raises(ConfigError, match=pattern):
        load(tmp_path / "a.npy")


def test_unsound_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    with pytest.raises(ConfigError, match=r"a.bin: has 3 bytes, not a multiple of 2"):
        load(tmp_path / "a.bin")
    (tmp_path / "b.npy").write_bytes(b"not numpy")
    with pytest.raises(ConfigError, match=r"b.npy: is not a sound .npy file"):
        load(tmp_path / "b.npy")
    np.savez(tmp_path / "z.npz", np.arange(9))
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(ConfigError, match=r"z.npy: is not a sound .npy file"):
        load(tmp_path / "z.npy")
    for array in (np.zeros((2, 3), np.int32), np.zeros(5)):
        np.save(tmp_path / "c.npy", array)
        with pytest.raises(ConfigError, match=r"c.npy: must be a one-dimensional array of integers, is"):
            load(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"d.npy: is not a sound .npy file"):
        load(tmp_path / "d.npy")
