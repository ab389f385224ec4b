import numpy as np
import pytest

from training.data_order import SHARES
from training.data_order import sample_indices as chosen


def sample_indices(*, samples, **arguments):
    """Of one corpus."""
    corpora, indices = chosen(samples=[samples], **arguments)
    assert not corpora.any()
    return indices


def order(samples, *, epoch=0, seed=0):
    """The whole order of one epoch, read as one batch."""
    return sample_indices(seed=seed, step=epoch, rank=0, world=1, global_batch=samples, samples=samples)


@pytest.mark.parametrize("samples", [*range(1, 20), 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_003])
def test_every_epoch_visits_every_sample_once(samples):
    for epoch in (0, 1, 5):
        indices = order(samples, epoch=epoch)
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(np.sort(indices), np.arange(samples))


def test_epochs_and_seeds_give_unrelated_orders():
    orders = [order(1000, epoch=epoch, seed=seed) for epoch in range(4) for seed in (0, 1, -1, 2**63)]
    for i, first in enumerate(orders):
        assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15
        for second in orders[:i]:
            assert (first == second).mean() < 0.02
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_small_permutations_are_close_to_uniform():
    counts = np.zeros((5, 5))
    for seed in range(1000):
        counts[np.arange(5), order(5, seed=seed)] += 1
    np.testing.assert_allclose(counts / 1000, 0.2, atol=0.05)


def test_the_same_arguments_give_the_same_indices():
    arguments = dict(seed=7, step=123, rank=1, world=2, global_batch=8, samples=1000)
    np.testing.assert_array_equal(sample_indices(**arguments), sample_indices(**arguments))


def test_the_order_is_pinned():
    """A run resumed by a later version must read what it would have read: a change here breaks every checkpoint."""
    indices = sample_indices(seed=1234, step=3, rank=0, world=1, global_batch=8, samples=1000)
    assert indices.tolist() == [635, 881, 964, 458, 100, 834, 648, 215]


@pytest.mark.parametrize("step", [0, 1, 12])  # 12 crosses into the second epoch
def test_ranks_share_one_global_batch_in_contiguous_slices(step):
    arguments = dict(seed=3, step=step, global_batch=8, samples=100)
    whole = sample_indices(rank=0, world=1, **arguments)
    for world in (2, 4, 8):
        slices = [sample_indices(rank=rank, world=world, **arguments) for rank in range(world)]
        assert {part.size for part in slices} == {8 // world}
        np.testing.assert_array_equal(np.concatenate(slices), whole)


def test_batches_go_on_across_epoch_borders():
    samples, batch = 10, 7
    stream = np.concatenate([sample_indices(seed=1, step=s, rank=0, world=1, global_batch=batch, samples=samples) for s in range(30)])
    np.testing.assert_array_equal(np.sort(stream.reshape(-1, samples), axis=1), np.tile(np.arange(samples), (21, 1)))


def test_a_batch_may_span_several_epochs():
    stream = sample_indices(seed=1, step=0, rank=0, world=1, global_batch=12, samples=3)
    np.testing.assert_array_equal(np.sort(stream.reshape(4, 3), axis=1), np.tile(np.arange(3), (4, 1)))


@pytest.mark.parametrize("samples", [2**32 - 1, 2**32, 2**32 + 1, 2**33 + 5, 2**48 + 1, 2**61 + 3])
def test_huge_corpora_do_not_overflow(samples):
    step = samples // 1024 - 2
    indices = np.concatenate([sample_indices(seed=0, step=step + i, rank=0, world=1, global_batch=1024, samples=samples) for i in (0, 1)])
    assert indices.min() >= 0 and indices.max() < samples
    assert np.unique(indices).size == indices.size
    assert indices.max() > samples * 0.9 and indices.min() < samples * 0.1


@pytest.mark.parametrize("arguments, message", [
    (dict(samples=0), r"samples=\[0\]"),
    (dict(world=3), "multiple of world=3"),
    (dict(global_batch=0), "global_batch=0"),
    (dict(rank=2), "rank=2"),
    (dict(rank=-1), "rank=-1"),
    (dict(step=-1), "step=-1"),
])
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_indices(**(dict(seed=0, step=0, rank=0, world=2, global_batch=8, samples=100) | arguments))


MIXED = dict(seed=5, samples=[1000, 30, 7000], shares=[3000, 500, 6500])


def mixed_stream(count, **changes):
    """(corpus, index) of the first `count` samples, read in steps of 50."""
    steps = [chosen(step=step, rank=0, world=1, global_batch=50, **(MIXED | changes)) for step in range(count // 50)]
    return tuple(np.concatenate(parts) for parts in zip(*steps, strict=True))


def test_a_mixture_gives_every_corpus_its_share_of_every_block():
    corpora, _ = mixed_stream(3 * SHARES)
    for block in corpora.reshape(3, SHARES):
        assert np.bincount(block).tolist() == MIXED["shares"]
    for part in corpora[:SHARES].reshape(10, -1):  # and about that of every stretch
        np.testing.assert_allclose(np.bincount(part, minlength=3) / part.size, np.array(MIXED["shares"]) / SHARES, atol=0.05)
    assert (corpora[:SHARES] != corpora[SHARES : 2 * SHARES]).any()


def test_each_corpus_of_a_mixture_is_read_epoch_by_epoch_in_orders_of_its_own():
    corpora, indices = mixed_stream(2 * SHARES)
    for corpus, samples in enumerate(MIXED["samples"]):
        mine = indices[corpora == corpus]
        epochs = mine[: mine.size // samples * samples].reshape(-1, samples)
        assert len(epochs) >= 1
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(samples), (len(epochs), 1)))
        assert all((first != second).any() for first, second in zip(epochs, epochs[1:]))
    twins = chosen(**(MIXED | dict(samples=[900, 900], shares=[5000, 5000])), step=0, rank=0, world=1, global_batch=1000)
    assert (twins[1][twins[0] == 0][:400] != twins[1][twins[0] == 1][:400]).any()


def test_a_mixture_depends_on_the_seed_and_not_on_the_ranks():
    for step in (0, 199):  # 199 crosses into the second block
        arguments = dict(step=step, global_batch=72)
        whole = chosen(rank=0, world=1, **arguments, **MIXED)
        for world in (2, 4, 8):
            slices = [chosen(rank=rank, world=world, **arguments, **MIXED) for rank in range(world)]
            for part, expected in zip(zip(*slices, strict=True), whole, strict=True):
                np.testing.assert_array_equal(np.concatenate(part), expected)
        other = chosen(rank=0, world=1, **arguments, **(MIXED | dict(seed=6)))
        assert (whole[0] != other[0]).any() and (whole[1] != other[1]).any()


def test_the_order_of_a_mixture_is_pinned():
    """As that of one corpus: a change here breaks every checkpoint."""
    corpora, indices = chosen(step=1300, rank=0, world=1, global_batch=8, **MIXED)
    assert (corpora.tolist(), indices.tolist()) == ([0, 2, 0, 2, 0, 0, 1, 1], [12, 6992, 573, 3540, 202, 242, 11, 18])


@pytest.mark.parametrize("changes", [{"shares": [3000, 500, 6499]}, {"shares": [5000, 5000]}, {"samples": [10, 0, 10]}])
def test_impossible_mixtures_are_refused(changes):
    with pytest.raises(ValueError, match="shares=|no whole sample"):
        chosen(step=0, rank=0, world=1, global_batch=8, **(MIXED | changes))
