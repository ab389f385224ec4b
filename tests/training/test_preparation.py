"""Preparation by several processes: the same bytes however many there are, whatever is killed, and however often it is started."""

import fcntl
import json
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from tests.launching import ROOT
from tests.training.preparation_worker import DOCUMENTS, LEFT_OUT, prepare, text
from training.corpus import CorpusError
from training.preparation import Part, prepare_corpus
from training.tokenizers import load_tokenizer


def start(folder, processes, *kill):
    command = [sys.executable, "tests/training/preparation_worker.py", folder, processes, *kill]
    return subprocess.run([str(word) for word in command], cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                          capture_output=True, text=True, timeout=120)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def starts(folder):
    """(part, first document) of each time a part was read, in order of parts."""
    return sorted(tuple(map(int, line.split()[:2])) for line in folder.with_suffix(".log").read_text().splitlines())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "corpus"
    prepare(folder, 1)
    return folder


def test_a_corpus_holds_the_documents_of_its_parts_in_order(undisturbed):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    tokenizer = load_tokenizer("gpt2")
    all_documents = [text(part, number) for part, count in enumerate(DOCUMENTS) for number in range(count)]
    for split in ("train", "validation"):
        shards = manifest["splits"][split]["shards"]
        assert [shard["name"] for shard in shards] == [f"{split}_{number:05d}.bin" for number in range(len(shards))] and len(shards) > 10
        tokens = np.concatenate([np.fromfile(undisturbed / shard["name"], "<u2") for shard in shards])
        ends = np.flatnonzero(tokens == tokenizer.end_of_text)
        assert [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]] == [words for where, words in all_documents if where == split]
        assert manifest["splits"][split]["text_bytes"] == sum(len(words.encode()) for where, words in all_documents if where == split)
    assert manifest["provenance"] == {"source": "numbers", "left_out": {"unwanted": sum(where == LEFT_OUT for where, _ in all_documents)}}
    assert sorted(path.name for path in undisturbed.parent.iterdir()) == ["corpus", "corpus.log"]


def test_several_processes_give_the_same_bytes(undisturbed, tmp_path):
    prepare(tmp_path / "corpus", 3, readers=2)
    assert contents(tmp_path / "corpus") == contents(undisturbed)
    readers = {line.split()[2] for line in (tmp_path / "corpus.log").read_text().splitlines()}
    assert len(readers) > 1 and str(os.getpid()) not in readers


@pytest.mark.parametrize("processes, victim, again", [(1, "worker", 3), (3, "worker", 1), (3, "first", 2)])
def test_a_killed_preparation_goes_on_from_its_finished_blocks(undisturbed, tmp_path, processes, victim, again):
    folder = tmp_path / "corpus"
    killed = start(folder, processes, victim, 3, 50)
    assert killed.returncode != 0 and not folder.exists()
    workers = {int(line.split()[2]) for line in folder.with_suffix(".log").read_text().splitlines()}
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers), "a process outlived the preparation"
    folder.with_suffix(".log").unlink()
    done = start(folder, again)
    assert done.returncode == 0, done.stderr
    assert "MB of text, which an earlier start has finished" in done.stderr
    assert contents(folder) == contents(undisturbed)
    read_again = dict(starts(folder))
    assert 0 < read_again[3] <= 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "corpus.log"]


def test_a_preparation_killed_while_shards_are_gathered_goes_on(undisturbed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def fail(*_):
        raise Killed

    def interrupted(name):
        with monkeypatch.context() as patched:
            patched.setattr(name, fail)
            with pytest.raises(Killed):
                prepare(tmp_path / "corpus", 1)

    interrupted("training.preparation.documents_file")  # before the first move
    interrupted("training.preparation.publish")  # all are moved, the manifest is missing
    interrupted("training.preparation.Counter.__add__")
    assert starts(tmp_path / "corpus") == [(part, 0) for part in range(len(DOCUMENTS))], "read once"
    interrupted("training.corpus.Corpus.open")  # the corpus is in its place, the partial folder still there
    prepare(tmp_path / "corpus", 1, overwrite=True)
    assert contents(tmp_path / "corpus") == contents(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "corpus.log"]


def test_another_unfinished_preparation_is_kept_unless_overwritten(tmp_path):
    folder = tmp_path / "corpus"
    assert start(folder, 1, "worker", 2, 0).returncode != 0
    with pytest.raises(CorpusError, match=r"corpus.partial holds an unfinished preparation of another corpus \(source differ\); .* --overwrite"):
        prepare(folder, 1, provenance={"source": "others"})
    prepare(folder, 1, provenance={"source": "others"}, overwrite=True)
    assert (0, 0) in starts(folder)[1:], "the blocks of the other one were not taken for its own"


def test_two_at_once_are_refused(tmp_path):
    folder = tmp_path / "corpus"
    folder.with_name("corpus.partial").mkdir()
    with open(tmp_path / "corpus.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match="another process is preparing this corpus at this moment"):
            prepare(folder, 1)


def broken(first):
    yield "train", "a text"
    raise ValueError("rows.jsonl, line 2: not JSON")


def endless(first):
    while True:
        time.sleep(0.01)
        yield "train", "a text"


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_wrong_with_a_source_ends_all_processes_and_leaves_nothing(tmp_path, processes):
    parts = [Part(broken)] + [Part(endless)] * (processes - 1)
    with pytest.raises(ValueError, match="^rows.jsonl, line 2: not JSON$"):
        prepare_corpus(tmp_path / "corpus", tokenizer=load_tokenizer("bytes"), parts=parts, provenance={}, prepare_command="", processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_not_read_beyond_its_bytes(tmp_path):
    parts = [Part(partial(alternating, count=100), max_bytes=95) for _ in range(2)]
    corpus, read_bytes = prepare_corpus(tmp_path / "corpus", tokenizer=load_tokenizer("bytes"), parts=parts, provenance={}, prepare_command="",
                                        processes=1, block_bytes=30)
    assert read_bytes == 180 == sum(corpus.split(split).text_bytes for split in ("train", "validation"))


def alternating(first, count):
    yield from (("train" if number % 2 else "validation", "ten bytes.") for number in range(first, count))


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.preparation._PROGRESS_SECONDS", 0)
    parts = [Part(partial(alternating, count=4), text_bytes=40) for _ in range(2)]
    prepare_corpus(tmp_path / "corpus", tokenizer=load_tokenizer("bytes"), parts=parts, provenance={}, prepare_command="", processes=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8 and lines[-1].startswith("0 of 0 MB of text, 1 of 2 parts, ") and lines[-1].endswith("s left")


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    parts = [Part(partial(alternating, count=4)) for _ in range(2)]
    prepare_corpus(tmp_path / "corpus", tokenizer=load_tokenizer("bytes"), parts=parts, provenance={}, prepare_command="", processes=1)
    shown = capsys.readouterr().err
    assert "80.0B" in shown and "2 of 2 parts" in shown and "MB/s," not in shown
