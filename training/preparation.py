"""A corpus prepared by several processes, block by block, so that a killed preparation goes on from its finished blocks.

    NAME.partial/                 beside the corpus's folder, until that is complete
      preparation.json            what is being prepared: another start with the same goes on, one with other options is refused
      lock                        held by the process that prepares
      block_00003_00001/          part 3, block 1: its shards and record.json; complete, or block_00003_00001.tmp

A source is a list of parts, each read by one process, in order.  Where its blocks end depends on the texts alone, so the corpus is the same
for any number of processes, starts and crashes.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from training.corpus import (
    SHARD_TOKENS, SPLITS, Corpus, CorpusError, documents_file, join_entries, publish, refuse_existing, shard_name, write_shards,
)
from training.files import fsync, rename_durably, write_atomically
from training.tokenizers import Tokenizer

BLOCK_BYTES = 400_000_000  # text in a block, about a shard of GPT-2's tokens: what a crash may cost each process
LEFT_OUT = "left out"
_PROGRESS_SECONDS = 5.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Part:
    """One part of a source; it is pickled to the process that reads it.

    `read(first)` gives (split, text) of its documents from number `first` on; one whose split is LEFT_OUT counts as a document, and its
    text is the reason. `text_bytes` is what they come to, where that is known. After `max_bytes` the rest is not read.
    """

    read: Callable[[int], Iterator[tuple[str, str]]]
    text_bytes: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class _Job:
    folder: Path
    tokenizer: Tokenizer
    shard_tokens: int
    block_bytes: int


def prepare_corpus(folder: Path, *, tokenizer: Tokenizer, parts: list[Part], provenance: dict, prepare_command: str, processes: int,
                   left_out: Mapping[str, int] | None = None, overwrite: bool = False, shard_tokens: int = SHARD_TOKENS,
                   block_bytes: int = BLOCK_BYTES) -> tuple[Corpus, int]:
    """Tokenizes the parts into `folder`, which appears whole or not at all; see training.corpus.write_corpus, which does it in one go.

    Progress goes to stderr. `left_out`: what the source left out already, by reason. Returns the corpus and how many bytes of text were read.
    Raises CorpusError also where another preparation of the folder is running, or an unfinished one was of something else; ValueError for
    what is wrong with the source.
    """
    refuse_existing(folder, overwrite)
    partial = folder.with_name(f"{folder.name}.partial")
    wanted = {**provenance, "tokenizer": tokenizer.sha256, "parts": len(parts), "shard_tokens": shard_tokens, "block_bytes": block_bytes}
    job = _Job(partial, tokenizer, shard_tokens, block_bytes)
    with _locked(partial):
        _begin(partial, wanted, overwrite)
        try:
            _prepare_parts(job, parts, processes)
            records = [record for number in range(len(parts)) for record in _records(partial, number)]
            splits = _gather_shards(partial, records)
            left_out = sum((Counter(record["left_out"]) for record in records), Counter(left_out))
            corpus = publish(folder, partial / "corpus", tokenizer, splits, {**provenance, "left_out": dict(left_out)}, prepare_command)
        except ValueError:  # no other start of the same would fare better
            shutil.rmtree(partial)
            raise
        shutil.rmtree(partial)
    return corpus, sum(record["text_bytes"] for record in records)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{partial}: another process is preparing this corpus at this moment; wait for it, or choose another folder") from None
        except OSError as error:  # some network file systems have no locks
            print(f"{partial} cannot be locked ({error.strerror}): do not prepare it twice at once", file=sys.stderr)
        yield


def _begin(partial: Path, wanted: dict, overwrite: bool) -> None:
    """Keeps the finished blocks of an earlier start that prepared the same; refuses, or with `overwrite` removes, those of another."""
    description = partial / "preparation.json"
    wanted = json.loads(json.dumps(wanted))
    if description.exists():
        before = json.loads(description.read_text(encoding="utf-8"))
        differing = sorted(key for key in wanted.keys() | before.keys() if wanted.get(key) != before.get(key))
        if not differing and _is_whole(partial):
            return
        if differing and not overwrite:
            raise CorpusError(f"{partial} holds an unfinished preparation of another corpus ({', '.join(differing)} differ); "
                              "finish that one, choose another folder, or discard it with --overwrite")
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    write_atomically(description, json.dumps(wanted) + "\n")


def _is_whole(partial: Path) -> bool:
    """Whether the shards of the finished blocks are still there: not after a crash between the corpus's completion and this folder's removal."""
    records = (json.loads(file.read_text(encoding="utf-8")) for file in partial.glob("block_?????_?????/record.json"))
    return (partial / "corpus").exists() or all(
        (_block_folder(partial, record["part"], record["block"]) / shard["name"]).exists()
        for record in records for split in SPLITS for shard in record["splits"][split]["shards"])


# ---------------------------------------------------------------- blocks


def _block_folder(partial: Path, part: int, block: int) -> Path:
    return partial / f"block_{part:05d}_{block:05d}"


def _records(partial: Path, part: int) -> list[dict]:
    """What the finished blocks of a part hold, in order."""
    records = []
    while (file := _block_folder(partial, part, len(records)) / "record.json").exists():
        records.append(json.loads(file.read_text(encoding="utf-8")))
    return records


def _prepare_part(job: _Job, number: int, part: Part, report: Callable[[int], None]) -> None:
    """Writes what is missing of a part's blocks; `report` is told the bytes of each text."""
    records = _records(job.folder, number)
    if records and records[-1]["is_last"]:
        return
    source = part.read(sum(record["documents"] for record in records))
    done = sum(record["text_bytes"] for record in records)
    is_last = False
    while not is_last:
        block = _Block(source, job.block_bytes, None if part.max_bytes is None else part.max_bytes - done, report)
        folder = _block_folder(job.folder, number, len(records))
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        splits = write_shards(temporary, block.documents(), job.tokenizer, job.shard_tokens)
        is_last = block.is_last
        record = {"part": number, "block": len(records), "is_last": is_last, "documents": block.read, "text_bytes": block.text_bytes,
                  "left_out": dict(block.left_out), "splits": splits}
        (temporary / "record.json").write_text(json.dumps(record), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        rename_durably(temporary, folder)
        records.append(record)
        done += block.text_bytes


class _Block:
    """Takes documents from a part until they fill a block; then tells what they were and whether the part is at its end."""

    def __init__(self, source: Iterator[tuple[str, str]], block_bytes: int, max_bytes: int | None, report: Callable[[int], None]):
        self.source, self.block_bytes, self.max_bytes, self.report = source, block_bytes, max_bytes, report
        self.read = self.text_bytes = 0
        self.left_out: Counter = Counter()
        self.is_last = False

    def documents(self) -> Iterator[tuple[str, str]]:
        while self.text_bytes < self.block_bytes:
            document = next(self.source, None)
            size = 0 if document is None or document[0] == LEFT_OUT else len(document[1].encode())
            if document is None or self.max_bytes is not None and self.text_bytes + size > self.max_bytes:
                self.is_last = True
                return
            self.read += 1
            if document[0] == LEFT_OUT:
                self.left_out[document[1]] += 1
                continue
            self.text_bytes += size
            self.report(size)
            yield document


def _gather_shards(partial: Path, records: list[dict]) -> dict[str, dict]:
    """Moves the shards of all blocks, in order, into partial/corpus, numbered through; a second call finishes what a killed one began."""
    target, splits = partial / "corpus", {}
    target.mkdir(exist_ok=True)
    for split in SPLITS:
        entry = join_entries(record["splits"][split] for record in records)
        places = [_block_folder(partial, record["part"], record["block"]) for record in records for _ in record["splits"][split]["shards"]]
        for number, (shard, place) in enumerate(zip(entry["shards"], places, strict=True)):
            old, new = shard["name"], shard_name(split, number)
            for before, after in ((old, new), (documents_file(old), documents_file(new))):
                if (place / before).exists():
                    (place / before).replace(target / after)
            shard["name"] = new
        splits[split] = entry
    return splits


# ---------------------------------------------------------------- processes


def _prepare_parts(job: _Job, parts: list[Part], processes: int) -> None:
    records = [_records(job.folder, number) for number in range(len(parts))]
    missing = [number for number, found in enumerate(records) if not (found and found[-1]["is_last"])]
    total = None if any(part.text_bytes is None for part in parts) else sum(part.text_bytes for part in parts)
    done = sum(record["text_bytes"] for found in records for record in found)
    if done:
        print(f"going on after {done / 1e6:.0f} MB of text, which an earlier start has finished", file=sys.stderr)
    processes = min(processes, len(missing))
    with contextlib.closing(_Progress(total, done, len(parts), len(parts) - len(missing))) as progress:
        if processes > 1:
            _prepare_in_processes(job, parts, missing, processes, progress)
        else:
            for number in missing:
                _prepare_part(job, number, parts[number], progress.add)
                progress.finish_part()


def _prepare_in_processes(job: _Job, parts: list[Part], missing: list[int], processes: int, progress: "_Progress") -> None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of the libraries in a state they do not survive
    # Without locks, which a killed process would never give back: each part's bytes are counted by one process alone.
    counts, stop = context.RawArray("q", len(parts)), context.RawValue("b", 0)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with ProcessPoolExecutor(processes, context, _start_worker, (job, counts, stop, threads)) as pool:
        waiting = {pool.submit(_work, number, parts[number]) for number in missing}
        told = 0
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                progress.add((read := sum(counts)) - told)
                told = read
                for future in ended:
                    future.result()
                    progress.finish_part()
        except BaseException:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(job: _Job, counts, stop, threads: int) -> None:
    global _job, _counts
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the library tokenizers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others

    def end_when_told() -> None:  # or alone in the world; what is unfinished is begun again by the next start
        while not stop.value and multiprocessing.parent_process().is_alive():
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=end_when_told, daemon=True).start()
    _job, _counts = job, counts


