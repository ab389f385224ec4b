"""FlashAttention-2 forward in portable Triton (Ampere and newer): `recipe::attention_forward`. `reference.tiled` is its specification.

Names carry their shape: M queries of a tile, N keys of a tile, D head_dim; q_MD is [M, D], s_MN a tile of scores.
Scores are kept in base 2, s * log2(e), because the hardware's exponential is exp2; the scale and log2(e) are one factor.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.attention.backends import INTERPRETED
from kernels.attention.tuning import tile

if INTERPRETED:
    import kernels.attention.interpreter  # noqa: F401

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_rows(
    base, row_stride, first_row, rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """Rows first_row .. first_row + ROWS of a [rows, HEAD_DIM] matrix, zeros outside it; 64-bit offset to the tile, 32-bit inside it."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    pointers = base + first_row.to(tl.int64) * row_stride + row[:, None] * row_stride + d[None, :]
    if CHECK_ROWS and BLOCK_D > HEAD_DIM:
        return tl.load(pointers, mask=(first_row + row < rows)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(pointers, mask=(first_row + row < rows)[:, None], other=0.0)
    if BLOCK_D > HEAD_DIM:
        return tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, row_stride, first_row, rows, x, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    pointers = base + first_row.to(tl.int64) * row_stride + row[:, None] * row_stride + d[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(first_row + row < rows)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def visible(query, key, seq_q, seq_k, CAUSAL: tl.constexpr):
    """Whether the query may see the key; both broadcastable index tensors. Keys past the end are hidden."""
    if CAUSAL:
        # A query before the end sees no key past it. One past the end is not stored, or, summed over in dkdv, has dO = 0 and delta 0.
        return key <= query + (seq_k - seq_q)
    return (key < seq_k) & (query >= 0)  # query >= 0 is always so: it broadcasts the mask to the tile


@triton.jit
def key_range(first_query, seq_q, seq_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(full, end): every query of the tile sees all keys before `full`, a multiple of BLOCK_N, and none sees a key from `end` on."""
    full = seq_k
    end = seq_k
    if CAUSAL:
        offset = seq_k - seq_q
        full = tl.minimum(seq_k, tl.maximum(0, first_query + 1 + offset))
        end = tl.minimum(seq_k, tl.maximum(0, first_query + BLOCK_M + offset))
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def _attend(
    acc_MD, max_M, sum_M, q_MD, k_base, v_base, k_stride, v_stride, first_query, start, stop, seq_q, seq_k, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys start .. stop (FlashAttention-2, Algorithm 1, lines 6 to 11)."""
    for first_key in tl.range(start, stop, BLOCK_N):
        first_key = tl.multiple_of(first_key, BLOCK_N)
        k_ND = load_rows(k_base, k_stride, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_KEYS)
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        if MASKED:
            query_M1 = (first_query + tl.arange(0, BLOCK_M))[:, None]
            key_1N = (first_key + tl.arange(0, BLOCK_N))[None, :]
            s_MN = tl.where(visible(query_M1, key_1N, seq_q, seq_k, CAUSAL), s_MN, -float("inf"))
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * scale_log2)
        if MASKED:
            # A row that has seen nothing: exp2(-inf - 0) = 0, where exp2(-inf + inf) is NaN.
            shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
        else:
            shift_M = new_max_M
        p_MN = tl.exp2(s_MN * scale_log2 - shift_M[:, None])
        rescale_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * rescale_M + tl.sum(p_MN, 1)
        acc_MD = acc_MD * rescale_M[:, None]
        v_ND = load_rows(v_base, v_stride, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_KEYS)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
        max_M = new_max_M
    return acc_MD, max_M, sum_M


@triton.jit
def forward_kernel(
    q, k, v, out, lse,
    heads, seq_q, seq_k, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M queries of one head; *_batch, *_row, *_head are strides in elements."""
    tiles = tl.cdiv(seq_q, BLOCK_M)
    program = tl.program_id(0)
    # Causal: the last queries see the most keys; starting them first leaves short programs for the end.
    first_query = (tiles - 1 - program % tiles if CAUSAL else program % tiles) * BLOCK_M
    batch_head = program // tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)

    q_MD = load_rows(q + batch * q_batch + head * q_head, q_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, not EVEN_M)
    k_base = k + batch * k_batch + head // GROUP * k_head
    v_base = v + batch * v_batch + head // GROUP * v_head

    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    full, end = key_range(first_query, seq_q, seq_k, BLOCK_M, BLOCK_N, CAUSAL)
    # Masked tiles first: after the loop of full tiles, ptxas would wait for every single product of both loops (C7515).
    if CAUSAL or not EVEN_N:
        acc_MD, max_M, sum_M = _attend(
            acc_MD, max_M, sum_M, q_MD, k_base, v_base, k_row, v_row, first_query, full, end, seq_q, seq_k, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    acc_MD, max_M, sum_M = _attend(
        acc_MD, max_M, sum_M, q_MD, k_base, v_base, k_row, v_row, first_query, 0, full, seq_q, seq_k, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, False, False, PRECISION,
    )  # fmt: skip

    query_M = first_query + tl.arange(0, BLOCK_M)
    sum_M = tl.where(sum_M == 0, 1.0, sum_M)  # rows that saw nothing: output 0, log-sum-exp -inf + log(1)
    tl.store(lse + batch_head.to(tl.int64) * seq_q + query_M, (max_M + tl.log2(sum_M)) * LN_2, mask=query_M < seq_q)
    acc_MD = acc_MD / sum_M[:, None]
    store_rows(out + batch * out_batch + head * out_head, out_row, first_query, seq_q, acc_MD, HEAD_DIM, BLOCK_M, BLOCK_D)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels read rows of consecutive elements, at any stride that keeps offsets inside a tile (at most 256 rows) in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**31 // 256 else x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless torch's own matmul may use TF32 (torch.set_float32_matmul_precision)."""
    return "tf32" if dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@torch.library.custom_op("recipe::attention_forward", mutates_args=())
def attention_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [batch, seq_q, heads, head_dim], lse [batch, heads, seq_q] float32, natural) of the tensors that `attention` describes."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    out, lse = outputs(q, k, v, causal, scale)
    block_m, block_n, warps, stages = tile(q.device, "forward", q.dtype, head_dim)
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(seq_q, block_m) * batch * heads,)](
            q, k, v, out, lse,
            heads, seq_q, seq_k, scale * LOG2_E,
            *strides(q), *strides(k), *strides(v), *strides(out),
            heads // kv_heads, head_dim, triton.next_power_of_2(head_dim), block_m, block_n,
            causal, seq_q % block_m == 0, seq_k % block_n == 0, dot_precision(q.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


@attention_forward.register_fake
def outputs(q, k, v, causal, scale):
    batch, seq_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq_q), dtype=torch.float32)


def save_for_backward(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, dlse):
    # Imported here because the backward's kernels use this file's helpers.
    from kernels.attention.triton_backward import attention_backward

    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *attention_backward(dout, dlse, q, k, v, out, lse, ctx.causal, ctx.scale), None, None


attention_forward.register_autograd(differentiate, setup_context=save_for_backward)
