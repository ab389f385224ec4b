"""FlashAttention backward for Hopper (sm_90a) in Gluon: `recipe::hopper_attention_backward`. `reference.tiled` is its specification.

A program stays on its multiprocessor and takes work items: dK and dV of 128 keys of one key head, over all query heads that share it. One warp
loads, two warpgroups of 4 warps compute, 64 keys each, and a warp for each of these takes its results to global memory. A step is one tile of
queries (64 at head_dim 128, 128 at 64). Five products a step, S and dP transposed, so that P and dS are left operands as they stand; dQ needs the
keys of both warpgroups, and of all programs: it is summed up in float32 in global memory by TMA.

      load, one warp                    shared memory                          compute, each warpgroup

    claim a work item, when the last tile of the one before is requested
    for each tile of queries i:
      wait free[slot]
      the first: the item  ------->  work[4]           -- work_full ------>  take the item
      TMA: Q, log-sum-exp  ------->  q[2], lse[2]      -- q_full[slot] --->    S = K Q^T             on the matrix units: S
      TMA: dO, delta  ------------>  dout[2], delta[2]  -- dout_full --->      dP = V dO^T                                dP
      the first: wait K_FREE                                                   P = exp2(S - lse)     under dP
      TMA: K  -------------------->  k[2]              -- q_full[slot] --->    dV += P dO                                 dV
                 wait V_FREE                                                   (last tile: arrive at V_FREE)
      TMA: V  -------------------->  v[1 or 2]         -- dout_full --->       dS = P (dP - delta)   under dV
                                     ds[2]  -- ds_ready[other] ---------->     dQ of i - 1           (all 128 keys)       dQ
                                     ds[2]  <------------------------------    dS of 64 keys, half a slot
                                                                               dK += dS Q                                 dK
                                                       -- dq_free -------->    wait dq_free
                                     dq[warpgroup]  <----------------------    dQ of i - 1           under dK
                                                                               (first tile: arrive at K_FREE)
                                                                               arrive at dq_full, at free[slot]
                                     dq[warpgroup]  <----------------------  dK and dV, likewise

      add, one warp for each warpgroup, which follows the items likewise

    for each tile of queries i, the last one when dV and dK are out:
      wait dq_full                   dq[warpgroup]
      unless the tile of dQ was stored when last seen: touch it; where another has touched it first, wait until it is stored
      TMA: stores dQ, if this was the first touch, or else adds it, to global memory
      when TMA has read dQ: arrive at dq_free
      after a first touch: wait until the tile is stored, and say so; or else see to the state of the next tile
    wait dq_full; TMA: stores dV and dK, at once or one after the other; arrive at dq_free

Steps count on across items, and so does the pipeline: dQ of an item's last tile is computed in the first step of the next item, for which K of
both lies in shared memory. V of the next item is loaded when both warpgroups have their last dP, or has a place of its own at head_dim 64.

The full barriers of loads, and dq_free, are mbarriers: use n of a slot completes its phase (n // slots) % 2; who waits counts, steps for q_full and
dout_full, items for work_full, for dq_free steps and what dK and dV take. The others are the hardware's named barriers, which need no phase as long
as nobody arrives for one use before all have synchronised for the use before:

    free[slot], K_FREE, V_FREE: both warpgroups arrive, once a step or once an item; the loading warp synchronises before it fills a place again, and
      what it then fills is what they need to arrive again. It waits in the order in which they arrive. K_FREE of item n, in its first step, says that
      K of item n - 1 is free, and so the loading warp waits for it before it loads K of item n + 1. Arrivals of the last uses stay unanswered.
    ds_ready, two a warpgroup, for even and odd steps: it arrives when it has stored its dS of i and has its dQ of i - 1; the other synchronises in
      step i + 1 before it issues its dQ of i and stores its own dS. It arrives for i + 2 after the other's dS of i + 1, and so after the other
      synchronised for i.
    dq_full: the warpgroup arrives, its adding warp synchronises; it arrives again after dq_free.
    START: the first warpgroup arrives when it has the first dP of an item, and the second synchronises before it starts the item, so that one
      computes while the other multiplies. An item's V, or at head_dim 64 its K, is loaded when the second has started the item before.

An item is put into work[n % 4] when free[slot] says that both have ended the step before the last one of item n - 1. No warpgroup ends step i before
its adding warp has handled dQ of i - 2. So the adding warps have handled one of the four steps before item n, and taken item n - 4 or a later one.

Two slots of dS suffice: a warpgroup stores dS of i when both have read that of i - 2, itself in step i - 1, the other before it arrived for i - 1.
So the two may drift apart by almost a step, less the time of one dQ.

A warpgroup waits at three barriers a step: for dS of the other, and at two of the compiler's, which for all it knows must part the store of a dS
from the products that read another. At head_dim 128 dQ's product comes first, and the matrix units need not wait for the store; at 64, where its
registers would be spilled, the store.

dQ is split by columns (head_dim 128: each warpgroup has 64 of them) or by queries (head_dim 64: each has 64 of the 128), into tiles of 64 by 64. A
tile lies in global memory as the threads hold it, without gaps, so that its numbers go from registers to shared memory as they stand, 16 bytes a
thread, and no bank is asked twice; `finish_kernel` brings back the order of rows and columns.

Nothing sets these sums to 0. Each tile has a state: untouched, touched, or stored. The first to touch it stores its part, and says so when the part
has arrived in global memory; the others wait for that, and add theirs. A tile is touched when its dQ is there, not sooner: between touch and store
its warp must wait for nothing, since what it waited for could wait for another tile, and so on in a circle. Most tiles are stored long since, as the
adding warp has seen a step ahead.

Queries past the end are loaded as zeros, with log-sum-exp and delta 0, and add nothing. Masked tiles are a loop of their own; so are those before
the diagonal of the second warpgroup, at head_dim 128 the first of an item, in which it takes part in the rest with a dS of 0. Full attention
starts each item at another tile, so that the programs of a head add to different rows of dQ at any time, and divides the last items, which would
leave programs without work, into parts with some of the queries each, whose dK and dV `finish_kernel` adds; causal attention takes the items
with the most queries first, over heads whose tensors L2 holds together.

Names carry their shape: M queries of a tile, N the 64 keys of a warpgroup, D head_dim.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate  # exported to Gluon programs by this name alone

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
from kernels.attention.operators import launch, launch_specialised, operator, planned, strides
from kernels.attention.triton_backward import ROWS_PER_PROGRAM, plan_rows
from kernels.attention.triton_forward import LOG2_E, blocks, dense_rows, row_strides
from kernels.attention.triton_tiles import store_rows

WARPGROUPS = gl.constexpr(2)
KEYS = gl.constexpr(128)  # of a program
OWN_KEYS = gl.constexpr(64)  # of a warpgroup: the rows of one wgmma
STAGES = gl.constexpr(2)  # tiles of queries in shared memory
DS_SLOTS = gl.constexpr(2)
K_SLOTS = gl.constexpr(2)
ITEMS = gl.constexpr(4)  # in shared memory
ITEM_FIELDS = gl.constexpr(6)  # of each: what `Problem.place` returns, which takes divisions
DQ_TILE = gl.constexpr(64)  # rows and columns of dQ that a warpgroup adds at once
DQ_BOX = gl.constexpr([128, 32])  # as which TMA sees them
UNTOUCHED, STORED = gl.constexpr(0), gl.constexpr(2)  # states of such a tile; 1: touched
STEPS_AROUND_AN_ITEM = 2  # what its start and end take
MOST_PARTS = 8  # of an item: `finish_kernel` reads them one after the other
ROWS_ADDED = gl.constexpr(16)  # of dK and dV, by one of its programs: few, so that many take part
COMPUTE_REGISTERS, REGISTERS_AT_START = 240, 168  # 2 * 128 * 240 + 128 * 24 is all of 65536 that is left of 384 * 168
L2_FOR_A_GROUP = 32 << 20  # bytes of the tensors of heads that are computed together
FREE = gl.constexpr(FIRST_FREE_BARRIER.value)  # of the hardware's named barriers: one a stage
DS_READY = gl.constexpr(FREE.value + STAGES.value)  # two a warpgroup
K_FREE = gl.constexpr(DS_READY.value + 2 * WARPGROUPS.value)  # and one each
V_FREE = gl.constexpr(K_FREE.value + 1)
START = gl.constexpr(V_FREE.value + 1)
DQ_FULL = gl.constexpr(START.value + 1)  # one a warpgroup
LOADING = gl.constexpr(WARPGROUPS.value * WARPGROUP.value + 32)  # threads that meet at `free`
ADDING = gl.constexpr(WARPGROUP.value + 32)
COMPUTING = gl.constexpr(WARPGROUPS.value * WARPGROUP.value)


@builtin
def tma_reduce_add(desc, coord, src, _semantic=None):
    """Adds a tile in shared memory to global memory, asynchronously; Gluon has it in its compiler and not in its language."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@aggregate
