"""Scaled dot-product attention behind one function, `attention`; every backend computes the same function of the same tensors."""

import math
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from kernels.attention.backends import BACKENDS, choose, sdpa, unsupported
from kernels.attention.reference import eager, tiled
from kernels.attention.tuning import compute_capability, read_compute_capability

__all__ = ["BACKENDS", "attention", "choose", "unsupported"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V for every head, differentiable once in q, k and v (Vaswani et al. 2017, equation 1).

    q: [batch, seq_q, heads, head_dim]; k, v: [batch, seq_k, kv_heads, head_dim], heads a multiple of kv_heads: query head h reads key head
    h // (heads / kv_heads) (grouped-query attention). One dtype: float16, bfloat16 or float32 (`eager`, `tiled` and `sdpa` also take
    float64). Strided views, such as slices of a packed projection, are read in place; only a last dimension that is not dense is copied.

    causal: query i sees the keys j <= i + seq_k - seq_q (the last query sees all). A query that sees nothing gives 0, a log-sum-exp of
    -inf and zero gradients. scale: above 0 and finite; default head_dim ** -0.5. backend: a name in `backends.BACKENDS`, or "auto",
    which chooses at each call, by that call's tensors and arguments (see `choose`). torch.autocast does not reach inside.

    Returns the output [batch, seq_q, heads, head_dim] in q's dtype; with return_lse also the natural log-sum-exp of the scaled scores
    [batch, heads, seq_q], float32 (float64 for float64 inputs), differentiable too. ValueError when shapes do not fit together or the
    backend cannot do what is asked.
    """
    _check_shapes(q, k, v)
    head_dim = q.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"attention: scale must be above 0 and finite, got {scale}")
    asked = dict(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=head_dim,
        compute_capability=_compute_capability(q.device),
        grouped=True if q.shape[2] != k.shape[2] else False,  # a bool, where torch.compile has symbolic sizes
        unequal_causal=causal and q.shape[1] != k.shape[1],
        return_lse=return_lse,
    )
    if backend == "auto":
        backend, _ = choose(**asked)
    elif reason := unsupported(backend, **asked):
        raise ValueError(reason)
    device_type = q.device.type
    # Autocast would change some operations of some backends: all of them compute in the dtype that they are given.
    with torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext():
        out, lse = _IMPLEMENTATIONS[backend](q, k, v, causal=causal, scale=scale, return_lse=return_lse)
    return (out, lse) if return_lse else out


def _compute_capability(device):
    if device.type != "cuda":
        return None
    return read_compute_capability(device) if torch.compiler.is_compiling() else compute_capability(device)


def _check_shapes(q, k, v):
    wrong = None
    if not q.ndim == k.ndim == v.ndim == 4:
        wrong = "q, k and v are [batch, seq, heads, head_dim]"
    elif k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        wrong = "q, k and v must agree in batch and head_dim, k and v in all dimensions"
    elif k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        wrong = "the number of query heads must be a multiple of the number of key heads"
    elif q.shape[3] == 0:
        wrong = "head_dim must be above 0"
    if wrong:
        raise ValueError(f"attention: {wrong}, got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        got = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"attention: q, k and v must share dtype and device, got {got}")


# Both imported on first use: a CPU installation of torch comes without triton.
def _triton(q, k, v, *, causal, scale, return_lse):
    from kernels.attention.triton_forward import attention_forward

    out, lse = attention_forward(q, k, v, causal, scale)
    return out, lse if return_lse else None


def _hopper(q, k, v, *, causal, scale, return_lse):
    from kernels.attention.hopper_forward import attention_forward

    out, lse = attention_forward(q, k, v, causal, scale)
    return out, lse if return_lse else None


_IMPLEMENTATIONS = {
    "eager": eager,
    "tiled": tiled,
    "sdpa": sdpa,
    "sdpa_cudnn": partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": partial(sdpa, kernel=SDPBackend.EFFICIENT_ATTENTION),
    "triton": _triton,
    "hopper": _hopper,
}
