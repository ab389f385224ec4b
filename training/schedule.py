"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

import math

from training.config import OptimizerSection


def learning_rate(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """Linear warm-up to ``lr``, then a cosine to ``min_lr`` (Loshchilov and Hutter 2017, equation 5).

    Args:
        step: the optimizer step about to be taken, from 0.
        steps: optimizer steps of the whole run.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(1, steps - 1 - optimizer.warmup_steps)
    return optimizer.min_lr + 0.5 * (optimizer.lr - optimizer.min_lr) * (1 + math.cos(math.pi * min(1.0, done)))
