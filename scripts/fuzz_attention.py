"""Fuzz the attention kernels: random cases of features and shapes, forward and backward, against float64; one JSON out.

    python scripts/fuzz_attention.py                                  # 2000 cases on a GPU, of a fresh seed
    python scripts/fuzz_attention.py --seed 7 --case 31               # one of them again, in this process
    TRITON_INTERPRET=1 python scripts/fuzz_attention.py --cases 20    # small ones on the CPU, by Triton's interpreter

A signature is all that Triton compiles a kernel of its own for: dtype, head_dims, heads, features, strides, and which powers of two divide
the lengths. At most --signatures of them are drawn, and case N is one of signature N modulo their number, with lengths, batch, windows,
documents and tensors of its own. All follow from seed, number and the kind of device. A case passes on a backend when

- output, log-sum-exp and every gradient are finite where they should be, and as close to float64 as RULE says;
- what float64 says is exactly 0 in the output and in dV, as for queries that see nothing and keys that nobody sees, is exactly 0;
- a second forward and backward pass gives the same bits; of `hopper` also dQ, where both are asked to be deterministic.

Each signature's cases run one after the other in one of --jobs processes, which share the work of compiling; a case that kills its process,
or hangs it, fails alone. Exit code 0: all passed; 1: one failed; 2: nothing here can run them.
"""

import argparse
import json
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch.nn.functional import pad

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.attention import BACKENDS, attention, attention_packed, unsupported  # noqa: E402
from kernels.attention.backends import INTERPRETED, TRITON_INSTALLED  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

RULE = """error(kernel) <= 2 * error(beside) + eps(its dtype) / 4 * result + eps(float32) * 8 * terms + 1e-5, each the largest of its
tensor. Beside is the worse of `eager` in the same dtype and of float64 that keeps O in that dtype, as FlashAttention does. Terms are a
gradient before delta is subtracted: where a query sees one key alone, they cancel out, and `eager` makes no error there. For the
log-sum-exp, always float32: eps(float32) * 4 * result + 1e-5. The largest errors of few numbers scatter: a case that does not hold on one
draw is judged on 16 together, so that no error is forgotten, but all are compared with what 16 draws bring beside; where a tensor has fewer
than 8 numbers, on 128, with the same sinks (of one number, the largest of 16 is over twice the largest of 16 others in 4% of cases, of 128 in
0.03%)."""
DRAWS, DRAWS_OF_FEW = 16, 128
EPS_FLOAT32 = torch.finfo(torch.float32).eps
ONE = 0  # as an alignment: the length 1, which Triton compiles in
TILES = (16, 32, 64, 128)  # lengths near multiples of these are drawn as often as all others together
PLAIN, WITH_FEATURE = 0.3, 0.35  # how often a signature has no feature at all, and how often each of the others has any one
CASE_SECONDS = 300  # after which a case is taken to hang; the first of a signature compiles
PROGRESS_SECONDS = 10
PROCESSES = 16  # at most: each holds some 500 MB of the GPU


class Limits(NamedTuple):
    """What can be drawn on a kind of device."""

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    kv_heads: tuple[int, ...]
    groups: tuple[int, ...]  # query heads that share a key head
    alignments: tuple[int, ...]  # ONE, or the largest power of two up to 128 that divides a length
    longest: int  # queries, or keys
    scores: int  # batch * heads * seq_q * seq_k, from which on the batch is 1


LIMITS = {
    "cuda": Limits(
        dtypes=("bfloat16", "bfloat16", "bfloat16", "float16", "float16", "float32"),
        head_dims=(16, 24, 33, 40, 64, 64, 64, 72, 80, 96, 128, 128, 128, 160, 192, 256),
        kv_heads=(1, 2, 3),
        groups=(1, 1, 2, 4),
        alignments=(ONE, 1, 1, 1, 1, 8, 16, 32, 64, 128, 128, 128),
        longest=1100,
        scores=2**23,
    ),
    "cpu": Limits(("float16", "float32"), (16, 24, 33), (1, 1, 2), (1, 2), (ONE, 1, 1, 16, 32), longest=50, scores=2**12),
}

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of [batch, seq, heads, head_dim]
    "dense": lambda x: x,
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": lambda x: pad(x, (0, 8))[..., :-8],
    "every_second": lambda x: x.repeat_interleave(2, -1)[..., ::2],  # the last dimension is not dense
    "one_head": lambda x: x[:, :, :1].expand_as(x),
    "one_row": lambda x: x[:, :1].expand_as(x),
}
PROJECTIONS = ("slices", "packed")  # q, k and v are slices of one projection; packed: `attention_packed` is called


