"""fp16's dynamic loss scale (Micikevicius et al. 2018, section 3.2), kept in the state of the run."""

import math
from dataclasses import dataclass

LEAST = 1.0


@dataclass
class LossScale:
    """What the loss is multiplied by, so that gradients do not vanish in fp16: halved where they overflow, doubled after
    ``train.loss_scale_window`` steps without.

    DeepSpeed 0.19.8 has its own, which at stage 3 doubles before it divides the gradients by it, so that they are half as large in that
    step; and which ends the process at the least scale. It is given this one before every step (``override_loss_scale``).
    """

    scale: float
    steps_without_overflow: int = 0

    def can_fall(self) -> bool:
        return self.scale > LEAST

    def update(self, loss: float, applied: bool, window: int) -> None:
        """After a step that was applied or not. A loss that is not finite says nothing about the scale, which gradients alone carry."""
        if not math.isfinite(loss):
            return
        if not applied:
            self.scale, self.steps_without_overflow = max(self.scale / 2, LEAST), 0
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow >= window:
            self.scale, self.steps_without_overflow = self.scale * 2, 0