def _work(number: int, part: Part) -> None:
    def report(text_bytes: int) -> None:
        _counts[number] += text_bytes

    _prepare_part(_job, number, part, report)


class _Progress:
    """How far it has come, on stderr: a bar on a terminal, a line every few seconds elsewhere. `total`: bytes of text, None if not known."""

    def __init__(self, total: int | None, done: int, parts: int, parts_done: int):
        self.total, self.done, self.before, self.parts, self.parts_done = total, done, done, parts, parts_done
        self.started = time.monotonic()
        self.next_line = self.started + _PROGRESS_SECONDS
        self.bar = tqdm(total=total, initial=done, unit="B", unit_scale=True) if sys.stderr.isatty() else None

    def add(self, text_bytes: int) -> None:
        self.done += text_bytes
        if self.bar is not None:
            self.bar.update(text_bytes)
        elif (now := time.monotonic()) >= self.next_line:
            rate = (self.done - self.before) / (now - self.started)
            end = f", {(self.total - self.done) / rate:.0f} s left" if self.total is not None and rate else ""
            whole = "" if self.total is None else f" of {self.total / 1e6:.0f}"
            print(f"{self.done / 1e6:.0f}{whole} MB of text, {self.parts_done} of {self.parts} parts, {rate / 1e6:.1f} MB/s{end}",
                  file=sys.stderr, flush=True)
            self.next_line = now + _PROGRESS_SECONDS

    def finish_part(self) -> None:
        self.parts_done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.parts_done} of {self.parts} parts")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
