import json
import re

import numpy as np
import pytest

from training.corpus import Corpus, CorpusError, _corpus_sha256, token_dtype, write_corpus
from training.tokenizers import ByteTokenizer, load_tokenizer

TRAIN = [f"train document {i} " * (i + 1) for i in range(7)]
VALIDATION = ["held out é", "and another"]
COMMAND = "python scripts/prepare_data.py --source here"


def make(folder, **changes):
    arguments = dict(tokenizer=load_tokenizer("bytes"), splits={"train": TRAIN, "validation": VALIDATION}, provenance={"source": "here"},
                     prepare_command=COMMAND, shard_tokens=150)
    return write_corpus(folder, **(arguments | changes))


@pytest.fixture
def corpus(tmp_path):
    return make(tmp_path / "corpus")


@pytest.fixture(scope="module")
def stream():
    """The training tokens as one array: every document and an end of text behind it."""
    return np.concatenate([[*text.encode(), 256] for text in TRAIN])



def test_shards_hold_whole_documents_each_ending_in_end_of_text(corpus):
    shards = corpus.manifest["splits"]["train"]["shards"]
    assert len(shards) > 2
    documents = []
    for shard in shards:
        tokens = np.fromfile(corpus.folder / shard["name"], dtype="<u2")
        starts = np.load(corpus.folder / shard["name"].replace(".bin", ".documents.npy"))
        assert starts.dtype == np.int64 and starts[0] == 0
        assert tokens.size == shard["tokens"] and starts.size == shard["documents"]
        assert tokens.size <= 150 or starts.size == 1
        documents += np.split(tokens, starts[1:])
    assert [bytes(document[:-1].astype(np.uint8)).decode() for document in documents] == TRAIN
    assert all(document[-1] == 256 for document in documents)


def test_manifest_counts_documents_tokens_and_bytes(corpus):
    split = corpus.split("validation")
    text_bytes = sum(len(text.encode()) for text in VALIDATION)
    assert (split.documents, split.tokens, split.text_bytes) == (2, text_bytes + 2, text_bytes)
    assert (corpus.tokenizer_name, corpus.vocab_size, corpus.manifest["tokenizer"]["end_of_text"]) == ("bytes", 257, 256)
    np.testing.assert_array_equal(corpus.token_bytes, load_tokenizer("bytes").token_bytes())
    assert corpus.manifest["provenance"] == {"source": "here"}


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = end_of_text = 70_000
        vocab_size += 1

        def token_bytes(self):
            return np.ones(self.vocab_size, dtype=np.int64)

    corpus = make(tmp_path / "wide", tokenizer=Wide())
    assert token_dtype(65_536) == np.dtype("<u2") and token_dtype(65_537) == np.dtype("<u4")
    assert corpus.split("validation").window(0, len(VALIDATION[0].encode()))[-1] == 70_000
    corpus.verify()


@pytest.mark.parametrize("length", [1, 7, 64, 149, 150, 400, 10_000])
def test_windows_are_slices_of_the_whole_stream_across_shards(corpus, stream, length):
    split = corpus.split("train")
    assert split.tokens == stream.size
    assert split.samples(length) == (stream.size - 1) // length
    for index in range(split.samples(length)):
        window = split.window(index, length)
        assert window.dtype == np.int64
        np.testing.assert_array_equal(window, stream[index * length : index * length + length + 1])


@pytest.mark.parametrize("length", [1, 7, 64, 100, 10_000])
def test_covering_windows_make_every_token_a_target_once(corpus, stream, length):
    split = corpus.split("train")
    windows = [split.window(i, length) for i in range(split.windows_covering_all(length))]
    assert all(window.size >= 2 for window in windows)
    np.testing.assert_array_equal(np.concatenate([window[1:] for window in windows]), stream[1:])
    for outside in (-1, len(windows)):
        with pytest.raises(IndexError):
            split.window(outside, length)


