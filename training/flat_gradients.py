"""ZeRO-3's gradient norm and step from the flat buffer that holds the gradients.

DeepSpeed 0.19.8 keeps every rank's sums of gradients in one flat buffer, and does not make use of it: while the GPU waits, it takes the norm
parameter by parameter, each copied to float64 (stage3.py, get_grad_norm_direct), and copies the gradients of each sub-group to a new flat
tensor (_prepare_fp32_grad_for_sub_group).
"""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def use_flat_gradients(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Have DeepSpeed's optimizer of stage 3, without offload, take norm and step from the buffer; clipping scales it in place.

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
