"""FlashAttention-2 backward in portable Triton: `recipe::attention_backward`. `reference.tiled` is its specification.

Three kernels, no atomics, so the same bits every time: the rows' log-sum-exp and delta; dK and dV, a program per key tile; dQ, a program
per query tile. Names carry their shape, as in triton_tiles.py. The key kernel computes S and dP transposed, [N, M], so that P and dS are
left operands as they stand.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from kernels.attention.operators import launch_specialised, operator, planned, strides
from kernels.attention.triton_forward import (
    FEATURES_SCHEMA,
    Features,
    asked,
    blocks,
    dense,
    dense_rows,
    dot_precision,
    kernel_arguments,
    pointers,
    row_strides,
    widths,
)
from kernels.attention.triton_tiles import (
    LOG2_E,
    UNSPECIALISED,
    Columns,
    Scoring,
    bounded_columns,
    head_dropout,
    head_slope,
    keep_mask,
    kept_scale,
    key_columns,
    load_rows,
    next_block,
    query_tile,
    score,
    store_rows,
    visible,
)
from kernels.attention.tuning import tile

ROWS_PER_PROGRAM = 64  # of the first kernel, which is bound by memory alone


@triton.jit
def row_kernel(
    dout, dlse, out, lse, padded_lse, delta, states,
    heads, seq_q, rows, log2_e,
    dout_batch, dout_row, dout_head, out_batch, out_row, out_head,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dL, where L, the log-sum-exp of base e, is lse / log2(e), and dlse may be None; 0 where L is -inf.

    [batch, heads, rows] float32, 0 from seq_q on, and so is padded_lse, or None where rows is seq_q. states, or None, int32 [batch, heads,
    rows / BLOCK_M, VALUE_DIM / 64], are set to 0.
    """
    if states is not None:
        tl.store(states + tl.program_id(0) * (VALUE_DIM // 64) + tl.arange(0, VALUE_DIM // 64), 0)
    tiles = tl.cdiv(rows, BLOCK_M)
    first_query = tl.program_id(0) % tiles * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    dout_MV = load_rows(dout + batch * dout_batch + head * dout_head, dout_row, first_query, seq_q, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    out_MV = load_rows(out + batch * out_batch + head * out_head, out_row, first_query, seq_q, VALUE_DIM, BLOCK_M, BLOCK_V, True)
    delta_M = tl.sum(dout_MV.to(tl.float32) * out_MV.to(tl.float32), 1)

    query_M = first_query + tl.arange(0, BLOCK_M)
    row_M = batch_head * seq_q + query_M
    if dlse is not None:
        delta_M -= tl.load(dlse + row_M, mask=query_M < seq_q, other=0.0) * log2_e
    lse_M = tl.load(lse + row_M, mask=query_M < seq_q, other=0.0)
    # A query that saw nothing has P = 0, but 0 * NaN is NaN, and the gradient of its -inf may be that (logaddexp's is).
    delta_M = tl.where(lse_M == -float("inf"), 0.0, delta_M)
    row_M = batch_head * rows + query_M
    tl.store(delta + row_M, delta_M, mask=query_M < rows)
    if padded_lse is not None:
        tl.store(padded_lse + row_M, lse_M, mask=query_M < rows)


@triton.jit
def _load_per_query(base, query_M, seq_q, CHECK: tl.constexpr):
    if CHECK:
        return tl.load(base + query_M, mask=query_M < seq_q, other=0.0)
    return tl.load(base + query_M)


@triton.jit
def _query_columns(
    first_key, seq_q, seq_k, window_left, window_right, doc_start, doc_end, batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The queries that see a tile of keys. Queries past the end add nothing, and so need no mask without bounds."""
    if window_left is None and window_right is None and doc_start is None:
        start = 0
        full = 0
        if CAUSAL:  # `full` may lie past seq_q, and then no query sees the whole tile
            offset = seq_k - seq_q
            start = tl.maximum(0, first_key - offset) // BLOCK_M * BLOCK_M
            full = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
        return Columns(start, tl.minimum(full, seq_q), full, seq_q, start, full)
    else:
        right = 0 if CAUSAL else window_right
        key_N = first_key + tl.arange(0, BLOCK_N)
        return bounded_columns(key_N, seq_k, seq_q, right, window_left, doc_start, doc_end, batch, BLOCK_M)


@triton.jit
def _add_queries(
    dk_ND, dv_NV, k_ND, v_NV, q_base, dout_base, lse_base, delta_base, q_stride, dout_stride,
    columns, how, drop, first_key, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    CHECK_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the masked or the full columns of queries add to dK / scale and dV (FlashAttention-2, Algorithm 2, lines 8 to 16).

    Queries past the end are loaded as zeros with delta 0, and so add nothing.
    """
    for first_query in tl.range(
        columns.start if MASKED else columns.full_start, columns.stop if MASKED else columns.full_stop, BLOCK_M
    ):  # fmt: skip
        first_query = tl.multiple_of(next_block(first_query, columns, MASKED, BOUNDED), BLOCK_M)
        query_M = first_query + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q_base, q_stride, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, CHECK_QUERIES)
        lse_M = _load_per_query(lse_base, query_M, seq_q, CHECK_QUERIES)
        s_NM = tl.dot(k_ND, q_MD.T, input_precision=PRECISION)
        key_N1 = (first_key + tl.arange(0, BLOCK_N))[:, None]
        s_NM, factor, cap_slope = score(s_NM, query_M[None, :], key_N1, seq_q, seq_k, how)
        p_NM = tl.exp2(s_NM * factor - lse_M[None, :])
        if MASKED:
            if BOUNDED:
                seen_NM = (query_M[None, :] >= columns.low[:, None]) & (query_M[None, :] < columns.high[:, None])
            else:
                seen_NM = visible(query_M[None, :], key_N1, seq_q, seq_k, CAUSAL)
            p_NM = tl.where(seen_NM, p_NM, 0.0)
        dout_MV = load_rows(dout_base, dout_stride, first_query, seq_q, VALUE_DIM, BLOCK_M, BLOCK_V, CHECK_QUERIES)
        delta_M = _load_per_query(delta_base, query_M, seq_q, CHECK_QUERIES)
        dp_NM = tl.dot(v_NV, dout_MV.T, input_precision=PRECISION)
        kept_NM = p_NM
        if drop is not None:
            keep_NM = keep_mask(drop, first_query, first_key, BLOCK_M, BLOCK_N).T
            kept_NM = tl.where(keep_NM, p_NM, 0.0)
            dp_NM = tl.where(keep_NM, dp_NM * kept_scale(drop.threshold), 0.0)
        dv_NV = tl.dot(kept_NM.to(dout_MV.dtype), dout_MV, dv_NV, input_precision=PRECISION)
        ds_NM = p_NM * (dp_NM - delta_M[None, :]) * cap_slope
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_NV


@triton.jit(do_not_specialize=UNSPECIALISED)
def dkdv_kernel(
    # pointers; None for what is absent
    q, k, v, dout, lse_log2, delta, dk, dv, alibi_slopes, doc_start, doc_end, dropout_seed,
    # shapes and numbers; None for what is absent
    kv_heads, seq_q, seq_k, scale, scale_log2, softcap_log2, window_left, window_right, dropout_threshold,
    # strides, in elements
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    # constants
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N keys of one key head, over all query heads that share it.

    Causal: the first keys are seen by the most queries, so the longest programs come first as they stand.
    """
    BOUNDED: tl.constexpr = window_left is not None or window_right is not None or doc_start is not None
    tiles = tl.cdiv(seq_k, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    batch_head = tl.program_id(0) // tiles
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)

    k_ND = load_rows(k + batch * k_batch + kv_head * k_head, k_row, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, not EVEN_N)
    v_NV = load_rows(v + batch * v_batch + kv_head * v_head, v_row, first_key, seq_k, VALUE_DIM, BLOCK_N, BLOCK_V, not EVEN_N)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_NV = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    columns = _query_columns(first_key, seq_q, seq_k, window_left, window_right, doc_start, doc_end, batch, BLOCK_M, BLOCK_N, CAUSAL)

    for member in range(GROUP):
        head = kv_head * GROUP + member
        query_head = batch * kv_heads * GROUP + head
        slope_log2 = None if alibi_slopes is None else head_slope(alibi_slopes, query_head)
        how = Scoring(scale_log2, softcap_log2, slope_log2)
        drop = None if dropout_seed is None else head_dropout(dropout_seed, dropout_threshold, query_head)
        q_base = q + batch * q_batch + head * q_head
        dout_base = dout + batch * dout_batch + head * dout_head
        row = query_head * seq_q
        if CAUSAL or BOUNDED:
            dk_ND, dv_NV = _add_queries(
                dk_ND, dv_NV, k_ND, v_NV, q_base, dout_base, lse_log2 + row, delta + row, q_row, dout_row,
                columns, how, drop, first_key, seq_q, seq_k,
                HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, BOUNDED, True, not EVEN_M, PRECISION,
            )  # fmt: skip
        dk_ND, dv_NV = _add_queries(
            dk_ND, dv_NV, k_ND, v_NV, q_base, dout_base, lse_log2 + row, delta + row, q_row, dout_row,
            columns, how, drop, first_key, seq_q, seq_k,
            HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, BOUNDED, False, not EVEN_M, PRECISION,
        )  # fmt: skip

    if dropout_seed is not None:
        dv_NV *= kept_scale(dropout_threshold)
    store_rows(dk + batch * dk_batch + kv_head * dk_head, dk_row, first_key, seq_k, dk_ND * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(dv + batch * dv_batch + kv_head * dv_head, dv_row, first_key, seq_k, dv_NV, VALUE_DIM, BLOCK_N, BLOCK_V)


@triton.jit
def _add_keys(
    dq_MD, q_MD, dout_MV, lse_M, delta_M, k_base, v_base, k_stride, v_stride, columns, how, drop, first_query, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the masked or the full columns of keys add to dQ / scale."""
    for first_key in tl.range(
        columns.start if MASKED else columns.full_start, columns.stop if MASKED else columns.full_stop, BLOCK_N
    ):  # fmt: skip
        first_key = tl.multiple_of(next_block(first_key, columns, MASKED, BOUNDED), BLOCK_N)
        k_ND = load_rows(k_base, k_stride, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_KEYS)
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        query_M1 = (first_query + tl.arange(0, BLOCK_M))[:, None]
        key_1N = (first_key + tl.arange(0, BLOCK_N))[None, :]
        s_MN, factor, cap_slope = score(s_MN, query_M1, key_1N, seq_q, seq_k, how)
        p_MN = tl.exp2(s_MN * factor - lse_M[:, None])
        if MASKED:
            if BOUNDED:
                seen_MN = (key_1N >= columns.low[:, None]) & (key_1N < columns.high[:, None])
            else:
                seen_MN = visible(query_M1, key_1N, seq_q, seq_k, CAUSAL)
            p_MN = tl.where(seen_MN, p_MN, 0.0)
        v_NV = load_rows(v_base, v_stride, first_key, seq_k, VALUE_DIM, BLOCK_N, BLOCK_V, CHECK_KEYS)
        dp_MN = tl.dot(dout_MV, v_NV.T, input_precision=PRECISION)
        if drop is not None:
            dp_MN = tl.where(keep_mask(drop, first_query, first_key, BLOCK_M, BLOCK_N), dp_MN * kept_scale(drop.threshold), 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * cap_slope
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD


@triton.jit(do_not_specialize=UNSPECIALISED)
def dq_kernel(
    # pointers; None for what is absent
    q, k, v, dout, lse_log2, delta, dq, alibi_slopes, doc_start, doc_end, dropout_seed,
    # shapes and numbers; None for what is absent
    heads, seq_q, seq_k, scale, scale_log2, softcap_log2, window_left, window_right, dropout_threshold,
    # strides, in elements
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head, dq_batch, dq_row, dq_head,
    # constants
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M queries of one head, in the forward's order."""
    BOUNDED: tl.constexpr = window_left is not None or window_right is not None or doc_start is not None
    first_query, batch_head, batch, head = query_tile(heads, seq_q, BLOCK_M, CAUSAL)
    columns = key_columns(first_query, seq_q, seq_k, window_left, window_right, doc_start, doc_end, batch, BLOCK_M, BLOCK_N, CAUSAL)
    slope_log2 = None if alibi_slopes is None else head_slope(alibi_slopes, batch_head)
    how = Scoring(scale_log2, softcap_log2, slope_log2)
    drop = None if dropout_seed is None else head_dropout(dropout_seed, dropout_threshold, batch_head)
    q_MD = load_rows(q + batch * q_batch + head * q_head, q_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, not EVEN_M)
    k_base = k + batch * k_batch + head // GROUP * k_head
    v_base = v + batch * v_batch + head // GROUP * v_head
    dout_base = dout + batch * dout_batch + head * dout_head
    dout_MV = load_rows(dout_base, dout_row, first_query, seq_q, VALUE_DIM, BLOCK_M, BLOCK_V, not EVEN_M)
    query_M = first_query + tl.arange(0, BLOCK_M)
    row = batch_head.to(tl.int64) * seq_q
    lse_M = _load_per_query(lse_log2 + row, query_M, seq_q, not EVEN_M)
    delta_M = _load_per_query(delta + row, query_M, seq_q, not EVEN_M)

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CAUSAL or BOUNDED or not EVEN_N:
        dq_MD = _add_keys(
            dq_MD, q_MD, dout_MV, lse_M, delta_M, k_base, v_base, k_row, v_row, columns, how, drop, first_query, seq_q, seq_k,
            HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, BOUNDED, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    dq_MD = _add_keys(
        dq_MD, q_MD, dout_MV, lse_M, delta_M, k_base, v_base, k_row, v_row, columns, how, drop, first_query, seq_q, seq_k,
        HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, BOUNDED, False, False, PRECISION,
    )  # fmt: skip
    store_rows(dq + batch * dq_batch + head * dq_head, dq_row, first_query, seq_q, dq_MD * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


def plan_rows(out_shape, of_dout: tuple, of_out: tuple, rows: int) -> Callable:
    """The launch of `row_kernel`, which takes its tensors, of these strides; rows: at least seq_q."""
    batch, seq_q, heads, value_dim = out_shape
    return partial(
        launch_specialised, row_kernel, blocks(rows, ROWS_PER_PROGRAM) * batch * heads,
        numbers=(heads, seq_q, rows, LOG2_E, *row_strides((of_dout, of_out))),
        constants=(*widths(value_dim, value_dim)[2:], ROWS_PER_PROGRAM),
    )  # fmt: skip


@planned
def backward_plan(
    device, dtype, precision, q_shape, v_shape, of: tuple, causal: bool, scale: float, asked: tuple
) -> tuple[Callable, Callable, Callable]:
    """The three kernels' launches, which take their tensors; of: strides of q, k, v, dout, out, dq, dk and dv."""
    of_q, of_k, of_v, of_dout, of_out, of_dq, of_dk, of_dv = of
    batch, seq_q, heads, head_dim = q_shape
    _, seq_k, kv_heads, value_dim = v_shape
    numbers, causal, score_features, bounded = kernel_arguments(causal, seq_q, seq_k, *asked)

    def plan(which, kernel, rows, side, heads_of_rows, of):
        tiles = tile(device, which, dtype, max(head_dim, value_dim), score_features, bounded)
        constants = (
            heads // kv_heads, *widths(head_dim, value_dim), tiles.queries, tiles.keys,
            causal, seq_q % tiles.queries == 0, seq_k % tiles.keys == 0, precision,
        )  # fmt: skip
        return partial(
            launch_specialised, kernel, blocks(rows, getattr(tiles, side)) * batch * heads_of_rows,
            numbers=(heads_of_rows, seq_q, seq_k, scale, scale * LOG2_E, *numbers, *row_strides(of)), constants=constants,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip

    dkdv = plan("dkdv", dkdv_kernel, seq_k, "keys", kv_heads, (of_q, of_k, of_v, of_dout, of_dk, of_dv))
    dq = plan("dq", dq_kernel, seq_q, "queries", heads, (of_q, of_k, of_v, of_dout, of_dq))
    return plan_rows((batch, seq_q, heads, value_dim), of_dout, of_out, seq_q), dkdv, dq


def launch_backward(dout, dlse, q, k, v, out, lse, causal: bool, scale: float, features: Features, dq, dk, dv) -> torch.Tensor:
    """Writes dq, dk and dv, whose last dimensions are dense; returns the sinks' gradient, float32 [heads], empty without sinks."""
    of = strides(q, k, v, dout, out, dq, dk, dv)
    if not dense(of):
        q, k, v, dout, out = (dense_rows(x) for x in (q, k, v, dout, out))
        of = strides(q, k, v, dout, out, dq, dk, dv)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    precision = dot_precision(q.dtype)
    rows, dkdv, of_queries = backward_plan(q.device, q.dtype, precision, q.shape, v.shape, of, causal, scale, asked(features))
    given = pointers(features, q.shape[0], q.shape[2])
    rows((dout, None if dlse is None else dlse.contiguous(), out, lse, None, delta, None))
    dkdv((q, k, v, dout, lse, delta, dk, dv, *given))
    of_queries((q, k, v, dout, lse, delta, dq, *given))
    if features.sinks is None:
        return lse.new_empty(0)
    # dS = P * (dP - delta), as for any key, with dP = 0: the sink has no value. Where L is -inf, so is the sink.
    p = torch.exp2(features.sinks.float()[:, None] * LOG2_E - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(p * delta).sum(dim=(0, 2))


def _gradients(dout, dlse, q, k, v, out, lse, causal, scale, *features):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(0 if Features(*features).sinks is None else q.shape[2])


@operator(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale, "
    f"{FEATURES_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
)
def attention_backward(dout, dlse, q, k, v, out, lse, causal, scale, *features):
    """(dq, dk, dv), shaped as q, k and v, and dsinks, float32 [heads] (empty without sinks), from the gradients of `attention_forward`'s
    two outputs and all it saved."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return dq, dk, dv, launch_backward(dout, dlse, q, k, v, out, lse, causal, scale, Features(*features), dq, dk, dv)