@dataclass(frozen=True)
class Signature:
    """What Triton compiles kernels for. Absent features are None."""

    dtype: str
    head_dim: int
    value_head_dim: int
    heads: int
    kv_heads: int
    causal: bool
    queries: int  # alignments, see Limits
    keys: int
    layouts: tuple[str, ...]  # of q, k, v and dout; one of PROJECTIONS, and dout's
    window: str | None = None  # which sides end: "left", "right", "left right"
    documents: str | None = None  # in which form: "document_ids", "cu_seqlens"
    alibi: bool | None = None
    softcap: bool | None = None
    sinks: str | None = None  # their dtype
    dropout: bool | None = None
    log_sum_exp: bool | None = None  # returned, with a gradient

    @property
    def square(self) -> bool:
        return self.documents is not None or self.layouts[0] in PROJECTIONS


@dataclass(frozen=True)
class Case:
    """The numbers of one call. Absent features are None."""

    number: int
    seed: int  # of its tensors and its dropout
    signature: Signature
    batch: int
    seq_q: int
    seq_k: int
    scale: float | None
    window: int | tuple[int | None, int | None] | None
    documents: tuple[tuple[int, ...], ...] | None  # lengths in each row of the batch; 0 is none
    alibi_per_row: bool | None  # of the batch, or one for all
    softcap: float | None
    dropout_p: float | None

    def __str__(self) -> str:
        given = {**asdict(self.signature), **{field.name: getattr(self, field.name) for field in fields(self)}}
        hidden = ("number", "seed", "signature", "queries", "keys", "alibi", "dropout")
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None and name not in hidden)


@cache
def draw_signatures(seed: int, count: int, limits: Limits) -> tuple[Signature, ...]:
    """`count` different ones."""
    random = Random(f"{seed} signatures")
    drawn: dict[Signature, None] = {}
    while len(drawn) < count:
        drawn[draw_signature(random, limits)] = None
    return tuple(drawn)


def draw_signature(random: Random, limits: Limits) -> Signature:
    chance = 0 if random.random() < PLAIN else WITH_FEATURE

    def feature(*values):
        return random.choice(values) if values and random.random() < chance else None

    dtype, head_dim, kv_heads = random.choice(limits.dtypes), random.choice(limits.head_dims), random.choice(limits.kv_heads)
    value_head_dim = feature(*limits.head_dims) or head_dim
    documents, projection = feature("document_ids", "cu_seqlens"), random.choice((None, None, *PROJECTIONS))
    one_projection = projection is not None and value_head_dim == head_dim
    of_each = random.choices([*LAYOUTS], k=4) if random.random() < 0.3 else ["dense"] * 4
    queries, keys = random.choices(limits.alignments, k=2)
    keys = queries if documents or one_projection or random.random() < 0.5 else keys
    causal = random.random() < 0.6
    # A window that hides nothing is compiled as none: there must be something for it to hide.
    ends = ["left"] * (keys != ONE) + ["right"] * (queries != ONE and not causal)
    return Signature(
        dtype, head_dim, value_head_dim, kv_heads * random.choice(limits.groups), kv_heads, causal, queries, keys,
        (projection, of_each[3]) if one_projection else tuple(of_each),
        window=feature(*ends, *([" ".join(ends)] if len(ends) == 2 else [])),
        documents=documents,
        alibi=feature(True),
        softcap=feature(True),
        sinks=feature("float32", dtype),
        dropout=feature(True),
        log_sum_exp=True if random.random() < 0.5 else None,
    )  # fmt: skip


def draw_length(random: Random, alignment: int, longest: int) -> int:
    """Half of the time at the edge of a tile; never 2, which leaves no room for a window on either side."""
    if alignment == ONE:
        return 1
    if random.random() < 0.5:
        length = random.choice(TILES) * random.randint(1, 4) + random.choice((-1, 0, 1))
    else:
        length = round(math.exp(random.uniform(math.log(3), math.log(longest))))
    length = min(max(length, 3), longest - longest % (2 * alignment))
    return length // 128 * 128 or 128 if alignment == 128 else alignment * (length // alignment | 1)


