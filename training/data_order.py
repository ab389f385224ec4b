"""Which samples a rank reads at a step: a stateless function, so that a run resumes exactly on any number of ranks."""

import numpy as np

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


def sample_indices(*, seed: int, step: int, rank: int, world: int, global_batch: int, samples: int) -> np.ndarray:
    """Indices of the samples that `rank` of `world` reads at optimizer step `step`: int64 `[global_batch // world]`.

    Sample `step * global_batch + position` of the run belongs to epoch `that // samples`; each epoch visits every index in
    range(samples) once, in an order that (seed, epoch) names. A rank takes a contiguous slice of the global batch, so the batch
    is the same set for every `world`. Time and memory are those of the slice: nothing of size `samples` is made.
    Raises ValueError if an argument is out of range or `world` does not divide `global_batch`.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: the corpus holds no whole sample; prepare a larger one or shorten the sequence length")
    if global_batch < 1 or world < 1 or global_batch % world:
        raise ValueError(f"global_batch={global_batch} must be a positive multiple of world={world}")
    if step < 0 or not 0 <= rank < world:
        raise ValueError(f"step={step}, rank={rank}, world={world}: need step >= 0 and 0 <= rank < world")
    per_rank = global_batch // world
    first = step * global_batch + rank * per_rank
    number = np.arange(first, first + per_rank, dtype=np.uint64)
    epoch, position = np.divmod(number, np.uint64(samples))
    key = _mix(_mix(np.full(per_rank, seed & _MASK_64, dtype=np.uint64)) ^ epoch)
    return _permute(position, key, samples).astype(np.int64)
