"""Time attention backends beside each other and beside the fastest peers, on one GPU; one JSON out, and a table.

    python scripts/benchmark_attention.py --out runs/benchmark_attention.json
    python scripts/benchmark_attention.py --backends hopper sdpa_cudnn flash_attn_4 --head-dims 128 --seqs 4096 16384 --groups 4

Every case has 16384 tokens and heads * head_dim = 2048, bfloat16. A case's backends are timed in turn, round after round, in an order drawn
anew for each: a GPU at its power limit is up to 8% slower after a backend that keeps it busy than after one that does not. A figure is the
median of the rounds, each the median GPU time of calls behind the same matrix product, which evicts their inputs from L2 and gives the CPU
time to queue them. FLOPs: 4 batch heads seq^2 head_dim forward, half if causal. The ceiling is a larger matrix product, timed in the same
run. Errors are against float64.
"""

import argparse
import json
import math
import random
import sys
import time
from functools import cache
from pathlib import Path
from statistics import geometric_mean, median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.attention import BACKENDS, attention, unsupported  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

TOKENS, HIDDEN = 16384, 2048  # batch * seq and heads * head_dim of every case
CEILING = 8192  # rows, columns and inner dimension of the matrix product that marks the ceiling
BEFORE_EACH_CALL = 4096  # of the product before each call: 100 MB, some 0.2 ms
ROUND_MILLISECONDS = 60  # of a backend's calls in a round
HOST_CALLS = 200
OURS = ("hopper", "triton")


def prepare_ours(backend, q, k, v, causal):
    return lambda: attention(q, k, v, causal=causal, backend=backend)