def draw_case(seed: int, number: int, signatures: tuple[Signature, ...], limits: Limits) -> Case:
    random, signature = Random(f"{seed} {number}"), signatures[number % len(signatures)]
    seq_q = draw_length(random, signature.queries, limits.longest)
    same = signature.square or signature.queries == signature.keys and random.random() < 0.5
    seq_k = seq_q if same else draw_length(random, signature.keys, limits.longest)
    batch = max(1, min(random.randint(1, 4), limits.scores // (signature.heads * seq_q * seq_k)))
    batch = 1 if signature.documents == "cu_seqlens" else batch
    return Case(
        number, random.getrandbits(62), signature, batch, seq_q, seq_k,
        scale=random.choice((None, None, random.uniform(0.02, 0.5))),
        window=signature.window and draw_window(random, signature, seq_q, seq_k),
        documents=signature.documents and tuple(draw_documents(random, seq_q) for _ in range(batch)),
        alibi_per_row=signature.alibi and random.random() < 0.5,
        softcap=signature.softcap and math.exp(random.uniform(math.log(0.5), math.log(50))),
        dropout_p=signature.dropout and random.choice((0.001, 0.1, 0.5, 0.95)),
    )  # fmt: skip


def draw_window(random: Random, signature: Signature, seq_q: int, seq_k: int):
    """Narrower than what it would hide nothing of; on the right not 0, which is causal, and so another signature."""

    def end(least, most):
        return random.randint(least, random.choice((min(most, 5), most)))

    left = end(0, seq_k - 2) if "left" in signature.window else None
    right = end(1, seq_q - 2) if "right" in signature.window else None
    return left + 1 if signature.causal and random.random() < 0.5 else (left, right)


def draw_documents(random: Random, seq: int) -> tuple[int, ...]:
    cuts = sorted(random.randint(0, seq) for _ in range(random.randint(0, 7)))
    return tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, seq)))


class Given(NamedTuple):
    """What one call is given."""

    leaves: dict[str, torch.Tensor]  # q, k and v, or qkv; and sinks
    dout: torch.Tensor
    dlse: torch.Tensor | None
    options: dict  # of `attention`, without backend and return_lse


def given(case: Case, draw: int, device: str) -> Given:
    """The draw's tensors, laid out as the signature says."""
    signature = case.signature
    generator = torch.Generator(device).manual_seed(case.seed + draw)
    dtype = getattr(torch, signature.dtype)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    *of_inputs, of_dout = (LAYOUTS.get(name) for name in signature.layouts)
    heads, kv_heads, head_dim, value_head_dim = signature.heads, signature.kv_heads, signature.head_dim, signature.value_head_dim
    if signature.layouts[0] in PROJECTIONS:
        leaves = {"qkv": normal(case.batch, case.seq_q, heads + 2 * kv_heads, head_dim)}
        if signature.layouts[0] == "slices":
            leaves = dict(zip("qkv", leaves["qkv"].split([heads, kv_heads, kv_heads], dim=2)))
    else:
        shapes = (case.seq_q, heads, head_dim), (case.seq_k, kv_heads, head_dim), (case.seq_k, kv_heads, value_head_dim)
        leaves = {name: lay(normal(case.batch, *shape)) for name, lay, shape in zip("qkv", of_inputs, shapes)}
    if signature.sinks:
        of_all_draws = torch.Generator(device).manual_seed(case.seed - 1)
        leaves["sinks"] = torch.randn(heads, generator=of_all_draws, device=device).to(getattr(torch, signature.sinks))
    dout = of_dout(normal(case.batch, case.seq_q, heads, value_head_dim))
    dlse = normal(case.batch, heads, case.seq_q, dtype=torch.float32) if signature.log_sum_exp else None
    options = dict(causal=signature.causal, scale=case.scale, window=case.window, softcap=case.softcap)
    options["dropout_p"] = case.dropout_p or 0.0
    if signature.alibi:
        rows = [case.batch] if case.alibi_per_row else []
        options["alibi_slopes"] = torch.exp2(-8 * torch.rand(*rows, heads, generator=generator, device=device))
    return Given(leaves, dout, dlse, options | document_options(case, device))


