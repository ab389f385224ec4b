"""Blocks compiled by torch.compile: Inductor fuses norms, residuals, activation, rotary positions and dropout around products and attention."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.checkpointing import Checkpointing, Policy, options_of
from model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Have each block's forward pass compiled while it trains, one code for all of them.

    Module hooks stay outside: where ZeRO-3 gathers a block's parameters and lets go of them, the compiled code sees them whole, and keeps none
    of them for the backward pass. Checkpointing moves inside, where the compiler plans what is computed again, and ZeRO-3 gathers once for
    that and the backward pass; DeepSpeed's own stays around the block, and so does what brings the block's input back from the host.
    """
    # What an earlier model's policy keeps is in its code, but not in what is compared to tell whether a code fits.
    torch._dynamo.reset()
    checkpointing = model.checkpointing
    around = checkpointing.mode == "deepspeed" or checkpointing.offload is not None
    policy = checkpointing.policy()
    options = options_of(policy)
    for index, block in enumerate(model.blocks):
        inside = not around and checkpointing.includes(index)
        block.forward = _Forward(block, options if inside else None, policy if inside else None)
    model.checkpointing = checkpointing if around else Checkpointing()


class _Forward:
    """A block's forward pass, with the options of its checkpointing if it is checkpointed.

    In evaluation mode it runs as it is written: a text that is sampled has many lengths, and each would be compiled.
    """

    def __init__(self, block: nn.Module, options: dict[str, Callable] | None, policy: Policy | None):
        self.block, self.forward, self.options, self.policy = block, block.forward, options, policy

    def __call__(self, x: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        if not self.block.training:
            return self.forward(x, **context)
        out = _compiled()(self.forward, self.options, x, context)
        if self.policy is not None:
            self.policy.check()
        return out


def _run(forward: Callable, checkpointed: dict[str, Callable] | None, x: torch.Tensor, context: dict[str, torch.Tensor]) -> torch.Tensor:
    if checkpointed is None or not torch.is_grad_enabled():
        return forward(x, **context)
    return checkpoint(forward, x, use_reentrant=False, **checkpointed, **context)


@cache
def _compiled() -> Callable:
    # At its first use: the compiler takes two seconds to import. Whole or not at all: a break in the graph would cost the time that compiling
    # is to save. Lengths do not change from step to step.
    return torch.compile(_run, fullgraph=True, dynamic=False)
