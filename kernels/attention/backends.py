"""Which backend computes what: a table, refusals that follow from it, what "auto" chooses; PyTorch's kernels under our signature."""

import importlib.metadata
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.attention.masks import Rules, visible

HALF = (torch.float16, torch.bfloat16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_VERSION = importlib.metadata.version("triton") if TRITON_INSTALLED else None
GLUON_TESTED_WITH = ("3.6.0",)  # Gluon is experimental: it changes from one version of Triton to the next
# The values that Triton takes for true. It reads them when the kernels are defined: setting the variable later has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# Compute capabilities of which PyTorch's flash kernel computes some head_dims without gradients.
SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


# What a call may ask for beyond full or causal attention: (its name in the table, the refusal of a backend that lacks it).
FEATURES = {
    "grouped": ("GQA, MQA", "needs as many key heads as query heads"),
    "unequal_causal": ("lengths differ, causal", "needs queries and keys of the same length when causal"),
    "value_head_dim": ("value head_dim", "needs values of the same head_dim as the keys"),
    "window": ("window", "has no sliding window"),
    "document_ids": ("document_ids", "has no documents given by document_ids"),
    "cu_seqlens": ("cu_seqlens", "has no documents given by cu_seqlens"),
    "alibi": ("ALiBi", "has no ALiBi"),
    "softcap": ("softcap", "has no softcap"),
    "sinks": ("sinks", "has no sinks"),
    "dropout": ("dropout", "has no dropout (none whose mask is the other backends')"),
    "return_lse": ("log-sum-exp", "does not return the log-sum-exp"),
    "deterministic": ("deterministic", "does not promise the same bits in every backward pass"),
}
ALL = frozenset(FEATURES)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; everything else is refused. Lengths, strides, causal or full, and the scale are free in all of them."""

    features: frozenset[str]  # of FEATURES, forward and backward
    devices: tuple[str, ...] = ("cpu", "cuda")
    compute_capability: tuple[int, int] = (0, 0)  # the least, on CUDA
    dtypes: tuple[torch.dtype, ...] = (*HALF, torch.float32, torch.float64)
    head_dims: range = range(1, 65536)
    no_gradient: range = range(0)  # head_dims refused on SMALL_SHARED_MEMORY
    newer_gpus: bool = True  # runs on later compute capabilities too


def _features(names: str) -> frozenset[str]:
    assert ALL.issuperset(names.split()), names
    return frozenset(names.split())


# The library flash-attn: its log-sum-exp has no gradient, its dropout a mask of its own; the backward pass of version 4 on sm_90 has no
# windows, no softcap and no fixed order.
FLASH_ATTN = {
    2: Capabilities(
        _features("grouped unequal_causal window cu_seqlens alibi softcap deterministic"), ("cuda",), (8, 0), HALF, range(8, 257, 8)
    ),
    3: Capabilities(
        _features("grouped unequal_causal window cu_seqlens softcap deterministic"),
        ("cuda",), (9, 0), HALF, range(8, 257, 8), newer_gpus=False,
    ),
    4: Capabilities(_features("grouped unequal_causal cu_seqlens"), ("cuda",), (9, 0), HALF, range(64, 129, 32)),
}  # fmt: skip
FLASH_ATTN_PACKAGES = {4: "flash-attn-4", 3: "flash_attn_3", 2: "flash-attn"}  # the newest first


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


FLASH_ATTN_VERSION = next((version for version, package in FLASH_ATTN_PACKAGES.items() if _installed(package)), None)

# PyTorch's scaled_dot_product_attention has an argument for a mask that holds every score: what needs one is refused, but for causal
# attention over lengths that differ. Its dropout draws another mask than ours, and its backward passes on GPUs add up in any order.
BACKENDS = {
    "eager": Capabilities(ALL),
    "tiled": Capabilities(ALL),
    "sdpa": Capabilities(_features("grouped unequal_causal value_head_dim")),
    "sdpa_cudnn": Capabilities(_features("grouped"), ("cuda",), (8, 0), HALF, range(8, 129, 8)),
    "sdpa_flash": Capabilities(_features("grouped"), ("cuda",), (8, 0), HALF, range(8, 257, 8), range(200, 225, 8)),
    "sdpa_efficient": Capabilities(
        _features("unequal_causal value_head_dim"), ("cuda",), (5, 0), (*HALF, torch.float32), range(8, 65536, 8)
    ),
    "flex": Capabilities(ALL - {"dropout"}, ("cuda",), (8, 0), (*HALF, torch.float32), range(16, 257)),
    "flash_attn": FLASH_ATTN[FLASH_ATTN_VERSION or 2],
    "hopper": Capabilities(
        _features("grouped unequal_causal return_lse deterministic"), ("cuda",), (9, 0), HALF, range(64, 129, 64), newer_gpus=False
    ),
    "triton": Capabilities(ALL, ("cpu", "cuda") if INTERPRETED else ("cuda",), (8, 0), (*HALF, torch.float32), range(16, 257)),
}
REMEDIES = ("triton", "sdpa", "flex", "tiled", "eager")  # offered in this order when another backend is refused


def unsupported(
    backend: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int | None = None,
    compute_capability: tuple[int, int] | None = None,
    **features: bool,
) -> str | None:
    """Why `backend` cannot compute this, and which backends can; None when it can.

    value_head_dim: None means head_dim. compute_capability: of the CUDA device, None when not known yet (then it is not checked).
    features: names in FEATURES that are asked for, or not; value_head_dim is among them when it differs.
    """
    if backend == "auto":
        return None
    if backend not in BACKENDS:
        return f"attention.backend={backend} is not known; choose one of auto, {', '.join(BACKENDS)}"
    asked = dict(device_type=device_type, dtype=dtype, head_dim=head_dim, value_head_dim=value_head_dim)
    asked.update(compute_capability=compute_capability, **features)
    refusal = _refusal(backend, asked)
    if refusal is None:
        return None
    remedies = [name for name in REMEDIES if _unmet_need(name, **asked) is None][:2]
    return f"{refusal}; " + (f"use {' or '.join(remedies)}" if remedies else "no other backend can do this either")


def choose(
    *, device_type: str, dtype: torch.dtype, head_dim: int, compute_capability: tuple[int, int] | None = None, **asked
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
        not_triton = _refusal("triton", asked)
    if not_triton is None:
        return "triton", f"our portable kernel, because hopper {not_hopper}"
    not_sdpa = _refusal("sdpa", asked)
    if not_sdpa is None:
        return "sdpa", f"PyTorch's own choice of kernel, because {not_triton}"
    if _unmet_need("tiled", **asked) is None:
        return "tiled", f"the reference in plain PyTorch, because {not_triton} and {not_sdpa}"
    raise ValueError(unsupported("tiled", **asked))


def _refusal(backend: str, asked: dict) -> str | None:
    need = _unmet_need(backend, **asked)
    return None if need is None else f"attention.backend={backend} {need}"


def _unmet_need(backend, *, device_type, dtype, head_dim, value_head_dim=None, compute_capability=None, **features) -> str | None:
    can = BACKENDS[backend]
    if backend in ("triton", "hopper", "flex") and device_type == "cuda" and not TRITON_INSTALLED:
        return "needs the package triton, which is not installed"
    if backend == "flash_attn" and FLASH_ATTN_VERSION is None:
        return f"needs one of the packages {', '.join(FLASH_ATTN_PACKAGES.values())}, and none is installed (pip install flash-attn)"
    if device_type not in can.devices:
        hint = " (on the CPU only Triton's interpreter runs it: TRITON_INTERPRET=1, for tests)" if backend == "triton" else ""
        return f"runs on {' and '.join(can.devices)}, not on {device_type}{hint}"
    if backend == "triton" and INTERPRETED and dtype is torch.bfloat16:
        return "is wrong in bfloat16 under TRITON_INTERPRET=1 (the interpreter multiplies the raw bits; float16 and float32 are right)"
    if backend in ("hopper", "flex") and INTERPRETED:
        return "cannot run under TRITON_INTERPRET=1"
    if device_type == "cuda" and compute_capability is not None:
        too_old, too_new = compute_capability < can.compute_capability, compute_capability[0] > can.compute_capability[0]
        if too_old or too_new and not can.newer_gpus:
            return f"needs compute capability {_dotted(can.compute_capability)}, and this GPU has {_dotted(compute_capability)}"
    if backend == "hopper" and TRITON_VERSION not in GLUON_TESTED_WITH:
        return f"needs triton {' or '.join(GLUON_TESTED_WITH)}, and {TRITON_VERSION} is installed"
    if dtype not in can.dtypes:
        return f"needs {' or '.join(_name(d) for d in can.dtypes)}, not {_name(dtype)}"
    for which, number in (("head_dim", head_dim), ("a value head_dim", head_dim if value_head_dim is None else value_head_dim)):
        if not _within(number, can.head_dims):
            multiple = f", a multiple of {can.head_dims.step}" if can.head_dims.step > 1 else ""
            return f"needs {which} from {can.head_dims[0]} to {can.head_dims[-1]}{multiple}, not {number}"
    if compute_capability in SMALL_SHARED_MEMORY and _within(head_dim, can.no_gradient):
        return f"has no gradients for head_dim {head_dim} on compute capability {_dotted(compute_capability)}"
    if value_head_dim is not None and value_head_dim != head_dim and "value_head_dim" not in can.features:
        return FEATURES["value_head_dim"][1]
    for name, asked in features.items():
        if asked and name not in can.features:
            return FEATURES[name][1]
    return None


def _within(number, numbers: range) -> bool:
    """`number in numbers`, for a number that torch.compile may have made symbolic."""
    return numbers.start <= number < numbers.stop and (number - numbers.start) % numbers.step == 0


def _dotted(compute_capability):
    return ".".join(map(str, compute_capability))


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def sdpa(
    q, k, v, *, rules: Rules, sinks: None, return_lse: bool, kernel: SDPBackend | None = None
) -> tuple[torch.Tensor, None]:
    """torch's scaled_dot_product_attention; `kernel` forces one of its implementations. Shapes as in `attention`."""
    assert sinks is None and not return_lse, "refused by `unsupported`"
    seq_q, seq_k, causal = q.shape[1], k.shape[1], rules.causal
    if causal and seq_q > seq_k:  # the first queries see nothing: they give 0, and the rest is the square problem
        out, _ = sdpa(q[:, seq_q - seq_k :], k, v, rules=rules._replace(offset=0), sinks=None, return_lse=False, kernel=kernel)
        return pad(out, (0, 0, 0, 0, seq_q - seq_k, 0)), None
    if not (q.numel() and k.numel()):
        kernel = SDPBackend.MATH  # the others refuse empty tensors
    elif kernel is not None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as all named kernels require
    # is_causal aligns the first query with the first key, which is our definition for equal lengths alone.
    mask = visible(rules, range(seq_q), range(seq_k), q.device) if causal and seq_q != seq_k else None
    with sdpa_kernel(kernel) if kernel is not None else nullcontext():
        out = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=rules.scale,
            enable_gqa=True if q.shape[2] != k.shape[2] else False,  # a bool, where torch.compile has symbolic sizes
        )
    return out.transpose(1, 2), None
