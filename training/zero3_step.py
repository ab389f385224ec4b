"""ZeRO-3's optimizer step with less for the GPU to wait for.

At the end of the backward pass DeepSpeed 0.19.8 waits for the GPU, which from then on waits for the host (stage3.py, step): while every
gathered parameter is let go of; while the norm is taken parameter by parameter, each gradient copied to float64; while the gradients of each
sub-group, which lie in one flat buffer, are copied to another.
"""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def shorten_step(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Have DeepSpeed's optimizer of stage 3, without offload, step as said in ``take_flat_gradients`` and ``release_late``."""
    take_flat_gradients(zero)
    release_late(zero)


def take_flat_gradients(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Norm and step take the gradients from the flat buffer; clipping scales it in place.

    What pads a parameter to equal pieces is 0 in it, and the first micro batch of a step writes all else anew.
    """
    ends = accumulate((sum(p.partition_numel() for p in group) for group in zero.fp16_groups), initial=0)
    gradients = [zero.grad_partitions_flat_buffer[start:end] for start, end in pairwise(ends)]

    def norms_of_groups() -> list[torch.Tensor]:
        # In float64 as DeepSpeed's, but for no copy in it: of PyTorch's norms this one alone converts as it reads.
        squares = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float64)).square()
        dist.all_reduce(squares)
        norms = squares.sqrt()
        return list(norms.where(norms.isfinite(), -1.0))  # which is what the caller takes for not finite

    def hand_to_optimizer(group: int) -> None:
        flat = zero.fp32_partitioned_groups_flat[group]
        flat.grad = gradients[group].to(flat.dtype)
        zero.averaged_gradients[group] = None

    zero._get_norm_groups, zero._prepare_fp32_grad_for_sub_group = norms_of_groups, hand_to_optimizer


def release_late(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Within the step, gathered parameters are let go of once the GPU has the update to compute, which is of this rank's pieces alone."""
    step, release, finish = zero.step, zero._partition_all_parameters, zero._post_step

    def release_and_finish(timer_names: set[str]) -> None:
        release()
        finish(timer_names)

    def step_and_release(closure: None = None) -> None:
        zero._partition_all_parameters, zero._post_step = lambda: None, release_and_finish
        try:
            step()
        finally:
            del zero._partition_all_parameters, zero._post_step
        if zero.overflow:  # the step ended early
            release()

    zero.step = step_and_release
