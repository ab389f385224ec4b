"""Following every tensor that PyTorch allocates, as ``torch.cuda.max_memory_allocated`` does on a GPU, where there is none."""

import weakref
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from model import loss
from training.memory import BLOCK


class Allocations(TorchDispatchMode):
    """Bytes of all tensors alive that were made inside, and ``peaks``, the most of each ``phase``; in the allocator's blocks."""

    def __init__(self):
        super().__init__()
        self.alive, self.phase = 0, ""
        self.peaks: dict[str, int] = defaultdict(int)
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages or not storage.nbytes():
            return
        size = self._storages[storage._cdata] = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, storage: int) -> None:
        self.alive -= self._storages.pop(storage)


def as_on_a_gpu(monkeypatch) -> None:
    """One kernel where a GPU has one: the loss, the product summed in float32 and RMSNorm make no tensor that they do not keep."""

    def alone(function):
        def call(*arguments):
            with _disable_current_modes():
                returned = function(*arguments)
            return tuple(x.clone() for x in returned) if isinstance(returned, tuple) else returned.clone()

        return call

    monkeypatch.setattr(loss, "_loss_and_gradient", lambda device: alone(loss._eager_loss_and_gradient))
    monkeypatch.setattr(loss, "_product_in_float32", alone(loss._product_in_float32))
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: FusedRMSNorm.apply(x, norm.weight, norm.eps))


class FusedRMSNorm(torch.autograd.Function):
    """What PyTorch has on GPUs alone: it saves its input and one float32 a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            out = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)
        return *torch.autograd.grad(out, (x, weight), grad), None