def document_options(case: Case, device: str) -> dict[str, torch.Tensor]:
    if case.signature.documents is None:
        return {}
    if case.signature.documents == "cu_seqlens":
        return {"cu_seqlens": torch.tensor((0, *case.documents[0]), device=device).cumsum(0).int()}
    lengths = torch.zeros(case.batch, max(map(len, case.documents)), dtype=torch.int64)
    for row, of_row in zip(lengths, case.documents):
        row[: len(of_row)] = torch.tensor(of_row)
    ids = torch.arange(lengths.shape[1]) % 2 * 7 - 3  # ids come again: a document is a run of equal ones
    return {"document_ids": torch.stack([ids.repeat_interleave(row) for row in lengths]).int().to(device)}


def call(backend: str, case: Case, given: Given, dtype: torch.dtype | None = None, return_lse: bool = False, **further):
    """(leaves, out, log-sum-exp or None), everything in `dtype` where one is named."""
    leaves = {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in given.leaves.items()}
    inputs = dict(leaves)
    torch.manual_seed(case.seed)  # all draw the same dropout
    options = dict(given.options, backend=backend, return_lse=return_lse or given.dlse is not None, **further)
    if "qkv" in inputs:
        outputs = attention_packed(**inputs, heads=case.signature.heads, kv_heads=case.signature.kv_heads, **options)
    else:
        outputs = attention(**inputs, **options)
    return leaves, *(outputs if options["return_lse"] else (outputs, None))


def gradients(case: Case, leaves, outputs, of_outputs, retain_graph: bool = False) -> dict[str, torch.Tensor]:
    found = dict(zip(leaves, torch.autograd.grad(outputs, [*leaves.values()], of_outputs, retain_graph=retain_graph)))
    if "qkv" in found:
        heads = [case.signature.heads, case.signature.kv_heads, case.signature.kv_heads]
        found |= zip("qkv", found.pop("qkv").split(heads, dim=2))
    return {f"d{name}": x for name, x in found.items()}


def results(backend: str, case: Case, given: Given, **further) -> dict[str, torch.Tensor]:
    """Output and gradients, and the log-sum-exp where it is asked for."""
    leaves, out, lse = call(backend, case, given, **further)
    if lse is None:
        return {"out": out.detach()} | gradients(case, leaves, out, given.dout)
    return {"out": out.detach(), "lse": lse.detach()} | gradients(case, leaves, (out, lse), (given.dout, given.dlse))


