"""What the Hopper kernels of both passes share: the hardware's named barriers, work items, TMA's view of a tensor."""

from functools import cache, reduce
from operator import or_
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.operators import planned, strides

WARPGROUP = gl.constexpr(128)  # threads
FIRST_FREE_BARRIER = gl.constexpr(5)  # of the hardware's 16; Triton takes 0, 1 and one for each partition of several warps
LOAD_REGISTERS = 24  # the least that setmaxnreg takes
GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.constexpr_function
def _barrier_instruction(what, threads):
    return f"bar.{what} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def arrive(barrier, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(_barrier_instruction("arrive", THREADS), "=r,r,~{memory}", [barrier], gl.int32, False, 1)


@gluon.jit
def synchronise(barrier, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(_barrier_instruction("sync", THREADS), "=r,r,~{memory}", [barrier], gl.int32, False, 1)


@gluon.jit
def claim(counter):
    """Adds 1 to the counter without waiting for the old value, which `claimed` waits for (gl.atomic_add waits at once)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.u32 $0, 0;"
        " @first atom.global.relaxed.gpu.add.u32 $0, [$1], 1; }",
        "=r,l,~{memory}", [gl.full([1], 0, gl.int64, layout) + counter.to(gl.int64)], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def claimed(ticket):
    broadcast = gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [ticket], gl.int32, False, 1)
    return gl.max(broadcast, 0)  # of one element: the scalar


@gluon.jit
def longest_first(item, tiles, heads_at_once, all_heads):
    """(head, rank of its tile by length) of a work item of causal attention: the tiles with most work first, over heads whose tensors L2 holds
    together. The last group of heads has the rest as well: a small one would leave programs without work."""
    last_group = gl.maximum(all_heads // heads_at_once, 1) - 1
    group = gl.minimum(item // (heads_at_once * tiles), last_group)
    first_head = group * heads_at_once
    heads = gl.where(group == last_group, all_heads - first_head, heads_at_once)
    rank = item - first_head * tiles
    return first_head + rank % heads, rank // heads


@gluon.jit
def put(place, number):
    """A number into shared memory, int32 [1]."""
    place.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])) + number)


@gluon.jit
def take(place):
    return gl.max(place.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.constexpr_function
def in_place(n, beside):
    """Constraints of assembly on a thread's n floats $0 ... in place, beside n others, $2n ..."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + [beside] * n)


class View(NamedTuple):
    """How TMA sees a tensor."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: gl.NVMMASharedLayout


class Descriptor(TensorDescriptor):
    """Without the checks, 4 microseconds each time: `readable_by_tma` has seen to what they check."""

    def __init__(self, base: torch.Tensor, view: View):
        self.base = base
        self.shape, self.strides, self.block_shape, self.layout = view


@cache
def shared_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], GLUON_TYPES[dtype])


def view(shape: tuple, strides: tuple, rows: int, dtype: torch.dtype) -> View:
    """TMA's view of [batch, seq, heads, head_dim] as [batch, heads, seq, head_dim], in boxes of `rows` rows of one head."""
    batch, seq, heads, head_dim = shape
    of_batch, of_seq, of_heads, _ = strides
    layout = shared_layout(rows, head_dim, dtype)
    return View([batch, heads, seq, head_dim], [of_batch, of_heads, of_seq, 1], [1, 1, rows, head_dim], layout)


@planned
def aligned_rows(of: tuple) -> bool:
    """Whether with all these strides rows are dense, and start at multiples of 16 bytes, 8 elements, if the tensor does."""
    return all((of_batch | of_seq | of_heads) % 8 == 0 and of_head_dim == 1 for of_batch, of_seq, of_heads, of_head_dim in of)


def readable_by_tma(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], tuple]:
    """(the tensors, their strides); of those whose rows do not start at multiples of 16 bytes, copies."""
    of = strides(*tensors)
    if aligned_rows(of) and reduce(or_, map(torch.Tensor.data_ptr, tensors)) % 16 == 0:
        return tensors, of
    readable = [aligned_rows(strides(x)) and x.data_ptr() % 16 == 0 for x in tensors]
    tensors = [x if fits else x.clone(memory_format=torch.contiguous_format) for x, fits in zip(tensors, readable)]
    return tensors, strides(*tensors)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], torch.Tensor] = {}


def work_counter(device: torch.device) -> torch.Tensor:
    """The counter of work items, 0 between launches. Launches that may run at the same time must not share one: one for each stream, and
    for each launch that a CUDA graph records, since graphs are replayed on any stream."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device.index, triton.runtime.driver.active.get_current_stream(device.index)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]
