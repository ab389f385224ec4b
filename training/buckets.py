"""Which gradients are summed over the ranks together."""

from collections.abc import Sequence


def plan_buckets(modules: Sequence[Sequence[int]], limit: int) -> list[list[range]]:
    """For each module in turn, as the backward pass ends them: the buckets to be summed then, as places in the order of all gradients.

    A module's are in one bucket where they fit. A bucket has more than ``limit`` elements only where a single gradient has.

    Args:
        modules: elements of each gradient of each module.
    """
    due: list[list[range]] = [[] for _ in modules]
    start = place = elements = 0
    for number, lengths in enumerate(modules):
        for nth, length in enumerate(lengths):
            if elements and elements + (length if nth else sum(lengths)) > limit:
                due[number if nth else number - 1].append(range(start, place))
                start, elements = place, 0
            elements += length
            place += 1
    due[-1].append(range(start, place))
    return due
