"""Sequence parallelism by exchange of heads: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

n processes share a sequence, each with one n-th of its tokens. Attention alone needs all tokens: before it every process gives away its part
of most heads and gets the other parts of its own, one n-th of them; after it the other way round.

DeepSpeed's ``DistributedAttention`` takes as many key heads as processes, or more, and ``UlyssesSPAttentionHF`` the models of transformers:
these lines take any number, and what they make is a packed projection, which attention reads in place.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a sequence: ``rank`` of ``size``, in the order of their parts."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of a tensor, a view."""
        return whole.chunk(self.size, dim)[self.rank]

    def gather_tokens(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """All tokens of this process's heads out of its tokens of all heads.

        q: [batch, tokens, heads, head_dim]; k, v: [batch, tokens, kv_heads, head_dim].

        Returns the projection that ``attention_packed`` takes, [batch, size * tokens, its heads and twice its key heads, head_dim], and the
        number of each. Of fewer key heads than processes, or of a number that does not divide, copies are sent: as many as make a multiple.
        """
        copies = math.lcm(k.shape[2], self.size) // k.shape[2]
        k, v = (x.repeat_interleave(copies, dim=2) if copies > 1 else x for x in (k, v))
        of_each = torch.cat([x.unflatten(2, (self.size, -1)).movedim(2, 0) for x in (q, k, v)], dim=3)
        gathered = _Exchange.apply(of_each, self.group).movedim(0, 1).flatten(1, 2)
        return gathered, q.shape[2] // self.size, k.shape[2] // self.size

    def gather_heads(self, out: torch.Tensor) -> torch.Tensor:
        """All heads of this process's tokens, out of all tokens of its heads: [batch, tokens, heads, head_dim]."""
        of_each = out.unflatten(1, (self.size, -1)).movedim(1, 0)
        return _Exchange.apply(of_each, self.group).movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Piece i of x, [processes, ...], goes to process i; of what is returned, piece i came from it. The gradient goes the same way back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _exchanged(gradient, ctx.group), None


def _exchanged(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received