def references(case: Case, given: Given) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results in float64; the gradients of float64 that keeps O in the case's dtype; and those before delta is subtracted.

    dS = P * (dP - delta), delta = rowsum(dO * O) - dL: what is added to delta is subtracted from the log-sum-exp's gradient dL.
    """
    leaves, out, lse = call("eager", case, given, torch.float64, return_lse=True)
    dout = given.dout.double()
    dlse = torch.zeros_like(lse) if given.dlse is None else given.dlse.double()
    exact = {"out": out.detach()} | gradients(case, leaves, (out, lse), (dout, dlse), retain_graph=True)
    if given.dlse is not None:
        exact["lse"] = lse.detach()

    def with_delta_of(o):
        return gradients(case, leaves, (out, lse), (dout, dlse - (dout * (o - out.detach())).sum(-1).transpose(1, 2)), retain_graph=True)

    rounded = with_delta_of(exact["out"].to(given.dout.dtype).double())
    rounded = {name: x.to(given.leaves["sinks"].dtype if name == "dsinks" else given.dout.dtype) for name, x in rounded.items()}
    return exact, rounded, with_delta_of(0.0)


class Outcome(NamedTuple):
    """Of one draw: tensors by name, among them "out", "lse" where it is asked for, and gradients."""

    got: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]  # in float64
    beside: list[dict[str, torch.Tensor]]  # the first has all tensors, of the dtypes that they should have
    terms: dict[str, torch.Tensor] = {}
    scores: float = 0.0  # by how much rounding changes a score, where that is not in float32


class Errors(NamedTuple):
    """The largest of a tensor."""

    error: float
    beside: float
    result: float
    terms: float
    scores: float

    def allowed(self, name: str, dtype: torch.dtype, times: float) -> float:
        """RULE. The log-sum-exp moves by no more than the score that moves most."""
        if name == "lse":
            return EPS_FLOAT32 * 4 * self.result + self.scores + 1e-5
        return times * self.beside + torch.finfo(dtype).eps / 4 * self.result + EPS_FLOAT32 * 8 * self.terms + 1e-5


def errors(outcome: Outcome, name: str) -> Errors:
    exact = outcome.exact[name]
    finite = exact.isfinite()

    def largest(x):
        return x[finite].abs().max().item() if finite.any() else 0.0

    beside = max(largest(results[name] - exact) for results in outcome.beside if name in results)
    return Errors(largest(outcome.got[name] - exact), beside, largest(exact), largest(outcome.terms.get(name, exact)), outcome.scores)


def wrong_at_once(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]) -> list[str]:
    """What no rounding explains."""
    faults = []
    for name, expected in exact.items():
        x = got[name]
        if (x.shape, x.dtype) != (expected.shape, dtypes[name]):
            faults.append(f"{name} is {x.dtype} {list(x.shape)}")
            continue
        finite = expected.isfinite()
        if not (torch.equal(x.isfinite(), finite) and torch.equal(x[~finite].double(), expected[~finite])):
            faults.append(f"{name} is not finite where it should be, or not infinite")
        if name in ("out", "dv") and (x[expected == 0] != 0).any():
            faults.append(f"{name} is not 0 where nothing is seen")
    return faults


def compare(draws: Iterable[Outcome], times: float = 2) -> tuple[list[str], dict[str, float], int]:
    """(faults; the largest error of each tensor over what is allowed; on how many draws it was judged, the first or as many as RULE says).

    times: what stands in RULE before the error beside.
    """
    pooled: dict[str, Errors] = {}
    for number, draw in enumerate(draws, 1):
        dtypes = {name: x.dtype for name, x in draw.beside[0].items()}
        if faults := wrong_at_once(draw.got, draw.exact, dtypes):
            return faults, {}, number
        for name in draw.exact:
            found = errors(draw, name)
            pooled[name] = Errors(*map(max, found, pooled.get(name, found)))
        allowed = {name: x.allowed(name, dtypes[name], times) for name, x in pooled.items()}
        wanted = DRAWS if min(x.numel() for x in draw.exact.values()) >= 8 else DRAWS_OF_FEW
        if number == wanted or number == 1 and all(x.error <= allowed[name] for name, x in pooled.items()):
            break
    faults = [
        f"error of {name} {x.error:.3g}, beside {x.beside:.3g}, allowed {allowed[name]:.3g}, on {number} draw{'s' * (number > 1)}"
        for name, x in pooled.items()
        if x.error > allowed[name]
    ]
    return faults, {name: x.error / allowed[name] for name, x in pooled.items()}, number


def judge(backend: str, case: Case, device: str) -> tuple[list[str], dict[str, float], int]:
    """As `compare`; a fault, too, is a second pass that gives other bits."""

    def outcome(draw: int) -> Outcome:
        tensors = given(case, draw, device)
        exact, rounded, terms = references(case, tensors)
        return Outcome(results(backend, case, tensors), exact, [results("eager", case, tensors), rounded], terms)

    faults, worst, draws = compare(map(outcome, count()))
    if "deterministic" in BACKENDS[backend].features:
        for asked in (False, True):
            first, second = (results(backend, case, given(case, 0, device), deterministic=asked) for _ in range(2))
            free = {"dq"} if backend == "hopper" and not asked else set()  # added up in any order
            faults += [f"{name} has other bits the second time" for name in first.keys() - free if not torch.equal(first[name], second[name])]
    return faults, worst, draws


def refusal(backend: str, case: Case, device: str) -> str | None:
    """Why the backend cannot do this case."""
    signature = case.signature
    bounded = signature.causal or signature.window is not None
    return unsupported(
        backend,
        device_type=device,
        dtype=getattr(torch, signature.dtype),
        head_dim=signature.head_dim,
        value_head_dim=signature.value_head_dim,
        compute_capability=torch.cuda.get_device_capability() if device == "cuda" else None,
        grouped=signature.heads != signature.kv_heads,
        unequal_causal=bounded and case.seq_q != case.seq_k,
        window=signature.window is not None,
        alibi=signature.alibi is not None,
        softcap=signature.softcap is not None,
        sinks=signature.sinks is not None,
        dropout=signature.dropout is not None,
        return_lse=signature.log_sum_exp is not None,
        **({} if signature.documents is None else {signature.documents: True}),
    )


@dataclass(frozen=True)
class Plan:
    """What is fuzzed; every case follows from it."""

    seed: int
    signatures: int
    backends: tuple[str, ...]
    device: str

    def case(self, number: int) -> Case:
        limits = LIMITS[self.device]
        return draw_case(self.seed, number, draw_signatures(self.seed, self.signatures, limits), limits)

    def command(self, number: int) -> str:
        words = ["python", "scripts/fuzz_attention.py", "--seed", self.seed, "--signatures", self.signatures, "--backends", *self.backends]
        return "TRITON_INTERPRET=1 " * INTERPRETED + shlex.join(map(str, [*words, "--case", number]))


_compiled: set[str] = set()  # the kernels that this process has compiled, or found compiled on disk


def _note_compiled_kernel(*, src, metadata, **_) -> None:
    _compiled.add(f"{src.fn.__module__.rpartition('.')[2]}.{src.fn.__name__} {metadata['hash']}")


def check(plan: Plan, number: int) -> dict:
    """One case: {number, faults, worst: of each backend that can do it, error over allowed by tensor, draws, compiled so far, seconds}."""
    if TRITON_INSTALLED and not INTERPRETED:
        import triton

        triton.knobs.compilation.listener = _note_compiled_kernel
    case, start = plan.case(number), time.monotonic()
    faults, worst, draws = [], {}, {}
    for backend in plan.backends:
        if refusal(backend, case, plan.device):
            continue
        try:
            found, worst[backend], draws[backend] = judge(backend, case, plan.device)
        except Exception as error:  # whatever a kernel does: it is this case's fault, and the next case is checked
            found = [f"{type(error).__name__}: {error}"]
        faults += [f"{backend}: {fault}" for fault in found]
    return dict(number=number, faults=faults, worst=worst, draws=draws, compiled=sorted(_compiled), seconds=time.monotonic() - start)


def _usable() -> bool:
    """Whether CUDA still answers: after an illegal access it never does again in this process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _serve(pipe, check) -> None:
    try:
        while True:
            pipe.send((check(pipe.recv()), _usable()))
    except EOFError:  # no more cases
        pass


