"""Prepares a small corpus as scripts/prepare_data.py would; at a document that it is told to, a process is killed.

    python tests/training/preparation_worker.py FOLDER PROCESSES [worker|first PART DOCUMENT]
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from training.corpus import Corpus
from training.preparation import LEFT_OUT, Part, prepare_corpus
from training.tokenizers import load_tokenizer

DOCUMENTS = (40, 1, 25, 60)  # of each part


def text(part: int, number: int) -> tuple[str, str]:
    """Documents of unequal length, some for validation, some left out."""
    if number % 11 == 5:
        return LEFT_OUT, "unwanted"
    return "validation" if number % 7 == 3 else "train", f"part {part}, document {number}, naïve. " * (1 + (part + 3 * number) % 5)


def read(log: Path, part: int, victim: str, fatal: tuple[int, int], readers: int, first: int) -> Iterator[tuple[str, str]]:
    with open(log, "a") as file:
        file.write(f"{part} {first} {os.getpid()}\n")
    while len({line.split()[2] for line in log.read_text().splitlines()}) < readers:
        time.sleep(0.01)
    for number in range(first, DOCUMENTS[part]):
        if (part, number) == fatal:
            os.kill(os.getppid() if victim == "first" else os.getpid(), signal.SIGKILL)
            time.sleep(60)  # until it is noticed that the first process is gone
        yield text(part, number)


def prepare(folder: Path, processes: int, victim: str = "", fatal: tuple[int, int] = (-1, -1), *, readers: int = 1, **changes) -> Corpus:
    """``readers``: no document is read before so many processes have begun."""
    parts = [Part(partial(read, folder.with_suffix(".log"), part, victim, fatal, readers)) for part in range(len(DOCUMENTS))]
    settings = {"provenance": {"source": "numbers"}, "prepare_command": "again", "shard_tokens": 500, "block_bytes": 600} | changes
    return prepare_corpus(folder, tokenizer=load_tokenizer("gpt2"), parts=parts, processes=processes, **settings)[0]


if __name__ == "__main__":
    folder, processes, *kill = sys.argv[1:]
    prepare(Path(folder), int(processes), *([kill[0], (int(kill[1]), int(kill[2]))] if kill else []))
