"""Which backend computes what: a table, refusals that follow from it, what "auto" chooses; PyTorch's kernels under our signature."""

import importlib.metadata
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.attention.masks import causal_mask

HALF = (torch.float16, torch.bfloat16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_VERSION = importlib.metadata.version("triton") if TRITON_INSTALLED else None
GLUON_TESTED_WITH = ("3.6.0",)  # Gluon is experimental: it changes from one version of Triton to the next
# The values that Triton takes for true. It reads them when the kernels are defined: setting the variable later has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# Compute capabilities of which PyTorch's flash kernel computes some head_dims without gradients.
SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; everything else is refused. Lengths, strides, causal or full, and the scale are free in all of them."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    compute_capability: tuple[int, int] = (0, 0)  # the least, on CUDA
    dtypes: tuple[torch.dtype, ...] = (*HALF, torch.float32, torch.float64)
    head_dims: range = range(1, 65536)
    no_gradient: range = range(0)  # head_dims refused on SMALL_SHARED_MEMORY
    grouped: bool = True  # fewer key heads than query heads
    unequal_causal: bool = True  # causal with seq_q != seq_k
    lse: bool = False  # returns the log-sum-exp
    newer_gpus: bool = True  # runs on later compute capabilities too


BACKENDS = {
    "eager": Capabilities(lse=True),
    "tiled": Capabilities(lse=True),
    "sdpa": Capabilities(),
    "sdpa_cudnn": Capabilities(("cuda",), (8, 0), HALF, range(8, 129, 8), unequal_causal=False),
    "sdpa_flash": Capabilities(("cuda",), (8, 0), HALF, range(8, 257, 8), range(200, 225, 8), unequal_causal=False),
    "sdpa_efficient": Capabilities(("cuda",), (5, 0), (*HALF, torch.float32), range(8, 65536, 8), grouped=False),
    "hopper": Capabilities(("cuda",), (9, 0), HALF, range(64, 129, 64), lse=True, newer_gpus=False),
    "triton": Capabilities(("cpu", "cuda") if INTERPRETED else ("cuda",), (8, 0), (*HALF, torch.float32), range(16, 257), lse=True),
}
REMEDIES = ("triton", "sdpa", "tiled", "eager")  # offered in this order when another backend is refused


def unsupported(
    backend: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    compute_capability: tuple[int, int] | None = None,
    grouped: bool = False,
    unequal_causal: bool = False,
    return_lse: bool = False,
) -> str | None:
    """Why `backend` cannot compute this, and which backends can; None when it can.

    compute_capability: of the CUDA device, None when not known yet (then it is not checked). grouped: kv_heads < heads.
    unequal_causal: causal with seq_q != seq_k.
    """
    if backend == "auto":
        return None
    if backend not in BACKENDS:
        return f"attention.backend={backend} is not known; choose one of auto, {', '.join(BACKENDS)}"
    asked = (device_type, dtype, head_dim, compute_capability, grouped, unequal_causal, return_lse)
    need = _unmet_need(backend, *asked)
    if need is None:
        return None
    remedies = [name for name in REMEDIES if _unmet_need(name, *asked) is None][:2]
    return f"attention.backend={backend} {need}; " + (f"use {' or '.join(remedies)}" if remedies else "no other backend can do this either")


def choose(
    *, device_type: str, dtype: torch.dtype, head_dim: int, compute_capability: tuple[int, int] | None = None, **asked: bool
) -> tuple[str, str]:
    """What "auto" means: (backend, why). Arguments as in `unsupported`. ValueError when no backend can do it."""
    asked = dict(device_type=device_type, dtype=dtype, head_dim=head_dim, compute_capability=compute_capability, **asked)
    not_hopper = _unmet_need("hopper", **asked) if compute_capability is not None else "needs a GPU that is known"
    if not_hopper is None:
        return "hopper", "our kernel for Hopper runs on this GPU, dtype and head_dim"
    if device_type == "cpu":
        not_triton = "triton is for GPUs"
    elif INTERPRETED:
        not_triton = "TRITON_INTERPRET is set: triton would run on the CPU"
    else:
        not_triton = unsupported("triton", **asked)
    if not_triton is None:
        return "triton", f"our portable kernel, because hopper {not_hopper}"
    not_sdpa = unsupported("sdpa", **asked)
    if not_sdpa is None:
        return "sdpa", f"PyTorch's own choice of kernel, because {not_triton}"
    not_tiled = unsupported("tiled", **asked)
    if not_tiled is None:
        return "tiled", f"the reference in plain PyTorch, because {not_triton} and {not_sdpa}"
    raise ValueError(not_tiled)


def _unmet_need(
    backend, device_type, dtype, head_dim, compute_capability=None, grouped=False, unequal_causal=False, return_lse=False
) -> str | None:
    can = BACKENDS[backend]
    if backend in ("triton", "hopper") and not TRITON_INSTALLED:
        return "needs the package triton, which is not installed"
    if device_type not in can.devices:
        hint = " (on the CPU only Triton's interpreter runs it: TRITON_INTERPRET=1, for tests)" if backend == "triton" else ""
        return f"runs on {' and '.join(can.devices)}, not on {device_type}{hint}"
    if backend == "triton" and INTERPRETED and dtype is torch.bfloat16:
        return "is wrong in bfloat16 under TRITON_INTERPRET=1 (the interpreter multiplies the raw bits; float16 and float32 are right)"
    if backend == "hopper" and INTERPRETED:
        return "cannot run under TRITON_INTERPRET=1"
    if device_type == "cuda" and compute_capability is not None:
        if compute_capability < can.compute_capability or compute_capability != can.compute_capability and not can.newer_gpus:
            return f"needs compute capability {_dotted(can.compute_capability)}, and this GPU has {_dotted(compute_capability)}"
    if backend == "hopper" and TRITON_VERSION not in GLUON_TESTED_WITH:
        return f"needs triton {' or '.join(GLUON_TESTED_WITH)}, and {TRITON_VERSION} is installed"
    if dtype not in can.dtypes:
        return f"needs {' or '.join(_name(d) for d in can.dtypes)}, not {_name(dtype)}"
    if not _within(head_dim, can.head_dims):
        multiple = f", a multiple of {can.head_dims.step}" if can.head_dims.step > 1 else ""
        return f"needs head_dim from {can.head_dims[0]} to {can.head_dims[-1]}{multiple}, not {head_dim}"
    if compute_capability in SMALL_SHARED_MEMORY and _within(head_dim, can.no_gradient):
        return f"has no gradients for head_dim {head_dim} on compute capability {_dotted(compute_capability)}"
    if grouped and not can.grouped:
        return "needs as many key heads as query heads"
    if unequal_causal and not can.unequal_causal:
        return "needs queries and keys of the same length when causal"
    if return_lse and not can.lse:
        return "does not return the log-sum-exp"
    return None


def _within(number, numbers: range) -> bool:
    """`number in numbers`, for a number that torch.compile may have made symbolic."""
    return numbers.start <= number < numbers.stop and (number - numbers.start) % numbers.step == 0


def _dotted(compute_capability):
    return ".".join(map(str, compute_capability))


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def sdpa(q, k, v, *, causal: bool, scale: float, return_lse: bool, kernel: SDPBackend | None = None) -> tuple[torch.Tensor, None]:
    """torch's scaled_dot_product_attention; `kernel` forces one of its implementations. Shapes as in `attention`."""
    assert not return_lse, "refused by `unsupported`"
    seq_q, seq_k = q.shape[1], k.shape[1]
    if causal and seq_q > seq_k:  # the first queries see nothing: they give 0, and the rest is the square problem
        out, _ = sdpa(q[:, seq_q - seq_k :], k, v, causal=True, scale=scale, return_lse=False, kernel=kernel)
        return pad(out, (0, 0, 0, 0, seq_q - seq_k, 0)), None
    if not (q.numel() and k.numel()):
        kernel = SDPBackend.MATH  # the others refuse empty tensors
    elif kernel is not None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as all named kernels require
    # is_causal aligns the first query with the first key, which is our definition for equal lengths alone.
    mask = causal_mask(range(seq_q), range(seq_k), seq_k - seq_q, q.device) if causal and seq_q != seq_k else None
    with sdpa_kernel(kernel) if kernel is not None else nullcontext():
        out = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=True if q.shape[2] != k.shape[2] else False,  # a bool, where torch.compile has symbolic sizes
        )
    return out.transpose(1, 2), None
