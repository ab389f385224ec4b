"""FlashAttention-2 backward in portable Triton: `recipe::attention_backward`. `reference.tiled` is its specification.

Three kernels, no atomics, so the same bits every time: the rows' log-sum-exp and delta; dK and dV, a program per key tile; dQ, a program
per query tile. Names carry their shape: M queries of a tile, N keys of a tile, D head_dim. The key kernel computes S and dP transposed,
[N, M], so that P and dS are left operands as they stand.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.triton_forward import LOG2_E, dense_rows, dot_precision, key_range, load_rows, store_rows, strides, visible
from kernels.attention.tuning import tile

ROWS_PER_PROGRAM = 64  # of the first kernel, which is bound by memory alone


@triton.jit
def row_kernel(
    dout, dlse, out, lse, lse_log2, delta,
    heads, seq_q, log2_e,
    dout_batch, dout_row, dout_head, out_batch, out_row, out_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse_log2 = L log2(e) and delta = rowsum(dO * O) - dL (0 where L is -inf), both [batch, heads, seq_q] float32; dlse may be None."""
    tiles = tl.cdiv(seq_q, BLOCK_M)
    first_query = tl.program_id(0) % tiles * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    dout_MD = load_rows(dout + batch * dout_batch + head * dout_head, dout_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    out_MD = load_rows(out + batch * out_batch + head * out_head, out_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    delta_M = tl.sum(dout_MD.to(tl.float32) * out_MD.to(tl.float32), 1)

    query_M = first_query + tl.arange(0, BLOCK_M)
    row_M = batch_head * seq_q + query_M
    if dlse is not None:
        delta_M -= tl.load(dlse + row_M, mask=query_M < seq_q, other=0.0)
    lse_M = tl.load(lse + row_M, mask=query_M < seq_q)
    # A query that saw nothing has P = 0, but 0 * NaN is NaN, and the gradient of its -inf may be that (logaddexp's is).
    delta_M = tl.where(lse_M == -float("inf"), 0.0, delta_M)
    tl.store(delta + row_M, delta_M, mask=query_M < seq_q)
    tl.store(lse_log2 + row_M, lse_M * log2_e, mask=query_M < seq_q)


@triton.jit
def _load_per_query(base, query_M, seq_q, CHECK: tl.constexpr):
    if CHECK:
        return tl.load(base + query_M, mask=query_M < seq_q, other=0.0)
    return tl.load(base + query_M)


@triton.jit
def _add_queries(
    dk_ND, dv_ND, k_ND, v_ND, q_base, dout_base, lse_base, delta_base, q_stride, dout_stride,
    first_key, start, stop, seq_q, seq_k, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHECK_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries start .. stop add to dK / scale and dV (FlashAttention-2, Algorithm 2, lines 8 to 16).

    Queries past the end are loaded as zeros with delta 0, and so add nothing.
    """
    for first_query in tl.range(start, stop, BLOCK_M):
        first_query = tl.multiple_of(first_query, BLOCK_M)
        query_M = first_query + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q_base, q_stride, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, CHECK_QUERIES)
        lse_M = _load_per_query(lse_base, query_M, seq_q, CHECK_QUERIES)
        s_NM = tl.dot(k_ND, q_MD.T, input_precision=PRECISION)
        p_NM = tl.exp2(s_NM * scale_log2 - lse_M[None, :])
        if MASKED:
            key_N1 = (first_key + tl.arange(0, BLOCK_N))[:, None]
            p_NM = tl.where(visible(query_M[None, :], key_N1, seq_q, seq_k, CAUSAL), p_NM, 0.0)
        dout_MD = load_rows(dout_base, dout_stride, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, CHECK_QUERIES)
        delta_M = _load_per_query(delta_base, query_M, seq_q, CHECK_QUERIES)
        dp_NM = tl.dot(v_ND, dout_MD.T, input_precision=PRECISION)
        dv_ND = tl.dot(p_NM.to(dout_MD.dtype), dout_MD, dv_ND, input_precision=PRECISION)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_ND


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse_log2, delta, dk, dv,
    kv_heads, seq_q, seq_k, scale, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head, dk_batch, dk_row, dk_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N keys of one key head, over all query heads that share it; dk and dv share their strides.

    Causal: the first keys are seen by the most queries, so the longest programs come first as they stand.
    """
    tiles = tl.cdiv(seq_k, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    batch_head = tl.program_id(0) // tiles
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)

    k_ND = load_rows(k + batch * k_batch + kv_head * k_head, k_row, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, not EVEN_N)
    v_ND = load_rows(v + batch * v_batch + kv_head * v_head, v_row, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, not EVEN_N)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Queries before `begin` see no key of the tile, those from `full` on see all of them; `full` may lie past seq_q, and then none do.
    begin = 0
    full = 0
    if CAUSAL:
        offset = seq_k - seq_q
        begin = tl.maximum(0, first_key - offset) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = q + batch * q_batch + head * q_head
        dout_base = dout + batch * dout_batch + head * dout_head
        row = (batch * kv_heads * GROUP + head) * seq_q
        if CAUSAL:
            dk_ND, dv_ND = _add_queries(
                dk_ND, dv_ND, k_ND, v_ND, q_base, dout_base, lse_log2 + row, delta + row, q_row, dout_row,
                first_key, begin, tl.minimum(full, seq_q), seq_q, seq_k, scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, True, not EVEN_M, PRECISION,
            )  # fmt: skip
        dk_ND, dv_ND = _add_queries(
            dk_ND, dv_ND, k_ND, v_ND, q_base, dout_base, lse_log2 + row, delta + row, q_row, dout_row,
            first_key, full, seq_q, seq_q, seq_k, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, False, not EVEN_M, PRECISION,
        )  # fmt: skip

    store_rows(dk + batch * dk_batch + kv_head * dk_head, dk_row, first_key, seq_k, dk_ND * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(dv + batch * dk_batch + kv_head * dk_head, dk_row, first_key, seq_k, dv_ND, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _add_keys(
    dq_MD, q_MD, dout_MD, lse_M, delta_M, k_base, v_base, k_stride, v_stride, first_query, start, stop, seq_q, seq_k, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys start .. stop add to dQ / scale."""
    for first_key in tl.range(start, stop, BLOCK_N):
        first_key = tl.multiple_of(first_key, BLOCK_N)
        k_ND = load_rows(k_base, k_stride, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_KEYS)
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        p_MN = tl.exp2(s_MN * scale_log2 - lse_M[:, None])
        if MASKED:
            query_M1 = (first_query + tl.arange(0, BLOCK_M))[:, None]
            key_1N = (first_key + tl.arange(0, BLOCK_N))[None, :]
            p_MN = tl.where(visible(query_M1, key_1N, seq_q, seq_k, CAUSAL), p_MN, 0.0)
        v_ND = load_rows(v_base, v_stride, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_KEYS)
        dp_MN = tl.dot(dout_MD, v_ND.T, input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD


@triton.jit
def dq_kernel(
    q, k, v, dout, lse_log2, delta, dq,
    heads, seq_q, seq_k, scale, scale_log2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head, dq_batch, dq_row, dq_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M queries of one head, in the forward's order."""
    tiles = tl.cdiv(seq_q, BLOCK_M)
    program = tl.program_id(0)
    first_query = (tiles - 1 - program % tiles if CAUSAL else program % tiles) * BLOCK_M
    batch_head = program // tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)

    q_MD = load_rows(q + batch * q_batch + head * q_head, q_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, not EVEN_M)
    dout_MD = load_rows(dout + batch * dout_batch + head * dout_head, dout_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, not EVEN_M)
    query_M = first_query + tl.arange(0, BLOCK_M)
    row = batch_head.to(tl.int64) * seq_q
    lse_M = _load_per_query(lse_log2 + row, query_M, seq_q, not EVEN_M)
    delta_M = _load_per_query(delta + row, query_M, seq_q, not EVEN_M)
    k_base = k + batch * k_batch + head // GROUP * k_head
    v_base = v + batch * v_batch + head // GROUP * v_head

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full, end = key_range(first_query, seq_q, seq_k, BLOCK_M, BLOCK_N, CAUSAL)
    if CAUSAL or not EVEN_N:
        dq_MD = _add_keys(
            dq_MD, q_MD, dout_MD, lse_M, delta_M, k_base, v_base, k_row, v_row, first_query, full, end, seq_q, seq_k, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    dq_MD = _add_keys(
        dq_MD, q_MD, dout_MD, lse_M, delta_M, k_base, v_base, k_row, v_row, first_query, 0, full, seq_q, seq_k, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, False, False, PRECISION,
    )  # fmt: skip
    store_rows(dq + batch * dq_batch + head * dq_head, dq_row, first_query, seq_q, dq_MD * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@torch.library.custom_op("recipe::attention_backward", mutates_args=())
def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), shaped as q, k and v, from the gradients of `attention_forward`'s two outputs and all it saved."""
    q, k, v, dout, out = (dense_rows(x) for x in (q, k, v, dout, out))
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    dq, dk, dv = _gradients(dout, dlse, q, k, v, out, lse, causal, scale)
    lse_log2, delta = torch.empty_like(lse), torch.empty_like(lse)
    block_d = triton.next_power_of_2(head_dim)
    constants = (heads // kv_heads, head_dim, block_d)
    precision = dot_precision(q.dtype)

    with torch.cuda.device_of(q):
        row_kernel[(triton.cdiv(seq_q, ROWS_PER_PROGRAM) * batch * heads,)](
            dout, None if dlse is None else dlse.contiguous(), out, lse.contiguous(), lse_log2, delta,
            heads, seq_q, LOG2_E,
            *strides(dout), *strides(out),
            head_dim, block_d, ROWS_PER_PROGRAM,
        )  # fmt: skip

        block_m, block_n, warps, stages = tile(q.device, "dkdv", q.dtype, head_dim)
        dkdv_kernel[(triton.cdiv(seq_k, block_n) * batch * kv_heads,)](
            q, k, v, dout, lse_log2, delta, dk, dv,
            kv_heads, seq_q, seq_k, scale, scale * LOG2_E,
            *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dk),
            *constants, block_m, block_n, causal, seq_q % block_m == 0, seq_k % block_n == 0, precision,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

        block_m, block_n, warps, stages = tile(q.device, "dq", q.dtype, head_dim)
        dq_kernel[(triton.cdiv(seq_q, block_m) * batch * heads,)](
            q, k, v, dout, lse_log2, delta, dq,
            heads, seq_q, seq_k, scale, scale * LOG2_E,
            *strides(q), *strides(k), *strides(v), *strides(dout), *strides(dq),
            *constants, block_m, block_n, causal, seq_q % block_m == 0, seq_k % block_n == 0, precision,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _gradients(dout, dlse, q, k, v, out, lse, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
