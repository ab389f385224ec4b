import pytest

from training.config import OptimizerSection
from training.schedule import learning_rate

STEPS = 20


def rates(steps=STEPS, **settings) -> list[float]:
    section = OptimizerSection(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **settings})
    return [learning_rate(step, steps, section) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_in_a_straight_line_to_lr(schedule):
    found = rates(schedule=schedule, decay_steps=5 if schedule == "wsd" else None)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(later <= earlier for earlier, later in zip(found[4:], found[5:], strict=False))


def test_shapes():
    assert rates(schedule="linear", warmup_steps=0, min_lr=0.0, steps=5) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates(schedule="cosine", warmup_steps=0, min_lr=0.0, steps=5) == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])
    assert rates(schedule="wsd", warmup_steps=0, min_lr=0.0, steps=7, decay_steps=4) == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert set(rates(schedule="constant", warmup_steps=0)) == {1.0}


def test_a_decay_that_branches_off_has_the_rates_of_the_stable_phase_before_it():
    long = rates(schedule="wsd", decay_steps=5)
    for stable in (long, rates(schedule="constant")):
        assert rates(steps=15, schedule="wsd", decay_steps=3)[:12] == stable[:12]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_runs_of_one_and_two_steps(schedule, warmup):
    for steps in (1, 2):
        found = rates(steps=steps, schedule=schedule, warmup_steps=min(warmup, steps), decay_steps=1 if schedule == "wsd" else None)
        assert all(0.1 <= rate <= 1 for rate in found)
