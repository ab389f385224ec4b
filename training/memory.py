"""What a run needs: peak memory of a GPU by part, the host's memory with offload, and what would lower it; before any GPU is touched.

DeepSpeed's share is that of version 0.19.8, read from its source and followed allocation by allocation on CPUs; docs/memory.md derives it,
and has predictions beside measured peaks. P parameters, N processes, e bytes an element of the model. Blocks are those of the project's own
GPT as they are written: what ``train.compile`` keeps of them the compiler decides.
"""

import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from pathlib import Path

import torch

from model.checkpointing import Checkpointing
from model.config import GPTConfig
from model.gpt import GPT, hidden_layers
from model.offload import HostMemoryError
from training.activations import (
    FP32,
    Shape,
    block_backward,
    STANDARD,
    block_keeps,
    checkpoint_keeps,
    eager_forward,
    loss_backward,
    loss_forward,
    rotating_forward,
)
from training.buckets import plan_buckets
from training.compositions import faults
from training.config import Config
from training.distributed import LoneFault, UserFault

GIB = 2**30
BLOCK = 512  # bytes: sizes are multiples of it in the allocator of PyTorch
# DeepSpeed's defaults that no key of ours sets, in elements.
MAX_LIVE = 1_000_000_000  # stage 3: no more is gathered ahead of its use with so much there
ALLREDUCE_BUCKET = 500_000_000  # stages 0, and 1 in bf16
NORM_BYTES = 8  # norms are taken in float64, a parameter at a time
CUBLAS_WORKSPACE = 32 << 20  # what PyTorch reserves for cuBLAS on compute capability 9.0, the most of all
NOT_OURS = "model.huggingface: memory is predicted of the project's own GPT alone; train some steps and read it in metrics.jsonl"
MLP_TILE = 16384  # tokens: what is proposed where tiles would help
CONTEXT = 0.07  # share of a GPU's memory that the CUDA context, NCCL's buffers and the allocator's gaps take


# Device name as in training.flops -> GiB of memory, by the same documents; NVIDIA's GB of a board are GiB, but for a percent.
_MEMORY = (
    (r"A100-(SXM4|PCIE)-40GB", 40), (r"A100-(SXM4|PCIE)-80GB|A100 80GB PCIe", 80), (r"A30|A10|A10G|L4|RTX 3090|RTX 4090", 24),
    (r"RTX 5090", 32),
    (r"A40|RTX A6000|L40|L40S|RTX 6000 Ada Generation", 48), (r"H100 (80GB HBM3|PCIe)", 80), (r"H100 NVL", 94), (r"H200( NVL)?", 141),
    (r"GH200 (120|480)GB", 96), (r"GH200 144G HBM3e", 144), (r"G?B200", 180),
)  # fmt: skip


def capacity(device_name: str) -> int | None:
    """Bytes that a run can have of a GPU, CONTEXT aside; None where the device is not known."""
    plain = re.sub(r"^(NVIDIA )?(GeForce )?", "", device_name.strip())
    found = next((gib for pattern, gib in _MEMORY if re.fullmatch(pattern, plain)), None)
    return None if found is None else int(found * GIB * (1 - CONTEXT))


