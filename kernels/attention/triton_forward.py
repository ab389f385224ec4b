"""FlashAttention-2 forward in portable Triton (Ampere and newer): `recipe::attention_forward`. `reference.tiled` is its specification.

Names carry their shape, as in triton_tiles.py.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.attention import dropout
from kernels.attention.operators import call, differentiable, launch_specialised, operator, planned, strides
from kernels.attention.triton_tiles import (
    INTO_BASE_2,
    LOG2_E,
    UNSPECIALISED,
    Scoring,
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


class Features(NamedTuple):
    """What an attention operator takes beyond plain attention, in this order. An absent feature is None, and costs nothing.

    The query at position i stands at key position p = i + seq_k - seq_q. A score is cap(scale q.k) - slope * |p - j|.
    """

    window_left: int | None = None  # the query sees no key before p - window_left
    window_right: int | None = None  # and none after p + window_right; causal is the same as 0
    softcap: float | None = None  # cap(x) = softcap * tanh(x / softcap)
    alibi_slopes: torch.Tensor | None = None  # float32 [heads] or [batch, heads]
    sinks: torch.Tensor | None = None  # [heads]: a logit that joins the softmax's sum and has no value; has a gradient
    doc_start: torch.Tensor | None = None  # int32 [batch, seq]: the first position of the document that a position belongs to,
    doc_end: torch.Tensor | None = None  # and one past its last; with seq_q == seq_k only
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None  # int64 [2], see dropout.keep_mask


FEATURES_SCHEMA = (
    "SymInt? window_left=None, SymInt? window_right=None, float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None, "
    "Tensor? doc_start=None, Tensor? doc_end=None, float dropout_p=0.0, Tensor? dropout_seed=None"
)


@triton.jit
def _attend(
    acc_MV, max_M, sum_M, q_MD, k_base, v_base, k_stride, v_stride, columns, how, drop, first_query, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the masked or the full columns (FlashAttention-2, Algorithm 1, lines 6 to 11)."""
    for first_key in tl.range(
        columns.start if MASKED else columns.full_start, columns.stop if MASKED else columns.full_stop, BLOCK_N
    ):  # fmt: skip
        first_key = tl.multiple_of(next_block(first_key, columns, MASKED, BOUNDED), BLOCK_N)
        k_ND = load_rows(k_base, k_stride, first_key, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D, CHECK_KEYS)
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        query_M1 = (first_query + tl.arange(0, BLOCK_M))[:, None]
        key_1N = (first_key + tl.arange(0, BLOCK_N))[None, :]
        s_MN, factor, _ = score(s_MN, query_M1, key_1N, seq_q, seq_k, how)
        if MASKED:
            if BOUNDED:
                seen_MN = (key_1N >= columns.low[:, None]) & (key_1N < columns.high[:, None])
            else:
                seen_MN = visible(query_M1, key_1N, seq_q, seq_k, CAUSAL)
            s_MN = tl.where(seen_MN, s_MN, -float("inf"))
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * factor)
        if MASKED:
            # A row that has seen nothing: exp2(-inf - 0) = 0, where exp2(-inf + inf) is NaN.
            shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
        else:
            shift_M = new_max_M
        p_MN = tl.exp2(s_MN * factor - shift_M[:, None])
        rescale_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * rescale_M + tl.sum(p_MN, 1)
        acc_MV = acc_MV * rescale_M[:, None]
        if drop is not None:
            p_MN = tl.where(keep_mask(drop, first_query, first_key, BLOCK_M, BLOCK_N), p_MN, 0.0)
        v_NV = load_rows(v_base, v_stride, first_key, seq_k, VALUE_DIM, BLOCK_N, BLOCK_V, CHECK_KEYS)
        acc_MV = tl.dot(p_MN.to(v_NV.dtype), v_NV, acc_MV, input_precision=PRECISION)
        max_M = new_max_M
    return acc_MV, max_M, sum_M


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    # pointers; None for what is absent
    q, k, v, out, lse_log2, sinks, alibi_slopes, doc_start, doc_end, dropout_seed,
    # shapes and numbers; None for what is absent
    heads, seq_q, seq_k, scale_log2, softcap_log2, window_left, window_right, dropout_threshold,
    # strides, in elements
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    # constants
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M queries of one head."""
    BOUNDED: tl.constexpr = window_left is not None or window_right is not None or doc_start is not None
    first_query, batch_head, batch, head = query_tile(heads, seq_q, BLOCK_M, CAUSAL)
    columns = key_columns(first_query, seq_q, seq_k, window_left, window_right, doc_start, doc_end, batch, BLOCK_M, BLOCK_N, CAUSAL)
    slope_log2 = None if alibi_slopes is None else head_slope(alibi_slopes, batch_head)
    how = Scoring(scale_log2, softcap_log2, slope_log2)
    drop = None if dropout_seed is None else head_dropout(dropout_seed, dropout_threshold, batch_head)
    q_MD = load_rows(q + batch * q_batch + head * q_head, q_row, first_query, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D, not EVEN_M)
    k_base = k + batch * k_batch + head // GROUP * k_head
    v_base = v + batch * v_batch + head // GROUP * v_head

    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # as if each row had already seen one key, of this score and with the value 0
        max_M = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * INTO_BASE_2
        sum_M = tl.full([BLOCK_M], 1.0, tl.float32)
    # Masked tiles first: after the loop of full tiles, ptxas would wait for every single product of both loops (C7515).
    if CAUSAL or BOUNDED or not EVEN_N:
        acc_MV, max_M, sum_M = _attend(
            acc_MV, max_M, sum_M, q_MD, k_base, v_base, k_row, v_row, columns, how, drop, first_query, seq_q, seq_k,
            HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, BOUNDED, True, not EVEN_N, PRECISION,
        )  # fmt: skip
    acc_MV, max_M, sum_M = _attend(
        acc_MV, max_M, sum_M, q_MD, k_base, v_base, k_row, v_row, columns, how, drop, first_query, seq_q, seq_k,
        HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, BLOCK_M, BLOCK_N, CAUSAL, BOUNDED, False, False, PRECISION,
    )  # fmt: skip

    query_M = first_query + tl.arange(0, BLOCK_M)
    sum_M = tl.where(sum_M == 0, 1.0, sum_M)  # rows that saw nothing: output 0, log-sum-exp -inf + log(1)
    tl.store(lse_log2 + batch_head.to(tl.int64) * seq_q + query_M, max_M + tl.log2(sum_M), mask=query_M < seq_q)
    acc_MV = acc_MV / sum_M[:, None]
    if drop is not None:
        acc_MV *= kept_scale(dropout_threshold)
    store_rows(out + batch * out_batch + head * out_head, out_row, first_query, seq_q, acc_MV, VALUE_DIM, BLOCK_M, BLOCK_V)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels read rows of consecutive elements, at any stride that keeps offsets inside a tile (at most 256 rows) in 32 bits."""
    return x if dense(strides(x)) else x.contiguous()


