import dataclasses
import math

import torch

from training.checkpoints import LoopState
from training.engine import Late, StepResult
from training.loss_scale import LossScale


def test_the_scale_falls_with_gradients_that_overflow_and_rises_after_a_window_without():
    scale, seen = LossScale(8.0), []
    for applied in (False, True, True, False, True, True, True, True):
        scale.update(2.5, applied, window=3)
        seen.append(scale.scale)
    assert seen == [4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 4.0, 4.0]
    assert scale.steps_without_overflow == 1


def test_it_has_a_least_value_and_a_loss_that_is_not_finite_leaves_it_alone():
    scale = LossScale(2.0)
    assert scale.can_fall()
    for _ in range(3):
        scale.update(2.5, False, window=3)
    assert scale == LossScale(1.0) and not scale.can_fall()
    scale = LossScale(8.0, steps_without_overflow=2)
    scale.update(math.nan, False, window=3)
    assert scale == LossScale(8.0, steps_without_overflow=2)


def test_overflow_counts_as_skipped_and_not_as_skipped_in_a_row():
    state = LoopState(loss_scale=LossScale(8.0))
    skipped = {"loss": 2.5, "grad_norm": math.inf, "lr": 0.1, "applied": False}
    for overflow in (True, True, False, True, False):
        state.count(StepResult(**skipped, overflow=overflow))
    assert (state.step, state.skipped_steps, state.overflow_steps, state.skipped_in_a_row) == (5, 5, 3, 2)
    state.count(StepResult(**skipped | {"applied": True}))
    assert state.skipped_in_a_row == 0
    assert LoopState(**dataclasses.asdict(state)) == state, "as state.json holds it"


def test_a_step_holds_numbers_that_are_read_when_they_are_asked_for():
    scalar, waited = torch.tensor(2.5, dtype=torch.float64), []
    late, no = Late(scalar * 2), Late(scalar > 3)
    result = StepResult(loss=late, grad_norm=1, lr=0.1, applied=no)
    assert float(result.loss) == 5.0 and not result.applied and float(result.grad_norm) == 1.0 and float(result.stopping) == 0.0
    late.arrived = type("Event", (), {"synchronize": lambda self: waited.append(1)})()
    assert float(dataclasses.replace(result, lr=0.2).loss) == 5.0 and waited