def host_capacity() -> int:
    """Bytes of this host's memory, or of what its container may have of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # none; "max"
            found = min(found, int(Path("/sys/fs/cgroup", limit).read_text()))
    return found


def check_host(config: Config, processes: int, here: int, available: int) -> None:
    """Refuse what the ``here`` of the processes on one host have no room for: the kernel would end one without a word.

    Raises:
        UserFault: what is predicted of them all is more than ``available`` bytes. Of ``model.huggingface`` nothing is.
    """
    if config.model.huggingface is not None:
        return
    host = estimate(config, processes).host
    needed = here * sum(host.values())
    if needed <= available:
        return
    asked = {
        "train.checkpoint_offload": config.train.checkpoint_offload,
        "train.cpu_checkpointing": _moves_inputs(config) and not config.train.checkpoint_offload,
        "zero.offload_optimizer": config.zero.offload_optimizer == "cpu",
        "zero.offload_parameters": config.zero.offload_parameters == "cpu",
    }
    remedy = "spread the run over more hosts, or leave these states on the GPU (zero.offload_optimizer=none zero.offload_parameters=none)"
    if max(host, key=host.__getitem__) == "block inputs":
        remedy = (
            "shorten model.sequence_length, lower train.micro_batch_size, share sequences by more GPUs (parallel.sequence), "
            "or let fewer blocks wait there (train.activation_checkpointing=every_n)"
        )
    raise UserFault(
        f"{', '.join(key for key, on in asked.items() if on)}: {here} process{'es' * (here > 1)} of this host would keep {gib(needed)} in its memory, "
        f"and it has {gib(available)}; {remedy}"
    )


@dataclass(frozen=True)
class Parameters:
    """Elements of the model's parameters.

    embeddings, norm: of each of those, norm being the final one; head: of the output projection, one of the embeddings if it is tied;
    block: of each of one block's; matrices: of all blocks'.
    """

    layers: int
    embeddings: tuple[int, ...]
    norm: tuple[int, ...]
    head: int
    tied: bool
    block: tuple[int, ...]
    matrices: int

    @classmethod
    def of(cls, config: GPTConfig) -> "Parameters":
        with torch.device("meta"):
            model = GPT(config.model_copy(update={"layers": 1}))
        matrices = config.layers * sum(layer.weight.numel() for layer in hidden_layers(model))
        embeddings = [each.weight.numel() for each in (model.token_embedding, model.position_embedding) if each is not None]
        norm, block = (tuple(p.numel() for p in module.parameters()) for module in (model.final_norm, model.blocks[0]))
        return cls(config.layers, tuple(embeddings), norm, model.head.weight.numel(), config.tied_embeddings, block, matrices)

    @property
    def outside(self) -> list[int]:
        """Of the parameters in no block, as they are used."""
        return [*self.embeddings, *self.norm, *([] if self.tied else [self.head])]

    @property
    def each(self) -> list[int]:
        return [*self.outside, *self.block * self.layers]

    @property
    def total(self) -> int:
        return sum(self.each)

    @property
    def largest(self) -> int:
        return max(self.each)

    def shard(self, processes: int) -> int:
        """Elements of one process's share when every parameter is cut, and padded, on its own (stage 3)."""
        return sum(ceil(n / processes) for n in self.each)


@cache
def kept_gathered(parameters: Parameters, distance: int, prefetch: int, threshold: int, *, all_hooks: bool) -> tuple[int, int]:
    """Elements that stage 3 has gathered at the loss, forward, and backward once the last block's are there too.

    distance, prefetch, threshold: zero.reuse_distance, prefetch_bucket_size and persistence_threshold. all_hooks: whether modules that have
    nothing to gather are in DeepSpeed's order too; ``training.zero3_step`` takes them out.

    As DeepSpeed goes through modules (partitioned_param_coordinator.py): before each it gathers ahead what is not there yet, and after each
    it lets go of what is not used again within the distance, unless gathering ahead has passed over the next use because it was there.
    To a block the whole model's own place in the order of modules counts for all parameters, to an embedding a block counts for none.
    What is gathered ahead together comes in a buffer, is copied out of it at the first use of any, and the buffer stays to the last's.
    """
    sizes = parameters.each
    count, width = len(parameters.outside), len(parameters.block)
    embeddings = [[k] for k in range(len(parameters.embeddings))]
    norm = [len(embeddings) + k for k in range(len(parameters.norm))]
    blocks = [[count + i * width + k for k in range(width)] for i in range(parameters.layers)]
    model, dropout, head = [], [], [0 if parameters.tied else count - 1]
    forward = [model, *embeddings, dropout, *blocks, norm, head]
    order = [*forward, model, head, norm, *reversed(blocks), dropout, *reversed(embeddings)]
    small = {p for p, size in enumerate(sizes) if size < threshold}
    if not all_hooks:
        order = [module for module in order if module is head or set(module) - small]
    there, passed, in_flight, copied = set(small), {}, {}, set()
    queue = deque((p, step) for step, module in enumerate(order) for p in module)

    def stays(p: int, block: bool, step: int) -> bool:
        traversed = 0
        for module in order[step:]:
            if traversed >= distance:
                return False
            seen = range(len(sizes)) if block and module is model else [] if not block and module in blocks else module
            if p in seen:
                return True
            traversed += sum(sizes[q] for q in seen)
        return False

    found = []
    for step, module in enumerate(order, start=1):
        there |= set(module)
        copied |= {in_flight.pop(p) for p in module if p in in_flight}
        awaited = {p for p in module if passed.get(p, 0) < step}
        while queue and awaited:
            p, used = queue.popleft()
            passed[p] = used + 1
            awaited.discard(p)
        ahead, room = 0, min(max(distance, MAX_LIVE) - sum(sizes[p] for p in there - small), prefetch)
        together = set()
        while queue and ahead < room:
            p, used = queue.popleft()
            passed[p] = used + 1
            if p not in there | together:
                together.add(p)
                ahead += sizes[p]
        there |= together
        in_flight |= dict.fromkeys(together, (step, frozenset(together)))
        if module is head or len(found) == 2 and module is blocks[-1]:
            buffers = copied & set(in_flight.values())
            found.append(sum(sizes[p] for p in there) + sum(sizes[p] for _, each in buffers for p in each))
        if len(found) == 3:
            break
        there -= {p for p in module if p not in small and passed[p] <= step + 1 and not stays(p, module in blocks, step)}
    at_loss, *backward = found
    return at_loss, max(backward)


