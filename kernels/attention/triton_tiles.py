"""What the kernels of both passes share: tiles in and out, which keys a query sees, how a product becomes a score, dropout.

Names carry their shape: M queries of a tile, N keys of a tile, D head_dim; q_MD is [M, D], s_MN a tile of scores.
Scores are kept in base 2, s * log2(e), because the hardware's exponential is exp2; the scale and log2(e) are one factor.
A feature that is absent is None, which Triton compiles away: the code of plain attention holds nothing of it.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from kernels.attention.backends import INTERPRETED
from kernels.attention.dropout import ROUNDS

if INTERPRETED:
    import kernels.attention.interpreter  # noqa: F401

LOG2_E = math.log2(math.e)
INTO_BASE_2 = tl.constexpr(LOG2_E)
_ROUNDS = tl.constexpr(ROUNDS)
# Runtime numbers that must not select a variant of the kernel of their own.
UNSPECIALISED = ["window_left", "window_right", "dropout_threshold"]


class Columns(NamedTuple):
    """What a tile of rows meets: queries meet the keys that they see, keys the queries that see them. Starts are multiples of the block.

    All rows meet all columns of full_start .. full_stop; those of start .. stop need the mask.
    """

    start: object
    stop: object
    full_start: object
    full_stop: object
    low: object  # with bounds: the first column of each row,
    high: object  # and one past its last


class Scoring(NamedTuple):
    """How the products of one head become scores in base 2."""

    scale_log2: object
    softcap_log2: object  # or None
    slope_log2: object  # ALiBi's, or None


class Dropout(NamedTuple):
    """Philox's key and the counter's words that one head shares, as in dropout.py."""

    threshold: object
    key: object
    offset: object
    batch_head: object


@triton.jit
def load_rows(
    base, row_stride, first_row, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """Rows first_row .. first_row + ROWS of a [rows, WIDTH] matrix, zeros outside it; 64-bit offset to the tile, 32-bit inside it."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    pointers = base + first_row.to(tl.int64) * row_stride + row[:, None] * row_stride + d[None, :]
    if CHECK_ROWS and BLOCK_D > WIDTH:
        return tl.load(pointers, mask=(first_row + row < rows)[:, None] & (d < WIDTH)[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(pointers, mask=(first_row + row < rows)[:, None], other=0.0)
    if BLOCK_D > WIDTH:
        return tl.load(pointers, mask=(d < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, row_stride, first_row, rows, x, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    pointers = base + first_row.to(tl.int64) * row_stride + row[:, None] * row_stride + d[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(first_row + row < rows)[:, None] & (d < WIDTH)[None, :])


@triton.jit
def query_tile(heads, seq_q, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """(first query, batch * heads + head, batch, head) of this program, which computes one tile of queries of one head."""
    tiles = tl.cdiv(seq_q, BLOCK_M)
    program = tl.program_id(0)
    # Causal: the last queries see the most keys; starting them first leaves short programs for the end.
    first_query = (tiles - 1 - program % tiles if CAUSAL else program % tiles) * BLOCK_M
    batch_head = program // tiles
    return first_query, batch_head, (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)


@triton.jit
def bounded_columns(row, rows, columns, back, ahead, doc_start, doc_end, batch, BLOCK: tl.constexpr):
    """The columns that a tile of rows meets: each from its own place - back to its place + ahead, within its document. None: no limit."""
    row = tl.minimum(row, rows - 1)  # rows past the end meet what the last one meets
    here = row + (columns - rows)
    low = tl.zeros_like(row)
    high = low + columns
    if back is not None:
        low = tl.maximum(low, here - back)
    if ahead is not None:
        high = tl.maximum(tl.minimum(high, here + ahead + 1), 0)
    if doc_start is not None:  # here rows and columns are as many
        low = tl.maximum(low, tl.load(doc_start + batch * rows + row))
        high = tl.minimum(high, tl.load(doc_end + batch * rows + row))
    end = tl.max(high)
    full_start = tl.minimum(tl.cdiv(tl.max(low), BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    full_stop = tl.maximum(tl.min(high) // BLOCK * BLOCK, full_start)
    return Columns(tl.min(low) // BLOCK * BLOCK, end - (full_stop - full_start), full_start, full_stop, low, high)


@triton.jit
def key_columns(
    first_query, seq_q, seq_k, window_left, window_right, doc_start, doc_end, batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The keys that a tile of queries sees."""
    if window_left is None and window_right is None and doc_start is None:
        full = seq_k
        end = seq_k
        if CAUSAL:
            offset = seq_k - seq_q
            full = tl.minimum(seq_k, tl.maximum(0, first_query + 1 + offset))
            end = tl.minimum(seq_k, tl.maximum(0, first_query + BLOCK_M + offset))
        full = full // BLOCK_N * BLOCK_N
        return Columns(full, end, 0, full, full, end)
    else:
        right = 0 if CAUSAL else window_right
        query_M = first_query + tl.arange(0, BLOCK_M)
        return bounded_columns(query_M, seq_q, seq_k, window_left, right, doc_start, doc_end, batch, BLOCK_N)


@triton.jit
def next_block(first, columns, MASKED: tl.constexpr, BOUNDED: tl.constexpr):
    """With bounds, masked blocks lie on both sides of the full ones; the loop over them counts as if the full ones were not there."""
    if MASKED and BOUNDED:
        return first + tl.where(first >= columns.full_start, columns.full_stop - columns.full_start, 0)
    else:
        return first


@triton.jit
def visible(query, key, seq_q, seq_k, CAUSAL: tl.constexpr):
    """Whether the query may see the key, without windows and documents; both broadcastable index tensors. Keys past the end are hidden."""
    if CAUSAL:
        # A query before the end sees no key past it. One past the end is not stored, or, summed over in dkdv, has dO = 0 and delta 0.
        return key <= query + (seq_k - seq_q)
    return (key < seq_k) & (query >= 0)  # query >= 0 is always so: it broadcasts the mask to the tile


@triton.jit
def score(s, query, key, seq_q, seq_k, how):
    """(s, factor, slope): of products s the scores s * factor in base 2, and the derivative of the soft cap, which is 1 without one."""
    factor = how.scale_log2
    slope = 1.0
    if how.softcap_log2 is not None:  # c tanh(x / c), by tanh(y) = 1 - 2 / (exp(2 y) + 1), which also holds where exp is infinite
        tanh = 1 - 2 / (tl.exp2(s * (2 * INTO_BASE_2 * how.scale_log2 / how.softcap_log2)) + 1)
        s = tanh * how.softcap_log2
        slope = 1 - tanh * tanh
        factor = 1.0
    if how.slope_log2 is not None:
        s = s * factor - how.slope_log2 * tl.abs(query + (seq_k - seq_q) - key).to(tl.float32)
        factor = 1.0
    return s, factor, slope


@triton.jit
def head_slope(alibi_slopes, batch_head):
    return tl.load(alibi_slopes + batch_head) * INTO_BASE_2


@triton.jit
def head_dropout(seed, threshold, batch_head):
    return Dropout(threshold, tl.load(seed), tl.load(seed + 1).to(tl.int32), batch_head.to(tl.int32))


@triton.jit
def kept_scale(threshold):
    """1 / (1 - p), by which dropout multiplies what it keeps."""
    return 1 / (1 - threshold.to(tl.float32) * 2.0**-31)


@triton.jit
def keep_mask(drop, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`dropout.keep_mask` of a tile, [M, N]; one evaluation of Philox serves four keys."""
    query_M1 = (first_query + tl.arange(0, BLOCK_M))[:, None]
    group_1G = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    word_0, word_1, word_2, word_3 = tl.philox(drop.key, group_1G, query_M1, drop.batch_head, drop.offset, _ROUNDS)
    even = tl.join(_kept(word_0, drop.threshold), _kept(word_2, drop.threshold))
    odd = tl.join(_kept(word_1, drop.threshold), _kept(word_3, drop.threshold))
    return tl.join(even, odd).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _kept(word, threshold):
    return (word >> 1).to(tl.int32) >= threshold
