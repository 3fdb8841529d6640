import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import build_tokenizer, load_corpus, load_tokenizer
from train.data.documents import Document
from train.data.huggingface import HuggingFaceTokenizer
from train.data.tokenizer import ByteTokenizer, CharTokenizer
from train.errors import ConfigError

TEXT = "def f(x):\n    return 'naïve 漢字 🙂'\n"


def byte_level(special=("<|endoftext|>",)):
    """A real byte-level BPE, small enough that most characters take several ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the the return self def " * 20], trainer)
    return tokenizer


@pytest.fixture
def make(tmp_path):
    """A tokenizer of each kind, built from a config."""

    def make_one(kind):
        if kind == "char":
            (tmp_path / "corpus.txt").write_text(TEXT, newline="")
            return build_tokenizer(DataConfig(path=str(tmp_path / "corpus.txt"), tokenizer="char"))
        if kind == "huggingface":
            byte_level().save(str(tmp_path / "bpe.json"))
            return build_tokenizer(DataConfig(tokenizer=str(tmp_path / "bpe.json")))
        return build_tokenizer(DataConfig(tokenizer=kind))

    return make_one


KINDS = ("bytes", "char", "huggingface")


def streamed(tokenizer, ids):
    decoder = tokenizer.decoder()
    return "".join([decoder.push(int(token)) for token in ids]) + decoder.finish()


@pytest.mark.parametrize("kind", KINDS)
class TestEveryTokenizer:
    def test_round_trip(self, make, kind):
        tokenizer = make(kind)
        ids = tokenizer.encode(TEXT)
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.separator not in ids
        assert 0 <= tokenizer.separator < tokenizer.vocab_size
        assert tokenizer.decode(ids) == TEXT
        assert streamed(tokenizer, ids) == TEXT
        assert len(tokenizer.encode("")) == 0
        assert tokenizer.decode([]) == ""

    def test_documents_are_encoded_as_text_is(self, make, kind):
        tokenizer = make(kind)
        documents = [Document("data.path", "a", text.encode()) for text in (TEXT, "def", TEXT[:3])]
        for document, ids in zip(documents, tokenizer.encode_documents(documents), strict=True):
            assert ids.tolist() == tokenizer.encode(document.text()).tolist()

    def test_stream_gives_whole_characters_as_soon_as_they_are_certain(self, make, kind):
        tokenizer = make(kind)
        decoder, seen = tokenizer.decoder(), ""
        for token in tokenizer.encode(TEXT):
            seen += decoder.push(int(token))
            assert TEXT.startswith(seen)
            assert "\ufffd" not in seen
        assert seen == TEXT

    def test_separator_and_unknown_ids(self, make, kind):
        tokenizer = make(kind)
        ids = [
            *tokenizer.encode("def"),
            tokenizer.separator,
            *tokenizer.encode("f"),
            tokenizer.vocab_size + 5,
        ]
        assert tokenizer.decode(ids) == "deff\ufffd"
        assert streamed(tokenizer, ids) == "deff\ufffd"

    def test_saved_alone_it_is_the_same(self, make, kind, tmp_path):
        tokenizer = make(kind)
        run = tmp_path / "run"
        run.mkdir()
        tokenizer.save(run)
        for file in tmp_path.glob("*.*"):
            file.unlink()
        for again in (
            load_tokenizer(run),
            build_tokenizer(DataConfig(tokenizer=str(run))),
            build_tokenizer(DataConfig(tokenizer=str(run / "tokenizer.json"))),
        ):
            assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)
            assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
            assert again.decode(again.encode(TEXT)) == TEXT


@given(st.binary(max_size=30))
def test_bytes_decode_anything_as_python_does(raw):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(list(raw)) == raw.decode("utf-8", "replace") == streamed(tokenizer, raw)


def test_bytes_do_not_join_across_a_separator():
    e_acute = "é".encode()
    assert ByteTokenizer().decode([e_acute[0], 256, e_acute[1]]) == "\ufffd\ufffd"


def test_bytes_from_a_command_line_come_out_as_they_were():
    assert ByteTokenizer().encode(b"a\xff".decode("utf-8", "surrogateescape")).tolist() == [97, 255]


def test_char_vocabulary_is_the_sorted_characters_of_all_data(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_text("world")
    config = DataConfig(
        path=str(tmp_path / "a.txt"),
        validation_path=str(tmp_path / "b.txt"),
        tokenizer="char",
        sequence_length=2,
    )
    tokenizer = build_tokenizer(config)
    assert tokenizer.characters == "dehlorw"
    assert (tokenizer.vocab_size, tokenizer.separator) == (8, 7)
    assert load_corpus(config, tokenizer).validation.tokens().tolist() == tokenizer.encode("world").tolist()


@pytest.mark.parametrize(
    "text, name", [("abé", "'é' .U.00E9. at place 2"), ("\0", "U.0000"), ("a\U0001f642", "1F642")]
)
def test_char_names_an_unknown_character(text, name):
    with pytest.raises(ConfigError, match=rf"data.tokenizer = char: character .*{name}.*2 characters"):
        CharTokenizer("ab").encode(text)


@pytest.mark.parametrize(
    "special, config, separator",
    [
        (("<x>", "<|endoftext|>"), None, 1),
        (("<x>", "</s>"), None, 1),
        (("<x>", "</s>"), {"eos_token": "<x>"}, 0),
        (("<x>", "</s>"), {"eos_token": {"content": "<x>", "lstrip": False}}, 0),
        (("<x>", "</s>"), {"eos_token": None}, 1),
        (("<x>",), None, None),
        (("<x>",), {"eos_token": "<not there>"}, None),
    ],
)
def test_huggingface_separator(tmp_path, special, config, separator):
    """The token the config names, else a well-known one, else an id of its own; saving keeps it."""
    original = byte_level(special)
    original.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    size = original.get_vocab_size()
    assert tokenizer.separator == (size if separator is None else separator)
    assert tokenizer.vocab_size == size + (separator is None)
    run = tmp_path / "run"
    run.mkdir()
    tokenizer.save(run)
    assert load_tokenizer(run).separator == tokenizer.separator
    assert load_tokenizer(run).vocab_size == tokenizer.vocab_size


def test_huggingface_settings_of_a_server_do_not_cut_the_text(tmp_path):
    original = byte_level()
    expected = original.encode(TEXT).ids
    original.enable_truncation(3)
    original.enable_padding(length=500)
    original.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    original.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert tokenizer.encode(TEXT).tolist() == expected
    document = Document("data.path", "a", TEXT.encode())
    assert tokenizer.encode_documents([document])[0].tolist() == expected


def test_huggingface_stream_goes_on_after_noise(make):
    """Bytes that never become a character are let out in the end, and what follows is whole."""
    tokenizer = make("huggingface")
    lead_byte = tokenizer.encode("🙂")[0]
    text = streamed(tokenizer, [lead_byte] * 100 + list(tokenizer.encode("def 漢")))
    assert text.endswith("def 漢")
    assert set(text[: -len("def 漢")]) == {"\ufffd"}


@pytest.mark.parametrize(
    "name, rule",
    [
        ("byte", "must be `bytes`, `char`, or the path .* did you mean `bytes`"),
        ("characters", "did you mean `char`"),
        ("gpt2", "must be `bytes`, `char`, or the path of a tokenizer.json$"),
        ("no/such/tokenizer.json", "no such file"),
    ],
)
def test_unknown_tokenizers(name, rule):
    with pytest.raises(ConfigError, match=rf"^data.tokenizer = {name}: .*{rule}"):
        build_tokenizer(DataConfig(tokenizer=name))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"not json", b'{"model": 3}', b"\xff", b'{"moejax_tokenizer": "char"}']
)
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^data.tokenizer = .*is not a tokenizer.json") as info:
        build_tokenizer(DataConfig(tokenizer=str(path)))
    assert "\n" not in str(info.value)


def test_a_tokenizer_that_has_no_token_for_the_text(tmp_path):
    words = tokenizers.models.WordLevel({"the": 0}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("the quick brown fox " * 9)
    config = DataConfig(
        path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "words.json"), sequence_length=2
    )
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = .*words\.json: .*UNK") as info:
        load_corpus(config, build_tokenizer(config))
    assert "\n" not in str(info.value)


def test_a_panic_of_the_library_is_one_line(tmp_path, capfd):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": None}
    content = {"version": "1.0", "model": model | {"continuing_subword_prefix": "longer than a token"}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"^data\.tokenizer = .*: is not a tokenizer\.json: range .* out of range"
    ):
        build_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
    assert capfd.readouterr().err == ""


def test_ids_beyond_every_vocabulary(tmp_path):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"the": 0, "[UNK]": 7}, unk_token="[UNK]")
    ).to_str()
    (tmp_path / "words.json").write_text(words.replace('"[UNK]":7', f'"[UNK]":{2**31}'))
    with pytest.raises(
        ConfigError, match=r"^data\.tokenizer = .*: is not a tokenizer\.json: an id is beyond"
    ):
        build_tokenizer(DataConfig(tokenizer=str(tmp_path / "words.json")))


def test_a_reader_beside_a_run_that_goes_on_meets_a_whole_tokenizer(tmp_path, monkeypatch):
    CharTokenizer("abc").save(tmp_path)
    write, met = Path.write_text, []

    def half_written(path, text, **options):
        write(path, text[: len(text) // 2], **options)
        met.append(load_tokenizer(tmp_path).characters)
        write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", half_written)
    CharTokenizer("abcd").save(tmp_path)
    assert met == ["abc"] and load_tokenizer(tmp_path).characters == "abcd"


def test_a_directory_without_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"data.tokenizer = .*no such file"):
        build_tokenizer(DataConfig(tokenizer=str(tmp_path)))


def test_char_over_tokens_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10))
    with pytest.raises(ConfigError, match=r"^data.tokenizer = char: needs text"):
        build_tokenizer(DataConfig(path=str(tmp_path / "a.npy"), tokenizer="char"))


def small_bpe(pre_tokenizer, alphabet=(), **model):
    """A BPE over the characters of a few words; it knows no others."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["</s>", *([model["unk_token"]] if "unk_token" in model else [])]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False, initial_alphabet=list(alphabet)
    )
    tokenizer.train_from_iterator(["to be or not to be"], trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


PRE = tokenizers.pre_tokenizers
BYTES = sorted(PRE.ByteLevel.alphabet())  # which lists them in another order in every process


class TestNothingIsLost:
    @pytest.mark.parametrize("pre_tokenizer", [PRE.Whitespace(), PRE.Metaspace(), PRE.ByteLevel()])
    def test_a_character_without_a_token_is_refused(self, pre_tokenizer):
        tokenizer = small_bpe(pre_tokenizer)
        assert len(tokenizer.encode("not to be")) > 0
        rule = r"has no token for 'é' \(U\+00E9\), at place 3 of the text, and no unknown token; it would be lost"
        with pytest.raises(ConfigError, match=f"^data.tokenizer = tokenizer.json: {rule}"):
            tokenizer.encode("to é")
        documents = [
            Document("data.path", f"f.jsonl line {n}", text.encode()) for n, text in ((1, "to"), (2, "bé"))
        ]
        with pytest.raises(ConfigError, match=r"'é' \(U\+00E9\), at place 1 of f\.jsonl line 2, and"):
            tokenizer.encode_documents(documents)

    def test_characters_that_combine_are_looked_at_together(self):
        def encode(known, text, added=()):
            model = tokenizers.models.BPE({letter: i for i, letter in enumerate(known)}, [])
            plain = tokenizers.Tokenizer(model)
            plain.normalizer = tokenizers.normalizers.NFC()
            plain.add_tokens(list(added))
            return HuggingFaceTokenizer(plain.to_str()).encode(text).tolist()

        assert encode("eé", "ee\u0301e") == [0, 1, 0], "nothing is lost"
        with pytest.raises(ConfigError, match=r"'é' \(U\+00E9\), to which the text is normalised, and no"):
            encode("e\u0301", "ee\u0301")
        with pytest.raises(ConfigError, match=r"'\u0301' \(U\+0301\), at place 0 of the text"):
            encode("eé", "\u0301ee\u0301")
        assert encode("e", "e<ñ>e", ["<ñ>"]) == [0, 1, 0], "a character of an added token"
        with pytest.raises(ConfigError, match=r"'ñ' \(U\+00F1\), at place 2 of the text"):
            encode("e", "e<ñ>eñ", ["<ñ>"])

    def test_where_nothing_can_be_lost_nothing_is_looked_at(self):
        assert small_bpe(PRE.ByteLevel(), BYTES)._pieces is None
        assert small_bpe(PRE.Whitespace(), unk_token="<unk>")._pieces is None
        assert small_bpe(PRE.ByteLevel(), [byte for byte in BYTES if byte != "z"])._pieces is not None
        assert small_bpe(PRE.Whitespace(), byte_fallback=True)._pieces is None

    @given(text=st.text(st.sampled_from("to be</s>éࠀ漢🙂\u07ff\U0010ffff\x00\n")))
    def test_what_is_encoded_comes_back(self, text):
        tokenizer = WHOLE
        assert tokenizer.separator not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_special_tokens_in_text_are_text(self):
        tokenizer = HuggingFaceTokenizer(byte_level(("<|endoftext|>", "<|pad|>", "</s>")).to_str(), "</s>")
        text = "def</s><|pad|><|endoftext|>"
        [ids] = tokenizer.encode_documents([Document("data.path", "f", text.encode())])
        assert list(ids) == list(tokenizer.encode(text)) and ids.min() > 2, "no special token"
        assert tokenizer.decode(ids) == text

    def test_an_end_token_that_is_a_plain_one_is_text_too(self):
        plain = byte_level(())
        plain.add_tokens(["</s>", "<think>"])
        tokenizer = HuggingFaceTokenizer(plain.to_str())
        ids = tokenizer.encode("</s><think>")
        assert tokenizer.end_token == "</s>" and tokenizer.separator not in ids
        assert plain.token_to_id("<think>") in ids, "an added token that is not special"

    def test_an_end_token_that_cannot_be_told_from_text_is_refused(self):
        words = tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "to": 2}, unk_token="<unk>")
        plain = tokenizers.Tokenizer(words)
        plain.pre_tokenizer = PRE.WhitespaceSplit()
        tokenizer = HuggingFaceTokenizer(plain.to_str())
        assert list(tokenizer.encode("to x")) == [2, 1]
        with pytest.raises(ConfigError, match=r"^data.tokenizer = </s>: the text holds </s> as text, which"):
            tokenizer.encode("to </s> to")


WHOLE = HuggingFaceTokenizer(byte_level(("</s>",)).to_str())
