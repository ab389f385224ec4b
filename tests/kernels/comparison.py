"""How attention is checked: every backend's error against float64, beside the error of plain PyTorch in the same dtype."""

import os
from dataclasses import dataclass

import torch

from kernels.attention import attention


def fresh_seed() -> int:
    """A new seed every run; pytest shows it when the test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed


@dataclass
class Case:
    seq_q: int
    seq_k: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 1
    causal: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scale: float | None = None

    def tensors(self, seed: int) -> tuple[torch.Tensor, ...]:
        """q, k, v, and the gradients of the output and of the log-sum-exp."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(dtype)

        q = normal(self.batch, self.seq_q, self.heads, self.head_dim)
        k, v = (normal(self.batch, self.seq_k, self.kv_heads, self.head_dim) for _ in "kv")
        return q, k, v, normal(*q.shape), normal(self.batch, self.heads, self.seq_q, dtype=torch.float32)


def run(backend: str, case: Case, q, k, v, dout, dlse=None) -> dict[str, torch.Tensor]:
    """Output and gradients; with dlse also the log-sum-exp, whose gradient then flows too."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, causal=case.causal, scale=case.scale, backend=backend, return_lse=dlse is not None)
    out, lse = out if dlse is not None else (out, None)
    outputs, gradients = ((out,), (dout,)) if lse is None else ((out, lse), (dout, dlse))
    results = dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(outputs, (q, k, v), gradients))))
    return results if lse is None else results | {"lse": lse}


def check(backend: str, case: Case, *, with_lse: bool = False, tensors=None, times: float = 2) -> None:
    """error(backend) <= times * error(PyTorch in this dtype), in every tensor, for `tensors` (default: fresh ones).

    The floor covers what both round alike (the result, half a unit in the last place) and float32 sums in another order.
    """
    seed = fresh_seed()
    *inputs, dout, dlse = case.tensors(seed) if tensors is None else tensors
    gradients = (dout, dlse) if with_lse else (dout,)
    ours = run(backend, case, *inputs, *gradients)
    pytorch = run("eager", case, *inputs, *gradients)
    exact = run("eager", case, *(x.double() for x in (*inputs, *gradients)))
    for name, expected in exact.items():
        got, beside = ours[name], pytorch[name]
        assert (got.shape, got.dtype) == (expected.shape, beside.dtype), f"{backend} {case}: {name} is {got.shape} {got.dtype}"
        if not expected.numel():
            continue
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite), f"{backend} {case}: {name} is not finite where it should be, or the reverse"
        error, error_beside = ((x.double() - expected)[finite].abs().amax().item() if finite.any() else 0.0 for x in (got, beside))
        largest = expected[finite].abs().amax().item() if finite.any() else 0.0
        allowed = times * error_beside + largest * torch.finfo(got.dtype).eps / 4 + 1e-5
        assert error <= allowed, f"{backend} {case}: error of {name} {error:.3g}, PyTorch's {error_beside:.3g}, allowed {allowed:.3g}"