def prepare_flex(q, k, v, causal):
    """FlexAttention, compiled for the case's shape; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1000  # past the limit it would run uncompiled, without an error
    seq = q.shape[1]
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, seq, seq, device=q.device) if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def prepare_flash_attn_4(q, k, v, causal):
    from flash_attn.cute import flash_attn_func

    return lambda: flash_attn_func(q, k, v, causal=causal)[0]


PEERS = {"flex": prepare_flex, "flash_attn_4": prepare_flash_attn_4}  # beside the backends of `attention`


def prepare(backend: str, q, k, v, causal: bool):
    """A call of the backend's forward on these tensors, which returns the output."""
    return PEERS[backend](q, k, v, causal) if backend in PEERS else prepare_ours(backend, q, k, v, causal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmark_attention.json")
    names = [*(name for name in BACKENDS if name not in ("eager", "tiled")), *PEERS]
    default = ["hopper", "triton", "sdpa_cudnn", "sdpa_flash", "flex", "flash_attn_4"]
    parser.add_argument("--backends", nargs="+", choices=names, default=default)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--masks", nargs="+", choices=["causal", "full"], default=["causal", "full"])
    parser.add_argument("--seqs", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192, 16384], help="divisors of 16384")
    parser.add_argument("--groups", nargs="+", type=int, default=[1], help="query heads that share a key head")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark_attention: torch sees no CUDA GPU here", file=sys.stderr)
        return 2

    options.out.parent.mkdir(parents=True, exist_ok=True)
    environment = collect_environment()
    host = {name: host_microseconds(name) for name in options.backends}
    ceilings, rows = [matmul_tflops()], []
    for case in cases(options):
        rows.append(measure(case, options.backends, options.rounds))
        print(line(rows[-1]), flush=True)
        ceilings.append(matmul_tflops())
        result = {
            "environment": environment,
            "unit": "TFLOP/s",
            "matmul_ceiling": {"median": median(ceilings), "all": ceilings},
            "host_microseconds": host,
            "summary": {name: summarise(rows, name) for name in OURS if name in options.backends},
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # after every case: what is measured is kept
    for key in ("matmul_ceiling", "host_microseconds", "summary"):
        print(key, json.dumps(result[key]))
    print(f"written to {options.out}")
    return 0


def cases(options) -> list[dict]:
    return [
        dict(head_dim=d, causal=mask == "causal", seq=seq, batch=TOKENS // seq, heads=HIDDEN // d, kv_heads=HIDDEN // d // group)
        for group in options.groups
        for d in options.head_dims
        for mask in options.masks
        for seq in options.seqs
    ]


def tensors(case: dict) -> tuple[torch.Tensor, ...]:
    heads = (case["heads"], case["kv_heads"], case["kv_heads"])
    return tuple(torch.randn(case["batch"], case["seq"], n, case["head_dim"], device="cuda", dtype=torch.bfloat16) for n in heads)


def measure(case: dict, backends: list[str], rounds: int) -> dict:
    """The case with each backend's milliseconds (every round), TFLOP/s, and relative error of the output."""
    q, k, v = tensors(case)
    asked = dict(device_type="cuda", dtype=q.dtype, head_dim=case["head_dim"], compute_capability=torch.cuda.get_device_capability())
    asked["grouped"] = case["heads"] != case["kv_heads"]
    able = [name for name in backends if name in PEERS or unsupported(name, **asked) is None]
    calls = {name: prepare(name, q, k, v, case["causal"]) for name in able}
    errors = relative_errors(case, q, k, v, {name: call() for name, call in calls.items()})
    milliseconds = {name: [] for name in calls}
    for i in range(rounds):
        for name in random.Random(i).sample(able, len(able)):
            milliseconds[name].append(gpu_milliseconds(calls[name]))
    flops = 4 * TOKENS * case["seq"] * HIDDEN / (2 if case["causal"] else 1)
    tflops = {name: flops / median(times) / 1e9 for name, times in milliseconds.items()}
    return case | dict(milliseconds=milliseconds, tflops=tflops, errors=errors)


def relative_errors(case: dict, q, k, v, outs: dict[str, torch.Tensor]) -> dict[str, float]:
    """||out - exact|| / ||exact|| of the first head of the first sequence, exact in float64."""
    first = [x[:1, :, :1].double() for x in (q, k, v)]
    exact = attention(*first, causal=case["causal"], backend="eager")
    return {name: ((out[:1, :, :1].double() - exact).norm() / exact.norm()).item() for name, out in outs.items()}


def square_product(size: int):
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return lambda: a @ b


@cache
def product_before_each_call():
    return square_product(BEFORE_EACH_CALL)


def gpu_milliseconds(call) -> float:
    """Median GPU time of a call, without what the CPU needs to queue it."""
    before = product_before_each_call()

    def timed(calls: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            before()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    calls = int(ROUND_MILLISECONDS / median(timed(3)))
    return median(timed(min(max(calls, 5), 100)))


def matmul_tflops() -> float:
    return 2 * CEILING**3 / gpu_milliseconds(square_product(CEILING)) / 1e9


def host_microseconds(backend: str) -> float:
    """What a call costs the CPU, on a problem so small that the GPU keeps up; the best of five runs."""
    q, k, v = tensors(dict(batch=1, seq=128, heads=2, kv_heads=2, head_dim=64))
    call = prepare(backend, q, k, v, True)
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / HOST_CALLS


def ratio(row: dict, name: str) -> float | None:
    """Speed over that of the fastest peer in this case."""
    peers = [speed for peer, speed in row["tflops"].items() if peer not in OURS]
    return row["tflops"][name] / max(peers) if peers and name in row["tflops"] else None


def summarise(rows: list[dict], name: str) -> dict:
    ratios = [x for row in rows if (x := ratio(row, name)) is not None]
    errors = [row["errors"][name] / row["errors"]["flash_attn_4"] for row in rows if {name, "flash_attn_4"} <= row["errors"].keys()]
    speed = dict(cases=len(ratios), least=min(ratios), geometric_mean=geometric_mean(ratios)) if ratios else None
    return dict(over_fastest_peer=speed, error_over_flash_attn_4=geometric_mean(errors) if errors else None)


def line(row: dict) -> str:
    cells = " ".join(f"{name} {value:.0f}" for name, value in row["tflops"].items())
    best = {name: x for name in OURS if (x := ratio(row, name)) is not None}
    spread = max((max(times) - min(times)) / median(times) for times in row["milliseconds"].values())
    mask = "causal" if row["causal"] else "full"
    shape = f"head_dim {row['head_dim']:>3} heads {row['heads']}/{row['kv_heads']} {mask:6} seq {row['seq']:>5}"
    return f"{shape}  {cells}  over best peer {' '.join(f'{x:.2f}' for x in best.values())}  largest spread {spread:.0%}"


if __name__ == "__main__":
    sys.exit(main())
