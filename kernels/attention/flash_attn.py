"""The library flash-attn under our signature: version 2 (package flash-attn), 3 (flash_attn_3) or 4 (flash-attn-4), the newest installed."""

import torch

from kernels.attention.backends import FLASH_ATTN_VERSION
from kernels.attention.masks import Rules
from kernels.attention.reference import eager


def flash_attn(q, k, v, *, rules: Rules, sinks: None, return_lse: bool) -> tuple[torch.Tensor, None]:
    """Shapes as in `attention`; `backends.FLASH_ATTN` says what each version can do."""
    assert sinks is None and not return_lse, "refused by `unsupported`"
    if not (q.numel() and k.numel()):
        return eager(q, k, v, rules=rules, sinks=None, return_lse=False)
    without_end = None if FLASH_ATTN_VERSION == 4 else -1
    window = tuple(without_end if end is None else end for end in (rules.left, rules.right))
    options = dict(softmax_scale=rules.scale, causal=rules.causal, window_size=(without_end, without_end) if rules.causal else window)
    if rules.softcap is not None:
        options["softcap"] = rules.softcap
    if rules.deterministic:
        options["deterministic"] = True
    if rules.alibi_slopes is not None:
        options["alibi_slopes"] = rules.alibi_slopes.expand(q.shape[0], -1).contiguous()
    whole, packed = _functions()
    if rules.cu_seqlens is None:
        return _output(whole(q, k, v, **options)), None
    # The longest document is known on the GPU alone; the whole length bounds it, and only makes the grid larger.
    lengths = dict(cu_seqlens_q=rules.cu_seqlens, cu_seqlens_k=rules.cu_seqlens, max_seqlen_q=q.shape[1], max_seqlen_k=k.shape[1])
    return _output(packed(q[0], k[0], v[0], **lengths, **options))[None], None


def _functions():
    if FLASH_ATTN_VERSION == 4:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    elif FLASH_ATTN_VERSION == 3:
        from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    return flash_attn_func, flash_attn_varlen_func


def _output(result):
    """Versions differ in whether the log-sum-exp comes along."""
    return result[0] if isinstance(result, tuple) else result
