"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

import math

from training.config import OptimizerSection


def learning_rate(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """Linear warm-up to ``lr``, then what ``schedule`` says, down to ``min_lr`` at the last step.

    ``cosine``: Loshchilov and Hutter 2017, equation 5. ``linear``: the straight line. ``constant``: no fall. ``wsd``
    (warmup-stable-decay; Hu et al. 2024, section 4; Hägele et al. 2024, section 3): ``lr`` up to the last ``decay_steps``, over which it
    falls in a straight line, so that a decay of any length can begin at any checkpoint of the stable phase.

    Args:
        step: the optimizer step about to be taken, from 0.
        steps: optimizer steps of the whole run.
        optimizer: resolved.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    if optimizer.schedule == "wsd":
        left = min(1.0, max(0, steps - 1 - step) / optimizer.decay_steps)
        return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
    done = min(1.0, (step - optimizer.warmup_steps) / max(1, steps - 1 - optimizer.warmup_steps))
    left = 1 - done if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
