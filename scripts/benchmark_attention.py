"""Time attention backends beside each other and beside the fastest peers; one JSON out, and tables. scripts/plot_attention.py draws it.

    python scripts/benchmark_attention.py                                              # everything, on a GPU or a laptop
    python scripts/benchmark_attention.py --passes forward --backends hopper sdpa_cudnn flash_attn --head-dims 128 --groups 4
    python scripts/benchmark_attention.py --masks window=1024 documents=2048 --seqs 16384 --backends triton flex
    python scripts/benchmark_attention.py --module --batch 1 --hidden 1024 --head-dims 64 --masks causal

**A case** has --tokens tokens (batch * seq; or --batch sequences) and heads * head_dim = --hidden, in bfloat16; on the CPU float32, and few
tokens. --masks: `causal`, `full`, `window=N` (causal, N keys), `documents=N` (causal, packed documents of N tokens in the mean, their
lengths drawn), `window=N+documents=N`, `full+documents=N`. Documents go in as cu_seqlens where the batch is 1, else as document_ids. A
backend that cannot do a case, or whose memory does not suffice, is left out of it, and JSON and tables say why.

**Passes.** `forward` is that of training: recorded for the backward, which takes its log-sum-exp. `backward` is all of torch.autograd.grad,
with delta and every conversion; `both` is the one and then the other.

**Time.** A case's backends are timed in turn, round after round, in an order drawn anew for each: a GPU at its power limit is up to 8%
slower after a backend that keeps it busy than after one that does not. A figure is the median of the rounds, each the median GPU time of
calls behind the same matrix product, which evicts their inputs from L2 and, repeated where need be, gives the CPU time to queue them. On
the CPU a clock times the calls alone. Host time is what a call costs the CPU on a problem so small that the GPU keeps up.

**FLOPs** are 4 head_dim for each head and each pair of a query and a key that it sees, and 2.5 times that backward. So windows and
documents count as what is left to compute, and causal as (seq + 1) / (2 seq) of full. The ceiling is a larger matrix product, timed in the
same run.

**Memory** is the peak of what torch allocates beyond the inputs: output, what is kept for the backward, gradients, scratch. GPUs only.

**Errors** are ||x - exact|| / ||exact||, exact in float64: of the output, and of each gradient; of the first sequence's first key head.

**--module** sets nn.MultiheadAttention with its attn_mask, called as it is by default (`mha`) and with need_weights=False
(`mha_without_weights`), beside the same module built on `attention_packed`, with each of the backends. Projections and the gradients of all
parameters are included, in FLOPs too, and errors are of everything.

A GPU run takes, as an estimate, a second for each case, pass and backend, 10 to 20 more a case for FlexAttention to be compiled, and
several more for `eager` from seq 4096: the default (24 cases) a quarter of an hour, forward alone without `eager` and `flex` two minutes.
The CPU's default took 70 seconds on one core. The JSON is written after every case: what is measured is kept. Exit status 1 when a
backend failed otherwise than by its memory.
"""

import argparse
import importlib.metadata
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch._functorch.config
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.attention import BACKENDS, attention, attention_packed, unsupported  # noqa: E402
from kernels.attention.backends import FLASH_ATTN_PACKAGES, FLASH_ATTN_VERSION  # noqa: E402
from kernels.attention.masks import Rules, visible  # noqa: E402
from scripts.plot_attention import line, report, summarise  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

