"""FlashAttention forward for Hopper (sm_90a) in Gluon: `recipe::hopper_attention_forward`. `reference.tiled` is its specification.

One or two programs stay on each multiprocessor. A program has one warp that loads and two or three warpgroups (4 warps each) that compute;
a work item is a tile of queries of one head, 64 queries for each warpgroup, and all its warpgroups read the same tiles of keys.

      load, one warp                 shared memory                     compute, each warpgroup

    claim a work item
    wait q_free[slot]
    TMA: Q and the item  ------>  q[2], work[2]  -- q_full[slot] -->  take the item
    for each tile of keys, the last tile first:
      wait k_free[stage]                          (with two stages K is one tile ahead)
      TMA: K  ----------------->  k[stages]  --- k_full[stage] ---->  S = Q K^T           then arrive at k_free[stage]
      wait v_free[stage]                                              P = exp2(S - max)
      TMA: V  ----------------->  v[stages]  --- v_full[stage] ---->  O = O rescale + P V  then arrive at v_free[stage]
                                                                      arrive at q_free[slot] after the item's last S
                                  out[warpgroup]  <-----------------  O / sum, which TMA stores under the next item

The full barriers are mbarriers: use n of a slot, which n // slots uses precede, completes its phase (n // slots) % 2; both sides count n.
The free barriers are the hardware's named barriers: all computing threads arrive, the loading warp synchronises. They need no phase: a
warpgroup arrives for use n only after its full barrier, which the loading warp fills only after it has synchronised for use n - slots.
The first use of a slot waits for nothing. (mbarriers would do here too, but Gluon's arrive first stops the whole warpgroup.)

With OVERLAP a warpgroup issues the scores of tile i and then the output of tile i - 1, waits for the scores alone, and computes the softmax
of tile i while the matrix units still work on the output of tile i - 1:

    matrix units    S(i)  O(i-1)  [other warpgroups']        S(i+1)  O(i)
    this warpgroup        [softmax of S(i)        ] O rescaled        [softmax of S(i+1) ...

With TURNS, which goes with OVERLAP alone, the warpgroups issue in a fixed circle, so that their softmaxes spread out. Without OVERLAP each
product is waited for: that needs so few registers that two programs fit on a multiprocessor, and one computes while the other starts or
ends an item, which is better for short rows.

With LAZY a row keeps the maximum that it has until a score exceeds it by LAZY_GROWTH: P may then be larger than 1, and most warps pass the
output's rescaling by. (The row's sum and log-sum-exp are those of the maximum that was used, and so exact.)

Masked tiles come first in an item, so the loop over the rest has no mask. Scores are kept in base 2, s * log2(e), for the hardware's exp2.
Names carry their shape: M the 64 queries of a warpgroup, N keys of a tile, D head_dim. Distributed layouts are those of the matrix unit's
accumulator: a row lies in four lanes of one warp, so its maximum is two shuffles away, and its sum is left apart in those four lanes until
the end. P as a left operand (p_MN) has the same elements in the same threads, in half precision.

`problem.mark` reads the clock for scripts/trace_attention.py, which draws the pipeline as it ran. Without a trace it compiles to nothing.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate  # exported to Gluon programs by this name alone

from kernels.attention import hopper_backward, triton_backward
from kernels.attention.hopper_shared import (
    FIRST_FREE_BARRIER,
    LOAD_REGISTERS,
    WARPGROUP,
    Descriptor,
    View,
    arrive,
    claim,
    claimed,
    in_place,
    longest_first,
    multiprocessors,
    put,
    readable_by_tma,
    synchronise,
    take,
    view,
    work_counter,
)
from kernels.attention.operators import call, differentiable, launch, operator, planned
from kernels.attention.triton_forward import LOG2_E, outputs
from kernels.attention.tuning import HopperTile, hopper_tile

QUERIES = gl.constexpr(64)  # of a warpgroup: the rows of one wgmma
Q_SLOTS = gl.constexpr(2)
ITEM_FIELDS = gl.constexpr(4)  # batch, head, first query; a power of two
LAZY_GROWTH = gl.constexpr(8.0)  # of a row's maximum, base 2, that changes nothing: P stays below 2^8, and its relative rounding the same
L2_FOR_KEYS = 32 << 20  # bytes of K and V that stay in L2 (50 MB on an H100) beside the Q and O that stream through
# What a trace notes of each tile of keys. An item is taken at its first tile and stored at its last.
EVENTS = (
    *("item taken", "keys requested", "values requested"),
    *("scores issued", "scores ready", "softmax done", "output issued", "output ready", "item stored"),
)
ITEM_TAKEN, KEYS_REQUESTED, VALUES_REQUESTED, *_COMPUTING, ITEM_STORED = map(gl.constexpr, range(len(EVENTS)))
SCORES_ISSUED, SCORES_READY, SOFTMAX_DONE, OUTPUT_ISSUED, OUTPUT_READY = _COMPUTING
EVENT_COUNT = gl.constexpr(len(EVENTS))
TRACE_TILES = gl.constexpr(512)  # of each program the first; the last place takes what comes later


@aggregate
class Problem:
    """What every partition knows: lengths, tile sizes, and the numbers of the hardware barriers."""

    seq_q: gl.tensor
    seq_k: gl.tensor
    WARPGROUPS: gl.constexpr
    KEYS: gl.constexpr
    STAGES: gl.constexpr
    CAUSAL: gl.constexpr
    HIDE_FIRST: gl.constexpr
    HIDE_SECOND: gl.constexpr
    OVERLAP: gl.constexpr
    TURNS: gl.constexpr
    LAZY: gl.constexpr  # the output is rescaled only for maxima that grow by more than LAZY_GROWTH
    trace: gl.tensor | gl.constexpr  # None, or where `mark` writes: int64 [programs, WARPGROUPS + 1, TRACE_TILES, EVENTS]

    @gluon.constexpr_function
    def __init__(self, seq_q, seq_k, WARPGROUPS, KEYS, STAGES, CAUSAL, HIDE_FIRST, HIDE_SECOND, OVERLAP, TURNS, LAZY, trace):
        self.seq_q = seq_q
        self.seq_k = seq_k
        self.WARPGROUPS = gl.constexpr(WARPGROUPS)
        self.KEYS = gl.constexpr(KEYS)
        self.STAGES = gl.constexpr(STAGES)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.HIDE_FIRST = gl.constexpr(HIDE_FIRST)
        self.HIDE_SECOND = gl.constexpr(HIDE_SECOND)
        self.OVERLAP = gl.constexpr(OVERLAP)
        self.TURNS = gl.constexpr(TURNS)
        self.LAZY = gl.constexpr(LAZY)
        self.trace = gl.constexpr(None) if trace is None else trace

    @gluon.jit
    def key_tiles(self, first_query, COUNT: gl.constexpr):
        """How many tiles of keys the queries first_query .. first_query + COUNT see; at least one, which may be hidden altogether."""
        end = self.seq_k
        if self.CAUSAL:
            end = gl.minimum(self.seq_k, gl.maximum(1, first_query + COUNT + self.seq_k - self.seq_q))
        return (end + self.KEYS - 1) // self.KEYS

    @gluon.jit
    def k_free(self, stage):
        return FIRST_FREE_BARRIER + stage

    @gluon.jit
    def v_free(self, stage):
        return FIRST_FREE_BARRIER + self.STAGES + stage

    @gluon.jit
    def q_free(self, slot):
        return FIRST_FREE_BARRIER + 2 * self.STAGES + slot

    @gluon.jit
    def turn(self, warpgroup):
        return FIRST_FREE_BARRIER + 2 * self.STAGES + Q_SLOTS + warpgroup

    @gluon.jit
    def mark(self, partition: gl.constexpr, EVENT: gl.constexpr, step):
        """With a trace, notes the multiprocessor's clock as that of an event of tile `step`. The loading warp is the last partition."""
        if self.trace is not None:
            instructions: gl.constexpr = _note_clock(partition, gl.num_warps(), EVENT)
            gl.inline_asm_elementwise(instructions, "=r,l,r,~{memory}", [self.trace.to(gl.int64), step], gl.int32, False, 1)