def test_the_hash_names_the_content_and_nothing_else(corpus, tmp_path):
    assert make(tmp_path / "again", provenance={"source": "elsewhere"}, prepare_command="other").sha256 == corpus.sha256
    assert make(tmp_path / "moved", splits={"train": TRAIN[::-1], "validation": VALIDATION}).sha256 != corpus.sha256
    merged = ["".join(VALIDATION[:1]), VALIDATION[1] + "x"]
    assert make(tmp_path / "changed", splits={"train": TRAIN, "validation": merged}).sha256 != corpus.sha256


def test_a_failure_leaves_neither_a_corpus_nor_a_partial_folder(tmp_path):
    def breaking():
        yield "text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "corpus", splits={"train": TRAIN, "validation": breaking()})
    with pytest.raises(CorpusError, match="the validation split has no documents"):
        make(tmp_path / "corpus", splits={"train": TRAIN, "validation": []})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwritten(corpus, tmp_path):
    with pytest.raises(CorpusError, match="--overwrite"):
        make(corpus.folder)
    other = make(corpus.folder, splits={"train": TRAIN[:3], "validation": VALIDATION}, overwrite=True)
    other.verify()
    assert other.sha256 != corpus.sha256 and other.split("train").documents == 3
    assert list(tmp_path.iterdir()) == [corpus.folder]