class Item:
    """128 keys of a key head, and the tiles of queries that see them, or some of these, from first_tile on, the first `masked` of them in part, and
    the first `before_second` of those none of the second warpgroup's."""

    batch: gl.tensor
    kv_head: gl.tensor
    first_head: gl.tensor  # of the query heads that share the key head, counted over the batch
    first_key: gl.tensor
    first_tile: gl.tensor
    tiles: gl.tensor  # at least one
    part: gl.tensor  # of divided items the number, under which its dK and dV are kept; or else -1
    masked: gl.tensor
    before_second: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, kv_head, first_head, first_key, first_tile, tiles, part, masked, before_second):
        self.batch = batch
        self.kv_head = kv_head
        self.first_head = first_head
        self.first_key = first_key
        self.first_tile = first_tile
        self.tiles = tiles
        self.part = part
        self.masked = masked
        self.before_second = before_second


@aggregate
class Problem:
    """What every partition knows."""

    batch: gl.tensor
    kv_heads: gl.tensor
    seq_q: gl.tensor
    seq_k: gl.tensor
    heads_at_once: gl.tensor
    whole: gl.tensor  # items that are not divided into parts
    parts: gl.tensor  # of each of the others
    GROUP: gl.constexpr  # how many query heads share a key head
    QUERIES: gl.constexpr
    HEAD_DIM: gl.constexpr
    CAUSAL: gl.constexpr
    TAIL: gl.constexpr  # the last keys' tile is not full
    V_SLOTS: gl.constexpr  # as many as shared memory holds
    GRADIENTS_AT_ONCE: gl.constexpr  # dK and dV in dq's place

    @gluon.constexpr_function
    def __init__(self, batch, kv_heads, seq_q, seq_k, heads_at_once, whole, parts, GROUP, QUERIES, HEAD_DIM, CAUSAL, TAIL):
        self.batch = batch
        self.kv_heads = kv_heads
        self.seq_q = seq_q
        self.seq_k = seq_k
        self.heads_at_once = heads_at_once
        self.whole = whole
        self.parts = parts
        self.GROUP = gl.constexpr(GROUP)
        self.QUERIES = gl.constexpr(QUERIES)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.TAIL = gl.constexpr(TAIL)
        self.V_SLOTS = gl.constexpr(128 // HEAD_DIM)
        self.GRADIENTS_AT_ONCE = gl.constexpr(128 // HEAD_DIM)

    @gluon.jit
    def all_tiles(self):
        """Of the queries of a sequence."""
        return (self.seq_q + self.QUERIES - 1) // self.QUERIES

    @gluon.jit
    def items(self):
        """Whole ones and parts."""
        items = self.batch * self.kv_heads * ((self.seq_k + KEYS - 1) // KEYS)
        if not self.CAUSAL:
            items = self.whole + (items - self.whole) * self.parts
        return items

    @gluon.jit
    def place(self, number):
        """(batch, key head, first key, first tile, tiles, part) of an item."""
        key_tiles = (self.seq_k + KEYS - 1) // KEYS
        tiles = self.all_tiles()
        part = -1
        if self.CAUSAL:
            batch_head, rank = longest_first(number, key_tiles, self.heads_at_once, self.batch * self.kv_heads)
            first_key = rank * KEYS
            first_tile = gl.maximum(first_key - (self.seq_k - self.seq_q), 0) // self.QUERIES
            tiles -= first_tile
        else:
            skipped = 0
            if number >= self.whole:
                part = number - self.whole
                number = self.whole + part // self.parts
                skipped = part % self.parts * tiles // self.parts
                tiles = (part % self.parts + 1) * tiles // self.parts - skipped
            batch_head = number // key_tiles
            first_key = number % key_tiles * KEYS
            first_tile = (first_key // self.QUERIES + skipped) % self.all_tiles()
        return batch_head // self.kv_heads, batch_head % self.kv_heads, first_key, first_tile, tiles, part

    @gluon.jit
    def item(self, batch, kv_head, first_key, first_tile, tiles, part):
        masked = 0
        before_second = 0
        if self.CAUSAL:
            own_query = first_key - (self.seq_k - self.seq_q)  # the one that sees the first key as its last
            masked = (gl.maximum(own_query + KEYS - 1, 0) + self.QUERIES - 1) // self.QUERIES - first_tile
            before_second = gl.minimum(gl.maximum(own_query + OWN_KEYS, 0) // self.QUERIES - first_tile, tiles)
        if self.TAIL:
            masked = gl.where(first_key + KEYS > self.seq_k, tiles, masked)
        masked = gl.minimum(masked, tiles)
        first_head = (batch * self.kv_heads + kv_head) * self.GROUP
        return Item(batch, kv_head, first_head, first_key, first_tile, tiles, part, masked, before_second)

    @gluon.jit
    def first_query(self, item, i):
        """Of the item's i-th tile."""
        tile = item.first_tile + i
        if not self.CAUSAL:
            all_tiles = self.all_tiles()
            tile = gl.where(tile >= all_tiles, tile - all_tiles, tile)
        return tile * self.QUERIES


@aggregate
class Shared:
    """Shared memory: tiles, work items, and full barriers. The leading dimension counts slots, that of dq warpgroups."""

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    work: gl.shared_memory_descriptor
    work_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    dout_full: gl.shared_memory_descriptor
    dq_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, dout, lse, delta, k, v, ds, dq, work, work_full, q_full, dout_full, dq_free):
        self.q = q
        self.dout = dout
        self.lse = lse
        self.delta = delta
        self.k = k
        self.v = v
        self.ds = ds
        self.dq = dq
        self.work = work
        self.work_full = work_full
        self.q_full = q_full
        self.dout_full = dout_full
        self.dq_free = dq_free


@gluon.jit
def load(problem, shared, q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, counter):
    """The loading warp. Items are handed out by a counter in global memory, which the last claim of a launch sets back to 0."""
    QUERIES: gl.constexpr = problem.QUERIES
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes + 4 * QUERIES
    DOUT_BYTES: gl.constexpr = dout_desc.block_type.nbytes + 4 * QUERIES
    items = problem.items()
    rows = problem.all_tiles() * QUERIES
    number = gl.program_id(0)
    taken = 0
    step = 0
    while number < items:
        batch, kv_head, first_key, first_tile, tiles, part = problem.place(number)
        item = problem.item(batch, kv_head, first_key, first_tile, tiles, part)
        keys = [item.batch, item.kv_head, item.first_key, 0]
        for member in range(problem.GROUP):
            head = item.first_head + member
            for i in range(item.tiles):
                slot = step % STAGES
                q_full = shared.q_full.index(slot)
                dout_full = shared.dout_full.index(slot)
                first_query = problem.first_query(item, i)
                place = [item.batch, head - item.batch * q_desc.shape[1], first_query, 0]
                first = member + i == 0
                if step >= STAGES:
                    synchronise(FREE + slot, LOADING)
                if first:
                    field = taken % ITEMS * ITEM_FIELDS
                    put(shared.work.index(field), batch)
                    put(shared.work.index(field + 1), kv_head)
                    put(shared.work.index(field + 2), first_key)
                    put(shared.work.index(field + 3), first_tile)
                    put(shared.work.index(field + 4), tiles)
                    put(shared.work.index(field + 5), part)
                    mbarrier.expect(shared.work_full.index(taken % ITEMS), 0)
                    mbarrier.expect(q_full, Q_BYTES + k_desc.block_type.nbytes)
                    mbarrier.expect(dout_full, DOUT_BYTES + v_desc.block_type.nbytes)
                else:
                    mbarrier.expect(q_full, Q_BYTES)
                    mbarrier.expect(dout_full, DOUT_BYTES)
                tma.async_copy_global_to_shared(q_desc, place, q_full, shared.q.index(slot))
                tma.async_copy_global_to_shared(lse_desc, [head * rows + first_query], q_full, shared.lse.index(slot))
                tma.async_copy_global_to_shared(dout_desc, place, dout_full, shared.dout.index(slot))
                tma.async_copy_global_to_shared(delta_desc, [head * rows + first_query], dout_full, shared.delta.index(slot))
                if first:
                    if taken > 0:
                        synchronise(K_FREE, LOADING)
                    tma.async_copy_global_to_shared(k_desc, keys, q_full, shared.k.index(taken % K_SLOTS))
                    if problem.V_SLOTS == 1 and taken > 0:
                        synchronise(V_FREE, LOADING)
                    tma.async_copy_global_to_shared(v_desc, keys, dout_full, shared.v.index(taken % problem.V_SLOTS))
                step += 1
        # Not before: an item claimed early waits while others, whose items end sooner, find none.
        number = gl.num_programs(0) + claimed(claim(counter))
        taken += 1
    if step >= STAGES:
        synchronise(FREE + step % STAGES, LOADING)
    put(shared.work.index(taken % ITEMS * ITEM_FIELDS), -1)
    mbarrier.expect(shared.work_full.index(taken % ITEMS), 0)
    if number == items + gl.num_programs(0) - 1:
        gl.store(counter, 0)


@gluon.constexpr_function
def _arrive_if_zero(threads):
    return f"{{ .reg .pred zero; setp.eq.s32 zero, $2, 0; @zero bar.arrive $1, {threads}; mov.u32 $0, 0; }}"


@gluon.jit
def arrive_if_zero(number, barrier, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(_arrive_if_zero(THREADS), "=r,r,r,~{memory}", [barrier, number], gl.int32, False, 1)


@gluon.jit
def unknown(i):
    """i, of which the compiler knows nothing more: it then keeps one address where it would keep a register for each tile of a fixed buffer, or
    for each of those that a slot's number leads to, and would spill them."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], gl.int32, False, 1)


@gluon.jit
def issue_dq(INDEX: gl.constexpr, problem, shared, ds_slot, k_slot):
    """dQ's part of this warpgroup, [64, 64], from dS of all keys; not waited for."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_TILE, 16])
    zero = gl.full([DQ_TILE, DQ_TILE], 0.0, gl.float32, layout)
    ds_MN = shared.ds.index(unknown(ds_slot)).permute((1, 0))
    k_ND = shared.k.index(unknown(k_slot)).reshape([KEYS, problem.HEAD_DIM])
    if problem.HEAD_DIM == 64:
        ds_MN = ds_MN.slice(INDEX * DQ_TILE, DQ_TILE, 0)
    else:
        k_ND = k_ND.slice(INDEX * DQ_TILE, DQ_TILE, 1)
    return warpgroup_mma(ds_MN, k_ND, zero, use_acc=False, is_async=True)


@gluon.jit
def await_place(INDEX: gl.constexpr, shared, use):
    """Until TMA has read what the warpgroup left in dq's place before; use: how often that was."""
    mbarrier.wait(shared.dq_free.index(INDEX), (use & 1) ^ 1)


@gluon.jit
def hand_over(INDEX: gl.constexpr):
    """What lies in dq's place, to the adding warp."""
    fence_async_shared()
    arrive(DQ_FULL + INDEX, ADDING)


@gluon.jit
def put_dq(INDEX: gl.constexpr, shared, dq):
    """[64, 64] of dQ, in the order of `finish_kernel`: four of a thread's registers at a time."""
    # Rows: warp, half, quad; columns: 8 at a time, thread of the quad, pair.
    dq = dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    shared.dq.index(INDEX).reshape(DQ_BOX).store(dq.reshape(DQ_BOX))
    hand_over(INDEX)


@gluon.constexpr_function
def _hide_before(n):
    """0 for those of n probabilities, in pairs of the thread's two rows by turns, that come before the row's first query, $2n of the first two."""
    hidden = " ".join(f"setp.gt.s32 hidden, first{i // 2 % 2}, {i // 4 * 8 + i % 2}; @hidden mov.f32 ${i}, 0f00000000;" for i in range(n))
    return (
        "{ .reg .pred hidden; .reg .s32 lane, first0, first1; mov.u32 lane, %laneid; and.b32 lane, lane, 3; shl.b32 lane, lane, 1;"
        f" sub.s32 first0, ${2 * n}, lane; sub.s32 first1, ${2 * n + 2}, lane; {hidden} }}"
    )


@gluon.jit
def hide(p_NM, first_query, INDEX: gl.constexpr, problem, item):
    """0 for the probabilities of queries that must not see a key: those before it, or all, past the last key. In assembly, as in the forward."""
    layout: gl.constexpr = p_NM.type.layout
    N: gl.constexpr = OWN_KEYS * problem.QUERIES // WARPGROUP  # probabilities of a thread
    key_N = item.first_key + INDEX * OWN_KEYS + gl.arange(0, OWN_KEYS, gl.SliceLayout(1, layout))
    first_N = key_N * 0
    if problem.CAUSAL:
        first_N = key_N - (first_query + problem.seq_k - problem.seq_q)
    if problem.TAIL:
        first_N = gl.where(key_N < problem.seq_k, first_N, problem.QUERIES)
    p_NM, first_NM = gl.broadcast(p_NM, gl.expand_dims(first_N, 1))
    return gl.inline_asm_elementwise(_hide_before(N), in_place(N, "r"), [p_NM, first_NM], gl.float32, True, N)


@gluon.jit
def add_tiles(
    INDEX: gl.constexpr, MASKED: gl.constexpr, problem, item, shared, scale_log2, k_slot, started, end, step, first, last,
    dk_ND, dv_ND, dq_k_slot, other_uses,
):  # fmt: skip
    """The tiles first .. last of one query head (FlashAttention-2, Algorithm 2, lines 8 to 16). The item has the steps started .. end;
    dq_k_slot: of K whose dQ is due."""
    QUERIES: gl.constexpr = problem.QUERIES
    HEAD_DIM: gl.constexpr = problem.HEAD_DIM
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    of_query: gl.constexpr = gl.SliceLayout(0, s_layout)
    # At head_dim 64 its registers would be spilled.
    DQ_FIRST: gl.constexpr = HEAD_DIM == 128
    zero_NM = gl.full([OWN_KEYS, QUERIES], 0.0, gl.float32, s_layout)
    for i in range(first, last):
        slot = step % STAGES
        phase = step // STAGES & 1
        first_query = problem.first_query(item, i)
        q_MD = shared.q.index(slot).reshape([QUERIES, HEAD_DIM])
        dout_MD = shared.dout.index(slot).reshape([QUERIES, HEAD_DIM])
        mbarrier.wait(shared.q_full.index(slot), phase)
        k_ND = shared.k.index(unknown(k_slot)).reshape([KEYS, HEAD_DIM]).slice(INDEX * OWN_KEYS, OWN_KEYS, 0)
        s_NM = warpgroup_mma(k_ND, q_MD.permute((1, 0)), zero_NM, use_acc=False, is_async=True)
        mbarrier.wait(shared.dout_full.index(slot), phase)
        v_ND = shared.v.index(unknown(k_slot % problem.V_SLOTS)).reshape([KEYS, HEAD_DIM]).slice(INDEX * OWN_KEYS, OWN_KEYS, 0)
        dp_NM = warpgroup_mma(v_ND, dout_MD.permute((1, 0)), zero_NM, use_acc=False, is_async=True)
        s_NM = warpgroup_mma_wait(1, deps=(s_NM,))
        lse_M = shared.lse.index(slot).load(of_query)
        p_NM = gl.exp2(s_NM * scale_log2 - gl.expand_dims(lse_M, 0))
        if MASKED:
            p_NM = hide(p_NM, first_query, INDEX, problem, item)
        dv = warpgroup_mma(gl.convert_layout(p_NM.to(dtype), left), dout_MD, dv_ND, is_async=True)
        dp_NM = warpgroup_mma_wait(1, deps=(dp_NM,))
        if INDEX == 0:
            arrive_if_zero(step - started, START, COMPUTING)
        if problem.V_SLOTS == 1:
            arrive_if_zero(end - 1 - step, V_FREE, LOADING)
        delta_M = shared.delta.index(slot).load(of_query)
        ds_NM = (p_NM * (dp_NM - gl.expand_dims(delta_M, 0))).to(dtype)
        synchronise(DS_READY + 2 * (1 - INDEX) + (step + 1) % 2, COMPUTING)
        own_ds = shared.ds.index(unknown(step % DS_SLOTS)).slice(INDEX * OWN_KEYS, OWN_KEYS, 0)
        if DQ_FIRST:
            dq = issue_dq(INDEX, problem, shared, (step + 1) % DS_SLOTS, dq_k_slot)
            own_ds.store(ds_NM)
            fence_async_shared()
        else:
            own_ds.store(ds_NM)
            fence_async_shared()
            dq = issue_dq(INDEX, problem, shared, (step + 1) % DS_SLOTS, dq_k_slot)
        dk = warpgroup_mma(gl.convert_layout(ds_NM, left), q_MD, dk_ND, is_async=True)
        dq, dv_ND = warpgroup_mma_wait(1, deps=(dq, dv))
        arrive(DS_READY + 2 * INDEX + step % 2, COMPUTING)
        arrive_if_zero(step - started, K_FREE, LOADING)
        await_place(INDEX, shared, step + other_uses)
        put_dq(INDEX, shared, dq)
        dk_ND = warpgroup_mma_wait(0, deps=(dk,))
        arrive(FREE + slot, LOADING)
        dq_k_slot = k_slot
        step += 1
    return dk_ND, dv_ND, step, dq_k_slot


@gluon.jit
def pass_tiles(INDEX: gl.constexpr, problem, shared, k_slot, started, end, step, last, dq_k_slot, other_uses):
    """The tiles 0 .. last, whose queries see none of the warpgroup's keys: dS is 0, and dQ of the step before is due as ever."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, problem.QUERIES, 16])
    zero_NM = gl.full([OWN_KEYS, problem.QUERIES], 0.0, shared.k.dtype, s_layout)
    for _ in range(last):
        slot = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(shared.q_full.index(slot), phase)
        mbarrier.wait(shared.dout_full.index(slot), phase)
        if problem.V_SLOTS == 1:
            arrive_if_zero(end - 1 - step, V_FREE, LOADING)
        synchronise(DS_READY + 2 * (1 - INDEX) + (step + 1) % 2, COMPUTING)
        shared.ds.index(unknown(step % DS_SLOTS)).slice(INDEX * OWN_KEYS, OWN_KEYS, 0).store(zero_NM)
        fence_async_shared()
        dq = warpgroup_mma_wait(0, deps=(issue_dq(INDEX, problem, shared, (step + 1) % DS_SLOTS, dq_k_slot),))
        arrive(DS_READY + 2 * INDEX + step % 2, COMPUTING)
        arrive_if_zero(step - started, K_FREE, LOADING)
        await_place(INDEX, shared, step + other_uses)
        put_dq(INDEX, shared, dq)
        arrive(FREE + slot, LOADING)
        dq_k_slot = k_slot
        step += 1
    return step, dq_k_slot


@gluon.jit
def keep(INDEX: gl.constexpr, problem, item, kept, dk_ND, dv_ND):
    """dK and dV of the warpgroup's keys as far as this part goes, for `finish_kernel` to add."""
    row_N = INDEX * OWN_KEYS + gl.arange(0, OWN_KEYS, gl.SliceLayout(1, dk_ND.type.layout))
    column_D = gl.arange(0, problem.HEAD_DIM, gl.SliceLayout(0, dk_ND.type.layout))
    place_ND = gl.expand_dims(row_N * problem.HEAD_DIM, 1) + gl.expand_dims(column_D, 0)
    kept += item.part.to(gl.int64) * (2 * KEYS * problem.HEAD_DIM)
    gl.store(kept + place_ND, dk_ND)
    gl.store(kept + KEYS * problem.HEAD_DIM + place_ND, dv_ND)


@gluon.jit
def places_of_gradients(INDEX: gl.constexpr, problem, shared):
    """dq's place as two for dV and dK of the warpgroup's keys, or at head_dim 128 one for both."""
    dtype: gl.constexpr = shared.k.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, OWN_KEYS, problem.HEAD_DIM], dtype)
    return shared.dq.index(INDEX)._reinterpret(dtype, [problem.GRADIENTS_AT_ONCE, 1, 1, OWN_KEYS, problem.HEAD_DIM], layout)


@gluon.jit
def put_dk_dv(INDEX: gl.constexpr, problem, shared, use, dk_ND, dv_ND):
    """dK and dV of the warpgroup's keys; use: of dq's place."""
    AT_ONCE: gl.constexpr = problem.GRADIENTS_AT_ONCE
    dtype: gl.constexpr = shared.k.dtype
    places = places_of_gradients(INDEX, problem, shared)
    await_place(INDEX, shared, use)
    places.index(0).reshape([OWN_KEYS, problem.HEAD_DIM]).store(dv_ND.to(dtype))
    if AT_ONCE == 1:
        hand_over(INDEX)
        await_place(INDEX, shared, use + 1)
    places.index(AT_ONCE - 1).reshape([OWN_KEYS, problem.HEAD_DIM]).store(dk_ND.to(dtype))
    hand_over(INDEX)


@gluon.constexpr_function
def _one_lane(instructions):
    """What the first lane of the warp does where `one` is set. TMA may be issued by another."""
    return "{ .reg .pred one, again; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 one, lane, 0; " + instructions + " }"


@gluon.jit
def see(state, before):
    """State of a tile of dQ. Not looked at after one that was UNTOUCHED: whoever is first at a tile is mostly first at the next, and has no time."""
    instructions: gl.constexpr = "{ .reg .pred look; setp.ne.u32 look, $2, 0; mov.u32 $0, 0; @look ld.acquire.gpu.global.u32 $0, [$1]; }"
    return gl.inline_asm_elementwise(instructions, "=r,l,r,~{memory}", [state.to(gl.int64), before], gl.int32, False, 1)


@gluon.jit
def touch(state, seen):
    """UNTOUCHED if a tile of dQ was so, which is then this warp's to store at once; or else STORED, at once where the first lane has seen that.
    No branch of the language's: with one, the compiler keeps what is the same in all threads of a warpgroup in registers of each."""
    instructions: gl.constexpr = _one_lane(
        "setp.ne.and.u32 one, $2, 2, one; mov.u32 $0, $2; @one atom.acquire.gpu.global.cas.b32 $0, [$1], 0, 1;"
        " shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff;"
        " AGAIN: setp.eq.u32 again, $0, 1; @again ld.acquire.gpu.global.u32 $0, [$1]; @again bra AGAIN;"
        " bar.warp.sync 0xffffffff; fence.proxy.async.global;"
    )
    return gl.inline_asm_elementwise(instructions, "=r,l,r,~{memory}", [state.to(gl.int64), seen], gl.int32, False, 1)


@gluon.jit
def announce(state):
    """STORED, now that what this warp stored by TMA has arrived."""
    instructions: gl.constexpr = _one_lane(
        "mov.u32 $0, 0; cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; @one st.release.gpu.global.u32 [$1], 2;"
    )
    gl.inline_asm_elementwise(instructions, "=r,l,~{memory}", [state.to(gl.int64)], gl.int32, False, 1)


@gluon.jit
def free_place(INDEX: gl.constexpr, shared):
    tma.store_wait(0)
    mbarrier.arrive(shared.dq_free.index(INDEX), count=1)


@gluon.jit
def add_dq(INDEX: gl.constexpr, shared, dq_desc, tile, state, seen):
    """[64, 64] of dQ to global memory; seen: the tile's state some time before. Returns UNTOUCHED if this warp stored it."""
    place = shared.dq.index(INDEX)
    synchronise(DQ_FULL + INDEX, ADDING)
    before = touch(state, seen)
    if before == UNTOUCHED:
        tma.async_copy_shared_to_global(dq_desc, [tile, 0, 0], place)
    else:
        tma_reduce_add(dq_desc, [tile, 0, 0], place)
    return before


@gluon.jit
def add(INDEX: gl.constexpr, problem, shared, dq_desc, dk_desc, dv_desc, states):
    """The warp that takes to global memory what warpgroup INDEX leaves in dq's place."""
    AT_ONCE: gl.constexpr = problem.GRADIENTS_AT_ONCE
    all_tiles = problem.all_tiles()
    taken = 0
    # What comes first is dQ of no step.
    synchronise(DQ_FULL + INDEX, ADDING)
    free_place(INDEX, shared)
    mbarrier.wait(shared.work_full.index(0), 0)
    batch = take(shared.work.index(0))
    while batch >= 0:
        item = take_item(problem, shared, taken, batch)
        # Of dQ a tile of queries has two, one for each warpgroup.
        head_end = 2 * (item.first_head + 1) * all_tiles
        first = 2 * (item.first_head * all_tiles + item.first_tile) + INDEX
        tile = first
        seen = see(states + tile, STORED)
        i = 1
        for _ in range(problem.GROUP * item.tiles - 1):
            before = add_dq(INDEX, shared, dq_desc, tile, states + tile, seen)
            last = tile
            tile += 2
            if not problem.CAUSAL:
                tile = gl.where(tile >= head_end, tile - 2 * all_tiles, tile)
            if problem.GROUP > 1:
                if i == item.tiles:
                    i = 0
                    first += 2 * all_tiles
                    head_end += 2 * all_tiles
                    tile = first
                i += 1
            free_place(INDEX, shared)
            if before == UNTOUCHED:
                announce(states + last)
            seen = see(states + tile, before)
        if problem.CAUSAL or item.part < 0:
            places = places_of_gradients(INDEX, problem, shared)
            own = [item.batch, item.kv_head, item.first_key + INDEX * OWN_KEYS, 0]
            synchronise(DQ_FULL + INDEX, ADDING)
            tma.async_copy_shared_to_global(dv_desc, own, places.index(0))
            if AT_ONCE == 1:
                free_place(INDEX, shared)
                synchronise(DQ_FULL + INDEX, ADDING)
            tma.async_copy_shared_to_global(dk_desc, own, places.index(AT_ONCE - 1))
            free_place(INDEX, shared)
        before = add_dq(INDEX, shared, dq_desc, tile, states + tile, seen)
        free_place(INDEX, shared)
        if before == UNTOUCHED:
            announce(states + tile)
        taken += 1
        mbarrier.wait(shared.work_full.index(taken % ITEMS), taken // ITEMS & 1)
        batch = take(shared.work.index(taken % ITEMS * ITEM_FIELDS))


@gluon.jit
def take_item(problem, shared, taken, batch):
    """The item of this number, whose first field has been taken."""
    field = taken % ITEMS * ITEM_FIELDS
    kv_head = take(shared.work.index(field + 1))
    first_key = take(shared.work.index(field + 2))
    first_tile = take(shared.work.index(field + 3))
    return problem.item(batch, kv_head, first_key, first_tile, take(shared.work.index(field + 4)), take(shared.work.index(field + 5)))


@gluon.jit
def compute(INDEX: gl.constexpr, problem, shared, kept, scale, scale_log2):
    """Warpgroup INDEX: dK and dV of 64 keys an item, and its part of dQ."""
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, problem.HEAD_DIM, 16])
    step = 0
    taken = 0
    # There is no dS of step -1: whatever lies in its slot makes a dQ that the adding warp drops.
    arrive(DS_READY + 2 * INDEX + 1, COMPUTING)
    dq_k_slot = 0
    other_uses = 0  # of dq's place, by dK and dV
    mbarrier.wait(shared.work_full.index(0), 0)
    batch = take(shared.work.index(0))
    while batch >= 0:
        item = take_item(problem, shared, taken, batch)
        dk_ND = gl.full([OWN_KEYS, problem.HEAD_DIM], 0.0, gl.float32, acc_layout)
        dv_ND = gl.full([OWN_KEYS, problem.HEAD_DIM], 0.0, gl.float32, acc_layout)
        k_slot = taken % K_SLOTS
        started = step
        end = step + problem.GROUP * item.tiles
        if INDEX == 1:
            synchronise(START, COMPUTING)
        for _ in range(problem.GROUP):
            first = 0
            if problem.CAUSAL and INDEX == 1:
                first = item.before_second
                step, dq_k_slot = pass_tiles(INDEX, problem, shared, k_slot, started, end, step, first, dq_k_slot, other_uses)
            if problem.CAUSAL or problem.TAIL:
                dk_ND, dv_ND, step, dq_k_slot = add_tiles(
                    INDEX, True, problem, item, shared, scale_log2, k_slot, started, end, step, first, item.masked,
                    dk_ND, dv_ND, dq_k_slot, other_uses,
                )  # fmt: skip
                first = item.masked
            dk_ND, dv_ND, step, dq_k_slot = add_tiles(
                INDEX, False, problem, item, shared, scale_log2, k_slot, started, end, step, first, item.tiles,
                dk_ND, dv_ND, dq_k_slot, other_uses,
            )  # fmt: skip
        dk_ND *= scale
        if problem.CAUSAL or item.part < 0:
            put_dk_dv(INDEX, problem, shared, step + other_uses, dk_ND, dv_ND)
            other_uses += 2 // problem.GRADIENTS_AT_ONCE
        else:
            keep(INDEX, problem, item, kept, dk_ND, dv_ND)
        taken += 1
        mbarrier.wait(shared.work_full.index(taken % ITEMS), taken // ITEMS & 1)
        batch = take(shared.work.index(taken % ITEMS * ITEM_FIELDS))
    synchronise(DS_READY + 2 * (1 - INDEX) + (step + 1) % 2, COMPUTING)
    dq = warpgroup_mma_wait(0, deps=(issue_dq(INDEX, problem, shared, (step + 1) % DS_SLOTS, dq_k_slot),))
    await_place(INDEX, shared, step + other_uses)
    put_dq(INDEX, shared, dq)


@gluon.jit(do_not_specialize=["heads_at_once", "whole", "parts"])
def backward_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc,
    counter, states, kept, scale, scale_log2, heads_at_once, whole, parts,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, TAIL: gl.constexpr, LOAD: gl.constexpr, COMPUTE: gl.constexpr,
):  # fmt: skip
    """Descriptors are [batch, heads, seq, head_dim]; lse_desc and delta_desc, of base-2 log-sum-exps and deltas, [batch * heads * padded seq]."""
    QUERIES: gl.constexpr = q_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[3]
    problem = Problem(
        k_desc.shape[0], k_desc.shape[1], q_desc.shape[2], k_desc.shape[2], heads_at_once, whole, parts,
        GROUP, QUERIES, HEAD_DIM, CAUSAL, TAIL,
    )  # fmt: skip
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, QUERIES], k_desc.dtype)
    shared = Shared(
        gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES] + dout_desc.block_type.shape, dout_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES] + delta_desc.block_type.shape, delta_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [K_SLOTS] + k_desc.block_type.shape, k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [problem.V_SLOTS] + v_desc.block_type.shape, v_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [DS_SLOTS, KEYS, QUERIES], ds_layout),
        gl.allocate_shared_memory(gl.float32, [WARPGROUPS] + dq_desc.block_type.shape, dq_desc.layout),
        gl.allocate_shared_memory(gl.int32, [ITEMS * ITEM_FIELDS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [ITEMS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], barrier),
    )
    for i in gl.static_range(ITEMS):
        mbarrier.init(shared.work_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.q_full.index(i), count=1)
        mbarrier.init(shared.dout_full.index(i), count=1)
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(shared.dq_free.index(i), count=1)
    gl.thread_barrier()  # here once, where the compiler would put one into the first warpgroup's loop, before it waits at what is initialised here
    gl.warp_specialize([
        (compute, (0, problem, shared, kept, scale, scale_log2)),
        (compute, (1, problem, shared, kept, scale, scale_log2)),
        (load, (problem, shared, q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, counter)),
        (add, (0, problem, shared, dq_desc, dk_desc, dv_desc, states)),
        (add, (1, problem, shared, dq_desc, dk_desc, dv_desc, states)),
    ], [4, 1, 1, 1], [COMPUTE, LOAD, LOAD, LOAD])  # fmt: skip