@aggregate
class Shared:
    """Shared memory: tiles, the work items in flight, and the full barriers. The leading dimension counts slots."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    work: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, out, work, q_full, k_full, v_full):
        self.q = q
        self.k = k
        self.v = v
        self.out = out
        self.work = work
        self.q_full = q_full
        self.k_full = k_full
        self.v_full = v_full


@gluon.constexpr_function
def _note_clock(partition, warps, event):
    """Stores the clock for tile $2 where the program's trace, $1, keeps this event. Of each partition one warp does, those that share one
    scheduler and its part of the matrix units. (Were it chosen by %tid, ptxas would keep no address in uniform registers, and spill.)"""
    first = 8 * (partition * TRACE_TILES.value * EVENT_COUNT.value + event)
    return (
        "{ .reg .pred stores; .reg .u32 warp, tile; .reg .u64 clock, place; mov.u64 clock, %clock64;"
        f" mov.u32 warp, %warpid; and.b32 warp, warp, {warps - 1}; setp.eq.u32 stores, warp, 0;"
        f" min.u32 tile, $2, {TRACE_TILES.value - 1}; mad.wide.u32 place, tile, {8 * EVENT_COUNT.value}, $1;"
        f" @stores st.global.u64 [place + {first}], clock; mov.u32 $0, 0; }}"
    )


@gluon.jit
def hand_over(shared, slot, batch, head, first_query):
    put(shared.work.index(slot * ITEM_FIELDS), batch)
    put(shared.work.index(slot * ITEM_FIELDS + 1), head)
    put(shared.work.index(slot * ITEM_FIELDS + 2), first_query)


@gluon.jit
def take_field(shared, slot, FIELD: gl.constexpr):
    return take(shared.work.index(slot * ITEM_FIELDS + FIELD))


@gluon.jit
def work_item(item, heads_at_once, batch_heads, query_tiles, CAUSAL: gl.constexpr):
    """(head in the batch, tile of queries) of an item."""
    if CAUSAL:
        head, rank = longest_first(item, query_tiles, heads_at_once, batch_heads)
        return head, query_tiles - 1 - rank
    return item // query_tiles, item % query_tiles


@gluon.jit
def request_keys(problem, shared, k_desc, batch, kv_head, first_key, step):
    stage = step % problem.STAGES
    if step >= problem.STAGES:
        synchronise(problem.k_free(stage), problem.WARPGROUPS * WARPGROUP + 32)
    problem.mark(problem.WARPGROUPS, KEYS_REQUESTED, step)
    mbarrier.expect(shared.k_full.index(stage), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, kv_head, first_key, 0], shared.k_full.index(stage), shared.k.index(stage))


@gluon.jit
def request_values(problem, shared, v_desc, batch, kv_head, first_key, step):
    stage = step % problem.STAGES
    if step >= problem.STAGES:
        synchronise(problem.v_free(stage), problem.WARPGROUPS * WARPGROUP + 32)
    problem.mark(problem.WARPGROUPS, VALUES_REQUESTED, step)
    mbarrier.expect(shared.v_full.index(stage), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [batch, kv_head, first_key, 0], shared.v_full.index(stage), shared.v.index(stage))


@gluon.jit
def load(problem, shared, q_desc, k_desc, v_desc, counter, heads_at_once):
    """The loading warp. Items are handed out by a counter in global memory, which the last claim of a launch sets back to 0."""
    WARPGROUPS: gl.constexpr = problem.WARPGROUPS
    THREADS: gl.constexpr = WARPGROUPS * WARPGROUP + 32
    TILE: gl.constexpr = WARPGROUPS * QUERIES
    # With two stages the keys' place is free long before the values' of the tile before, which then must not be waited for first.
    KEYS_AHEAD: gl.constexpr = problem.STAGES == 2
    heads = q_desc.shape[1]
    group = heads // k_desc.shape[1]
    batch_heads = q_desc.shape[0] * heads
    query_tiles = (problem.seq_q + TILE - 1) // TILE
    items = batch_heads * query_tiles

    item = gl.program_id(0)
    batch_head, query_tile = work_item(item, heads_at_once, batch_heads, query_tiles, problem.CAUSAL)
    taken = 0  # items, of which Q's slot and phase follow
    step = 0  # tiles of keys of all items, of which K's and V's stage and phase follow
    while item < items:
        batch = batch_head // heads
        head = batch_head % heads
        first_query = query_tile * TILE
        slot = taken % Q_SLOTS
        if taken >= Q_SLOTS:
            synchronise(problem.q_free(slot), THREADS)
        problem.mark(WARPGROUPS, ITEM_TAKEN, step)
        hand_over(shared, slot, batch, head, first_query)
        mbarrier.expect(shared.q_full.index(slot), WARPGROUPS * q_desc.block_type.nbytes)
        for i in gl.static_range(WARPGROUPS):
            q_MD = shared.q.index(slot * WARPGROUPS + i)
            tma.async_copy_global_to_shared(q_desc, [batch, head, first_query + i * QUERIES, 0], shared.q_full.index(slot), q_MD)
        tiles = problem.key_tiles(first_query, TILE)
        kv_head = head // group
        if KEYS_AHEAD:
            request_keys(problem, shared, k_desc, batch, kv_head, (tiles - 1) * problem.KEYS, step)
        for i in range(tiles - 1):
            first_key = (tiles - 1 - i) * problem.KEYS
            if KEYS_AHEAD:
                request_keys(problem, shared, k_desc, batch, kv_head, first_key - problem.KEYS, step + 1)
            else:
                request_keys(problem, shared, k_desc, batch, kv_head, first_key, step)
            request_values(problem, shared, v_desc, batch, kv_head, first_key, step)
            step += 1
        ticket = claim(counter)  # not before: an item claimed early waits while others, whose items end sooner, find none
        if not KEYS_AHEAD:
            request_keys(problem, shared, k_desc, batch, kv_head, 0, step)
        request_values(problem, shared, v_desc, batch, kv_head, 0, step)
        step += 1
        taken += 1
        item = gl.num_programs(0) + claimed(ticket)
        batch_head, query_tile = work_item(item, heads_at_once, batch_heads, query_tiles, problem.CAUSAL)

    slot = taken % Q_SLOTS
    if taken >= Q_SLOTS:
        synchronise(problem.q_free(slot), THREADS)
    hand_over(shared, slot, -1, 0, 0)
    mbarrier.expect(shared.q_full.index(slot), 0)
    if item == items + gl.num_programs(0) - 1:
        gl.store(counter, 0)


@gluon.constexpr_function
def _hide_after(n):
    """-inf for those of n scores, in pairs of the thread's two rows by turns, that come after the row's last key, $2n of the first two."""
    hidden = " ".join(f"setp.lt.s32 hidden, last{i // 2 % 2}, {i // 4 * 8 + i % 2}; @hidden mov.f32 ${i}, 0fFF800000;" for i in range(n))
    return (
        "{ .reg .pred hidden; .reg .s32 first, last0, last1; mov.u32 first, %laneid; and.b32 first, first, 3; shl.b32 first, first, 1;"
        f" sub.s32 last0, ${2 * n}, first; sub.s32 last1, ${2 * n + 2}, first; {hidden} }}"
    )


@gluon.jit
def hide(s_MN, first_query, first_key, problem):
    """-inf for the scores of keys that a query must not see: those after it, or those past the end.

    In assembly, which says where the comparisons are: the compiler makes them before the scores are there, and keeps them as bits.
    """
    layout: gl.constexpr = s_MN.type.layout
    N: gl.constexpr = QUERIES * problem.KEYS // WARPGROUP  # scores of a thread
    if problem.CAUSAL:
        last_M = first_query + (problem.seq_k - problem.seq_q) - first_key + gl.arange(0, QUERIES, gl.SliceLayout(1, layout))
    else:
        last_M = problem.seq_k - 1 - first_key + gl.full([QUERIES], 0, gl.int32, gl.SliceLayout(1, layout))
    s_MN, last_MN = gl.broadcast(s_MN, gl.expand_dims(last_M, 1))
    return gl.inline_asm_elementwise(_hide_after(N), in_place(N, "r"), [s_MN, last_MN], gl.float32, True, N)


@gluon.jit
def sum_apart(p_MN):
    """Row sums of the elements that a thread holds, [M, 4]: the four lanes of a row are left apart."""
    return gl.sum(gl.sum(gl.reshape(p_MN, [p_MN.type.shape[0], p_MN.type.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def times_rows(x, factor_M):
    return x * gl.expand_dims(gl.convert_layout(factor_M, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.constexpr_function
def _multiply_unless_all_are_1(n):
    """n floats, in pairs of the thread's two rows by turns, by their rows' factors, $2n of the first two; not where these are 1 in the whole warp."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i // 2 % 2 * 2};" for i in range(n))
    return (
        f"{{ .reg .pred some; setp.ne.f32 some, ${2 * n}, 0f3F800000; setp.ne.or.f32 some, ${2 * n + 2}, 0f3F800000, some;"
        f" vote.sync.any.pred some, some, 0xffffffff; @!some bra.uni done; {products} done: }}"
    )


