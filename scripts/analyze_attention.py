"""Why flash attention: memory, traffic and roofline of standard attention and of our kernels, from formulas; measured beside them on a GPU.

    python scripts/analyze_attention.py                                  the tables, for head_dim 128
    python scripts/analyze_attention.py --docs docs/memory.md --plots docs/results    write them into the page, and the plots
    python scripts/analyze_attention.py --measure --out docs/results/analyze_attention-h200.json

docs/memory.md derives each formula. Standard attention is the backend `eager`; the tile sizes are read from kernels/attention.

--measure needs a GPU. It runs forward and backward of `eager`, `triton` and, where it can, `hopper`, and puts the peak of
``torch.cuda.max_memory_allocated`` beside the formula. Where Nsight Compute (`ncu`) is installed and allowed to read counters it also puts
bytes from L2 to the multiprocessors and to DRAM beside the tile formula; else the JSON says why it could not.
"""

import argparse
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kernels.attention import attention, unsupported  # noqa: E402
from kernels.attention.tuning import SHARED_MEMORY_LIMIT, generation, hopper_tile, tile_for  # noqa: E402
from training.flops import peak_flops  # noqa: E402

LENGTHS = [2**power for power in range(9, 18)]  # 512 to 131072
HALF, FP32 = 2, 4  # bytes
KIB, MIB, GIB = 2**10, 2**20, 2**30
TERA = 1e12
NSIGHT_METRICS = {
    "l2_to_sm_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
}


@dataclass(frozen=True)
class Case:
    """One causal self-attention in bf16: sequences, heads, their width, length; as many key heads as query heads."""

    seq: int
    head_dim: int = 128
    heads: int = 16
    batch: int = 1

    @property
    def tensor(self) -> int:
        """Bytes of one of Q, K, V, O."""
        return self.batch * self.seq * self.heads * self.head_dim * HALF

    @property
    def scores(self) -> int:
        """Elements, B H N^2."""
        return self.batch * self.heads * self.seq**2

    @property
    def lse(self) -> int:
        return self.batch * self.heads * self.seq * FP32

    @property
    def flops(self) -> int:
        """Of the forward pass, halved by the causal mask."""
        return 2 * self.scores * self.head_dim


# --- memory -----------------------------------------------------------------------------------------------------------


def standard_memory(case: Case) -> dict[str, dict[str, int]]:
    """Bytes by part, Q, K and V included: at the forward pass's peak, kept for the backward pass, at its peak."""
    s, q, mask = case.scores, case.tensor, case.seq**2
    inputs, copied = {"Q, K, V": 3 * q}, (2 + (case.batch > 1)) * q  # Q of one sequence is multiplied where it lies
    copies = {"copies for the products": copied}
    # At the product with V: scores, their softmax and the masked probabilities in float32, and those once more in bf16.
    forward = inputs | copies | {"scores": FP32 * s, "probabilities": (2 * FP32 + HALF) * s, "mask": mask, "output": q}
    kept = inputs | copies | {"probabilities": (FP32 + HALF) * s, "mask": mask, "output": q}
    # The bf16 probabilities have gone, and the copy of V for dV; two gradients of the scores in float32 stand beside the softmax.
    gradients = {"gradients of scores": 2 * FP32 * s, "gradient of the output": q, "gradients of Q, K, V": q}
    backward = inputs | {"copies for the products": copied - q, "probabilities": FP32 * s, "mask": mask, "output": q} | gradients
    return {"forward": forward, "kept": kept, "backward": backward}


