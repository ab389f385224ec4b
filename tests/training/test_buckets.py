import itertools
import random

from training.buckets import plan_buckets


def test_buckets_take_each_gradient_once_in_order_within_the_limit_and_with_their_modules():
    drawn = random.Random(0)
    for _ in range(300):
        limit = drawn.randint(1, 40)
        modules = [[drawn.randint(1, 20) for _ in range(drawn.randint(1, 5))] for _ in range(drawn.randint(1, 9))]
        due = plan_buckets(modules, limit)
        lengths, ends = list(itertools.chain(*modules)), list(itertools.accumulate(map(len, modules)))
        buckets = [(number, bucket) for number, of_module in enumerate(due) for bucket in of_module]
        assert [place for _, bucket in buckets for place in bucket] == list(range(len(lengths)))
        for number, bucket in buckets:
            assert bucket.stop <= ends[number], "summed before all of it are there"
            assert number == 0 or bucket.stop > ends[number - 1], "summed later than it could be"
            assert len(bucket) == 1 or sum(lengths[place] for place in bucket) <= limit
        for start, end in zip([0, *ends], ends):  # noqa: B905
            if sum(lengths[start:end]) <= limit:
                assert any(bucket.start <= start and end <= bucket.stop for _, bucket in buckets), "a module that fits is in one bucket"
        assert all(sum(lengths[place] for place in (*a, *b)) > limit or sum(lengths[a.start : ends[n + 1]]) > limit
                   for (n, a), (_, b) in itertools.pairwise(buckets) if n + 1 < len(ends)), "as full as they can be"


def test_modules_that_fit_share_a_bucket_which_ends_with_the_last_of_them():
    assert plan_buckets([[3], [2, 2], [4, 4], [9, 1]], 8) == [[], [range(0, 3)], [range(3, 5)], [range(5, 6), range(6, 7)]]
