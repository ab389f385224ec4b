"""The prepared corpus: a folder of memory-mapped token shards, its manifest, and the reader that refuses what does not fit.

    manifest.json                 what is in the folder, made from what, with the sha256 of every file
    train_00000.bin, ...          token ids, little-endian uint16 (uint32 for a vocabulary above 65,536); every document ends in
    validation_00000.bin, ...     one end-of-text token and lies whole in one shard
    train_00000.documents.npy     int64: where each document of that shard starts
    token_bytes.npy               int64: how many UTF-8 bytes each token id stands for (0 for end of text)
    tokenizer.json                what defines the ids, where the tokenizer is one of Hugging Face's
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from training.files import fsync
from training.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 100_000_000
TOKENIZER_FILE = "tokenizer.json"
_BATCH_CHARACTERS = 4 << 20  # text tokenized at once: enough to keep every core busy, little enough to hold in memory


class CorpusError(ValueError):
    """A corpus that is missing, damaged or does not fit the run; the message names the file and the remedy."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of the ids in a shard, little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(split: str, number: int) -> str:
    return f"{split}_{number:05d}.bin"


def documents_file(shard: str) -> str:
    """Name of the file that says where the documents of a shard start."""
    return shard.removesuffix(".bin") + ".documents.npy"


def _corpus_sha256(manifest: dict) -> str:
    """Names the content: the tokenizer, every count, token and document boundary, whatever the folder, the date or the sources."""
    content = {key: manifest[key] for key in ("format_version", "tokenizer", "splits")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- writing


def write_corpus(
    folder: Path | str,
    *,
    tokenizer: Tokenizer,
    splits: Mapping[str, Iterable[str]],
    provenance: dict,
    prepare_command: str = "python scripts/prepare_data.py",
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
) -> "Corpus":
    """Tokenizes the documents of each split into `folder`, which appears whole or not at all, and opens it.

    `splits` maps "train" and "validation" to their documents, in order; `provenance` (JSON) says where they came from;
    `prepare_command` is what an error message later tells the user to run again, with `--out` and `--overwrite` added.
    Raises CorpusError if a split has no documents, or if `folder` exists and `overwrite` is not set or it holds other files.
    """
    folder = Path(folder)
    refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        documents = ((split, text) for split in SPLITS for text in splits[split])
        entries = write_shards(partial, documents, tokenizer, shard_tokens)
        return publish(folder, partial, tokenizer, entries, provenance, prepare_command)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raises CorpusError if `folder` exists and `overwrite` is not set, or it holds what is no corpus."""
    if folder.exists() and not overwrite:
        raise CorpusError(f"{folder}: exists already; remove it, choose another folder, or pass --overwrite")
    _refuse_foreign_files(folder)


def write_shards(folder: Path, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, shard_tokens: int) -> dict[str, dict]:
    """Tokenizes (split, text) documents, in order, into shards in `folder`; returns each split's entry of the manifest, perhaps without shards."""
    writers = {split: _ShardWriter(folder, split, tokenizer.token_bytes(), shard_tokens) for split in SPLITS}
    end, dtype = [tokenizer.end_of_text], token_dtype(tokenizer.vocab_size)
    for batch in _batches(documents):
        for (split, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            writers[split].add(np.concatenate([ids, end]).astype(dtype))
    return {split: writer.finish() for split, writer in writers.items()}


class _ShardWriter:
    """Collects the documents of one split and writes them down, shard by shard."""

    def __init__(self, folder: Path, split: str, token_bytes: np.ndarray, shard_tokens: int):
        self.folder, self.split, self.token_bytes, self.shard_tokens = folder, split, token_bytes, shard_tokens
        self.shards: list[dict] = []
        self.pending: list[np.ndarray] = []
        self.pending_tokens = self.text_bytes = 0

    def add(self, document: np.ndarray) -> None:
        if self.pending and self.pending_tokens + document.size > self.shard_tokens:
            self._write()
        self.pending.append(document)
        self.pending_tokens += document.size
        self.text_bytes += int(self.token_bytes[document].sum())

    def finish(self) -> dict:
        if self.pending:
            self._write()
        return join_entries([{"text_bytes": self.text_bytes, "shards": self.shards}])

    def _write(self) -> None:
        name = shard_name(self.split, len(self.shards))
        starts = np.cumsum([0] + [document.size for document in self.pending[:-1]], dtype=np.int64)
        np.concatenate(self.pending).tofile(self.folder / name)
        np.save(self.folder / documents_file(name), starts)
        self.shards.append({
            "name": name,
            "tokens": self.pending_tokens,
            "documents": starts.size,
            "sha256": _sha256(self.folder / name),
            "documents_sha256": _sha256(self.folder / documents_file(name)),
        })
        self.pending, self.pending_tokens = [], 0


def join_entries(entries: Iterable[dict]) -> dict:
    """One split's entry of the manifest out of several, whose shards follow each other."""
    entries = list(entries)
    shards = [shard for entry in entries for shard in entry["shards"]]
    return {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "text_bytes": sum(entry["text_bytes"] for entry in entries),
        "shards": shards,
    }


def publish(folder: Path, partial: Path, tokenizer: Tokenizer, splits: dict[str, dict], provenance: dict, prepare_command: str) -> "Corpus":
    """Completes `partial`, which holds the shards that `splits` describe, to a corpus, and puts it in the place of `folder`.

    Raises CorpusError if a split has no documents.
    """
    for split in SPLITS:
        if not splits[split]["shards"]:
            raise CorpusError(f"the {split} split has no documents; give more text or another --validation-fraction")
    np.save(partial / "token_bytes.npy", tokenizer.token_bytes())
    described = {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "sha256": tokenizer.sha256,
        "token_bytes_sha256": _sha256(partial / "token_bytes.npy"),
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        (partial / TOKENIZER_FILE).write_bytes(tokenizer.definition)
        described["file_sha256"] = _sha256(partial / TOKENIZER_FILE)
    manifest = {"format_version": FORMAT_VERSION, "corpus_sha256": None, "tokenizer": described, "splits": splits,
                "prepare_command": prepare_command, "provenance": provenance}
    manifest["corpus_sha256"] = _corpus_sha256(manifest)
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.chmod(partial, 0o755)  # mkdtemp's folder is private, a corpus is shared
    for path in [*partial.iterdir(), partial]:
        fsync(path)
    _replace(folder, partial)
    return Corpus.open(folder)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for split, text in documents:
        batch.append((split, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _refuse_foreign_files(folder: Path) -> None:
    """Overwriting removes the folder: it must hold nothing but a corpus, or what is left of one."""
    own = re.compile(rf"manifest\.json|token_bytes\.npy|tokenizer\.json|({'|'.join(SPLITS)})_\d{{5}}\.(bin|documents\.npy)")
    if folder.exists():
        foreign = [folder.name] if not folder.is_dir() else sorted(path.name for path in folder.iterdir() if not own.fullmatch(path.name))
        if foreign:
            raise CorpusError(f"{folder}: not replaced, because {foreign[0]} is no file of a corpus; choose another folder")


def _replace(folder: Path, partial: Path) -> None:
    """Puts `partial` in the place of `folder`. A crash in between leaves no folder, never a mixture."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{folder.name}.old-", dir=folder.parent))
        folder.rename(old / folder.name)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    fsync(folder.parent)


# ---------------------------------------------------------------- reading


class TokenSplit:
    """One split: the concatenation of its shards, memory-mapped, never copied whole."""

    def __init__(self, folder: Path, entry: dict, dtype: np.dtype):
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.text_bytes: int = entry["text_bytes"]
        self._shards = [np.memmap(folder / shard["name"], dtype=dtype, mode="r") for shard in entry["shards"]]
        self._starts = np.cumsum([0] + [shard.size for shard in self._shards])

    def samples(self, sequence_length: int) -> int:
        """Number of whole windows of `sequence_length` inputs with their targets."""
        return (self.tokens - 1) // sequence_length

    def windows_covering_all(self, sequence_length: int) -> int:
        """Number of windows in which every token but the first is a target exactly once; the last may be shorter."""
        return -(-(self.tokens - 1) // sequence_length)

    def window(self, index: int, sequence_length: int) -> np.ndarray:
        """Tokens `[index * sequence_length, (index + 1) * sequence_length]`, both ends included: int64 `[sequence_length + 1]`.

        Inputs are all but the last, targets all but the first, so the last token of one window is the first of the next.
        Index `samples(sequence_length)`, where `windows_covering_all` counts it, is what is left at the end: 2 tokens or more.
        Raises IndexError beyond that.
        """
        if not 0 <= index < self.windows_covering_all(sequence_length):
            raise IndexError(f"window {index} of {self.windows_covering_all(sequence_length)}")
        first = index * sequence_length
        last = min(first + sequence_length + 1, self.tokens)
        pieces = []
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last:
            stop = min(last, int(self._starts[shard + 1]))
            pieces.append(self._shards[shard][first - self._starts[shard] : stop - self._starts[shard]])
            first, shard = stop, shard + 1
        return np.concatenate(pieces, dtype=np.int64)


class Corpus:
    """A prepared corpus. `open` is cheap, `verify` reads every byte; both raise CorpusError."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.manifest = manifest
        self.sha256: str = manifest["corpus_sha256"]
        self.provenance: dict = manifest["provenance"]
        self.tokenizer_name: str = manifest["tokenizer"]["name"]
        self.tokenizer_sha256: str = manifest["tokenizer"]["sha256"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._dtype = token_dtype(self.vocab_size)
        self._prepare_command: str = manifest["prepare_command"]
        self._shard_tokens: dict[str, int] = {}  # by file
        self._file_sha256: dict[str, str] = {"token_bytes.npy": manifest["tokenizer"]["token_bytes_sha256"]}
        if "file_sha256" in manifest["tokenizer"]:
            self._file_sha256[TOKENIZER_FILE] = manifest["tokenizer"]["file_sha256"]
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                self._shard_tokens[shard["name"]] = shard["tokens"]
                self._file_sha256[shard["name"]] = shard["sha256"]
                self._file_sha256[documents_file(shard["name"])] = shard["documents_sha256"]
        self._check_sizes()
        self._splits = {split: TokenSplit(folder, manifest["splits"][split], self._dtype) for split in SPLITS}

    @classmethod
    def open(cls, folder: Path | str) -> "Corpus":
        """Reads the manifest, checks that its counts agree and that every file it names is there with the size it says."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            missing = "manifest.json is missing" if folder.is_dir() else "no such folder"
            raise CorpusError(f"{folder}: {missing}; prepare the corpus: {_guess_command(folder)}") from None
        except ValueError as error:
            raise CorpusError(f"{folder}/manifest.json: not JSON ({error}); prepare the corpus again: {_guess_command(folder)}") from None
        return cls._checked(folder, manifest)

    @classmethod
    def _checked(cls, folder: Path, manifest: dict) -> "Corpus":
        again = f"prepare the corpus again: {_guess_command(folder)}"
        try:
            if manifest["format_version"] != FORMAT_VERSION:
                raise CorpusError(
                    f"{folder}/manifest.json: format {manifest['format_version']}, this version reads {FORMAT_VERSION}; {again}"
                )
            if manifest["corpus_sha256"] != _corpus_sha256(manifest):
                raise CorpusError(f"{folder}/manifest.json: altered since it was written (corpus_sha256 does not match); {again}")
            for split, count in product(SPLITS, ("tokens", "documents")):
                entry = manifest["splits"][split]
                total = sum(shard[count] for shard in entry["shards"])
                if entry[count] != total:
                    raise CorpusError(f"{folder}/manifest.json: splits.{split}.{count} is {entry[count]}, its shards hold {total}; {again}")
            return cls(folder, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{folder}/manifest.json: not a corpus manifest ({error!r}); {again}") from None

    def _check_sizes(self) -> None:
        for name in self._file_sha256:
            if not (self.folder / name).is_file():
                raise self._damaged(name, "missing")
        for name, tokens in self._shard_tokens.items():
            found, expected = (self.folder / name).stat().st_size, tokens * self._dtype.itemsize
            if found != expected:
                raise self._damaged(name, f"{found} bytes instead of {expected}")

    def _damaged(self, name: str, what: str) -> CorpusError:
        command = f"{self._prepare_command} --out {shlex.quote(str(self.folder))} --overwrite"
        return CorpusError(f"{self.folder}/{name}: {what}; prepare the corpus again: {command}")

    def verify(self) -> None:
        """Reads everything: the sha256 of every file against the manifest, and every token id against the vocabulary."""
        for name, digest in self._file_sha256.items():
            found = _sha256(self.folder / name)
            if found != digest:
                raise self._damaged(name, f"altered since it was prepared (sha256 {found[:12]}..., prepared {digest[:12]}...)")
        for name in self._shard_tokens:
            largest = int(np.memmap(self.folder / name, dtype=self._dtype, mode="r").max())
            if largest >= self.vocab_size:
                raise self._damaged(name, f"token id {largest} is outside the vocabulary of {self.vocab_size}")

    def check_fits(self, *, model_vocab_size: int, sequence_length: int) -> None:
        """Refuses a corpus that this model or this machine would misread.

        The model's vocabulary may be larger than the tokenizer's (padding), never smaller; each split must hold one whole
        sequence; the tokenizer installed here must be the one that made the ids.
        """
        if self.load_tokenizer().sha256 != self.tokenizer_sha256:
            what = f"made with another tokenizer {self.tokenizer_name!r} than the one installed (sha256 differs)"
            raise self._damaged("manifest.json", what)
        if self.vocab_size > model_vocab_size:
            raise CorpusError(
                f"{self.folder}: token ids go up to {self.vocab_size - 1} (tokenizer {self.tokenizer_name!r}), the model's vocabulary "
                f"holds {model_vocab_size}; raise the model's vocabulary size to at least {self.vocab_size}"
            )
        for name in SPLITS:
            tokens = self.split(name).tokens
            if tokens < sequence_length + 1:
                raise CorpusError(
                    f"{self.folder}: the {name} split has {tokens} tokens, one sequence of {sequence_length} needs {sequence_length + 1}; "
                    "shorten the sequence length or prepare a larger corpus"
                )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids: the one kept with them, or the one of that name that is installed. Raises ValueError."""
        if TOKENIZER_FILE in self._file_sha256:
            definition = (self.folder / TOKENIZER_FILE).read_bytes()
            try:
                return HuggingFaceTokenizer(self.tokenizer_name, definition, self.manifest["tokenizer"]["end_of_text"])
            except ValueError as error:
                raise self._damaged(TOKENIZER_FILE, str(error)) from None
        return load_tokenizer(self.tokenizer_name)

    def split(self, name: str) -> TokenSplit:
        """The split "train" or "validation"."""
        return self._splits[name]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each token id stands for, int64 `[vocab_size]`: what turns a loss per token into bits per byte."""
        return np.load(self.folder / "token_bytes.npy")


def _guess_command(folder: Path) -> str:
    """The command that prepares `folder`, read off the name that prepare_data.py gives by default; placeholders where it says nothing."""
    named = re.fullmatch(r"(shakespeare|python-source)-(bytes|gpt2)", folder.name)
    source, tokenizer = named.groups() if named else ("shakespeare|python-source|hf:DATASET|PATH", "bytes|gpt2|PATH|ID")
    overwrite = " --overwrite" if folder.exists() else ""
    return f"python scripts/prepare_data.py --source {source} --tokenizer {tokenizer} --out {shlex.quote(str(folder))}{overwrite}"
