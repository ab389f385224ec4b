"""Rows of JSON lines, Parquet files and data sets: the same texts whatever holds them, each in one split, each mistake told."""

import gzip
import json
import os
import shutil
from collections import Counter

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from scripts.prepare_data import main
from training.corpus import Corpus
from training.preparation import LEFT_OUT
from training.rows import HubDataset, hub_rows, row_files, rows
from training.tokenizers import load_tokenizer

TEXTS = [f"text {number}, naïve\n" * (1 + number % 5) for number in range(200)]
TEXTS[17] = "  \n"
TEXTS[30] = None


def write_jsonl(path, texts):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": number, "body": text, "meta": None if number < 50 else {"a": number}}) + "\n" * (1 + number % 2))
    return path


def write_parquet(path, texts, kind=None):
    table = pyarrow.table({"id": range(len(texts)), "body": pyarrow.array(texts, kind or pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


@pytest.fixture
def folder(tmp_path):
    """The texts in three files of three kinds, in order of their names."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", TEXTS[:80])
    write_jsonl(folder / "1.jsonl.gz", TEXTS[80:120])
    write_parquet(folder / "2.parquet", TEXTS[120:], pyarrow.large_string())
    return folder


def read(source):
    return [document for part in source.parts for document in part.read(0)]


def documents_of(corpus):
    tokenizer, found = load_tokenizer("bytes"), []
    for split in ("train", "validation"):
        tokens = np.concatenate([np.fromfile(corpus.folder / shard["name"], "<u2") for shard in corpus.manifest["splits"][split]["shards"]])
        found.append([tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)[:-1]])
    return found


def prepare(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_text_goes_where_its_hash_says_and_equal_texts_together():
    found = list(rows(["a", "", None, "\ud800", *(str(number) for number in range(4000)), "a"], 0.1))
    assert found[1:4] == [(LEFT_OUT, "empty"), (LEFT_OUT, "empty"), (LEFT_OUT, "not UTF-8 text")] and found[0] == found[-1]
    assert 330 < Counter(split for split, _ in found)["validation"] < 470
    fewer = [text for split, text in rows(map(str, range(4000)), 0.05) if split == "validation"]
    assert set(fewer) < {text for split, text in found if split == "validation"}


def test_files_of_every_kind_give_their_rows_in_order(folder, tmp_path, capsys):
    assert prepare("--source", folder, "--text-field", "body", "--out", tmp_path / "out", "--validation-fraction", 0.2) == 0
    corpus = Corpus.open(tmp_path / "out")
    corpus.verify()
    train, validation = documents_of(corpus)
    kept = [text for text in TEXTS if text and text.strip()]
    assert train == [text for split, text in rows(kept, 0.2) if split == "train"]
    assert validation == [text for split, text in rows(kept, 0.2) if split == "validation"] and 20 < len(validation) < 60
    provenance = corpus.manifest["provenance"]
    assert provenance["left_out"] == {"empty": 2} and provenance["text_field"] == "body"
    assert [each["file"] for each in provenance["source_versions"]] == ["rows/0.jsonl", "rows/1.jsonl.gz", "rows/2.parquet"]
    assert prepare("--source", folder, "--text-field", "body", "--out", tmp_path / "out", "--validation-fraction", 0.2) == 0
    assert "nothing to do" in capsys.readouterr().out
    write_jsonl(folder / "0.jsonl", TEXTS[:79])
    assert prepare("--source", folder, "--text-field", "body", "--out", tmp_path / "out", "--validation-fraction", 0.2) == 2
    assert "(source_versions differ)" in capsys.readouterr().err


@pytest.mark.parametrize("first", [0, 1, 79, 80, 81, 130, 199, 200])
def test_a_part_can_be_read_from_any_row_on(folder, first):
    source = row_files([(path.name, path) for path in sorted(folder.iterdir())], "body", validation_fraction=0.1, max_bytes=None)
    assert len(source.parts) == 1  # small files share a part
    assert list(source.parts[0].read(first)) == read(source)[first:]


def test_large_files_are_parts_of_their_own(folder, monkeypatch):
    monkeypatch.setattr("training.rows._PART_BYTES", 4000)
    files = [(path.name, path) for path in sorted(folder.iterdir())]
    whole = row_files(files, "body", validation_fraction=0.1, max_bytes=999)
    assert [path.stat().st_size >= 4000 for _, path in files] == [True, False, True]
    assert len(whole.parts) == 2 and [part.max_bytes for part in whole.parts] == [499, 499]
    assert [text for _, text in read(whole)].count("empty") == 2 and len(read(whole)) == 200


def test_max_bytes_bounds_the_rows_that_are_read(folder, tmp_path):
    assert prepare("--source", folder, "--text-field", "body", "--max-bytes", 2000, "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    assert 1900 < corpus.split("train").text_bytes + corpus.split("validation").text_bytes <= 2000


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize("make, field, message", [
    (lambda path: broken(path, "a.jsonl", b'{"body": "x"}\n{"body": '), "body", "a.jsonl, line 2: not JSON"),
    (lambda path: broken(path, "a.jsonl", b'{"text": "x", "id": 1}\n'), "body", "a.jsonl, line 1: no field 'body': the row has text, id; choose another --text-field"),
    (lambda path: broken(path, "a.jsonl", b'["x"]\n'), "body", "a.jsonl, line 1: no field 'body': the row is no object"),
    (lambda path: broken(path, "a.jsonl", b'{"body": ["x"]}\n'), "body", "a.jsonl, line 1: field 'body' holds a list, not text"),
    (lambda path: broken(path, "a.parquet", b"PAR1 this is none"), "body", "a.parquet: not readable as Parquet"),
    (lambda path: write_parquet(path / "a.parquet", TEXTS), "text", "a.parquet: no field 'text': its rows have id, body; choose another --text-field"),
    (lambda path: write_parquet(path / "a.parquet", TEXTS), "id", "a.parquet: field 'id' holds int64, not text"),
    (lambda path: write_jsonl(path / "a.jsonl", [None, " "]), "body", "the train split has no documents"),
])
def test_mistakes_in_rows_give_one_line_and_leave_nothing(make, field, message, tmp_path, capsys):
    path = make(tmp_path)
    assert prepare("--source", path, "--text-field", field, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == [path.name]


def test_rows_and_texts_together_are_refused(folder, tmp_path, capsys):
    (folder / "README.md").write_text("about the rows")
    assert prepare("--source", folder, "--out", tmp_path / "out") == 2
    assert "files of rows (0.jsonl) and of text (README.md): give those of one kind" in capsys.readouterr().err


# ---------------------------------------------------------------- data sets


@pytest.fixture
def dataset(tmp_path):
    """A folder that the library datasets reads: three files of a split, and a README that names two configs."""
    folder = tmp_path / "hub" / "sayings"
    (folder / "other").mkdir(parents=True)
    for number in range(3):
        write_parquet(folder / f"train-{number}.parquet", TEXTS[50 * number : 50 * number + 50])
    write_parquet(folder / "other" / "rows.parquet", ["another config's"] * 9)
    (folder / "README.md").write_text("""---
configs:
- config_name: whole
  default: true
  data_files: [{split: train, path: "train-*.parquet"}]
- config_name: other
  data_files: [{split: train, path: "other/*.parquet"}, {split: held_out, path: "other/*.parquet"}]
---
""")
    return folder


def test_a_data_set_is_streamed_into_a_corpus_by_any_number_of_processes(dataset, tmp_path):
    corpora = []
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        assert prepare("--source", f"hf:{dataset}:whole", "--text-field", "body", "--out", out, "--processes", processes, "--validation-fraction", 0.2) == 0
        corpora.append(Corpus.open(out))
    train, validation = documents_of(corpora[0])
    kept = [text for text in TEXTS[:150] if text and text.strip()]
    assert (train, validation) == tuple([text for where, text in rows(kept, 0.2) if where == split] for split in ("train", "validation"))
    assert [corpus.manifest for corpus in corpora] == [corpora[0].manifest] * 2
    version = corpora[0].manifest["provenance"]["source_versions"][0]
    assert version["config"] == "whole" and version["split"] == "train" and "train-2.parquet" in version["files"]
    assert f"--source hf:{dataset}:whole:train --tokenizer" in corpora[0].manifest["prepare_command"]


def test_a_part_of_a_data_set_can_be_read_from_any_row_on(dataset):
    source = hub_rows(f"hf:{dataset}", "body", validation_fraction=0.1, max_bytes=300)
    assert len(source.parts) == 3 and source.parts[0].max_bytes == 100
    assert [list(part.read(20)) for part in source.parts] == [list(part.read(0))[20:] for part in source.parts]
    assert read(source) == list(rows(TEXTS[:150], 0.1))


def test_config_split_and_folder_are_named_in_the_source(dataset, tmp_path, monkeypatch):
    assert len(read(hub_rows(f"hf:{dataset}:other:held_out", "body", validation_fraction=0.1, max_bytes=None))) == 9
    monkeypatch.chdir(dataset.parent)
    assert prepare("--source", "hf:sayings:other", "--text-field", "body", "--max-bytes", 60, "--validation-fraction", 0.5) == 2  # all texts are equal
    assert prepare("--source", "hf:sayings::train", "--text-field", "body", "--processes", 1) == 0
    assert os.listdir("data") == ["sayings-train-bytes"]


@pytest.mark.parametrize("suffix, field, message", [
    (":nothing", "body", "BuilderConfig 'nothing' not found. Available: ['whole', 'other']"),
    (":whole:test", "body", "Bad split: test. Available splits: ['train']"),
    ("", "text", "no field 'text': its rows have id, body; choose another --text-field"),
])
def test_mistakes_in_a_data_set_give_one_line(dataset, tmp_path, capsys, suffix, field, message):
    assert prepare("--source", f"hf:{dataset}{suffix}", "--text-field", field, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source, parts", [
    ("hf:org/name", ("org/name", None, None, "train")),
    ("hf:org/name:sample-10BT", ("org/name", None, "sample-10BT", "train")),
    ("hf:org/name@v1:a:test", ("org/name", "v1", "a", "test")),
    ("hf:org/name::test", ("org/name", None, None, "test")),
])
def test_the_parts_of_a_hub_id(source, parts):
    dataset = HubDataset.parse(source)
    assert (dataset.name, dataset.revision, dataset.config, dataset.split) == parts
    assert HubDataset.parse(str(dataset)) == dataset
    with pytest.raises(ValueError, match="no data set is named"):
        HubDataset.parse("hf::a")


def test_a_data_set_of_the_hub_is_read_at_one_commit(dataset, monkeypatch):
    """The Hub stands in as a folder; what would be asked of it is seen."""
    import datasets

    asked, load = [], datasets.load_dataset

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            return type("Info", (), {"sha": "c0ffee"})

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision))
        return load(str(dataset), config, split=split, streaming=streaming)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = hub_rows("hf:org/name@main:whole", "body", validation_fraction=0.1, max_bytes=None)
    assert len(read(source)) == 150 and source.name == "hf:org/name@c0ffee:whole:train"
    assert source.versions == [{"dataset": "org/name", "revision": "c0ffee", "config": "whole", "split": "train"}]
    assert asked[0] == ("org/name", "main") and set(asked[1:]) == {("org/name", "whole", "train", "c0ffee")}


def test_a_stream_that_breaks_off_leaves_what_is_finished(dataset, tmp_path, monkeypatch, capsys):
    command = ["--source", f"hf:{dataset}", "--text-field", "body", "--out", tmp_path / "out", "--processes", 1]
    shutil.copy(dataset / "train-2.parquet", tmp_path / "whole.parquet")
    os.truncate(dataset / "train-2.parquet", 0)
    monkeypatch.setattr("training.rows._sha256", lambda path: "")
    assert prepare(*command) == 2
    error = capsys.readouterr().err
    assert "the stream broke off: " in error and "the same command goes on from what is finished" in error and error.count("\n") == 1
    shutil.copy(tmp_path / "whole.parquet", dataset / "train-2.parquet")
    assert prepare(*command) == 0
    assert "going on after" in capsys.readouterr().err
    assert sum(map(len, documents_of(Corpus.open(tmp_path / "out")))) == 148


@pytest.mark.parametrize("package, arguments", [("datasets", ["hf:org/name"]), ("pyarrow", ["a.parquet"])])
def test_a_missing_package_is_named_with_its_command(package, arguments, monkeypatch, tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert prepare("--source", *arguments, "--out", "out") == 2
    assert f"needs the package {package}: python -m pip install -r requirements-data.txt" in capsys.readouterr().err