@dataclass(frozen=True)
class Moment:
    """A point of a training step: its name, and bytes on the GPU by part."""

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU at the moments that can be the peak, and on the host by part, for one process."""

    moments: tuple[Moment, ...]
    host: dict[str, int]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)


@dataclass(frozen=True)
class _Waiting:
    """A stretch of the backward pass, a block or what is in none, whose gradients wait where they are until they fill a bucket.

    In elements. elements: at most, once the stretch's own are there. reduced: (waiting, in the bucket) at each reduction. under_way: of the
    bucket before, whose sums may not be there yet.
    """

    elements: int
    reduced: tuple[tuple[int, int], ...]
    under_way: int


@dataclass(frozen=True)
class _States:
    """What DeepSpeed holds, in bytes by part.

    always: on the GPU. backward, step: beside it in those. reduction: copies for one. host: always.
    waiting: of a block's gradients until they are in a bucket. whole_gradients: whether all blocks' wait, to the end of the backward pass.
    sums: in the backward pass from the first reduction on. between: from one micro batch to the next; sums_apart: whether the next one's
    sums are collected beside those. in_place: of gradients that wait in place of that, block by block; copied: bytes an element for a
    reduction of them; laid_out: and until the next.
    """

    always: dict[str, int]
    waiting: int
    reduction: int
    step: dict[str, int]
    backward: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    whole_gradients: bool = False
    sums: int = 0
    sums_apart: bool = False
    between: dict[str, int] = field(default_factory=dict)
    in_place: tuple[_Waiting, ...] = ()
    copied: float = 0.0
    laid_out: int = 0


def estimate(config: Config, processes: int, *, workspace: int = CUBLAS_WORKSPACE) -> Estimate:
    """Peak memory of a step on each of so many GPUs, for a resolved configuration; blocks are as written, also under ``train.compile``.

    Args:
        workspace: bytes that libraries reserve through PyTorch's allocator.

    Raises:
        UserFault: another model than the project's own GPT (``model.huggingface``).
    """
    if config.model.huggingface is not None:
        raise UserFault(NOT_OURS)
    e = element_size(config)
    sharing = config.parallel.sequence
    shape = Shape(config.model, config.attention, config.train.micro_batch_size, e, sharing, config.train.mlp_tile)
    parameters = _parameters(config.model.model_dump_json(include=set(GPTConfig.model_fields)))
    states = _states(config, parameters, processes)
    kept, recomputed, back = _activations(config, shape)
    always = states.always | {"workspace": workspace, "batch": 2 * 8 * shape.tokens * sharing * config.train.gradient_accumulation_steps}
    if config.model.positions == "rope":
        always["rotary table"] = FP32 * config.model.sequence_length // sharing * config.model.head_dim
    # Tied, it waits for the embedding's share.
    head_gradient = 0 if states.in_place and not config.model.tied_embeddings else e * parameters.head
    layers = config.model.layers
    between = states.between if config.train.gradient_accumulation_steps > 1 else {}

    def moment(name: str, *more: dict[str, int]) -> Moment:
        parts: dict[str, int] = {}
        for some in (always, *more):
            for part, size in some.items():
                parts[part] = parts.get(part, 0) + size
        return Moment(name, parts)

    ahead = {part: size for part, size in states.backward.items() if part == "gathered parameters"}

    def reductions(which: str, waiting: _Waiting, more: int, activations: int) -> list[Moment]:
        around = ahead | {"activations": activations, "gradients of activations": shape.stream}
        return [
            moment(f"reduction of gradients {which}", around, {"gradients": more + e * there, "buckets": int(states.copied * reduced)})
            for there, reduced in waiting.reduced
        ]

    moments = [
        moment("loss", between, {"activations": sum(kept)}, _named(loss_forward(shape))),
        moment("gradient of the loss", between, ahead, {"activations": sum(kept)}, _named(loss_backward(shape))),
        moment("optimizer step", states.step),
    ]
    if states.in_place:
        of_head, *_, of_embeddings = states.in_place
        moments += reductions("of the head", of_head, 0, sum(kept)) + reductions("of the embeddings", of_embeddings, 0, 0)
        gradients = {"gradients": head_gradient + e * of_embeddings.elements, "gradients of activations": shape.stream,
                     "buckets": states.laid_out * of_embeddings.under_way}
        moments.append(moment("backward pass of the embeddings", gradients))
    for i in range(layers):
        before = sum(kept[:i])
        which = f"of block {i + 1} of {layers}"
        if states.in_place:
            waiting, laid_out = e * states.in_place[layers - i].elements, states.laid_out * states.in_place[layers - i].under_way
        else:
            laid_out = 0
            waiting = states.waiting * (layers - i) if states.whole_gradients and not between else states.waiting
        gradients = {"gradients": head_gradient + waiting + between.get("gradients", 0)}
        backward = {
            "activations": before + kept[i] + back[i],
            "recomputed activations": recomputed[i],
            "gradients of activations": block_backward(shape),
        }
        done = sum(parameters.block) * (layers - i) + (0 if config.model.tied_embeddings else parameters.head)
        # What a process keeps of the sums is allocated with the first reduction, and that takes place when a bucket is full.
        reduced = states.sums > 0 and done > config.zero.reduce_bucket_size
        sums = {"gradients": states.sums if reduced and (states.sums_apart or not between) else 0}
        within = {"buckets": states.reduction if reduced else laid_out}  # in the midst of a block, a parameter at a time
        moments.append(moment(f"backward pass {which}", states.backward, sums, within, gradients, backward))
        if config.attention.backend == STANDARD:
            moments.append(moment(f"forward pass {which}", {"activations": before, "attention's scores": eager_forward(shape)}))
        if config.model.positions == "rope":
            moments.append(moment(f"forward pass {which}", {"activations": before, "rotation": rotating_forward(shape)}))
        if states.in_place:
            moments += reductions(which, states.in_place[layers - i], head_gradient, before)
        elif config.zero.stage == 3 or states.whole_gradients and i == 0:
            reduction = {"activations": before, "buckets": states.reduction}
            moments.append(moment(f"reduction of gradients {which}", states.backward, sums, gradients, reduction))
    return Estimate(tuple(moments), states.host | _host_activations(config, shape))


@cache
def _parameters(model: str) -> Parameters:
    return Parameters.of(GPTConfig.model_validate_json(model))


def _named(parts: dict[str, int]) -> dict[str, int]:
    return {"activations" if part == "final norm" else part: size for part, size in parts.items()}


def element_size(config: Config) -> int:
    """Bytes of an element of the model's parameters and activations."""
    return FP32 if config.train.precision == "fp32" else 2