def queries_per_tile(head_dim: int) -> int:
    return 64 if head_dim == 128 else 128


@cache
def one_dimensional() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@cache
def dq_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, *DQ_BOX.value], gl.float32)


class Constants(NamedTuple):
    """The kernel's constexpr parameters, in its order."""

    GROUP: int
    CAUSAL: bool
    TAIL: bool
    LOAD: int = LOAD_REGISTERS
    COMPUTE: int = COMPUTE_REGISTERS


OPTIONS = dict(num_warps=4, maxnreg=REGISTERS_AT_START)


@triton.jit
def _convert(
    block, sums, dq, heads, seq_q, rows, scale, dq_batch, dq_row, dq_head, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(seq_q, BLOCK)
    first = block % tiles * BLOCK
    batch_head = (block // tiles).to(tl.int64)
    # As `put_dq` left each tile of 64 rows and columns: 8 columns at a time, warp, quad, its thread, half of the rows, pair.
    place = tl.arange(0, BLOCK * HEAD_DIM)
    dq_MD = tl.load(sums + (batch_head * rows + first) * HEAD_DIM + place) * scale
    dq_MD = dq_MD.reshape((HEAD_DIM // 64, 8, 4, 8, 4, 2, 2)).permute((2, 5, 3, 0, 1, 4, 6)).reshape((BLOCK, HEAD_DIM))
    base = dq + batch_head // heads * dq_batch + batch_head % heads * dq_head
    store_rows(base, dq_row, first, seq_q, dq_MD, HEAD_DIM, BLOCK, HEAD_DIM)


@triton.jit
def _add_parts(
    block, kept, dk, dv, kv_heads, seq_k, whole, parts, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, HEAD_DIM: tl.constexpr
):  # fmt: skip
    blocks: tl.constexpr = KEYS // ROWS_ADDED
    item = block // (2 * blocks)
    of_values = block // blocks % 2
    row = block % blocks * ROWS_ADDED
    of_part = (row + tl.arange(0, ROWS_ADDED))[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    place = kept + (item * parts * 2 + of_values).to(tl.int64) * (KEYS * HEAD_DIM) + of_part
    sums_ND = tl.load(place)
    for _ in range(1, parts):
        place += 2 * KEYS * HEAD_DIM
        sums_ND += tl.load(place)
    key_tiles = tl.cdiv(seq_k, KEYS)
    batch_head = ((whole + item) // key_tiles).to(tl.int64)
    first = (whole + item) % key_tiles * KEYS + row
    if of_values == 0:
        base = dk + batch_head // kv_heads * dk_batch + batch_head % kv_heads * dk_head
        row_stride = dk_row
    else:
        base = dv + batch_head // kv_heads * dv_batch + batch_head % kv_heads * dv_head
        row_stride = dv_row
    store_rows(base, row_stride, first, seq_k, sums_ND, HEAD_DIM, ROWS_ADDED, HEAD_DIM)


@triton.jit
def finish_kernel(
    sums, dq, kept, dk, dv, blocks, heads, seq_q, rows, scale, kv_heads, seq_k, whole, parts,
    dq_batch, dq_row, dq_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq = scale * sums, from float32 [batch, heads, rows, HEAD_DIM] in the order of `put_dq` to dq's dtype and strides, by the first `blocks`
    blocks; the others add up dk and dv of the items from `whole` on, kept by their parts, float32 [all parts, 2, KEYS, HEAD_DIM]."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # what was written last comes first: L2 still has it
    if kept is None or block < blocks:
        _convert(block, sums, dq, heads, seq_q, rows, scale, dq_batch, dq_row, dq_head, HEAD_DIM, BLOCK)
    else:
        _add_parts(
            block - blocks, kept, dk, dv, kv_heads, seq_k, whole, parts, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, HEAD_DIM
        )  # fmt: skip


class Plan(NamedTuple):
    """Of the launches what does not change with the tensors' addresses."""

    rows: Callable  # the launch of the rows' kernel, which takes its tensors
    padded: tuple[int, int, int]  # batch, heads and rows of log-sum-exps and deltas
    dq_tiles: int
    blind: int  # the first queries that see no key, whose tiles nobody touches
    programs: int
    kept: tuple[int, int, int, int] | None  # shape of what parts of items keep of dK and dV
    views: tuple[View, ...]  # of q, k, v and dout; of log-sum-exps and of deltas; of dQ's sums; of dk and dv
    rest: tuple
    key: tuple
    finish: Callable  # the launch of `finish_kernel`


def divide(items: int, steps: int, tiles: int, programs: int) -> tuple[int, int]:
    """(whole items, parts of each of the others). items: all, of that many steps each, over that many tiles of queries.

    Where the last round of items would leave programs without work, these are divided, into as many parts as fill one round or two."""
    last = items % programs
    times = {1: steps + STEPS_AROUND_AN_ITEM}
    for rounds in (1, 2) if last else ():
        parts = min(rounds * programs // last, tiles, MOST_PARTS)
        times.setdefault(parts, rounds * (steps * blocks(tiles, parts) / tiles + STEPS_AROUND_AN_ITEM))
    parts = min(times, key=times.get)
    return (items, 1) if parts == 1 else (items - last, parts)


@planned
def plan_backward(device: torch.device, dtype: torch.dtype, q_shape, k_shape, of: tuple, causal: bool, scale: float) -> Plan:
    """of: strides of q, k, v, dout, out, dq, dk and dv."""
    of_q, of_k, of_v, of_dout, of_out, of_dq, of_dk, of_dv = of
    batch, seq_q, heads, head_dim = q_shape
    _, seq_k, kv_heads, _ = k_shape
    group, queries = heads // kv_heads, queries_per_tile(head_dim)
    rows = blocks(seq_q, queries) * queries
    # Two bytes each in K, V, Q and dO, four in dQ
    heads_at_once = max(1, L2_FOR_A_GROUP // (head_dim * (4 * seq_k + 8 * group * seq_q)))
    items = blocks(seq_k, KEYS.value) * batch * kv_heads
    tiles = rows // queries
    whole, parts = (items, 1) if causal else divide(items, group * tiles, tiles, multiprocessors(device))
    of_kernel = Constants(group, causal, seq_k % KEYS.value != 0)
    of_rows = View([batch * heads * rows], [1], [queries], one_dimensional())
    box = DQ_BOX.value
    dq_tiles = batch * heads * rows * head_dim // DQ_TILE.value**2
    views = (
        view(q_shape, of_q, queries, dtype), view(k_shape, of_k, KEYS.value, dtype), view(k_shape, of_v, KEYS.value, dtype),
        view(q_shape, of_dout, queries, dtype),
        of_rows, of_rows, View([dq_tiles, *box], [box[0] * box[1], box[1], 1], [1, *box], dq_layout()),
        view(k_shape, of_dk, OWN_KEYS.value, dtype), view(k_shape, of_dv, OWN_KEYS.value, dtype),
    )  # fmt: skip
    conversions = blocks(seq_q, ROWS_PER_PROGRAM) * batch * heads
    return Plan(
        plan_rows(q_shape, of_dout, of_out, rows),
        (batch, heads, rows),
        dq_tiles,
        max(seq_q - seq_k, 0) // queries * queries if causal else 0,
        min(whole + (items - whole) * parts, multiprocessors(device)),
        None if whole == items else ((items - whole) * parts, 2, KEYS.value, head_dim),
        views,
        (scale, scale * LOG2_E, heads_at_once, whole, parts, *of_kernel),
        (device.index, dtype, head_dim, of_kernel),
        partial(
            launch_specialised, finish_kernel, conversions + (items - whole) * 2 * (KEYS.value // ROWS_ADDED.value),
            numbers=(conversions, heads, seq_q, rows, scale, kv_heads, seq_k, whole, parts, *row_strides((of_dq, of_dk, of_dv))),
            constants=(head_dim, ROWS_PER_PROGRAM),
        ),
    )  # fmt: skip


def launch_backward(dout, dlse, q, k, v, out, lse, causal: bool, scale: float, dq, dk, dv) -> None:
    """Writes dq, dk and dv."""
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    (q, k, v, dout), of = readable_by_tma(q, k, v, dout)
    out, lse = dense_rows(out), lse.contiguous()
    plan = plan_backward(q.device, q.dtype, q.shape, k.shape, of + strides(out, dq, dk, dv), causal, scale)
    delta = lse.new_empty(plan.padded)
    padded_lse = None if delta.shape == lse.shape else torch.empty_like(delta)
    sums = lse.new_empty((*plan.padded, q.shape[3]))
    kept = sums if plan.kept is None else lse.new_empty(plan.kept)  # which the kernel then leaves alone
    described = q, k, v, dout, lse if padded_lse is None else padded_lse, delta, sums, dk, dv
    descriptors = [Descriptor(x, view) for x, view in zip(described, plan.views)]
    states = torch.empty(plan.dq_tiles, dtype=torch.int32, device=q.device)
    counter = work_counter(q.device)
    plan.rows((dout, None if dlse is None else dlse.contiguous(), out, lse, padded_lse, delta, states))
    if plan.blind:
        sums[:, :, : plan.blind].zero_()
    launch(backward_kernel, plan.programs, descriptors, (counter, states, kept), plan.rest, plan.key, OPTIONS)
    plan.finish((sums, dq, None, None, None) if plan.kept is None else (sums, dq, kept, dk, dv))


def _gradients(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator(
    "hopper_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _gradients,
)
def attention_backward(dout, dlse, q, k, v, out, lse, causal, scale):
    """(dq, dk, dv), shaped as q, k and v, from the gradients of `hopper_forward.attention_forward`'s two outputs and all it saved."""
    gradients = _gradients(dout, dlse, q, k, v)
    launch_backward(dout, dlse, q, k, v, out, lse, causal, scale, *gradients)
    return gradients
