"""Which samples of which corpus a rank reads at a step: a stateless function, so that a run resumes exactly on any number of ranks."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SHARES = 10_000  # a mixture is made of so many parts: of every so many samples of a run each corpus gives exactly its shares
_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit: SplitMix64's output function (Steele, Lea and Flood 2014, figure 17)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(position: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """Image of each `position` (uint64 in range(size)) under the permutation of range(size) that `key` (uint64, same shape) names.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest range 2^(2h) >= size; values that land outside
    range(size) go through it again until they land inside, which keeps the whole a bijection (cycle walking: Black and Rogaway
    2002, section 3). The range is less than four times the size, so a few passes do.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    value = position.copy()
    walking = np.arange(value.size)
    while walking.size:
        left, right = value[walking] >> half, value[walking] & mask
        round_key = key[walking]
        for _ in range(_ROUNDS):
            round_key = _mix(round_key)
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value[walking] = (left << half) | right
        walking = walking[value[walking] >= size]
    return value


def sample_indices(*, seed: int, step: int, rank: int, world: int, global_batch: int, samples: Sequence[int],
                   shares: Sequence[int] = (SHARES,)) -> tuple[np.ndarray, np.ndarray]:
    """What `rank` of `world` reads at optimizer step `step`: the corpus of each sample and its index there, int64 `[global_batch // world]` both.

    Sample `step * global_batch + position` of the run is of the corpus that `_corpora` says, corpus c having `shares[c]` of SHARES
    samples. The n-th sample of a corpus belongs to its epoch `n // samples[c]`; each epoch visits every index in range(samples[c]) once,
    in an order that (seed, corpus, epoch) names. A rank takes a contiguous slice of the global batch, so the batch is the same set for every
    `world`. Time and memory are those of the slice and of SHARES: nothing of the size of a corpus is made.
    Raises ValueError if an argument is out of range or `world` does not divide `global_batch`.
    """
    if min(samples) < 1:
        raise ValueError(f"samples={list(samples)}: a corpus holds no whole sample; prepare a larger one or shorten the sequence length")
    if global_batch < 1 or world < 1 or global_batch % world:
        raise ValueError(f"global_batch={global_batch} must be a positive multiple of world={world}")
    if step < 0 or not 0 <= rank < world:
        raise ValueError(f"step={step}, rank={rank}, world={world}: need step >= 0 and 0 <= rank < world")
    if sum(shares) != SHARES or len(shares) != len(samples):
        raise ValueError(f"shares={list(shares)} of samples={list(samples)}: there must be as many, {SHARES} together")
    per_rank = global_batch // world
    first = step * global_batch + rank * per_rank
    corpus, number = _corpora(seed, first, per_rank, tuple(shares))
    index = np.empty(per_rank, dtype=np.int64)
    for c, size in enumerate(samples):
        mine = corpus == c
        epoch, position = np.divmod(number[mine].astype(np.uint64), np.uint64(size))
        key = _mix(_mix(np.full(position.size, (seed + c) & _MASK_64, dtype=np.uint64)) ^ epoch)
        index[mine] = _permute(position, key, size).astype(np.int64)
    return corpus, index


def _corpora(seed: int, first: int, count: int, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The corpus of the run's samples first, first + 1, ..., and which of that corpus's own samples each is, counted from 0."""
    corpora, numbers = [], []
    while count:
        block, start = divmod(first, SHARES)
        corpus, number = _block(seed if len(shares) > 1 else 0, block if len(shares) > 1 else 0, shares)
        stop = min(SHARES, start + count)
        corpora.append(corpus[start:stop])
        numbers.append(number[start:stop] + block * np.array(shares)[corpus[start:stop]])
        first, count = first + stop - start, count - (stop - start)
    return np.concatenate(corpora), np.concatenate(numbers)


@lru_cache(maxsize=2)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Corpus of each of SHARES samples, `shares[c]` of them c's, in an order that (seed, block) names; and how many of the same came before."""
    slots = np.arange(SHARES, dtype=np.uint64)
    # Adding 2^63 keeps these orders apart from those within a corpus.
    key = _mix(_mix(np.full(SHARES, (seed + (1 << 63)) & _MASK_64, dtype=np.uint64)) ^ np.uint64(block))
    corpus = np.repeat(np.arange(len(shares)), shares)[_permute(slots, key, SHARES).astype(np.int64)]
    number = np.empty(SHARES, dtype=np.int64)
    for c, share in enumerate(shares):
        number[corpus == c] = np.arange(share)
    return corpus, number
