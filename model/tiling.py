"""A function of tokens, each by itself, computed for some at a time, so that what it holds meanwhile never exists for a whole sequence.

Tiled MLP of Arctic Long Sequence Training (Bekman et al. 2025, arXiv 2506.13996, section 3.1.1).
"""

from collections.abc import Callable, Sequence

import torch


def in_tiles(function: Callable, parameters: Sequence[torch.Tensor], x: torch.Tensor, length: int) -> torch.Tensor:
    """``function(x)`` of at most ``length`` tokens at a time; the backward pass computes each tile again. No more is kept than x.

    Gradients of the parameters are added up over the tiles in float32, and handed to autograd once: whoever waits for them, as ZeRO does,
    sees one.

    Args:
        function: of [tokens, hidden], and so is what it returns; it must not draw random numbers, and reads ``parameters`` where they are.
        x: [..., hidden].
    """
    # PyTorch's recomputation of a block ends where the last tensor is kept: here, so that no tile is computed for nothing then.
    kept = _Keep.apply(x.new_empty(0, requires_grad=True), x)
    return _InTiles.apply(x, kept.grad_fn, function, length, *parameters)


class _Keep(torch.autograd.Function):
    """A place in the graph that holds x for ``_InTiles``; no gradient passes it."""

    @staticmethod
    def forward(ctx, empty, x):
        ctx.save_for_backward(x)
        return torch.empty_like(empty)

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("nothing is computed of it")


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept, function, length, *parameters):
        ctx.kept, ctx.function, ctx.length, ctx.parameters = kept, function, length, parameters
        out = x.new_empty(x.shape)  # dense, so that tiles of it are views
        for tile, target in zip(_tiles(x.detach(), length), _tiles(out, length), strict=True):
            target.copy_(function(tile))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.kept.saved_tensors
        ctx.kept = None
        of_x = x.new_empty(x.shape)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.parameters]
        for tile, of_out, target in zip(*(_tiles(each, ctx.length) for each in (x, gradient, of_x)), strict=True):
            tile = tile.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(tile.view_as(tile))  # FlopCounterMode hooks what modules are given, and that must be no leaf here
            of_tile, *of_parameters = torch.autograd.grad(out, (tile, *ctx.parameters), of_out)
            target.copy_(of_tile)
            for total, part in zip(sums, of_parameters, strict=True):
                total += part
        return of_x, None, None, None, *(total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True))


def _tiles(x: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    return x.flatten(0, -2).split(length)
