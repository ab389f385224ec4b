"""Activation checkpointing (Chen et al. 2016): which blocks are computed again in the backward pass, and what they keep instead."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.config import ModelFault
from model.offload import Offload

# The operations that "selective" knows attention by; each hands on its output and log-sum-exp. Of PyTorch's own choice, any.
_SDPA = {
    "sdpa_cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "sdpa_flash": "aten::_scaled_dot_product_flash_attention",
    "sdpa_efficient": "aten::_scaled_dot_product_efficient_attention",
}
ATTENTION_OPERATIONS = {
    "triton": frozenset({"recipe::attention_forward", "recipe::attention_packed_forward"}),
    "hopper": frozenset({"recipe::hopper_attention_forward", "recipe::hopper_attention_packed_forward"}),
    **{backend: frozenset({name}) for backend, name in _SDPA.items()},
    "sdpa": frozenset({*_SDPA.values(), "aten::_scaled_dot_product_flash_attention_for_cpu"}),
}
ATTENTION_OPERATIONS["auto"] = frozenset().union(*ATTENTION_OPERATIONS.values())  # of a model of transformers, where each call chooses
_MATMULS = frozenset({"aten::mm", "aten::addmm"})


@dataclass(frozen=True)
class Checkpointing:
    """What a block keeps for its backward pass.

    mode:
        none       every activation.
        full       the block's input; the rest is computed again.
        every_n    as full in the first of every ``every`` blocks, everything in the others.
        selective  the block's input, attention's output and log-sum-exp, and with ``keep_matmuls`` the products of the linear layers.
        deepspeed  what ``function`` keeps.
    backend: attention's, by whose operations selective knows it: a key of ``ATTENTION_OPERATIONS``.
    function: calls its first argument with the second, [batch, sequence, hidden], and takes care of the backward pass.
    offload: where the inputs of full and every_n wait for it, if not on the GPU.
    """

    mode: str = "none"
    every: int = 1
    keep_matmuls: bool = False
    backend: str = ""
    function: Callable | None = None
    offload: Offload | None = None

    def includes(self, index: int) -> bool:
        """Whether block ``index``, counted from 0, is computed again."""
        return self.mode != "none" and (self.mode != "every_n" or index % self.every == 0)

    def policy(self) -> "Policy | None":
        """Which operations of a block are not computed again, where some are not."""
        return Policy(self.backend, self.keep_matmuls) if self.mode == "selective" else None

    def run(self, block: nn.Module, x: torch.Tensor, context: dict[str, torch.Tensor]) -> torch.Tensor:
        """``block(x, **context)``, checkpointed."""
        # By keyword: ZeRO-3 copies positional tensors, and what attention makes of document_ids is kept for one and the same tensor.
        # DeepSpeed's function would move every tensor that it is given to the CPU, also those that the next block needs.
        if self.mode == "deepspeed":
            return self.function(partial(block, **context), x)
        if self.offload is not None:
            return self._run_offloaded(block, x, context)
        policy = self.policy()
        out = checkpoint(block, x, use_reentrant=False, **options_of(policy), **context)
        if policy is not None:
            policy.check()
        return out

    def _run_offloaded(self, block: nn.Module, x: torch.Tensor, context: dict[str, torch.Tensor]) -> torch.Tensor:
        waiting, given = self.offload.keep(x), [x]

        def run(device: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
            return block(given.pop() if given else waiting.come_back(), **context)

        # PyTorch keeps its arguments: of this one, empty, it sees which device's random numbers to draw again.
        return checkpoint(run, x.new_empty(0), use_reentrant=False, **context)


def options_of(policy: "Policy | None") -> dict[str, Callable]:
    """What torch.utils.checkpoint is told of it."""
    return {} if policy is None else {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}


class Policy:
    """Tells PyTorch, operation by operation, whether to keep what it returns: attention's, and with ``keep_matmuls`` the linear layers'."""

    def __init__(self, backend: str, keep_matmuls: bool):
        self.backend, self.attention = backend, ATTENTION_OPERATIONS[backend]
        self.kept = self.attention | (_MATMULS if keep_matmuls else frozenset())
        self.kept_attention = False

    def __call__(self, context, operation, *args, **kwargs) -> CheckpointPolicy:
        name = operation.name()
        self.kept_attention |= name in self.attention
        return CheckpointPolicy.MUST_SAVE if name in self.kept else CheckpointPolicy.PREFER_RECOMPUTE

    def check(self) -> None:
        """After a forward pass, or after it was traced.

        Raises:
            ModelFault: attention would be computed again.
        """
        if not self.kept_attention:
            raise ModelFault(
                f"train.activation_checkpointing=selective: attention.backend={self.backend} ran none of {', '.join(sorted(self.attention))}, "
                "so that attention would be computed again; use attention.backend=triton, or train.activation_checkpointing=full"
            )