class Worker:
    """A process that checks cases one after the other."""

    def __init__(self, check: Callable[[int], dict], group: deque[int]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, check), daemon=True)
        self.process.start()
        end.close()
        self.take(group)

    def take(self, group: deque[int]) -> None:
        self.group, self.number, self.deadline = group, group.popleft(), time.monotonic() + CASE_SECONDS
        try:
            self.pipe.send(self.number)
        except OSError:  # it is dead: `result` says so
            pass

    def result(self, ready: bool) -> tuple[dict, bool] | None:
        """(the result of its case, whether it can go on), or None while it is at it."""
        if ready:
            try:
                return self.pipe.recv()
            except (EOFError, OSError):
                self.process.join()
                return self._failed(f"the process ended with exit code {self.process.exitcode}")
        return self._failed(f"not done after {CASE_SECONDS} s") if time.monotonic() > self.deadline else None

    def _failed(self, fault: str) -> tuple[dict, bool]:
        return dict(number=self.number, faults=[fault], worst={}, draws={}, compiled=[], seconds=0.0), False

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def check_apart(check: Callable[[int], dict], groups: list[list[int]], jobs: int) -> Iterator[dict | None]:
    """Every number's result, as they come, or None when a second brought none; a group's numbers run in one process, in order."""
    waiting = deque(deque(group) for group in groups)
    workers = [Worker(check, waiting.popleft()) for _ in range(min(jobs, len(waiting)))]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers], timeout=1)
            if not ready:
                yield None
            for worker in [*workers]:
                result = worker.result(worker.pipe in ready)
                if result is None:
                    continue
                outcome, usable = result
                yield outcome
                group = worker.group or (waiting.popleft() if waiting else None)
                if group and usable:
                    worker.take(group)
                    continue
                workers.remove(worker)
                worker.end()
                if group:
                    workers.append(Worker(check, group))
    finally:
        for worker in workers:
            worker.end()


