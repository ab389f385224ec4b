"""Sources whose documents are rows: JSON lines, Parquet files, and data sets of the Hugging Face Hub.

A row's text goes to validation or training by a hash of itself, so that this needs no look at the other rows and equal texts stay together.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from training.preparation import LEFT_OUT, Part

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_PREFIX = "hf:"
_PART_BYTES = 256_000_000  # smaller files share a part, or each would become a shard of its own
_MOST_PARTS = 1024  # of a data set


@dataclass(frozen=True)
class RowSource:
    """Rows with a text field: `versions` (JSON) tells one state of the source from another; `name` names it for good."""

    name: str
    versions: list
    parts: list[Part]


def rows(texts: Iterable[str | None], validation_fraction: float) -> Iterator[tuple[str, str]]:
    """(split, text) of each text; empty ones and null are left out."""
    for text in texts:
        if text is None or not text.strip():
            yield LEFT_OUT, "empty"
            continue
        try:
            digest = hashlib.sha256(text.encode()).digest()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            yield LEFT_OUT, "not UTF-8 text"
            continue
        yield "validation" if int.from_bytes(digest[:8]) < validation_fraction * 2**64 else "train", text


def _share(max_bytes: int | None, parts: int) -> int | None:
    return None if max_bytes is None else max_bytes // parts


# ---------------------------------------------------------------- files


def row_files(files: list[tuple[str, Path]], field: str, *, validation_fraction: float, max_bytes: int | None) -> RowSource:
    """The rows of (name, path) files, whose path ends in one of ROW_SUFFIXES."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, [path for _, path in files])
    versions = [{"file": name, "bytes": path.stat().st_size, "sha256": digest} for (name, path), digest in zip(files, digests, strict=True)]
    groups: list[list[Path]] = []
    filled = _PART_BYTES
    for _, path in files:
        if filled >= _PART_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += path.stat().st_size
    share = _share(max_bytes, len(groups))
    parts = [Part(partial(_read_files, group, field, validation_fraction), max_bytes=share) for group in groups]
    return RowSource("rows", versions, parts)


def _read_files(paths: list[Path], field: str, validation_fraction: float, first: int) -> Iterator[tuple[str, str]]:
    texts = (text for path in paths for text in (_parquet_texts if path.suffix == ".parquet" else _json_texts)(path, field))
    return rows(islice(texts, first, None), validation_fraction)


def _json_texts(path: Path, field: str) -> Iterator[str | None]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            yield _field_of(row, field, f"{path}, line {number}")


def _field_of(row: object, field: str, place: str) -> str | None:
    if not isinstance(row, dict) or field not in row:
        has = f"has {', '.join(map(str, row)) or 'no field'}" if isinstance(row, dict) else "is no object"
        raise ValueError(f"{place}: no field {field!r}: the row {has}; choose another --text-field")
    if not isinstance(row[field], str | None):
        raise ValueError(f"{place}: field {field!r} holds a {type(row[field]).__name__}, not text; choose another --text-field")
    return row[field]


def _parquet_texts(path: Path, field: str) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet needs the package pyarrow: python -m pip install -r requirements-data.txt") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kind = {column.name: column.type for column in file.schema_arrow}
            if field not in kind:
                raise ValueError(f"{path}: no field {field!r}: its rows have {', '.join(kind)}; choose another --text-field")
            if not (pyarrow.types.is_string(kind[field]) or pyarrow.types.is_large_string(kind[field])):
                raise ValueError(f"{path}: field {field!r} holds {kind[field]}, not text; choose another --text-field")
            for batch in file.iter_batches(columns=[field], batch_size=1024):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not readable as Parquet: {' '.join(str(error).split())}") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- data sets


@dataclass(frozen=True)
class HubDataset:
    """A data set that the library `datasets` reads: of the Hub, at one commit, or a folder."""

    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, source: str) -> "HubDataset":
        """`hf:NAME[@REVISION][:CONFIG[:SPLIT]]`: NAME may be a folder, an empty CONFIG is the default one, SPLIT is train where it is left out."""
        name, _, rest = source.removeprefix(HUB_PREFIX).partition(":")
        config, _, split = rest.partition(":")
        name, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
        if not name:
            raise ValueError(f"--source {source}: no data set is named; hf:NAME[@REVISION][:CONFIG[:SPLIT]], as in "
                             "hf:HuggingFaceFW/fineweb-edu:sample-10BT")
        return cls(name, revision or None, config or None, split or "train")

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.name}{at}:{self.config or ''}:{self.split}"

    def pinned(self) -> "HubDataset":
        """The same at the commit that its revision means today. Raises ValueError if the Hub does not tell."""
        if Path(self.name).exists():
            return HubDataset(str(Path(self.name).resolve()), None, self.config, self.split)
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(self.name, revision=self.revision).sha
        except Exception as error:
            raise self._fault(error) from None
        return HubDataset(self.name, commit, self.config, self.split)

    def open(self):
        """An IterableDataset, which streams. Raises ValueError for whatever stands against it."""
        datasets = _import_datasets()
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> ValueError:
        about = (" (a private or gated data set needs the environment variable HF_TOKEN; without a network, give hf:FOLDER, or its jsonl or "
                 "Parquet files)") * (not isinstance(error, ValueError))
        return ValueError(f"--source {self}: {' '.join(str(error).split()) or type(error).__name__}{about}")


def _import_datasets():
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("a source hf:... needs the package datasets: python -m pip install -r requirements-data.txt") from None
    datasets.config.TORCH_AVAILABLE = False  # every process would import torch, only to see that it is no DataLoader's worker
    datasets.disable_progress_bars()
    return datasets


def hub_rows(source: str, field: str, *, validation_fraction: float, max_bytes: int | None) -> RowSource:
    """The rows of a data set, each of its files read by one process."""
    _import_datasets()
    dataset = HubDataset.parse(source).pinned()
    stream = dataset.open()
    columns = stream.column_names or list(next(iter(stream), {}))
    if field not in columns:
        raise ValueError(f"--source {dataset}: no field {field!r}: its rows have {', '.join(columns) or 'no field'}; choose another --text-field")
    if dataset.revision:
        version = {"dataset": dataset.name, "revision": dataset.revision}
    else:
        files = sorted(path for path in Path(dataset.name).rglob("*") if path.is_file())
        version = {"files": {path.relative_to(dataset.name).as_posix(): _sha256(path) for path in files}}
    count = min(stream.num_shards, _MOST_PARTS)
    share = _share(max_bytes, count)
    parts = [Part(partial(_read_dataset, dataset, field, validation_fraction, index, count), max_bytes=share) for index in range(count)]
    return RowSource(str(dataset), [{**version, "config": dataset.config, "split": dataset.split}], parts)


def _read_dataset(dataset: HubDataset, field: str, validation_fraction: float, index: int, count: int, first: int) -> Iterator[tuple[str, str]]:
    stream = dataset.open().select_columns([field]).shard(num_shards=count, index=index).skip(first)
    return rows((_field_of(row, field, f"{dataset}, part {index}") for row in _streamed(stream, dataset)), validation_fraction)


def _streamed(stream: Iterable[dict], dataset: HubDataset) -> Iterator[dict]:
    try:
        yield from stream
    except Exception as error:  # of the network, in classes of several libraries
        raise OSError(f"{dataset}: the stream broke off: {type(error).__name__}: {' '.join(str(error).split())}") from error