def flash_memory(case: Case, backend: str) -> dict[str, dict[str, int]]:
    """The same of `triton` or `hopper`; sums: dQ in float32, which hopper adds up over tiles of keys."""
    q, inputs = case.tensor, {"Q, K, V": 3 * case.tensor}
    kept = inputs | {"output": q, "log-sum-exp": case.lse}
    sums = {"dQ in float32": q // HALF * FP32} if backend == "hopper" else {}
    gradients = {"gradient of the output": q, "gradients of Q, K, V": 3 * q, "log-sum-exp and delta of rows": 2 * case.lse}
    return {"forward": kept, "kept": kept, "backward": kept | gradients | sums}


def fit(points: list[tuple[int, int]]) -> tuple[float, float]:
    """(a, b) of bytes = a n^2 + b n, least squares of relative errors."""
    # Weighted by 1 / bytes: rows (n^2 / y, n / y) against 1.
    rows = [(n * n / y, n / y) for n, y in points]
    (aa, ab, bb), (a1, b1) = (
        [sum(x * x for x, _ in rows), sum(x * y for x, y in rows), sum(y * y for _, y in rows)],
        [sum(c) for c in zip(*rows, strict=True)],
    )
    determinant = aa * bb - ab * ab
    return (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant


# --- tiles and traffic ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Of a forward kernel: queries and keys of a tile, bytes in shared memory, bytes of registers for S and O in float32."""

    queries: int
    keys: int
    shared: int
    registers: int


def forward_tiles(backend: str, case: Case, arch: str = "sm_90") -> Tiles:
    """What the kernels use for this case."""
    d = case.head_dim
    if backend == "hopper":
        from kernels.attention.hopper_forward import Q_SLOTS, QUERIES

        tile = hopper_tile(d, True, case.seq, case.seq)
        queries = tile.warpgroups * QUERIES.value
        shared = HALF * d * (Q_SLOTS.value * queries + 2 * tile.stages * tile.keys + queries)  # Q, K and V, O
        return Tiles(queries, tile.keys, shared, FP32 * queries * (d + tile.keys))
    tile = tile_for(arch, "forward", torch.bfloat16, d, score_features=False)
    return Tiles(
        tile.queries, tile.keys, HALF * d * (tile.queries + (tile.stages - 1) * 2 * tile.keys), FP32 * tile.queries * (d + tile.keys)
    )


def keys_read(case: Case, tiles: Tiles) -> int:
    """Tiles of keys that all tiles of queries of one head read, causal: those up to the last query of each."""
    ends = (min(case.seq, start + tiles.queries) for start in range(0, case.seq, tiles.queries))
    return sum(math.ceil(end / tiles.keys) for end in ends)


def flash_traffic(case: Case, tiles: Tiles) -> dict[str, int]:
    """Bytes of the forward pass: into the multiprocessors, Q once, K and V once for every tile of queries; and DRAM's, at least."""
    of_heads = case.batch * case.heads
    keys = of_heads * keys_read(case, tiles) * tiles.keys * 2 * case.head_dim * HALF
    return {"L2 to multiprocessors": case.tensor + keys, "DRAM, compulsory": 4 * case.tensor + case.lse}


def standard_traffic(case: Case) -> int:
    """Bytes to and from DRAM of the textbook's three passes, in bf16: S = Q K^T is written, softmax reads and writes it, P V reads it."""
    return 4 * case.tensor + 4 * HALF * case.scores


# --- the memory of GPUs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A level of a GPU's memory: bytes, bytes/s, and ns from a load to its value; None where no source was found."""

    capacity: int
    bandwidth: float | None
    latency: float | None


@dataclass(frozen=True)
class Gpu:
    """name: as training.flops knows it. clock: boost, in Hz."""

    name: str
    multiprocessors: int
    clock: float
    shared: int  # for each multiprocessor, the most of the pool that it shares with L1
    l1_latency: float  # that pool's, in ns
    l2: Level
    dram: Level
    sources: str

    @property
    def levels(self) -> dict[str, Level]:
        # 65,536 registers of 4 bytes and 128 bytes a cycle of shared memory on all five (CUDA C++ Programming Guide, compute capabilities).
        # Registers: three operands a lane and cycle, 128 lanes (64 on A100).
        lanes = 64 if "A100" in self.name else 128
        n = self.multiprocessors
        return {
            "registers": Level(n * 256 * KIB, n * self.clock * lanes * 3 * FP32, 0),
            "shared memory": Level(n * self.shared, n * self.clock * 128, self.l1_latency),
            "L2": self.l2,
            "DRAM": self.dram,
        }


GPUS = (
    Gpu("A100-SXM4-80GB", 108, 1.410e9, 164 * KIB, 25.6, Level(40 * MIB, 5120 * 1.410e9, 150), Level(80 * GIB, 2.039e12, 405),
        "NVIDIA A100 whitepaper (L2 5,120 bytes a clock) and datasheet; latencies: gpu-benches"),
    Gpu("H100 80GB HBM3", 132, 1.755e9, 228 * KIB, 19.5, Level(50 * MIB, 5120 * 1.755e9, 151), Level(80 * GIB, 3.35e12, 372),
        "NVIDIA H100 whitepaper and datasheet; L2: taken to give A100's bytes a clock; latencies: gpu-benches, of the PCIe card, which has "
        "HBM2e"),
    Gpu("H200", 132, 1.755e9, 228 * KIB, 19.5, Level(50 * MIB, 5120 * 1.755e9, 151), Level(141 * GIB, 4.8e12, None),
        "NVIDIA H200 datasheet; the chip is H100's, and so are the levels above DRAM (gpu-benches measured 9.8 TB/s of L2)"),
    Gpu("B200", 148, 1.965e9, 228 * KIB, 19.6, Level(126 * MIB, None, 150), Level(180 * GIB, 8.0e12, None),
        "NVIDIA Blackwell datasheet (HGX B200); multiprocessors, L2, clock, latencies: Chips and Cheese 2025"),
    Gpu("RTX 4090", 128, 2.520e9, 100 * KIB, 14.5, Level(72 * MIB, 5.2e12, 111), Level(24 * GIB, 1.008e12, 254),
        "NVIDIA Ada GPU architecture whitepaper; L2's bandwidth and latencies: gpu-benches, of the L40, which has the same chip with 142 "
        "multiprocessors, and GDDR6"),
)  # fmt: skip


def gpu_here() -> dict | None:
    """What PyTorch says of the GPU at hand: bytes, and bytes/s at the boost clock; of L2's bandwidth and of latencies no driver says anything."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    clock, memory_clock, lines = (getattr(p, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width"))  # not in every PyTorch
    return {
        "name": p.name,
        "multiprocessors": p.multi_processor_count,
        "registers": p.multi_processor_count * p.regs_per_multiprocessor * 4,
        "shared_memory": p.multi_processor_count * p.shared_memory_per_multiprocessor,
        "l2": p.L2_cache_size,
        "dram": p.total_memory,
        # Clocks in kHz, two bits a line and cycle.
        "shared_memory_bandwidth": p.multi_processor_count * clock * 1e3 * 128 or None,
        "dram_bandwidth": 2 * memory_clock * 1e3 * lines / 8 or None,
    }


def longest(capacity: int, bytes_of: Callable[[int], int]) -> int:
    """The longest multiple of 64 whose bytes fit."""
    n = 64
    while bytes_of(2 * n) <= capacity:
        n *= 2
    step = n
    while step > 64:
        step //= 2
        n += step if bytes_of(n + step) <= capacity else 0
    return n if bytes_of(n) <= capacity else 0


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def size(bytes_: float) -> str:
    for unit, name in ((TERA, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if bytes_ >= unit:
            return f"{bytes_ / unit:.3g} {name}"
    return f"{bytes_:.0f} B"


def memory_table(head_dim: int) -> str:
    rows = []
    for n in LENGTHS:
        case = Case(n, head_dim)
        standard, flash = standard_memory(case), flash_memory(case, "hopper")
        peak, ours = sum(standard["forward"].values()), sum(flash["forward"].values())
        kept, keeps = (sum(x["kept"].values()) for x in (standard, flash))
        parts = standard["forward"]
        rows.append(
            [
                f"{n:,}",
                size(parts["Q, K, V"]),
                size(parts["scores"]),
                size(parts["probabilities"]),
                size(parts["output"]),
                size(peak),
                size(kept),
                size(sum(standard["backward"].values())),
                size(ours),
                size(keeps),
                size(sum(flash["backward"].values())),
                f"{1 - ours / peak:.2%}",
            ]
        )
    header = [
        "N",
        "Q, K, V",
        "scores",
        "probabilities",
        "output",
        "standard: forward",
        "kept",
        "backward",
        "flash: forward",
        "kept",
        "backward",
        "saved, forward",
    ]
    return markdown(header, rows)


def fits_table(head_dim: int) -> str:
    rows = []
    for name, of in (
        ("standard", standard_memory),
        *((name, lambda case, name=name: flash_memory(case, name)) for name in ("hopper", "triton")),
    ):
        for which in ("forward", "backward"):
            a, b = fit([(n, sum(of(Case(n, head_dim))[which].values())) for n in LENGTHS])
            rows.append([name, which, f"{max(0.0, round(a / 16, 9)):.4g}", f"{b / 16:,.0f}"])
    return markdown(["attention", "peak of", "bytes a head and N^2", "bytes a head and N"], rows)


def measured_table(head_dim: int) -> str:
    """The benchmark's peaks on an H200 beside the formula; they leave out what was there before: Q, K, V, the output's gradient."""
    found = json.loads((ROOT / f"docs/results/benchmark_attention-h200-{head_dim}.json").read_text())["rows"]
    rows = []
    for row in found:
        if not row["causal"] or row["pass"] == "both" or row["seq"] not in (512, 4096, 16384):
            continue
        case = Case(row["seq"], head_dim, row["heads"], row["batch"])
        for backend in ("hopper", "triton"):
            predicted = (
                sum(flash_memory(case, backend)[row["pass"]].values()) - 3 * case.tensor - (case.tensor if row["pass"] == "backward" else 0)
            )
            measured = row["measured"][backend]["peak_bytes"]
            rows.append(
                [
                    backend,
                    row["pass"],
                    f"{row['batch']} x {row['seq']:,}",
                    f"{predicted:,}",
                    f"{measured:,}",
                    f"{predicted / measured - 1:+.2%}",
                ]
            )
    return markdown(["backend", "pass", "batch x N", "formula, bytes", "measured, H200", "difference"], rows)


def traffic_table(head_dim: int) -> str:
    rows = []
    for n in LENGTHS:
        case = Case(n, head_dim)
        cells = [f"{n:,}", size(standard_traffic(case))]
        for backend in ("hopper", "triton"):
            tiles = forward_tiles(backend, case)
            traffic = flash_traffic(case, tiles)
            constant = traffic["L2 to multiprocessors"] / (case.scores * head_dim**2 * HALF**2 / tiles.shared)
            cells += [
                f"{tiles.queries} x {tiles.keys}",
                f"{tiles.shared / KIB:.0f} KiB",
                size(traffic["L2 to multiprocessors"]),
                f"{constant:.2f}",
            ]
        rows.append([*cells, size(traffic["DRAM, compulsory"]), f"{standard_traffic(case) / traffic['DRAM, compulsory']:,.0f}"])
    header = [
        "N",
        "standard, DRAM",
        *(f"{name}: {what}" for name in ("hopper", "triton") for what in ("tile", "M", "L2 to SMs", "c")),
        "flash, DRAM",
        "standard / flash",
    ]
    return markdown(header, rows)


def hierarchy_table() -> str:
    rows = []
    for gpu in GPUS:
        for level, of in gpu.levels.items():
            rows.append(
                [
                    gpu.name,
                    level,
                    size(of.capacity),
                    "-" if of.bandwidth is None else f"{of.bandwidth / TERA:.3g} TB/s",
                    "-" if of.latency is None else f"{of.latency:g} ns",
                ]
            )
    return (
        markdown(["GPU", "level", "capacity", "bandwidth", "latency"], rows)
        + "\n\n"
        + "\n".join(f"- {gpu.name}: {gpu.sources}." for gpu in GPUS)
    )


def levels_table(head_dim: int) -> str:
    rows = []
    for gpu in GPUS:
        for level, of in gpu.levels.items():
            scores = longest(of.capacity, lambda n: HALF * n * n)
            keys = longest(of.capacity, lambda n: 2 * HALF * n * head_dim)
            rows.append([gpu.name, level, f"{scores:,}", f"{keys:,}"])
    return markdown(["GPU", "level", "N whose scores of one head fit", "N whose K and V of one head fit"], rows)


def roofline_table(head_dim: int) -> str:
    rows = []
    for gpu in GPUS:
        peak = peak_flops(gpu.name, "bf16")
        for n in (1024, 8192, 65536):
            case = Case(n, head_dim)
            standard = case.flops / standard_traffic(case)
            flash = case.flops / flash_traffic(case, forward_tiles("triton", case))["DRAM, compulsory"]
            bound = [min(peak, intensity * gpu.dram.bandwidth) / TERA for intensity in (standard, flash)]
            rows.append(
                [
                    gpu.name,
                    f"{n:,}",
                    f"{peak / gpu.dram.bandwidth:.0f}",
                    f"{standard:.1f}",
                    f"{bound[0]:.0f}",
                    f"{flash:.0f}",
                    f"{bound[1]:.0f}",
                ]
            )
    return markdown(["GPU", "N", "ridge, FLOP/B", "standard, FLOP/B", "at most TFLOP/s", "flash, FLOP/B", "at most TFLOP/s"], rows)


def tiles_table(head_dim: int) -> str:
    """How the tile size follows, on an H200: K and V cross from L2 once for every tile of queries, so its rows are FLOPs a byte."""
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200")
    peak, rows = peak_flops(gpu.name, "bf16"), []
    for queries in (32, 64, 128, 192, 256):
        keys = 128
        shared = HALF * head_dim * (2 * queries + 2 * 2 * keys + queries)
        registers = FP32 * queries * (head_dim + keys)
        fits = [
            word
            for word, fit_ in (("shared memory", shared <= SHARED_MEMORY_LIMIT["sm_90"]), ("registers", registers <= 256 * KIB * 0.75))
            if not fit_
        ]
        needed = peak / (queries * 2 / HALF)
        rows.append(
            [
                str(queries),
                f"{queries * 2 // HALF}",
                f"{needed / TERA:.1f} TB/s",
                f"{needed / gpu.l2.bandwidth:.0%}",
                f"{shared / KIB:.0f} KiB",
                f"{registers / KIB:.0f} KiB",
                "no: " + ", ".join(fits) if fits else "yes",
            ]
        )
    header = [
        "queries",
        "FLOP a byte of K and V",
        "L2 to SMs at peak FLOP/s",
        "of L2's bandwidth",
        "shared memory",
        "registers for S and O",
        "fits",
    ]
    return markdown(header, rows)


def tables(head_dim: int) -> dict[str, str]:
    """By the name that docs/memory.md knows them by."""
    return {
        "memory": memory_table(head_dim),
        "fits": fits_table(head_dim),
        "measured": measured_table(head_dim),
        "traffic": traffic_table(head_dim),
        "hierarchy": hierarchy_table(),
        "levels": levels_table(head_dim),
        "roofline": roofline_table(head_dim),
        "tiles": tiles_table(head_dim),
    }


def filled(page: str, contents: dict[str, str]) -> str:
    """A Markdown page with what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` replaced."""
    for name, table in contents.items():
        before, _, rest = page.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"the page has no <!-- table: {name} --> ... <!-- end -->")
        page = f"{before}<!-- table: {name} -->\n{table}\n{end}{after}"
    return page


def draw(folder: Path, head_dim: int) -> None:
    """memory-attention.png: bytes over length; memory-roofline.png: both attentions under the roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [Case(n, head_dim) for n in LENGTHS]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, of in (("standard", standard_memory), ("flash (hopper)", lambda case: flash_memory(case, "hopper"))):
        for which, style in (("forward", "-"), ("backward", "--")):
            axes.loglog(LENGTHS, [sum(of(case)[which].values()) / GIB for case in cases], style, base=2, label=f"{name}, {which}")
    axes.axhline(141, color="grey", linewidth=0.8)
    axes.text(LENGTHS[0], 150, "H200", color="grey")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel="sequence length", ylabel="GiB at the peak, formula", title=f"One causal attention, 16 heads of {head_dim}, bf16, batch 1"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "memory-attention.png", dpi=120)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for gpu in GPUS:
        peak = peak_flops(gpu.name, "bf16")
        intensities = [2.0, peak / gpu.dram.bandwidth, 2.0**16]
        axes.loglog(intensities, [min(peak, x * gpu.dram.bandwidth) / TERA for x in intensities], base=2, label=gpu.name)
    for name, x in (
        ("standard, any N", cases[-1].flops / standard_traffic(cases[-1])),
        *((f"flash, N {case.seq:,}", case.flops / (4 * case.tensor + case.lse)) for case in cases[1::3]),
    ):
        axes.axvline(x, color="black", linestyle=":", linewidth=0.8)
        axes.text(x, 24, f" {name}", rotation=90, fontsize=8, verticalalignment="bottom")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="FLOP a byte of DRAM", ylabel="at most TFLOP/s, bf16", title=f"Roofline of causal attention's forward, head_dim {head_dim}"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "memory-roofline.png", dpi=120)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def measure(head_dim: int, out: Path) -> None:
    from training.files import write_atomically
    from training.tracking import collect_environment, to_json

    result = {"environment": collect_environment(), "device": gpu_here(), "rows": [], "counters": "not read yet"}
    for backend in ("eager", "triton", "hopper"):
        for n in LENGTHS:
            case = Case(n, head_dim)
            formula = standard_memory(case) if backend == "eager" else flash_memory(case, backend)
            predicted = {which: sum(formula[which].values()) for which in ("forward", "backward")}
            row = {"backend": backend, "seq": n, "predicted": predicted}
            reason = refusal(backend, head_dim)
            torch.cuda.empty_cache()  # what the row before needed is free only then
            if reason is None and max(predicted.values()) > 0.9 * torch.cuda.mem_get_info()[0]:
                reason = "needs more memory than is free"
            result["rows"].append(row | ({"left_out": reason} if reason else measured(case, backend)))
            write_atomically(out, to_json(result))
    print(peaks_table(result["rows"]), flush=True)
    result["counters"] = counters(head_dim)  # last, since a profiler may take minutes
    write_atomically(out, to_json(result))
    print(f"\ncounters: {result['counters']}\nwritten to {out}")


def refusal(backend: str, head_dim: int) -> str | None:
    """Why the GPU at hand cannot run it; None where it can."""
    return unsupported(
        backend, device_type="cuda", dtype=torch.bfloat16, head_dim=head_dim, compute_capability=torch.cuda.get_device_capability()
    )


def peaks_table(found: list[dict]) -> str:
    """Formula beside measurement, or why there is none."""
    rows = []
    for row in found:
        for which, formula in row["predicted"].items():
            peak = row.get("measured", {}).get(which)
            cells = [row["left_out"], "-"] if peak is None else [size(peak), f"{formula / peak - 1:+.2%}"]
            rows.append([row["backend"], which, f"{row['seq']:,}", size(formula), *cells])
    return markdown(["backend", "peak of", "N", "formula", "measured", "difference"], rows)


def measured(case: Case, backend: str) -> dict:
    try:
        return {"measured": peaks(case, backend)}
    except RuntimeError as error:  # out of memory among them: the rows after it can still be had
        return {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def inputs(case: Case) -> list[torch.Tensor]:
    shape = case.batch, case.seq, case.heads, case.head_dim
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]


def peaks(case: Case, backend: str) -> dict[str, int]:
    """Bytes at the peaks of both passes, inputs included. A first run compiles and is not counted."""
    found = {}
    for _ in range(2):
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        qkv = inputs(case)
        torch.cuda.reset_peak_memory_stats()
        out = attention(*qkv, backend=backend)
        found["forward"] = torch.cuda.max_memory_allocated() - held
        dout = torch.randn_like(out)
        torch.cuda.reset_peak_memory_stats()
        out.backward(dout)
        found["backward"] = torch.cuda.max_memory_allocated() - held
        del qkv, out, dout
    return found


def counters(head_dim: int) -> list[dict] | str:
    """Nsight Compute's bytes of each forward kernel beside the tile formula; or why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return "not available: Nsight Compute (ncu) is not installed on this machine"
    found = []
    for backend in ("hopper", "triton"):
        if refusal(backend, head_dim) is not None:
            continue
        for n in (2048, 8192):
            case = Case(n, head_dim)
            command = [
                ncu,
                "--csv",
                "--metrics",
                ",".join(NSIGHT_METRICS.values()),
                "--launch-skip",
                "1",
                "--launch-count",
                "1",
                "--kernel-name",
                "regex:forward_kernel",
                sys.executable,
                __file__,
                "--one",
                backend,
                str(n),
                "--head-dim",
                str(head_dim),
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
            except subprocess.TimeoutExpired:
                return "not available: ncu took more than 120 s"
            if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
                return "not available: this user may not read the GPU's counters (ERR_NVGPUCTRPERM)"
            lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
            if done.returncode or len(lines) < 2:
                return f"not available: ncu: {(done.stderr or done.stdout).strip()[-300:]}"
            values = {
                row["Metric Name"]: float(row["Metric Value"].replace(",", "")) * scale(row["Metric Unit"])
                for row in csv.DictReader(io.StringIO("\n".join(lines)))
            }
            traffic = flash_traffic(case, forward_tiles(backend, case, generation(torch.cuda.get_device_capability())))
            found.append(
                {"backend": backend, "seq": n, "formula": traffic} | {name: values.get(metric) for name, metric in NSIGHT_METRICS.items()}
            )
    return found


def scale(unit: str) -> float:
    return {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}.get(unit, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, choices=[64, 128], default=128)
    parser.add_argument("--docs", type=Path, help="page whose tables are written anew")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--measure", action="store_true", help="on a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/analyze_attention.json")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "N"), help=argparse.SUPPRESS)  # what ncu looks at: two forward passes
    options = parser.parse_args(arguments)
    if (options.measure or options.one) and not torch.cuda.is_available():
        parser.error("--measure needs a GPU, and torch sees none here")
    if options.one:
        qkv = inputs(Case(int(options.one[1]), options.head_dim))
        for _ in range(2):
            attention(*qkv, backend=options.one[0])
        torch.cuda.synchronize()
    elif options.measure:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        measure(options.head_dim, options.out)
    elif options.docs:
        options.docs.write_text(filled(options.docs.read_text(encoding="utf-8"), tables(options.head_dim)), encoding="utf-8")
    elif not options.plots:
        print("\n\n".join(f"{name}\n{table}" for name, table in tables(options.head_dim).items()))
        if here := gpu_here():
            print(f"\nthe GPU at hand: {here}")
    if options.plots:
        draw(options.plots, options.head_dim)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