def report(plan: Plan, cases: int, outcomes: list[dict], seconds: float, environment: dict) -> dict:
    """What is written: each signature with its cases' largest errors, and every failure with the command that repeats it."""
    signatures = []
    for i, signature in enumerate(draw_signatures(plan.seed, plan.signatures, LIMITS[plan.device])):
        of_it = [outcome for outcome in outcomes if outcome["number"] % plan.signatures == i]
        worst = {backend: _largest([x["worst"][backend] for x in of_it if backend in x["worst"]]) for backend in plan.backends}
        signatures.append(dict(cases=len(of_it), error_over_allowed={name: x for name, x in worst.items() if x}) | asdict(signature))
    failures = [
        dict(command=plan.command(x["number"]), faults=x["faults"], case=str(plan.case(x["number"]))) for x in outcomes if x["faults"]
    ]
    compiled = {kernel for outcome in outcomes for kernel in outcome["compiled"]}
    return dict(
        environment=environment,
        **asdict(plan),
        cases=cases,
        checked=len(outcomes),
        passed=not failures and len(outcomes) == cases,
        checked_by_backend=Counter(backend for x in outcomes for backend in x["worst"]),
        judged_on_more_draws=sorted(x["number"] for x in outcomes if max(x["draws"].values(), default=1) > 1),
        kernels_compiled=Counter(kernel.split()[0] for kernel in compiled),
        seconds=round(seconds, 1),
        rule=" ".join(RULE.split()),
        failures=failures,
        of_signatures=signatures,
    )


def _largest(ratios: list[dict[str, float]]) -> dict[str, float]:
    names = {name for ratio in ratios for name in ratio}
    return {name: round(max(ratio[name] for ratio in ratios if name in ratio), 3) for name in sorted(names)}


def show_failure(plan: Plan, outcome: dict) -> None:
    print(f"FAILED: {plan.case(outcome['number'])}", *outcome["faults"], plan.command(outcome["number"]), sep="\n    ", flush=True)


def fuzz(plan: Plan, cases: int, jobs: int, out: Path) -> int:
    environment, start = collect_environment(), time.monotonic()
    groups = [range(i, cases, plan.signatures) for i in range(min(plan.signatures, cases))]
    outcomes, shown = [], start

    def write() -> dict:
        result = report(plan, cases, outcomes, time.monotonic() - start, environment)
        out.write_text(json.dumps(result, indent=1) + "\n")
        return result

    out.parent.mkdir(parents=True, exist_ok=True)
    for outcome in check_apart(partial(check, plan), groups, jobs):
        if outcome is not None:
            outcomes.append(outcome)
            if outcome["faults"]:
                show_failure(plan, outcome)
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown, result = time.monotonic(), write()  # what is checked is kept
            print(f"{result['seconds']:6.0f} s: {len(outcomes)} of {cases} cases, {len(result['failures'])} failed", flush=True)
    result = write()
    for key in ("checked_by_backend", "kernels_compiled"):
        print(key.replace("_", " "), json.dumps(result[key]))
    print(f"judged on {DRAWS} draws or more: {len(result['judged_on_more_draws'])} cases")
    verdict = "passed" if result["passed"] else "FAILED"
    print(f"{verdict}: seed {plan.seed}, {cases} cases, {len(result['failures'])} failed, {result['seconds']} s")
    print(f"written to {out}")
    return 0 if result["passed"] else 1


def fuzz_one(plan: Plan, number: int) -> int:
    print(plan.case(number), flush=True)
    outcome = check(plan, number)
    print("error over allowed", json.dumps(outcome["worst"]), "draws", json.dumps(outcome["draws"]))
    if outcome["faults"]:
        show_failure(plan, outcome)
    return 1 if outcome["faults"] else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/fuzz_attention.json")
    parser.add_argument("--seed", type=int, help="default: a fresh one, which is printed and written")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--signatures", type=int, default=150, help="how many are drawn at most")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["triton", "hopper"], help="each checks what it can do")
    parser.add_argument("--jobs", type=int, help=f"processes; default: on a GPU one a CPU core, {PROCESSES} at most, and one without")
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args(arguments)
    if min(options.cases, options.signatures, 1 if options.jobs is None else options.jobs) < 1:
        parser.error("--cases, --signatures and --jobs are 1 at least")
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    usable = [name for name in options.backends if device in BACKENDS[name].devices]
    if not usable:
        print(f"fuzz_attention: no GPU here, for {' and '.join(options.backends)} (TRITON_INTERPRET=1 runs triton)", file=sys.stderr)
        return 2
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    plan = Plan(seed, options.signatures, tuple(usable), device)
    if options.case is not None:
        return fuzz_one(plan, options.case)
    jobs = options.jobs or (min(os.cpu_count(), PROCESSES) if device == "cuda" else 1)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    what = f"{options.cases} cases of {plan.signatures} signatures, {', '.join(usable)}"
    print(f"seed {seed}: {what} on {where}, {jobs} processes", flush=True)
    return fuzz(plan, options.cases, jobs, options.out)


if __name__ == "__main__":
    sys.exit(main())