MODULES = {"mha": True, "mha_without_weights": False}  # nn.MultiheadAttention, and its need_weights
DEFAULTS = {
    "cuda": dict(
        tokens=16384, hidden=2048, head_dims=[64, 128], seqs=[512, 1024, 2048, 4096, 8192, 16384],
        backends=["eager", "hopper", "triton", "sdpa_cudnn", "sdpa_flash", "flex", "flash_attn"],
    ),
    "cpu": dict(tokens=1024, hidden=128, head_dims=[64], seqs=[128, 256, 512, 1024], backends=["eager", "tiled", "sdpa"]),
}  # fmt: skip
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
PASSES = {"forward": (1, 1), "backward": (2.5, 2), "both": (3.5, 3)}  # FLOPs over those of the forward: attention's, a projection's
CEILING = {"cuda": 8192, "cpu": 1024}  # rows, columns and inner dimension of the matrix product that marks the ceiling
BASELINE = {False: "eager", True: "mha"}  # of the speed-up; True: --module
BEFORE_EACH_CALL = 4096  # of the product before each call: 100 MB, some 0.2 ms
ROUND_MILLISECONDS = 60  # of a backend's calls in a round
HOST_CALLS = 200
HOST_CASE = dict(causal=True, window=None, documents=None, batch=1, seq=128, heads=2, kv_heads=2, head_dim=64)
STORE_SCORES = ("eager", "mha")
BYTES_A_SCORE = 16  # of `eager` at its peak: four numbers in float32
FAILED = "failed: "  # how the reason begins when it is neither a refusal nor memory
GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch._functorch.config.donated_buffer = False  # else FlexAttention's backward runs once only: it may overwrite what it is given
    environment = collect_environment() | {"flash_attn": flash_attn_version()}
    on_gpu, host_left_out, ceilings, rows = options.device == "cuda", {}, [matmul_tflops(options.device)], []
    host = host_microseconds(options, host_left_out) if on_gpu else {}
    products = {which: products_before_each_call(host[which]) if on_gpu else 0 for which in options.passes}
    for case in cases(options):
        for row in measure_case(case, options, products):
            rows.append(row)
            print(line(row), flush=True)
        ceilings.append(matmul_tflops(options.device))
        result = {
            "environment": environment,
            "device": options.device,
            "dtype": str(DTYPES[options.device]).removeprefix("torch."),
            "baseline": BASELINE[options.module],
            "matmul_ceiling": {"unit": "TFLOP/s", "size": CEILING[options.device], "median": median(ceilings), "all": ceilings},
            "products_before_each_call": products,
            "host_microseconds": host,
            "host_left_out": host_left_out,
            "summary": summarise(rows, host),
            "rows": rows,
        }
        write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(f"\n{report(result)}\n\nwritten to {options.out}; pictures: python scripts/plot_attention.py {options.out}")
    reasons = [*host_left_out.values(), *(reason for row in rows for reason in row["left_out"].values())]
    return int(any(reason.startswith(FAILED) for reason in reasons))


