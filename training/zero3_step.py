"""ZeRO-3's sums of gradients and optimizer step with fewer copies, and less for the GPU to wait for.

DeepSpeed 0.19.8 (stage3.py) copies each gradient into a bucket, these side by side, and divides all by the number of ranks before they are
summed. At the end of the backward pass it waits for the GPU, which from then on waits for the host: while every gathered parameter is let go
of; while the norm is taken parameter by parameter, each gradient copied to float64; while the gradients of each sub-group, which lie in one
flat buffer, are copied to another.
"""

import math

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def shorten_step(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Have DeepSpeed's optimizer of stage 3, without offload, do as the functions below say."""
    scatter_at_once(zero)
    take_flat_gradients(zero)
    release_late(zero)


def scatter_at_once(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Gradients of a bucket are laid out for the ranks, and converted, by one kernel, and this rank's sums alone are divided.

    With ``contiguous_gradients: false``, which leaves them where the backward pass has put them until then.
    """

    def average_and_scatter(parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        group = zero._get_param_partition_group(parameters[0])
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        lengths = [p.grad.numel() for p in parameters]
        pieces = [math.ceil(length / world) for length in lengths]  # DeepSpeed's
        device = parameters[0].grad.device
        everyones = torch.empty(world, sum(pieces), dtype=dtype, device=device)
        torch._chunk_cat([p.grad.reshape(-1) for p in parameters], 0, world, out=everyones)
        mine = torch.empty(sum(pieces), dtype=dtype, device=device)
        dist.reduce_scatter_tensor(mine, everyones.view(-1), group=group)
        mine = mine.to(zero.gradient_accumulation_dtype).div_(world)
        own = [max(0, min(piece, length - rank * piece)) for piece, length in zip(pieces, lengths, strict=True)]
        return [part[:length] for part, length in zip(mine.split(pieces), own, strict=True)]

    zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = average_and_scatter


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