@planned
def dense(of: tuple) -> bool:
    """Whether rows are such in tensors of these strides."""
    return all(of_element == 1 and of_row < 2**31 // 256 for _, of_row, _, of_element in of)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless torch's own matmul may use TF32 (torch.set_float32_matmul_precision)."""
    return "tf32" if dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def blocks(rows: int, block: int) -> int:
    """How many blocks cover the rows (triton.cdiv, called from Python, takes 7 microseconds)."""
    return -(-rows // block)


@cache
def widths(head_dim: int, value_dim: int) -> tuple[int, int, int, int]:
    """HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V."""
    # Half-precision rows of less than 64 numbers lie otherwise in Hopper's shared memory than wider ones. Where K's and V's differ in that,
    # and K's tile makes room for V's, ptxas 12.8 builds V's matrix descriptors from registers that nothing has written: wrong products, or
    # an illegal access. So the narrower rows are as wide as the others, up to 64.
    least = min(64, triton.next_power_of_2(max(head_dim, value_dim)))
    return head_dim, max(least, triton.next_power_of_2(head_dim)), value_dim, max(least, triton.next_power_of_2(value_dim))


class Arguments(NamedTuple):
    """The features as the kernels take them, but for pointers."""

    numbers: tuple  # softcap_log2, window_left, window_right, dropout_threshold
    causal: bool
    score_features: bool  # these two choose the tile
    bounded: bool


def asked(features: Features) -> tuple:
    """What `kernel_arguments` depends on."""
    left, right, softcap, slopes, _, doc_start, _, dropout_p, _ = features
    return left, right, softcap, slopes is not None, doc_start is not None, dropout_p


def kernel_arguments(causal: bool, seq_q: int, seq_k: int, left, right, softcap, slopes, documents, dropout_p) -> Arguments:
    causal = causal or right == 0
    # A window that hides nothing is no window: the plain kernel serves it.
    left = None if left is None or left >= seq_k - 1 else left
    right = None if causal or right is None or right >= seq_q - 1 else right
    has_dropout = dropout_p > 0
    softcap_log2 = None if softcap is None else softcap * LOG2_E
    numbers = softcap_log2, left, right, dropout.threshold(dropout_p) if has_dropout else None
    score_features = softcap is not None or slopes or has_dropout
    return Arguments(numbers, causal, score_features, bounded=left is not None or right is not None or documents)


def pointers(features: Features, batch: int, heads: int) -> tuple:
    """alibi_slopes, doc_start, doc_end, dropout_seed, as the kernels read them."""
    _, _, _, slopes, _, doc_start, doc_end, dropout_p, seed = features
    if slopes is not None:
        slopes = slopes.float().expand(batch, heads).contiguous()
    if doc_start is not None:
        doc_start, doc_end = doc_start.contiguous(), doc_end.contiguous()
    return slopes, doc_start, doc_end, seed.contiguous() if dropout_p > 0 else None


@planned
def forward_plan(device, dtype, precision, q_shape, v_shape, of: tuple, causal: bool, scale: float, asked: tuple) -> Callable:
    """The kernel's launch, which takes its tensors; of: strides of q, k, v and out."""
    batch, seq_q, heads, head_dim = q_shape
    _, seq_k, kv_heads, value_dim = v_shape
    numbers, causal, score_features, bounded = kernel_arguments(causal, seq_q, seq_k, *asked)
    block_m, block_n, warps, stages = tile(device, "forward", dtype, max(head_dim, value_dim), score_features, bounded)
    constants = (
        heads // kv_heads, *widths(head_dim, value_dim), block_m, block_n,
        causal, seq_q % block_m == 0, seq_k % block_n == 0, precision,
    )  # fmt: skip
    return partial(
        launch_specialised, forward_kernel, blocks(seq_q, block_m) * batch * heads,
        numbers=(heads, seq_q, seq_k, scale * LOG2_E, *numbers, *row_strides(of)), constants=constants,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
    )  # fmt: skip


def row_strides(of: tuple) -> list[int]:
    """Those of batch, row and head."""
    return [stride for strides in of for stride in strides[:3]]


def launch_forward(q, k, v, causal: bool, scale: float, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = outputs(q, k, v)
    of = strides(q, k, v, out)
    if not dense(of):
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        of = strides(q, k, v, out)
    plan = forward_plan(q.device, q.dtype, dot_precision(q.dtype), q.shape, v.shape, of, causal, scale, asked(features))
    plan((q, k, v, out, lse, features.sinks, *pointers(features, q.shape[0], q.shape[2])))
    return out, lse


def outputs(q, k, v, *_):
    batch, seq_q, heads, _ = q.shape
    return q.new_empty((batch, seq_q, heads, v.shape[3])), q.new_empty((batch, heads, seq_q), dtype=torch.float32)


@operator(f"attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, {FEATURES_SCHEMA}) -> (Tensor, Tensor)", outputs)
def attention_forward(q, k, v, causal, scale, *features):
    """(out [batch, seq_q, heads, value_dim], lse [batch, heads, seq_q] float32, of base 2) of the tensors that `attention` describes.

    Of base 2, as the kernels compute it: brought to base e and back, each rounding would be one of every probability of the backward's,
    and larger the larger the scores are. After scale come the fields of `Features`, by position or name.
    """
    return launch_forward(q, k, v, causal, scale, Features(*features))


def keep_for_backward(
    ctx, tensors, causal, scale,
    left=None, right=None, softcap=None, slopes=None, sinks=None, doc_start=None, doc_end=None, dropout_p=0.0, seed=None,
) -> None:  # fmt: skip
    ctx.numbers = causal, scale, left, right, softcap, dropout_p
    ctx.save_for_backward(*tensors, slopes, sinks, doc_start, doc_end, seed)
    ctx.set_materialize_grads(False)


def kept_for_backward(ctx) -> tuple:
    """(*tensors, causal, scale, the fields of `Features`)."""
    *tensors, slopes, sinks, doc_start, doc_end, seed = ctx.saved_tensors  # once: activation checkpointing allows no second look
    causal, scale, left, right, softcap, dropout_p = ctx.numbers
    return *tensors, causal, scale, (left, right, softcap, slopes, sinks, doc_start, doc_end, dropout_p, seed)


NO_GRADIENTS = tuple(Features(dropout_p=None))


def feature_gradients(features: tuple, dsinks: torch.Tensor) -> tuple:
    sinks = features[4]
    return NO_GRADIENTS if sinks is None else tuple(Features(dropout_p=None, sinks=dsinks.to(sinks.dtype)))


def save_for_backward(ctx, inputs, output):
    q, k, v, *others = inputs
    keep_for_backward(ctx, (q, k, v, *output), *others)


def differentiate(ctx, dout, dlse):
    q, k, v, out, lse, causal, scale, features = kept_for_backward(ctx)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = call(triton_backward.attention_backward, dout, dlse, q, k, v, out, lse, causal, scale, *features)
    return dq, dk, dv, None, None, *feature_gradients(features, dsinks)


differentiable(attention_forward, save_for_backward, differentiate)

# At the end, because it uses this file's helpers; not on demand, because code that torch.compile finds in its cache calls the operator by name.
import kernels.attention.triton_backward as triton_backward  # noqa: E402