@gluon.jit
def times_rows_if_needed(x, factor_M):
    """times_rows, which most warps pass by when few factors differ from 1."""
    N: gl.constexpr = x.type.shape[0] * x.type.shape[1] // WARPGROUP  # elements of a thread
    x, factor = gl.broadcast(x, gl.expand_dims(gl.convert_layout(factor_M, gl.SliceLayout(1, x.type.layout)), 1))
    return gl.inline_asm_elementwise(_multiply_unless_all_are_1(N), in_place(N, "f"), [x, factor], gl.float32, True, N)


@gluon.jit
def compute(INDEX: gl.constexpr, problem, shared, out_desc, lse, scale_log2):
    """Warpgroup INDEX: the online softmax over the tiles of keys (FlashAttention-2, Algorithm 1, lines 6 to 13) for 64 queries an item."""
    STAGES: gl.constexpr = problem.STAGES
    WARPGROUPS: gl.constexpr = problem.WARPGROUPS
    KEYS: gl.constexpr = problem.KEYS
    HEAD_DIM: gl.constexpr = out_desc.block_type.shape[3]
    THREADS: gl.constexpr = WARPGROUPS * WARPGROUP + 32
    NEXT: gl.constexpr = (INDEX + 1) % WARPGROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    zero_MN = gl.full([QUERIES, KEYS], 0.0, gl.float32, s_layout)

    step = 0
    taken = 0
    if problem.TURNS and INDEX == WARPGROUPS - 1:
        arrive(problem.turn(0), 2 * WARPGROUP)
    mbarrier.wait(shared.q_full.index(0), 0)
    batch = take_field(shared, 0, 0)
    while batch >= 0:
        slot = taken % Q_SLOTS
        head = take_field(shared, slot, 1)
        tile_query = take_field(shared, slot, 2)
        first_query = tile_query + INDEX * QUERIES
        q_MD = shared.q.index(slot * WARPGROUPS + INDEX).reshape([QUERIES, HEAD_DIM])
        tiles = problem.key_tiles(tile_query, WARPGROUPS * QUERIES)
        item_end = step + tiles
        problem.mark(INDEX, ITEM_TAKEN, step)
        if problem.CAUSAL:  # tiles that other warpgroups of the program see, and this one does not
            own = gl.where(first_query < problem.seq_q, problem.key_tiles(first_query, QUERIES), 1)
            for _ in range(tiles - own):
                mbarrier.wait(shared.k_full.index(step % STAGES), step // STAGES & 1)
                arrive(problem.k_free(step % STAGES), THREADS)
                mbarrier.wait(shared.v_full.index(step % STAGES), step // STAGES & 1)
                arrive(problem.v_free(step % STAGES), THREADS)
                if problem.TURNS:
                    synchronise(problem.turn(INDEX), 2 * WARPGROUP)
                    arrive(problem.turn(NEXT), 2 * WARPGROUP)
                step += 1
            tiles = own

        stage = step % STAGES
        mbarrier.wait(shared.k_full.index(stage), step // STAGES & 1)
        k_DN = shared.k.index(stage).reshape([KEYS, HEAD_DIM]).permute((1, 0))
        problem.mark(INDEX, SCORES_ISSUED, step)
        s_MN = warpgroup_mma_wait(0, deps=(warpgroup_mma(q_MD, k_DN, zero_MN, use_acc=False, is_async=True),))
        problem.mark(INDEX, SCORES_READY, step)
        arrive(problem.k_free(stage), THREADS)
        if problem.HIDE_FIRST:
            s_MN = hide(s_MN, first_query, (tiles - 1) * KEYS, problem)
        max_M = gl.max(s_MN, 1) * scale_log2
        # A row that sees nothing here: exp2(-inf - 0) = 0, where exp2(-inf + inf) is NaN.
        shift_M = gl.where(max_M == float("-inf"), 0.0, max_M) if problem.CAUSAL else max_M
        p_MN = gl.exp2(s_MN * scale_log2 - gl.expand_dims(shift_M, 1))
        sum_M4 = sum_apart(p_MN)
        p_MN = gl.convert_layout(p_MN.to(out_desc.dtype), p_layout)
        acc_MD = gl.full([QUERIES, HEAD_DIM], 0.0, gl.float32, out_layout)
        problem.mark(INDEX, SOFTMAX_DONE, step)
        mbarrier.wait(shared.k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=tiles > 1)
        for i in range(1, tiles):
            v_stage = step % STAGES
            v_phase = step // STAGES & 1
            v_ND = shared.v.index(v_stage).reshape([KEYS, HEAD_DIM])
            step += 1
            stage = step % STAGES
            k_DN = shared.k.index(stage).reshape([KEYS, HEAD_DIM]).permute((1, 0))
            if problem.OVERLAP:
                if problem.TURNS:
                    synchronise(problem.turn(INDEX), 2 * WARPGROUP)
                problem.mark(INDEX, SCORES_ISSUED, step)
                scores = warpgroup_mma(q_MD, k_DN, zero_MN, use_acc=False, is_async=True)
                mbarrier.wait(shared.v_full.index(v_stage), v_phase)
                problem.mark(INDEX, OUTPUT_ISSUED, step - 1)
                output = warpgroup_mma(p_MN, v_ND, acc_MD, is_async=True)
                if problem.TURNS:
                    arrive(problem.turn(NEXT), 2 * WARPGROUP)
                s_MN = warpgroup_mma_wait(1, deps=(scores,))
                problem.mark(INDEX, SCORES_READY, step)
            else:
                mbarrier.wait(shared.v_full.index(v_stage), v_phase)
                acc_MD = warpgroup_mma_wait(0, deps=(warpgroup_mma(p_MN, v_ND, acc_MD, is_async=True),))
                arrive(problem.v_free(v_stage), THREADS)
                s_MN = warpgroup_mma_wait(0, deps=(warpgroup_mma(q_MD, k_DN, zero_MN, use_acc=False, is_async=True),))
            arrive(problem.k_free(stage), THREADS)
            if problem.HIDE_SECOND:
                if i == 1:
                    s_MN = hide(s_MN, first_query, (tiles - 2) * KEYS, problem)
            new_max_M = gl.maximum(max_M, gl.max(s_MN, 1) * scale_log2)
            if problem.LAZY:
                new_max_M = gl.where(new_max_M > max_M + LAZY_GROWTH, new_max_M, max_M)
            rescale_M = gl.exp2(max_M - new_max_M)
            exp_MN = gl.exp2(s_MN * scale_log2 - gl.expand_dims(new_max_M, 1))
            sum_M4 = times_rows(sum_M4, rescale_M) + sum_apart(exp_MN)
            max_M = new_max_M
            problem.mark(INDEX, SOFTMAX_DONE, step)
            # Here, not where K is used: a wait's spin ends ptxas's block, and within one block ptxas waits for the output before the exp2.
            mbarrier.wait(shared.k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=i + 1 < tiles)
            if problem.OVERLAP:
                acc_MD = warpgroup_mma_wait(0, deps=(output,))
                problem.mark(INDEX, OUTPUT_READY, step - 1)
                arrive(problem.v_free(v_stage), THREADS)
            acc_MD = times_rows_if_needed(acc_MD, rescale_M) if problem.LAZY else times_rows(acc_MD, rescale_M)
            p_MN = gl.convert_layout(exp_MN.to(out_desc.dtype), p_layout)
        arrive(problem.q_free(slot), THREADS)

        stage = step % STAGES
        mbarrier.wait(shared.v_full.index(stage), step // STAGES & 1)
        v_ND = shared.v.index(stage).reshape([KEYS, HEAD_DIM])
        problem.mark(INDEX, OUTPUT_ISSUED, step)
        acc_MD = warpgroup_mma_wait(0, deps=(warpgroup_mma(p_MN, v_ND, acc_MD, is_async=True),))
        problem.mark(INDEX, OUTPUT_READY, step)
        arrive(problem.v_free(stage), THREADS)
        step = item_end

        sum_M = gl.convert_layout(gl.sum(sum_M4, 1), gl.SliceLayout(1, s_layout))
        if problem.CAUSAL:
            sum_M = gl.where(sum_M == 0, 1.0, sum_M)  # rows that saw nothing: output 0, log-sum-exp -inf + log(1)
        out = shared.out.index(INDEX)
        tma.store_wait(0)
        out.reshape([QUERIES, HEAD_DIM]).store(times_rows(acc_MD, 1.0 / sum_M).to(out_desc.dtype))
        fence_async_shared()
        if first_query < problem.seq_q:
            tma.async_copy_shared_to_global(out_desc, [batch, head, first_query, 0], out)  # rows past the end are not written
            query_M = first_query + gl.arange(0, QUERIES, gl.SliceLayout(1, s_layout))
            row_M = (batch * out_desc.shape[1] + head).to(gl.int64) * problem.seq_q + query_M
            gl.store(lse + row_M, max_M + gl.log2(sum_M), mask=query_M < problem.seq_q)

        problem.mark(INDEX, ITEM_STORED, step - 1)
        taken += 1
        slot = taken % Q_SLOTS
        mbarrier.wait(shared.q_full.index(slot), taken // Q_SLOTS & 1)
        batch = take_field(shared, slot, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads_at_once"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse, counter, trace, scale_log2, heads_at_once,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr, HIDE_FIRST: gl.constexpr, HIDE_SECOND: gl.constexpr, OVERLAP: gl.constexpr, TURNS: gl.constexpr, LAZY: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory, initialises the full barriers and starts the partitions. Descriptors are [batch, heads, seq, head_dim]."""
    KEYS: gl.constexpr = k_desc.block_type.shape[2]
    if trace is not None:
        trace += gl.program_id(0) * (WARPGROUPS + 1) * TRACE_TILES * EVENT_COUNT
    problem = Problem(
        q_desc.shape[2], k_desc.shape[2], WARPGROUPS, KEYS, STAGES, CAUSAL, HIDE_FIRST, HIDE_SECOND, OVERLAP, TURNS, LAZY, trace
    )  # fmt: skip
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    shared = Shared(
        gl.allocate_shared_memory(q_desc.dtype, [Q_SLOTS * WARPGROUPS] + q_desc.block_type.shape, q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout),
        gl.allocate_shared_memory(out_desc.dtype, [WARPGROUPS] + out_desc.block_type.shape, out_desc.layout),
        gl.allocate_shared_memory(gl.int32, [Q_SLOTS * ITEM_FIELDS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
    )
    for i in gl.static_range(Q_SLOTS):
        mbarrier.init(shared.q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.k_full.index(i), count=1)
        mbarrier.init(shared.v_full.index(i), count=1)

    if WARPGROUPS == 2:
        gl.warp_specialize([
            (compute, (0, problem, shared, out_desc, lse, scale_log2)),
            (compute, (1, problem, shared, out_desc, lse, scale_log2)),
            (load, (problem, shared, q_desc, k_desc, v_desc, counter, heads_at_once)),
        ], [4, 1], [REGISTERS, LOAD_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (compute, (0, problem, shared, out_desc, lse, scale_log2)),
            (compute, (1, problem, shared, out_desc, lse, scale_log2)),
            (compute, (2, problem, shared, out_desc, lse, scale_log2)),
            (load, (problem, shared, q_desc, k_desc, v_desc, counter, heads_at_once)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, LOAD_REGISTERS])  # fmt: skip


class Constants(NamedTuple):
    """The kernel's constexpr parameters, in its order."""

    WARPGROUPS: int
    STAGES: int
    REGISTERS: int
    LOAD_REGISTERS: int
    CAUSAL: bool
    HIDE_FIRST: bool
    HIDE_SECOND: bool
    OVERLAP: bool
    TURNS: bool
    LAZY: bool


@cache
def compile_options(tile: HopperTile) -> dict:
    return dict(num_warps=4, maxnreg=tile.registers(LOAD_REGISTERS)[1])


def constants(tile: HopperTile, causal: bool, seq_q: int, seq_k: int) -> Constants:
    assert tile.overlap or not tile.turns, "without overlap nobody passes the turn on"
    return Constants(
        tile.warpgroups, tile.stages, tile.registers(LOAD_REGISTERS)[0], LOAD_REGISTERS,
        CAUSAL=causal,
        HIDE_FIRST=causal or seq_k % tile.keys != 0,
        HIDE_SECOND=causal and (seq_k - seq_q) % 64 != 0,  # then the diagonal of 64 queries may cross from one tile of keys to the next
        OVERLAP=tile.overlap, TURNS=tile.turns, LAZY=tile.lazy,
    )  # fmt: skip


class Plan(NamedTuple):
    """Of a launch what does not change with the tensors' addresses."""

    programs: int
    views: tuple[View, ...]  # of q, k, v and out
    rest: tuple
    key: tuple
    options: dict


@planned
def plan_forward(device: torch.device, dtype: torch.dtype, q_shape, k_shape, of: tuple, causal: bool, scale: float) -> Plan:
    """of: strides of q, k, v and out."""
    batch, seq_q, heads, head_dim = q_shape
    _, seq_k, kv_heads, _ = k_shape
    tile = hopper_tile(head_dim, causal, seq_q, seq_k)
    items = batch * heads * triton.cdiv(seq_q, tile.warpgroups * QUERIES.value)
    heads_at_once = max(1, L2_FOR_KEYS // (4 * seq_k * head_dim)) * (heads // kv_heads)  # 4: two bytes in K, two in V
    shapes, rows = (q_shape, k_shape, k_shape, q_shape), (QUERIES.value, tile.keys, tile.keys, QUERIES.value)
    of_kernel = constants(tile, causal, seq_q, seq_k)
    return Plan(
        min(items, tile.programs * multiprocessors(device)),
        tuple(view(*x, dtype) for x in zip(shapes, of, rows)),
        (scale * LOG2_E, heads_at_once, *of_kernel),
        (device.index, dtype, head_dim, tile, of_kernel),
        compile_options(tile),
    )


def launch_forward(q, k, v, causal: bool, scale: float, trace: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_forward` past the dispatcher; with a `new_trace`, the kernel that fills it."""
    out, lse = outputs(q, k, v)
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    tensors, of = readable_by_tma(q, k, v, out)
    plan = plan_forward(q.device, q.dtype, q.shape, k.shape, of, causal, scale)
    descriptors = [Descriptor(x, view) for x, view in zip(tensors, plan.views)]
    counter = work_counter(q.device)
    launch(forward_kernel, plan.programs, descriptors, (lse, counter, trace), plan.rest, (*plan.key, trace is None), plan.options)
    return out, lse


def new_trace(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """What `launch_forward` fills: multiprocessors' clocks, int64 [programs, warpgroups + 1, TRACE_TILES, EVENTS]; 0: did not happen.

    ValueError for a tile without overlap, whose loop has no `mark`.
    """
    tile = hopper_tile(q.shape[3], causal, q.shape[1], k.shape[1])
    if not tile.overlap:
        raise ValueError("no trace of a kernel without overlap (head_dim 64, causal, up to 2048 keys or an odd diagonal): take longer rows")
    shape = multiprocessors(q.device), tile.warpgroups + 1, TRACE_TILES.value, len(EVENTS)
    return torch.zeros(shape, dtype=torch.int64, device=q.device)


@operator(
    "hopper_attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, bool deterministic=False) -> (Tensor, Tensor)", outputs
)
def attention_forward(q, k, v, causal, scale, deterministic=False):
    """(out [batch, seq_q, heads, head_dim], lse [batch, heads, seq_q] float32, of base 2) of the tensors that `attention` describes.

    float16 or bfloat16, head_dim 64 or 128. Strided tensors are read in place where TMA can: every row aligned to 16 bytes, the last
    dimension dense; others are copied. deterministic: the gradients come from the portable kernels, which add up in a fixed order.
    """
    return launch_forward(q, k, v, causal, scale)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs[:5]
    ctx.deterministic = inputs[5:] == (True,)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    kernels = triton_backward if ctx.deterministic else hopper_backward
    dq, dk, dv, *_ = call(kernels.attention_backward, dout, dlse, q, k, v, out, lse, ctx.causal, ctx.scale)
    return dq, dk, dv, None, None, None


differentiable(attention_forward, _save_for_backward, _differentiate)
