"""From the splits of corpora to the tensors of each step."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from model.gpt import IGNORED_LABEL
from training.corpus import TokenSplit
from training.data_order import sample_indices

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainingBatches:
    """This rank's micro batches of any step, read one step ahead by a thread.

    Which samples a step sees depends on (seed, step, global batch) alone; see ``training.data_order``, also for ``shares``.
    ``sharing``: so many ranks in a row share every sequence. All of them read it, and have the labels of their own part.
    """

    def __init__(self, splits: Sequence[TokenSplit], *, shares: Sequence[int], sequence_length: int, micro_batch_size: int, accumulation: int,
                 seed: int, rank: int, world: int, device: torch.device, sharing: int = 1):
        self.splits, self.sequence_length, self.micro_batch_size, self.accumulation = splits, sequence_length, micro_batch_size, accumulation
        readers = world // sharing
        self.order = {"seed": seed, "rank": rank // sharing, "world": readers, "global_batch": micro_batch_size * accumulation * readers,
                      "samples": [split.samples(sequence_length) for split in splits], "shares": shares}
        self.part, self.sharing, self.device = rank % sharing, sharing, device
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: tuple[int, Future] | None = None

    def _read(self, step: int) -> torch.Tensor:
        chosen = zip(*sample_indices(step=step, **self.order), strict=True)
        windows = torch.from_numpy(np.stack([self.splits[corpus].window(int(index), self.sequence_length) for corpus, index in chosen]))
        return windows.pin_memory() if self.device.type == "cuda" else windows

    def step(self, step: int) -> list[Batch]:
        """(tokens, labels) of each micro batch of an optimizer step, int64 [micro_batch, sequence] on the device (labels: of a part)."""
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = (step, self.reader.submit(self._read, step))
        windows = self.ahead[1].result().to(self.device, non_blocking=True)
        self.ahead = (step + 1, self.reader.submit(self._read, step + 1))
        return [(micro[:, :-1], micro[:, 1:].chunk(self.sharing, 1)[self.part]) for micro in windows.split(self.micro_batch_size)]

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)


def validation_batches(split: TokenSplit, *, sequence_length: int, batch_size: int, sequences: int | None, rank: int, world: int,
                       device: torch.device, sharing: int = 1) -> Iterator[Batch]:
    """This rank's share of the validation windows, the same number of batches on every rank.

    Args:
        sequences: evaluate that many windows, evenly spaced; None evaluates every token of the split once.
        sharing: as in ``TrainingBatches``.

    Yields:
        (tokens, labels), int64 [batch_size, sequence], labels of sequence / sharing; missing windows and the end of a short one have
        ignored labels.
    """
    windows = split.windows_covering_all(sequence_length)
    chosen = np.arange(windows) if sequences is None or sequences >= windows else np.arange(sequences) * windows // sequences
    reader, per_step = rank // sharing, batch_size * (world // sharing)
    for start in range(0, len(chosen), per_step):
        mine = chosen[start + reader * batch_size : start + (reader + 1) * batch_size]
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED_LABEL)
        for row, index in enumerate(mine):
            window = torch.from_numpy(split.window(int(index), sequence_length))
            tokens[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
        yield tokens.to(device), labels.chunk(sharing, 1)[rank % sharing].to(device)