def _checkpointing(config: Config) -> Checkpointing:
    train = config.train
    return Checkpointing(train.activation_checkpointing, every=train.checkpoint_every or 1, keep_matmuls=train.keep_matmuls)


def _activations(config: Config, shape: Shape) -> tuple[list[int], list[int], list[int]]:
    """Bytes of each block: kept from the forward pass; in addition once it is computed again; of the input before, on its way back."""
    checkpointing, all_of_it = _checkpointing(config), sum(block_keeps(shape).values())
    some = sum(checkpoint_keeps(shape, checkpointing).values())
    moved = _moves_inputs(config)
    *_, last = _checkpointed(config) or [-1]
    kept, recomputed, back = [], [], []
    for i in range(config.model.layers):
        if not checkpointing.includes(i):
            kept.append(all_of_it)
            recomputed.append(0)
        else:
            kept.append(0 if moved and i < last else some)
            recomputed.append(all_of_it - kept[-1])
        back.append(some if config.train.checkpoint_offload and 0 < i <= last else 0)
    return kept, recomputed, back


def _checkpointed(config: Config) -> list[int]:
    checkpointing = _checkpointing(config)
    return [i for i in range(config.model.layers) if checkpointing.includes(i)]


def _moves_inputs(config: Config) -> bool:
    return config.train.checkpoint_offload or config.train.activation_checkpointing == "deepspeed" and config.train.cpu_checkpointing


