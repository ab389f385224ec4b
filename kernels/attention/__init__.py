"""Scaled dot-product attention behind one function, `attention`; every backend computes the same function of the same tensors."""

import math
from functools import lru_cache, partial

import torch
from torch.nn.attention import SDPBackend

from kernels.attention.backends import BACKENDS, choose, sdpa, unsupported
from kernels.attention.masks import Rules, alibi_slopes, document_bounds
from kernels.attention.reference import eager, tiled
from kernels.attention.tuning import compute_capability, read_compute_capability

__all__ = ["BACKENDS", "alibi_slopes", "attention", "attention_packed", "choose", "unsupported"]

LN_2 = math.log(2)  # our kernels' log-sum-exps are of base 2


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    document_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V for every head, differentiable once in q, k, v and sinks (Vaswani et al. 2017, equation 1).

    q: [batch, seq_q, heads, head_dim]; k: [batch, seq_k, kv_heads, head_dim]; v: [batch, seq_k, kv_heads, value_head_dim], heads a multiple
    of kv_heads: query head h reads key head h // (heads / kv_heads) (grouped-query attention). One dtype: float16, bfloat16 or float32
    (`eager`, `tiled` and `sdpa` also take float64). Strided views, such as slices of a packed projection, are read in place; only a last
    dimension that is not dense is copied.

    The scores s of query i and key j, before the softmax over the keys, are made in this order:
        scale         s = scale * q_i . k_j; above 0 and finite, default head_dim ** -0.5.
        softcap       s = softcap * tanh(s / softcap); above 0.
        alibi_slopes  s = s - slope * |i + seq_k - seq_q - j|; float32 [heads] or [batch, heads], without a gradient.
        causal        query i sees the keys j <= i + seq_k - seq_q (the last query sees all).
        window        (left, right): query i sees the keys from i + seq_k - seq_q - left to i + seq_k - seq_q + right; None has no end.
                      A number w is (w - 1, 0): w keys, the query's own the last.
        document_ids  int32 [batch, seq], seq_q = seq_k = seq: a query sees its own document, the run of equal ids that it stands in.
        cu_seqlens    the same for batch 1, as int32 [documents + 1]: where each begins, first 0, last seq. On a GPU they are not checked.
        sinks         [heads], any floating dtype: one more score of every query of the head, with no value; takes its share of the softmax.
        dropout_p     of the probabilities after the softmax, from 0 to below 1; the rest are divided by 1 - dropout_p. The mask follows
                      from two numbers drawn of torch's generator for q's device: the same in every backend, and in a recomputation.

    A query that sees nothing gives 0, without a sink a log-sum-exp of -inf, and zero gradients. backend: a name in `backends.BACKENDS`, or
    "auto", which chooses at each call, by that call's tensors and arguments (see `choose`). deterministic: refuse backends whose backward
    passes may differ in the last bits from one to the next. torch.autocast does not reach inside.

    Returns the output [batch, seq_q, heads, value_head_dim] in q's dtype; with return_lse also the natural log-sum-exp of the scores, sink
    included, [batch, heads, seq_q], float32 (float64 for float64 inputs), differentiable too: outputs over two sets of keys merge by it.
    ValueError when arguments do not fit together or the backend cannot do what is asked.
    """
    return _attend(
        q, k, v, None, causal=causal, window=window, document_ids=document_ids, cu_seqlens=cu_seqlens, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, scale=scale, backend=backend, deterministic=deterministic, return_lse=return_lse,
    )  # fmt: skip


def attention_packed(
    qkv: torch.Tensor, *, heads: int, kv_heads: int | None = None, **options
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of one projection: of its slices, but on `triton` and `hopper` their gradients are written into one buffer, where autograd would copy
    three gradients into a fourth tensor.

    qkv: [batch, seq, heads + 2 * kv_heads, head_dim], the heads of Q, then of K, then of V; or [batch, seq, 3, heads, head_dim].
    kv_heads: default heads. options: those of `attention`, by name. Returns and raises what `attention` does.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    packed = qkv.flatten(2, 3) if qkv.ndim == 5 else qkv
    if packed.ndim != 4 or packed.shape[2] != heads + 2 * kv_heads:
        expected = f"[batch, seq, {heads} + 2 * {kv_heads}, head_dim] or, without fewer key heads, [batch, seq, 3, {heads}, head_dim]"
        raise ValueError(f"attention_packed: qkv must be {expected}, got {list(qkv.shape)}")
    return _attend(*packed.split([heads, kv_heads, kv_heads], dim=2), packed, **_DEFAULTS | options)


_DEFAULTS = attention.__kwdefaults__


def _attend(
    q, k, v, packed, *,
    causal, window, document_ids, cu_seqlens, alibi_slopes, softcap, sinks, dropout_p, scale, backend, deterministic, return_lse,
):  # fmt: skip
    """packed: the tensor that q, k and v are slices of; or None."""
    # What was asked for once is not looked into again: on a GPU the CPU must keep ahead. torch.compile and its tensors without data have
    # symbolic sizes, which nothing is found by.
    kind = _known_kind if q.is_cuda and type(q) is torch.Tensor and not torch.compiler.is_dynamo_compiling() else _kind
    backend, rules = kind(
        (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device),
        causal, tuple(window) if isinstance(window, list) else window, softcap, dropout_p, scale, backend, deterministic, return_lse,
        document_ids is not None, cu_seqlens is not None, alibi_slopes is not None, sinks is not None,
    )  # fmt: skip
    if document_ids is not None or cu_seqlens is not None:
        start, end = _documents(q, document_ids, cu_seqlens)
        rules = rules._replace(doc_start=start, doc_end=end, cu_seqlens=cu_seqlens)
    if alibi_slopes is not None:
        rules = rules._replace(alibi_slopes=_slopes(q, alibi_slopes))
    if sinks is not None and not (sinks.shape == q.shape[2:3] and sinks.is_floating_point() and sinks.device == q.device):
        raise ValueError(f"attention: sinks must be one floating-point number a query head, [{q.shape[2]}] on {q.device}, got {_of(sinks)}")
    if dropout_p > 0:
        rules = rules._replace(seed=torch.randint(2**63 - 1, (2,), device=q.device))
    if packed is not None and backend in _PACKED:
        compute = partial(_PACKED[backend], packed, q.shape[2], k.shape[2], rules=rules, sinks=sinks, return_lse=return_lse)
    else:
        compute = partial(_IMPLEMENTATIONS[backend], q, k, v, rules=rules, sinks=sinks, return_lse=return_lse)
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        # It would change some operations of some backends: all of them compute in the dtype that they are given.
        with torch.autocast(device_type, enabled=False):
            out, lse = compute()
    else:
        out, lse = compute()
    return (out, lse) if return_lse else out


def _kind(
    shapes, dtypes, devices, causal, window, softcap, dropout_p, scale, backend, deterministic, return_lse, ids, cu_seqlens, alibi, sinks
) -> tuple[str, Rules]:
    """(the backend, the rules without their tensors) of a call whose arguments fit together; the last four: whether there are such."""
    _check_shapes(shapes, dtypes, devices)
    _check_options(softcap, dropout_p, scale)
    q, k, v = shapes
    seq_q, seq_k, head_dim = q[1], k[1], q[3]
    left, right = _bounds(causal, window)
    if ids and cu_seqlens:
        raise ValueError("attention: document_ids and cu_seqlens say the same thing; give one of them")
    if (ids or cu_seqlens) and seq_q != seq_k:
        raise ValueError(f"attention: documents need as many queries as keys, got {seq_q} and {seq_k}")
    rules = Rules(
        head_dim**-0.5 if scale is None else float(scale), seq_k - seq_q, left, right,
        softcap=softcap, dropout_p=dropout_p, deterministic=deterministic,
    )  # fmt: skip
    asked = dict(
        device_type=devices[0].type,
        dtype=dtypes[0],
        head_dim=head_dim,
        value_head_dim=v[3],
        compute_capability=_compute_capability(devices[0]),
        grouped=True if q[2] != k[2] else False,  # a bool, where torch.compile has symbolic sizes
        unequal_causal=(left is not None or right is not None) and seq_q != seq_k,
        window=(left is not None or right is not None) and not rules.causal,
        document_ids=ids,
        cu_seqlens=cu_seqlens,
        alibi=alibi,
        softcap=softcap is not None,
        sinks=sinks,
        dropout=dropout_p > 0,
        return_lse=return_lse,
        deterministic=deterministic,
    )
    if backend == "auto":
        backend, _ = choose(**asked)
    elif reason := unsupported(backend, **asked):
        raise ValueError(reason)
    return backend, rules


_known_kind = lru_cache(4096)(_kind)  # lengths that differ from call to call would fill the memory


def _compute_capability(device):
    if device.type != "cuda":
        return None
    return read_compute_capability(device) if torch.compiler.is_compiling() else compute_capability(device)


def _check_shapes(shapes, dtypes, devices):
    q, k, v = shapes
    wrong = None
    if not len(q) == len(k) == len(v) == 4:
        wrong = "q, k and v are [batch, seq, heads, head_dim]"
    elif k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        wrong = "q and k must agree in batch and head_dim, k and v in all dimensions but the last"
    elif k[2] == 0 or q[2] % k[2]:
        wrong = "the number of query heads must be a multiple of the number of key heads"
    elif q[3] == 0 or v[3] == 0:
        wrong = "head_dim must be above 0"
    if wrong:
        raise ValueError(f"attention: {wrong}, got q {list(q)}, k {list(k)}, v {list(v)}")
    if not (dtypes[0] == dtypes[1] == dtypes[2] and devices[0] == devices[1] == devices[2]):
        got = ", ".join(f"{dtype} on {device}" for dtype, device in zip(dtypes, devices))
        raise ValueError(f"attention: q, k and v must share dtype and device, got {got}")


def _check_options(softcap, dropout_p, scale):
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention: scale must be above 0 and finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"attention: softcap must be above 0 and finite, got {softcap}; None has no cap")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be from 0 to below 1, got {dropout_p}")


def _bounds(causal, window) -> tuple[int | None, int | None]:
    """How many keys a query sees before its own position, and behind it; None: all."""
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"attention: a window of {window} keys sees nothing; it counts the query's own, so 1 is the least")
        window = (window - 1, 0)
    left, right = (None, None) if window is None else window
    for number in (left, right):
        if number is not None and number < 0:
            raise ValueError(f"attention: window is (left, right), each 0 or more, or None without an end, got {window}")
    return left, 0 if causal else right


def _documents(q, document_ids, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor]:
    """doc_start and doc_end of `Rules`."""
    batch, seq = q.shape[:2]
    if document_ids is not None:
        if document_ids.shape != (batch, seq) or document_ids.dtype is not torch.int32 or document_ids.device != q.device:
            raise ValueError(f"attention: document_ids must be int32 [{batch}, {seq}] on {q.device}, got {_of(document_ids)}")
    elif batch != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype is not torch.int32 or cu_seqlens.device != q.device:
        needed = f"int32 [documents + 1] on {q.device}, and batch 1 (or use document_ids)"
        raise ValueError(f"attention: cu_seqlens must be {needed}, got {_of(cu_seqlens)} and batch {batch}")
    elif cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere looking would wait for the GPU
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != seq or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"attention: cu_seqlens must rise from 0 to seq {seq}, got {cu_seqlens.tolist()}")
    return document_bounds(document_ids, cu_seqlens, seq)


def _slopes(q, slopes):
    """[1 or batch, heads]."""
    batch, _, heads, _ = q.shape
    if slopes.shape not in ((heads,), (batch, heads)) or slopes.dtype is not torch.float32 or slopes.device != q.device:
        expected = f"float32 [{heads}] or [{batch}, {heads}] on {q.device}"
        raise ValueError(f"attention: alibi_slopes must be {expected}, got {_of(slopes)}")
    if slopes.requires_grad:
        raise ValueError("attention: alibi_slopes get no gradient; detach() them")
    return slopes.view(-1, heads)


def _of(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


# Those below import on first use: a CPU installation of torch comes without triton, and flash-attn may not be there.
def _triton(q, k, v, *, rules, sinks, return_lse):
    from kernels.attention.triton_forward import attention_forward, call

    out, lse = call(attention_forward, q, k, v, *_triton_options(rules, sinks))
    return out, lse * LN_2 if return_lse else None


def _triton_packed(packed, heads, kv_heads, *, rules, sinks, return_lse):
    from kernels.attention.triton_packed import attention_packed_forward, call

    out, lse = call(attention_packed_forward, packed, heads, kv_heads, *_triton_options(rules, sinks))
    return out, lse * LN_2 if return_lse else None


def _triton_options(rules, sinks):
    """causal, scale and the fields of `triton_forward.Features`."""
    scale, _, left, right, doc_start, doc_end, _, slopes, softcap, dropout_p, seed, _ = rules
    causal = rules.causal
    if slopes is not None and len(slopes) == 1:
        slopes = slopes[0]
    return causal, scale, left, None if causal else right, softcap, slopes, sinks, doc_start, doc_end, dropout_p, seed


def _hopper(q, k, v, *, rules, sinks, return_lse):
    from kernels.attention.hopper_forward import attention_forward, call

    out, lse = call(attention_forward, q, k, v, rules.causal, rules.scale, rules.deterministic)
    return out, lse * LN_2 if return_lse else None


def _hopper_packed(packed, heads, kv_heads, *, rules, sinks, return_lse):
    from kernels.attention.hopper_packed import attention_packed_forward, call

    out, lse = call(attention_packed_forward, packed, heads, kv_heads, rules.causal, rules.scale, rules.deterministic)
    return out, lse * LN_2 if return_lse else None


def _flex(q, k, v, **options):
    from kernels.attention.flex import flex

    return flex(q, k, v, **options)


def _flash_attn(q, k, v, **options):
    from kernels.attention.flash_attn import flash_attn

    return flash_attn(q, k, v, **options)


_IMPLEMENTATIONS = {
    "eager": eager,
    "tiled": tiled,
    "sdpa": sdpa,
    "sdpa_cudnn": partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": partial(sdpa, kernel=SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
    "flash_attn": _flash_attn,
    "triton": _triton,
    "hopper": _hopper,
}
_PACKED = {"triton": _triton_packed, "hopper": _hopper_packed}  # where the gradients of slices are written into one buffer