def test_a_folder_with_other_files_is_never_overwritten(corpus, tmp_path):
    (corpus.folder / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for folder, name in [(corpus.folder, "thesis.txt"), (tmp_path / "file", "file")]:
        with pytest.raises(CorpusError, match=f"{name} is no file of a corpus"):
            make(folder, overwrite=True)
    assert (corpus.folder / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "precious"


def test_an_intact_corpus_verifies_and_fits(corpus):
    corpus.verify()
    corpus.check_fits(model_vocab_size=257, sequence_length=8)
    corpus.check_fits(model_vocab_size=320, sequence_length=corpus.split("validation").tokens - 1)


def test_a_missing_corpus_is_answered_with_the_command_that_prepares_it(tmp_path):
    folder = tmp_path / "python-source-gpt2"
    command = f"python scripts/prepare_data.py --source python-source --tokenizer gpt2 --out {folder}"
    with pytest.raises(CorpusError, match=re.escape(f"{folder}: no such folder; prepare the corpus: {command}") + "$"):
        Corpus.open(folder)
    folder.mkdir()
    with pytest.raises(CorpusError, match=re.escape(f"manifest.json is missing; prepare the corpus: {command} --overwrite")):
        Corpus.open(folder)
    with pytest.raises(CorpusError, match=re.escape("--source shakespeare|python-source|hf:DATASET|PATH --tokenizer bytes|gpt2|PATH|ID")):
        Corpus.open(tmp_path / "mine")


def test_a_damaged_manifest_is_refused(corpus):
    path = corpus.folder / "manifest.json"
    intact = path.read_text()
    for text, message in [
        (intact[:-20], "not JSON"),
        ("[]", "not a corpus manifest"),
        ('{"format_version": 1, "corpus_sha256": ""}', "not a corpus manifest"),
        (intact.replace('"format_version": 1', '"format_version": 99'), "format 99"),
        (intact.replace(corpus.manifest["splits"]["train"]["shards"][0]["sha256"], "0" * 64), "altered since it was written"),
    ]:
        path.write_text(text)
        with pytest.raises(CorpusError, match=f"manifest.json: {message}.*prepare the corpus again"):
            Corpus.open(corpus.folder)


def alter(corpus, path, change, *, rehash):
    """Apply `change` to the value at the dotted `path` of the manifest, or remove it if `change` is None."""
    manifest = json.loads(json.dumps(corpus.manifest))
    *parents, key = [int(part) if part.isdigit() else part for part in path.split(".")]
    entry = manifest
    for part in parents:
        entry = entry[part]
    if change is None:
        del entry[key]
    else:
        entry[key] = change(entry[key])
    if rehash:
        manifest["corpus_sha256"] = _corpus_sha256(manifest)
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("path", [
    *(f"splits.{split}.{count}" for split in ("train", "validation") for count in ("tokens", "documents", "text_bytes")),
    "splits.train.shards.0.tokens", "splits.train.shards.0.documents", "tokenizer.end_of_text",
])
def test_the_hash_covers_every_count(corpus, path):
    alter(corpus, path, lambda count: count * 3, rehash=False)
    with pytest.raises(CorpusError, match="manifest.json: altered since it was written"):
        Corpus.open(corpus.folder)


@pytest.mark.parametrize("count", ["tokens", "documents"])
def test_counts_that_do_not_add_up_are_refused(corpus, count):
    alter(corpus, f"splits.train.{count}", lambda total: total * 3, rehash=True)
    total = corpus.manifest["splits"]["train"][count]
    message = f"manifest.json: splits.train.{count} is {3 * total}, its shards hold {total}; prepare the corpus again"
    with pytest.raises(CorpusError, match=message):
        Corpus.open(corpus.folder)


@pytest.mark.parametrize("path", [
    *(f"splits.validation{key}" for key in ("", ".tokens", ".documents", ".text_bytes", ".shards")),
    *(f"splits.train.shards.0.{key}" for key in ("name", "tokens", "documents", "sha256", "documents_sha256")),
    *(f"tokenizer.{key}" for key in ("name", "vocab_size", "sha256", "token_bytes_sha256")),
    "prepare_command", "provenance",
])
def test_a_manifest_that_lacks_an_entry_is_refused_when_the_corpus_opens(corpus, path):
    alter(corpus, path, None, rehash=True)
    with pytest.raises(CorpusError, match=r"manifest.json: not a corpus manifest \(KeyError.*prepare the corpus again"):
        Corpus.open(corpus.folder)


@pytest.mark.parametrize("name", ["train_00001.bin", "train_00001.documents.npy", "token_bytes.npy"])
def test_a_missing_file_is_named_when_the_corpus_opens(corpus, name):
    (corpus.folder / name).unlink()
    message = f"{name}: missing; prepare the corpus again: {COMMAND} --out {corpus.folder} --overwrite"
    with pytest.raises(CorpusError, match=re.escape(message)):
        Corpus.open(corpus.folder)


@pytest.mark.parametrize("size", [0, 10])
def test_a_truncated_shard_is_named_when_the_corpus_opens(corpus, size):
    path = corpus.folder / "train_00000.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorpusError, match=rf"train_00000.bin: {size} bytes instead of \d+; .* again: {re.escape(COMMAND)}"):
        Corpus.open(corpus.folder)


@pytest.mark.parametrize("name", ["validation_00000.bin", "train_00001.documents.npy", "token_bytes.npy"])
def test_verify_finds_one_altered_byte(corpus, name):
    path = corpus.folder / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=f"{name}: altered since it was prepared.*{re.escape(COMMAND)}"):
        Corpus.open(corpus.folder).verify()


def test_verify_finds_ids_outside_the_vocabulary(tmp_path):
    class Overflowing(ByteTokenizer):
        end_of_text = 300

        def token_bytes(self):
            return np.ones(301, dtype=np.int64)

    with pytest.raises(CorpusError, match="train_00000.bin: token id 300 is outside the vocabulary of 257"):
        make(tmp_path / "corpus", tokenizer=Overflowing()).verify()


def test_check_fits_names_what_does_not_fit(corpus):
    with pytest.raises(CorpusError, match="up to 256.*vocabulary holds 256; raise"):
        corpus.check_fits(model_vocab_size=256, sequence_length=8)
    with pytest.raises(CorpusError, match="validation split has 24 tokens, one sequence of 24 needs 25"):
        corpus.check_fits(model_vocab_size=257, sequence_length=24)
    with pytest.raises(CorpusError, match="train split"):
        corpus.check_fits(model_vocab_size=257, sequence_length=100_000)


def test_check_fits_refuses_another_tokenizer_of_the_same_name(tmp_path):
    class Other(ByteTokenizer):
        sha256 = "0" * 64

    with pytest.raises(CorpusError, match="another tokenizer 'bytes' than the one installed"):
        make(tmp_path / "corpus", tokenizer=Other()).check_fits(model_vocab_size=257, sequence_length=8)