def _host_activations(config: Config, shape: Shape) -> dict[str, int]:
    """Block inputs in pinned memory; DeepSpeed's is PyTorch's, whose allocator rounds up to powers of two."""
    if not _moves_inputs(config):
        return {}
    if config.train.checkpoint_offload:
        return {"block inputs": len(_checkpointed(config)) * shape.stream}
    return {"block inputs": (config.model.layers - 1) * 2 ** (shape.stream - 1).bit_length()}


# --- DeepSpeed's share, stage by stage --------------------------------------------------------------------------------


def _states(config: Config, parameters: Parameters, processes: int) -> _States:
    stage, bf16 = config.zero.stage, config.train.precision == "bf16"
    if stage == 0:
        return _stage_0(config, parameters, processes)
    if stage == 1 and bf16 and not config.train.bf16_states and config.zero.offload_optimizer == "none":
        return _bf16_optimizer(config, parameters, processes)  # DeepSpeed's for this case alone
    return (_stage_3 if stage == 3 else _stage_1_and_2)(config, parameters, processes)


def _moments(config: Config, parameters: Parameters, share: int, size: int) -> int:
    """Bytes of the optimizer's moments for a share of the parameters, ``size`` bytes a number: AdamW has two, Muon one."""
    return 2 * size * share - (size * share * parameters.matrices // parameters.total if config.optimizer.name == "muon" else 0)


def _muon_step(config: Config, parameters: Parameters, share: int) -> int:
    """Bytes of Muon's direction in float32 and of what is orthogonalised, for a share of the parameters; 0 for AdamW."""
    if config.optimizer.name != "muon":
        return 0
    return (FP32 + element_size(config)) * share * parameters.matrices // parameters.total


def _stage_0(config: Config, parameters: Parameters, processes: int) -> _States:
    """Everything whole on every GPU. In bf16 the gradients are cast to float32 for the reduction, and once more for the step."""
    e, p = element_size(config), parameters.total
    at_once = min(p, ALLREDUCE_BUCKET) if processes > 1 else 0
    cast = FP32 if e != FP32 and config.zero.reduce_dtype == "fp32" else 0
    master = 0 if e == FP32 else FP32 * p
    always = {"parameters": e * p, "optimizer states": master + _moments(config, parameters, p, FP32)}
    return _States(
        always,
        e * sum(parameters.block),
        at_once * (e + cast),
        # Muon takes whole matrices one by one: direction, and while it is orthogonalised as much again.
        {"gradients": e * p + master, "workspace": 2 * (FP32 + e) * max(parameters.block) if config.optimizer.name == "muon" else 0},
        whole_gradients=True,
        between={"gradients": e * p},
    )


def _bf16_optimizer(config: Config, parameters: Parameters, processes: int) -> _States:
    """Stage 1 in bf16: sums of the gradients in float32 for all parameters; their reduction copies them."""
    p, share = parameters.total, ceil(parameters.total / processes)
    at_once = min(p, ALLREDUCE_BUCKET) if processes > 1 else 0
    reduction = at_once * (FP32 + (2 if config.zero.reduce_dtype == "bf16" else 0))
    always = {"parameters": 2 * p, "gradients": FP32 * p, "optimizer states": FP32 * share + _moments(config, parameters, share, FP32)}
    waiting, step = 2 * sum(parameters.block), {"gradients": 2 * p, "workspace": _muon_step(config, parameters, share)}
    if config.train.gradient_accumulation_steps > 1:  # those of the micro batch before stay, and are added to
        always["gradients"] += 2 * p
        waiting, step["gradients"] = 0, 0
    return _States(always, waiting, reduction, step, whole_gradients=True)


def _stage_1_and_2(config: Config, parameters: Parameters, processes: int) -> _States:
    """Two buckets while gradients come; this process's share of the sums until the step; flat copies of parameters from the start."""
    e, p, share = element_size(config), parameters.total, ceil(parameters.total / processes)
    state = 2 if config.train.bf16_states else FP32
    staged = FP32 if config.zero.stage == 1 and e != state else e  # stage 1 collects gradients in the dtype of their sums
    bucket = config.zero.reduce_bucket_size
    buckets = 2 * staged * bucket
    cast = FP32 if staged != FP32 and config.zero.reduce_dtype == "fp32" else 0
    reduction = min(bucket, p) * (staged + cast)
    sums = state * share
    norm = NORM_BYTES * min(parameters.largest, share)
    step = {
        "gradients": sums + (sums if e == state else 0),
        "workspace": max(0 if e == state else norm, _muon_step(config, parameters, share)),
    }
    if config.zero.stage == 1 and e != state:
        step["buckets"] = buckets
    states = state * share + _moments(config, parameters, share, state)
    backward, waiting = {"buckets": buckets}, staged * max(parameters.block)  # each is put into the bucket as it comes
    held = {
        "sums": sums,
        "sums_apart": e == state,
        "between": {"gradients": sums} | ({"buckets": buckets} if config.zero.stage == 1 else {}),
    }
    if config.zero.offload_optimizer == "none":
        return _States({"parameters": e * p, "optimizer states": states}, waiting, reduction, step, backward, **held)
    always = {"parameters": e * p, "buckets": e * parameters.largest}
    host = {"optimizer states": states, "gradients": sums, "buckets": e * (share + parameters.largest)}
    return _States(always, waiting, reduction, step | {"workspace": 0}, backward, host, **held)


def _stage_3(config: Config, parameters: Parameters, processes: int) -> _States:
    """Shares of parameters, of sums and of states, each parameter cut on its own; parameters that stay gathered.

    One process gathers nothing, unless its parameters wait on the host. Without offload gradients are reduced, and the step taken, by
    ``training.zero3_step``; with it there is a bucket of reduce_dtype, and a parameter larger than that is reduced by itself, in a copy.
    """
    e, zero = element_size(config), config.zero
    state = 2 if config.train.bf16_states else FP32
    communicated = 2 if zero.reduce_dtype == "bf16" else FP32
    share = parameters.shard(processes)
    offload, on_host = zero.offload_optimizer == "cpu", zero.offload_parameters == "cpu"
    ways = (zero.reuse_distance, zero.prefetch_bucket_size, zero.persistence_threshold)
    at_loss, at_gradient = kept_gathered(parameters, *ways, all_hooks=offload) if processes > 1 or on_host else (0, 0)
    gathered, more = e * at_loss, {"gathered parameters": e * (at_gradient - at_loss)}
    # Gathered parameters are let go before the step, all but the small ones.
    small = e * sum(n for n in parameters.each if n < zero.persistence_threshold) if gathered else 0
    always, step = {"gathered parameters": gathered}, {"gathered parameters": small - gathered}
    states = {"optimizer states": state * share + _moments(config, parameters, share, state), "gradients": state * share}
    if not offload:
        # The ranks' gradients side by side, this one's sums, and those once more where they are converted.
        copied = communicated + (communicated + (state if state != communicated else 0)) / processes
        renewal = ceil(small * (1 + 1 / processes))  # all pieces of what stays, and this rank's once more, on their way to their places
        step["workspace"] = max(renewal, _muon_step(config, parameters, share))
        in_place = _in_place(config, parameters)
        return _States(always | states | {"parameters": e * share}, 0, 0, step, more, in_place=in_place, copied=copied,
                       laid_out=communicated if processes > 1 else 0)
    large = [n for n in parameters.each if n > zero.reduce_bucket_size]
    collected = min(zero.reduce_bucket_size, parameters.total)
    reduction = max(communicated * collected, (communicated if communicated != e else 0) * max(large, default=0))
    always["buckets"] = communicated * zero.reduce_bucket_size
    host = states | {"gradients": 2 * state * share}
    (host if on_host else always)["parameters"] = e * share
    return _States(always, e * sum(parameters.block), reduction, step, more, host)


def _in_place(config: Config, parameters: Parameters) -> tuple[_Waiting, ...]:
    """Of the head and the final norm, of each block from the last to the first, and of the embeddings, as the backward pass meets them."""
    first, last = ([(n,) for n in reversed(some)] for some in (parameters.outside[len(parameters.embeddings) :], parameters.embeddings))
    stretches = [first, *[[parameters.block[::-1]]] * parameters.layers, last]
    lengths = [n for modules in stretches for module in modules for n in module]
    due = iter(plan_buckets([module for modules in stretches for module in modules], config.zero.reduce_bucket_size))
    waiting, summed, found = 0, 0, []
    for modules in stretches:
        before, there = summed, waiting + sum(map(sum, modules))
        waiting, reduced = there, []
        for bucket in (bucket for _ in modules for bucket in next(due)):
            summed = sum(lengths[bucket.start : bucket.stop])
            reduced.append((waiting, summed))
            waiting -= summed
        found.append(_Waiting(there, tuple(reduced), before))
    return tuple(found)


# --- What fits, and what would help -----------------------------------------------------------------------------------

FIXED = ("parameters", "gradients", "optimizer states", "gathered parameters", "buckets", "workspace", "batch")  # whatever the batch


def changed(config: Config, settings: dict[str, object]) -> Config:
    """A resolved configuration with other values, by ``section.key``."""
    for key, value in settings.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def _changes(config: Config, processes: int) -> list[dict[str, object]]:
    """Settings that can lower the peak and leave the loss as it is, but for the last, which costs some (docs/modes.md)."""
    micro, accumulation = config.train.micro_batch_size, config.train.gradient_accumulation_steps
    # What only the present mode reads goes with it.
    now, bound = config.train.activation_checkpointing, {"every_n": ("train.checkpoint_every", None), "selective": ("train.keep_matmuls", False)}
    dropped = dict([bound[now]]) if now in bound and getattr(config.train, bound[now][0].split(".")[1]) else {}
    modes = {mode: {"train.activation_checkpointing": mode} | (dropped if mode != now else {}) for mode in ("selective", "full")}
    offloaded = {} if now in ("full", "every_n") else modes["full"]
    # DeepSpeed's, whose copies computation waits for, is not proposed beside ours.
    found: list[dict[str, object]] = [*modes.values(), offloaded | {"train.checkpoint_offload": True}]
    if now == "every_n":
        found.append(modes["full"] | {"train.checkpoint_offload": True})
    if dropped and now == "selective":
        found.append(dropped)
    as_written = {"train.compile": False} if config.train.compile else {}  # which auto comes to with these two
    found.append({"train.mlp_tile": MLP_TILE} | as_written)
    if micro == 1:
        sharing = config.parallel.sequence
        for n in range(2 * sharing, processes + 1, sharing):
            if processes % n == 0:
                found.append({"parallel.sequence": n, "train.gradient_accumulation_steps": accumulation * n // sharing} | as_written)
    if config.attention.backend == STANDARD:
        found.append({"attention.backend": "auto"})
    if micro % 2 == 0:
        found.append({"train.micro_batch_size": micro // 2, "train.gradient_accumulation_steps": accumulation * 2})
    found += [{"zero.stage": stage} for stage in range(config.zero.stage + 1, 4)]
    found += [{"zero.offload_optimizer": "cpu"}, {"zero.offload_optimizer": "cpu", "zero.offload_parameters": "cpu"}]
    found += [{"zero.reduce_bucket_size": config.zero.reduce_bucket_size // 5}, {"zero.reduce_dtype": "bf16"}, {"train.bf16_states": True}]
    return found


def savings(config: Config, processes: int) -> list[tuple[dict[str, object], int]]:
    """(settings, bytes that they take from the peak), the most first: of those that begin with the same key the one that saves most.

    What does not compose, or saves nothing, is left out.
    """
    now, best = estimate(config, processes).peak.bytes, {}
    for settings in _changes(config, processes):
        other, key = changed(config, settings), next(iter(settings))
        if other != config and not faults(other):
            saved = now - estimate(other, processes).peak.bytes
            if saved > max(0, best[key][1] if key in best else 0):
                best[key] = (settings, saved)
    return sorted(best.values(), key=lambda each: -each[1])


def largest(fits: Callable[[int], bool], step: int = 1) -> int:
    """The largest multiple of ``step`` that fits, where all smaller ones do; 0 where none does."""
    low, high = 0, step
    while fits(high) and high < 2**40:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_micro_batch(config: Config, processes: int, available: int) -> int:
    """In sequences."""
    return largest(lambda n: estimate(changed(config, {"train.micro_batch_size": n}), processes).peak.bytes <= available)


def largest_sequence(config: Config, processes: int, available: int) -> int:
    """In tokens, at a micro batch of 1; a multiple of 128 for each process that shares it."""
    one, step = changed(config, {"train.micro_batch_size": 1}), 128 * config.parallel.sequence
    return largest(lambda n: estimate(changed(one, {"model.sequence_length": n}), processes).peak.bytes <= available, step=step)


# --- In words ---------------------------------------------------------------------------------------------------------


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def told(settings: dict[str, object]) -> str:
    """Settings as the command line takes them."""
    return " ".join(f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items())


def parts_of(parts: dict[str, int]) -> str:
    return ", ".join(f"{part} {gib(size)}" for part, size in sorted(parts.items(), key=lambda each: -each[1]) if size >= GIB / 100)


def of_host(config: Config, processes: int) -> str:
    size = sum(estimate(config, processes).host.values())
    return f" ({gib(size)} of the host for each process)" if size else ""


def helpful(config: Config, processes: int) -> list[str]:
    """The three settings that help most, each with what it saves, and what it takes of the host or of the loss."""
    lines = []
    for settings, saved in savings(config, processes)[:3]:
        other = changed(config, settings)
        on_host = of_host(other, processes) if estimate(other, processes).host != estimate(config, processes).host else ""
        lines.append(f"{told(settings)}: {gib(saved)} less{on_host}{' (it costs some loss: docs/modes.md)' * ('train.bf16_states' in settings)}")
    return lines


def summary(config: Config, processes: int, device_name: str) -> list[str]:
    """Lines: the peak and its parts, the host's share, what fits on this device, which settings would help most."""
    if config.model.huggingface is not None:
        return [f"memory {NOT_OURS}"]
    found, available = estimate(config, processes), capacity(device_name)
    compiled = "; for blocks as written: what compiled ones keep, train.compile, the compiler decides" if config.train.compile else ""
    peak = found.peak
    lines = [f"memory {gib(peak.bytes)} on each GPU at the peak, which is the {peak.name}: {parts_of(peak.parts)}{compiled}"]
    if found.host:
        lines.append(f"host   {gib(sum(found.host.values()))} for each process: {parts_of(found.host)}")
    if available is not None:
        micro, sequence = largest_micro_batch(config, processes, available), largest_sequence(config, processes, available)
        fits = "nothing of this fits, not even a micro batch of 1"
        if sequence:
            in_batch = of_host(changed(config, {"train.micro_batch_size": micro}), processes) if micro else ""
            in_sequence = of_host(changed(config, {"train.micro_batch_size": 1, "model.sequence_length": sequence}), processes)
            fits = (
                f"micro batches up to {micro:,} at sequence length {config.model.sequence_length:,}{in_batch}, "
                f"sequences up to {sequence:,} in micro batches of 1{in_sequence}"
            )
        lines.append(f"fits   {gib(available)} of an {device_name.strip()} are to be had: {fits}")
    less = "; ".join(helpful(config, processes))
    return lines + ([f"less   {less}"] if less else [])


def explanation(config: Config, processes: int, failure: str, allocated: int) -> str:
    """What ran out of memory, which part grew, and the three settings that help most.

    failure: PyTorch's message. allocated: bytes that tensors held then.
    """
    met = f"out of GPU memory: {failure.split('. GPU')[0]}, with {gib(allocated)} in tensors. "
    if config.model.huggingface is not None:
        return f"{met}A smaller train.micro_batch_size, train.activation_checkpointing=full or more GPUs take less; {NOT_OURS}"
    peak = estimate(config, processes).peak
    fixed = {part: size for part, size in peak.parts.items() if part in FIXED}
    grown = {part: size for part, size in peak.parts.items() if part not in FIXED}
    # States are there from the first step's end on: with less in use than they need, they did not fit themselves.
    candidates = grown if grown and allocated >= sum(fixed.values()) else fixed
    part = max(candidates, key=candidates.__getitem__)
    remedy = "".join(f"\n  {line}" for line in helpful(config, processes))
    return (
        f"{met}The part that grew: {part}, {gib(candidates[part])} of "
        f"{gib(peak.bytes)} that a step needs (predicted, at its peak, the {peak.name}: {parts_of(peak.parts)})."
        + (f" What helps most, predicted:{remedy}" if remedy else " No setting of memory is left: use more GPUs, or a smaller model")
    )


@contextlib.contextmanager
def out_of_memory_explained(config: Config, processes: int) -> Iterator[None]:
    """Turn a GPU's running out of memory into a fault that says which part grew and what helps; the host's into its own message."""
    try:
        yield
    except HostMemoryError as error:
        raise LoneFault(str(error)) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        raise LoneFault(explanation(config, processes, str(error).splitlines()[0], allocated)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory ran out: of PyTorch's allocator, or of a library beside it, such as cuBLAS, or of a kernel that has yet to be loaded."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