# --- what is asked for ----------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmark_attention.json")
    parser.add_argument("--device", choices=list(DEFAULTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--module", action="store_true", help="compare modules with nn.MultiheadAttention")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS))
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--head-dims", nargs="+", type=int)
    parser.add_argument("--masks", nargs="+", type=mask, default=[mask("causal"), mask("full")], help="see above")
    parser.add_argument("--seqs", nargs="+", type=int)
    parser.add_argument("--groups", nargs="+", type=int, default=[1], help="query heads that share a key head")
    parser.add_argument("--tokens", type=int, help="batch * seq of every case")
    parser.add_argument("--batch", type=int, help="sequences in every case, in place of --tokens")
    parser.add_argument("--hidden", type=int, help="heads * head_dim of every case")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here")
    if wrong := [seq for seq in options.seqs if options.tokens % seq and not options.batch]:
        parser.error(f"--seqs {wrong[0]} does not divide --tokens {options.tokens}; change one of them, or say --batch")
    if wrong := [d for d, group in product(options.head_dims, options.groups) if options.hidden % (d * group)]:
        parser.error(f"--head-dims {wrong[0]} and --groups do not divide --hidden {options.hidden}")
    if options.module and (options.groups != [1] or any(seen["documents"] for seen in options.masks)):
        parser.error("--module: nn.MultiheadAttention has no --groups, and its one mask no documents")
    return options


def mask(text: str) -> dict:
    """{name, causal, window, documents} of an argument to --masks."""
    if not re.fullmatch(r"causal|full|(full\+)?documents=[1-9]\d*|window=[1-9]\d*(\+documents=[1-9]\d*)?", text):
        raise ValueError(text)  # argparse names it
    numbers = {key: int(number) for key, number in re.findall(r"(window|documents)=(\d+)", text)}
    return dict(name=text, causal="full" not in text, window=numbers.get("window"), documents=numbers.get("documents"))


def cases(options) -> list[dict]:
    """JSON-serialisable; `series` names all but seq and batch."""
    made = []
    for group, head_dim, seen, seq in product(options.groups, options.head_dims, options.masks, options.seqs):
        heads, kv_heads = options.hidden // head_dim, options.hidden // head_dim // group
        name = f"{'module, ' if options.module else ''}head_dim {head_dim}, heads {heads}/{kv_heads}, {seen['name']}"
        shape = dict(batch=options.batch or options.tokens // seq, seq=seq, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        made.append(dict(series=name) | shape | {key: seen[key] for key in ("causal", "window", "documents")})
    return made


def contenders(options) -> list[str]:
    return [*(MODULES if options.module else ()), *options.backends]


def flash_attn_version() -> str | None:
    package = FLASH_ATTN_PACKAGES.get(FLASH_ATTN_VERSION)
    return package and f"{package} {importlib.metadata.version(package)}"


# --- a case ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A case on the device. A forward is a function of the inputs."""

    inputs: dict[str, torch.Tensor]  # all of them get gradients
    dout: torch.Tensor
    forwards: dict[str, Callable]
    exact: Callable  # the same, of what `compared` leaves of the inputs, in float64
    compared: Callable  # a tensor -> what of it, or of its gradient, is compared with float64


def attention_problem(case: dict, backends: list[str], device: str) -> Problem:
    torch.manual_seed(0)
    heads = dict(q=case["heads"], k=case["kv_heads"], v=case["kv_heads"], dout=case["heads"])
    shapes = {name: (case["batch"], case["seq"], count, case["head_dim"]) for name, count in heads.items()}
    inputs = {name: torch.randn(shape, device=device, dtype=DTYPES[device]) for name, shape in shapes.items()}
    dout = inputs.pop("dout")
    return Problem(
        {name: x.requires_grad_() for name, x in inputs.items()},
        dout,
        {name: partial(attention, **mask_arguments(case, device), backend=name) for name in backends},
        exact=partial(attention, **mask_arguments(case | {"batch": 1}, device), backend="tiled"),
        compared=lambda x: x[:1, :, : x.shape[2] // case["kv_heads"]],
    )


def module_problem(case: dict, backends: list[str], device: str) -> Problem:
    """nn.MultiheadAttention; and the same function of its parameters, made of `attention_packed`."""
    torch.manual_seed(0)
    heads, rules = case["heads"], dict(causal=case["causal"], window=case["window"])
    hidden = heads * case["head_dim"]
    module = torch.nn.MultiheadAttention(hidden, heads, batch_first=True, device=device, dtype=DTYPES[device])
    x, dout = (torch.randn(case["batch"], case["seq"], hidden, device=device, dtype=DTYPES[device]) for _ in range(2))
    everything = range(case["seq"])
    sight = Rules(1.0, 0, case["window"] and case["window"] - 1, 0 if case["causal"] else None)
    attn_mask = ~visible(sight, everything, everything, x.device)[0, 0]  # True where nothing is seen

    def theirs(x, *_, need_weights):  # the rest are the module's own parameters
        return module(x, x, x, attn_mask=attn_mask, need_weights=need_weights)[0]

    def ours(x, in_weight, in_bias, out_weight, out_bias, backend):
        qkv = linear(x, in_weight, in_bias).unflatten(-1, (3, heads, -1))
        return linear(attention_packed(qkv, heads=heads, **rules, backend=backend).flatten(2), out_weight, out_bias)

    inputs = {"x": x.requires_grad_(), **dict(module.named_parameters())}
    forwards = {name: partial(theirs, need_weights=MODULES[name]) if name in MODULES else partial(ours, backend=name) for name in backends}
    return Problem(inputs, dout, forwards, exact=partial(ours, backend="tiled"), compared=lambda x: x)


def mask_arguments(case: dict, device: str) -> dict:
    """What `attention` takes of the case beside its tensors."""
    arguments = dict(causal=case["causal"], window=case["window"])
    edges = torch.tensor(document_edges(case), dtype=torch.int32)
    if case["documents"] and case["batch"] == 1:
        arguments["cu_seqlens"] = edges[0].to(device)
    elif case["documents"]:
        number = torch.arange(edges.shape[1] - 1, dtype=torch.int32)
        arguments["document_ids"] = torch.stack([number.repeat_interleave(row.diff()) for row in edges]).to(device)
    return arguments


def document_edges(case: dict) -> list[list[int]]:
    """Where the documents of each sequence begin, and where the last ends; without documents, those of the sequence."""
    cuts = max(0, case["seq"] // case["documents"] - 1) if case["documents"] else 0
    return [[0, *sorted(random.Random(row).sample(range(1, case["seq"]), cuts)), case["seq"]] for row in range(case["batch"])]


def flops(case: dict, which: str, module: bool) -> float:
    attention_factor, projection_factor = PASSES[which]
    hidden = case["heads"] * case["head_dim"]
    projections = 8 * case["batch"] * case["seq"] * hidden**2 if module else 0  # of Q, K, V and the output
    return attention_factor * 4 * hidden * visible_pairs(case) + projection_factor * projections


def visible_pairs(case: dict) -> int:
    """Pairs of a query and a key that it sees, in all sequences of the batch."""

    def pairs(length: int) -> int:
        most = min(case["window"] or length, length)  # keys that a query sees
        return most * (most + 1) // 2 + (length - most) * most if case["causal"] else length**2

    return sum(pairs(end - start) for row in document_edges(case) for start, end in pairwise(row))


def refusal(name: str, case: dict, device: str) -> str | None:
    """Why this one does not take part."""
    if name in STORE_SCORES:
        needed, free = BYTES_A_SCORE * case["batch"] * case["heads"] * case["seq"] ** 2, free_bytes(device)
        if needed > free:
            return f"its scores take {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
    if name not in BACKENDS:
        return None
    packed = case["documents"] is not None
    reason = unsupported(
        name,
        device_type=device,
        dtype=DTYPES[device],
        head_dim=case["head_dim"],
        compute_capability=torch.cuda.get_device_capability() if device == "cuda" else None,
        grouped=case["heads"] != case["kv_heads"],
        window=case["window"] is not None,
        document_ids=packed and case["batch"] > 1,
        cu_seqlens=packed and case["batch"] == 1,
    )
    return reason and reason.partition(";")[0]  # without the remedies


def free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def make_problem(options, case: dict, names: list[str]) -> Problem:
    return (module_problem if options.module else attention_problem)(case, names, options.device)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure_case(case: dict, options, products: dict[str, int]) -> Iterator[dict]:
    """A row for each pass: the case, what was measured of each backend, the errors, and who is left out and why."""
    if "flex" in options.backends:
        torch.compiler.reset()  # a call compares with everything compiled so far, on the CPU
    names = contenders(options)
    refused = {name: reason for name in names if (reason := refusal(name, case, options.device))}
    able = [name for name in names if name not in refused]
    yardstick = [] if refusal("sdpa", case, options.device) else ["sdpa"]  # errors are compared with its
    problem = make_problem(options, case, [*able, *yardstick])
    for which in options.passes:
        left_out = dict(refused)
        errors = {} if which == "both" else relative_errors(problem, which, left_out)
        measured = measure(problem, which, able, options.rounds, products[which], left_out)
        baseline, work = measured.get(BASELINE[options.module]), flops(case, which, options.module)
        for one in measured.values():
            one["tflops"] = work / one["milliseconds"] / 1e9
            one["speedup"] = baseline and baseline["milliseconds"] / one["milliseconds"]
        yield case | {"pass": which, "measured": measured, "errors": errors, "left_out": left_out}


def measure(problem: Problem, which: str, names: list[str], rounds: int, products: int, left_out: dict) -> dict[str, dict]:
    """Of each backend: milliseconds (median), those of every round, peak_bytes. Those that fail go to left_out."""
    device, peaks, times = problem.dout.device.type, {}, {}
    for name in names:
        if name not in left_out:
            with leaving_out(name, left_out):
                peaks[name], times[name] = peak_bytes(partial(prepare, which, problem, name), device), []
    for i in range(rounds):
        for name in random.Random(i).sample(list(times), len(times)):
            with leaving_out(name, left_out):
                times[name].append(milliseconds(prepare(which, problem, name), device, products))
    able = [name for name in times if name not in left_out]
    return {name: dict(milliseconds=median(times[name]), rounds=times[name], peak_bytes=peaks[name]) for name in able}


@contextmanager
def leaving_out(name: str, left_out: dict[str, str]):
    """A backend that fails is left out, the reason noted, and the rest goes on."""
    try:
        yield
    except torch.OutOfMemoryError:
        left_out[name] = "out of memory"
    except Exception as error:
        left_out[name] = f"{FAILED}{type(error).__name__}: {error}"


def prepare(which: str, problem: Problem, name: str) -> Callable:
    """A call of the pass; gradients are returned, not added up."""
    forward, inputs, dout = problem.forwards[name], tuple(problem.inputs.values()), problem.dout
    if which == "forward":
        return lambda: forward(*inputs)
    if which == "both":
        return lambda: torch.autograd.grad(forward(*inputs), inputs, dout)
    out = forward(*inputs)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def relative_errors(problem: Problem, which: str, left_out: dict) -> dict[str, dict[str, float]]:
    """||x - exact|| / ||exact|| of each backend's output, or of its gradients."""
    double = {name: problem.compared(x).detach().double().requires_grad_() for name, x in problem.inputs.items()}
    exactly = problem._replace(inputs=double, dout=problem.compared(problem.dout).double(), forwards={"exact": problem.exact})
    exact, errors = results(which, exactly, "exact"), {}
    for name in problem.forwards:
        with leaving_out(name, left_out):
            computed = results(which, problem, name)
            errors[name] = {x: ((problem.compared(computed[x]) - exact[x]).norm() / exact[x].norm()).item() for x in exact}
    return errors


def results(which: str, problem: Problem, name: str) -> dict[str, torch.Tensor]:
    """{"out": ...}, or the gradients by their names."""
    result = prepare(which, problem, name)()
    return {"out": result} if which == "forward" else {f"d{x}": gradient for x, gradient in zip(problem.inputs, result, strict=True)}


def peak_bytes(prepared: Callable, device: str) -> int | None:
    prepared()()  # kernels are compiled, and what stays is allocated
    if device == "cpu":
        return None
    held = torch.cuda.memory_allocated()
    call = prepared()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - held


def milliseconds(call: Callable, device: str, products: int = 0) -> float:
    """Median time of a call; on a GPU the GPU's, without what the CPU needs to queue it."""
    times = partial(gpu_times, call, products) if device == "cuda" else partial(cpu_times, call)
    calls = int(ROUND_MILLISECONDS / median(times(3)))
    return median(times(min(max(calls, 5), 100)))


def gpu_times(call: Callable, products: int, calls: int) -> list[float]:
    before = square_product(BEFORE_EACH_CALL, "cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        for _ in range(products):
            before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def cpu_times(call: Callable, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


@cache
def square_product(size: int, device: str) -> Callable:
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[device]) for _ in "ab")
    return lambda: a @ b


def matmul_tflops(device: str) -> float:
    return 2 * CEILING[device] ** 3 / milliseconds(square_product(CEILING[device], device), device, products=1) / 1e9


def host_microseconds(options, left_out: dict[str, str]) -> dict[str, dict[str, float]]:
    """What a call of each pass and backend costs the CPU, on a problem so small that the GPU keeps up; the best of five runs."""
    names = [name for name in contenders(options) if not refusal(name, HOST_CASE, "cuda")]
    problem = make_problem(options, HOST_CASE, names)
    host = {which: {} for which in options.passes}
    for which, name in product(options.passes, names):
        with leaving_out(name, left_out):
            call, runs = prepare(which, problem, name), []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    call()
                runs.append(time.perf_counter() - start)
            host[which][name] = 1e6 * min(runs) / HOST_CALLS
    return host


def products_before_each_call(host: dict[str, float]) -> int:
    """As many as keep the GPU busy while the CPU queues the slowest backend's call."""
    one = 1000 * milliseconds(square_product(BEFORE_EACH_CALL, "cuda"), "cuda")
    return math.ceil(max(host.values(), default=one) / one)


if __name__ == "__main__":
    sys.exit(main())
