"""Which probabilities dropout keeps: a function of the seed and of a score's place alone, so that every backend and every tile size agrees.

The generator is Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4), counter-based:
the key is the seed; the counter (j // 4, i, b * heads + h, offset) yields four words, for query i of head h in batch b and the keys
j .. j + 3. This file is its specification in PyTorch; `triton_tiles.keep_mask` computes the same words.
"""

import torch

ROUNDS = 7  # the fewest that pass the tests of the paper's Table 2
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WORD = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """A probability is dropped when the upper 31 bits of its word are below this number: signed 32-bit integers hold both."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def keep_mask(seed: torch.Tensor, dropout_p: float, batch: int, heads: int, queries: range, keys: range) -> torch.Tensor:
    """Boolean [batch, heads, len(queries), len(keys)], True where the probability is kept (and then divided by 1 - dropout_p).

    seed: int64 [2], Philox's key and the offset, of which the lower 32 bits count.
    """
    device = seed.device

    def index(numbers):
        return torch.arange(numbers.start, numbers.stop, device=device)

    key, offset = seed.unbind()
    first_group, last_group = keys.start // 4, -(-keys.stop // 4)
    words = [index(range(first_group, last_group)), index(queries)[:, None], index(range(batch * heads))[:, None, None], offset & _WORD]
    for step in range(ROUNDS):
        key_words = (key + step * _KEY_STEPS[0]) & _WORD, ((key >> 32) + step * _KEY_STEPS[1]) & _WORD
        (high_0, low_0), (high_2, low_2) = (_multiply(words[i], factor) for i, factor in zip((0, 2), _FACTORS))
        words = [high_2 ^ words[1] ^ key_words[0], low_2, high_0 ^ words[3] ^ key_words[1], low_0]
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., keys.start - 4 * first_group :][..., : len(keys)]
    return ((words >> 1) >= threshold(dropout_p)).unflatten(0, (batch, heads))


def _multiply(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 32 bits of a 64-bit product, which int64 holds as two's complement."""
    product = word * factor
    return (product >> 32) & _WORD, product & _WORD
