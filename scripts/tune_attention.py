"""Time other tiles for the portable attention kernels than those of kernels/attention/tuning.py, on the GPU at hand.

    python scripts/tune_attention.py --out runs/tune_attention.json                              # every row of this GPU's table
    python scripts/tune_attention.py --passes dkdv dq --head-dims 128 --dtypes half --minutes 3
    python scripts/tune_attention.py --score-features                # the half-precision rows for softcap, ALiBi and dropout
    python scripts/tune_attention.py --bounded --passes forward      # the half-precision rows for windows and documents

It prints the table's rows as they would stand with what it found, and writes every timing; it changes nothing: the table is checked in, and
no tile is chosen while training. A row is a pass, a dtype class and a head_dim. Its candidates are the --candidates tiles nearest to the
present one, by factors of two, that may fit into shared memory and registers. They are compiled by one process a core, ahead of the timing
(some 20 seconds a row on 16 cores), and then timed in turn, in an order drawn anew for each round: one round drops what is far behind,
the rest decide by medians. A candidate takes the present tile's place when its results agree with the present tile's, and it is faster by
LEAST_GAIN in the geometric mean over --problems and in none slower by as much. --minutes is the time after which no more is begun; rows are
done in order, each with what is compiled by then. Exit code 0; 2: no GPU here.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from inspect import unwrap
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import geometric_mean, median
from typing import NamedTuple
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.attention import alibi_slopes, triton_backward, triton_forward, tuning  # noqa: E402
from kernels.attention.masks import document_bounds  # noqa: E402
from kernels.attention.triton_forward import Features  # noqa: E402
from kernels.attention.tuning import HEAD_DIMS, PASSES, Tile  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

DTYPES = {"half": torch.bfloat16, "float32": torch.float32}  # float16 shares bfloat16's tiles
HIDDEN = 2048  # heads * head_dim
TOKENS = {"half": 16384, "float32": 8192}  # batch * seq
LEAST_GAIN = 1.03  # what kernels that should be equal differ by
FAR_BEHIND = 1.15  # of the best, after the first round
ROUND_MILLISECONDS = 20  # of a candidate's calls in a round
ROUNDS = 5
PROCESSES = 16  # that compile, at most: each holds some 500 MB of the GPU
LAUNCHES = {
    "forward": (triton_forward, "forward_kernel"),
    "dkdv": (triton_backward, "dkdv_kernel"),
    "dq": (triton_backward, "dq_kernel"),
}


class Problem(NamedTuple):
    causal: bool
    seq: int
    bounded: bool = False  # by a window and by documents


PROBLEMS = {
    "causal": Problem(True, 4096),
    "full": Problem(False, 4096),
    "short": Problem(True, 1024),
    "bounded": Problem(True, 4096, True),
}


class Row(NamedTuple):
    """Of the table."""

    which: str  # a pass
    dtype: str  # a key of DTYPES
    head_dim: int
    score_features: bool = False  # softcap, ALiBi and dropout, all at once
    bounded: bool = False  # by a window and by documents

    def present(self, arch: str) -> Tile:
        return tuning.tile_for(arch, self.which, DTYPES[self.dtype], self.head_dim, self.score_features, self.bounded)


def candidates(row: Row, arch: str, count: int) -> list[Tile]:
    """The present tile, and those nearest to it of the tiles that may fit."""
    present, limit = row.present(arch), tuning.SHARED_MEMORY_LIMIT[arch]

    def distance(tile: Tile) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(tile[:3], present[:3])) + abs(tile.stages - present.stages) / 2

    stages = range(min(present.stages, 2), 5)  # 1 is no pipeline
    space = (Tile(*numbers) for numbers in product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (4, 8), stages))
    fits = [tile for tile in space if tile != present and shared_memory(row, tile) <= limit and registers(row, tile) <= 224]
    return [present, *sorted(fits, key=distance)[: count - 1]]


def shared_memory(row: Row, tile: Tile) -> int:
    """Bytes that a program needs at least: the tiles it keeps, and those in flight but for the one that may be in registers."""
    kept, streamed = (tile.keys, tile.queries) if row.which == "dkdv" else (tile.queries, tile.keys)
    kept_tensors = 1 if row.which == "forward" else 2
    rows = kept_tensors * kept + 2 * max(1, tile.stages - 1) * streamed
    return rows * row.head_dim * DTYPES[row.dtype].itemsize


def registers(row: Row, tile: Tile) -> int:
    """Of a thread, for accumulators and scores in float32."""
    accumulators = {"forward": tile.queries, "dq": tile.queries, "dkdv": 2 * tile.keys}[row.which] * row.head_dim
    scores = (1 if row.which == "forward" else 2) * tile.queries * tile.keys
    return (accumulators + scores) // (32 * tile.warps)


class Call(NamedTuple):
    """What a problem's passes are given."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    causal: bool
    scale: float
    features: Features


def call(row: Row, problem: Problem, device: str, batch: int) -> Call:
    seq, heads = problem.seq, HIDDEN // row.head_dim
    generator = torch.Generator(device).manual_seed(0)
    shape = batch, seq, heads, row.head_dim
    q, k, v, dout = (torch.randn(shape, generator=generator, device=device).to(DTYPES[row.dtype]) for _ in range(4))
    features = Features()
    if problem.bounded:
        ids = (torch.arange(seq, dtype=torch.int32, device=device) // (seq // 3)).expand(batch, seq)
        doc_start, doc_end = document_bounds(ids, None, seq)
        features = features._replace(window_left=seq // 4, doc_start=doc_start, doc_end=doc_end)
    if row.score_features:
        of_dropout = dict(dropout_p=0.1, dropout_seed=torch.tensor([1, 2], device=device))
        features = features._replace(softcap=30.0, alibi_slopes=alibi_slopes(heads, q.device), **of_dropout)
    return Call(q, k, v, dout, problem.causal, row.head_dim**-0.5, features)


class Launch:
    """Stands where a kernel stands, and keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def keep(*arguments, **options):
            self.grid, self.arguments, self.options = grid, arguments, options

        return keep

    def write_to(self, tensors: list[torch.Tensor], instead_of: list[torch.Tensor]) -> None:
        others = dict(zip(map(id, instead_of), tensors))
        self.arguments = tuple(others.get(id(x), x) for x in self.arguments)

    def compile(self):
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)

    def __call__(self):
        return self.kernel[self.grid](*self.arguments, **self.options)


@contextmanager
def kept_launch(which: str, tile: Tile):
    """Within it no kernel that has a tile is launched; it gives the launch of the pass `which`, with this tile."""
    launches = {name: Launch(getattr(module, kernel)) for name, (module, kernel) in LAUNCHES.items()}
    present = tuning.tile
    with ExitStack() as patches:
        for name, (module, kernel) in LAUNCHES.items():
            patches.enter_context(patch.object(module, kernel, launches[name]))
            patches.enter_context(patch.object(module, "tile", lambda *asked: tile if asked[1] == which else present(*asked)))
        for module, plan in ((triton_forward, "forward_plan"), (triton_backward, "backward_plan")):  # none of another tile, and none kept
            patches.enter_context(patch.object(module, plan, unwrap(getattr(module, plan))))
        yield launches[which]


def launch_of(row: Row, given: Call, forward, tile: Tile) -> tuple[Launch, list[torch.Tensor]]:
    """(the launch of the row's kernel, the tensors that it writes); forward: the forward pass's results, which the backward takes."""
    q, k, v, dout, *rest = given
    with kept_launch(row.which, tile) as launch:
        if row.which == "forward":
            return launch, list(triton_forward.launch_forward(q, k, v, *rest))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        triton_backward.launch_backward(dout, None, q, k, v, *forward, *rest, dq, dk, dv)
        return launch, [dq] if row.which == "dq" else [dk, dv]


def compile_tile(row: Row, tile: Tile, problems: list[Problem]) -> str | None:
    """In a process of its own: leaves the kernels in Triton's cache on disk, or says why the tile cannot be compiled."""
    try:
        for problem in problems:
            given = call(row, problem, "cuda", batch=1)
            forward = triton_forward.outputs(*given[:3])  # never read
            launch_of(row, given, forward, tile)[0].compile()
    except Exception as error:  # whatever a compiler raises: not all of it could be handed on as it is
        return f"{type(error).__name__}: {error}"


class Candidate:
    """A tile with its launches, one a problem, and its times in milliseconds."""

    def __init__(self, tile: Tile) -> None:
        self.tile, self.launches, self.times = tile, {}, {}
        self.refused: str | None = None
        self.registers, self.spills, self.shared = 0, 0, 0  # the most of any problem's kernel: a thread's, a thread's, bytes

    def note(self, compiled) -> None:
        self.registers, self.spills = max(self.registers, compiled.n_regs), max(self.spills, compiled.n_spills)
        self.shared = max(self.shared, compiled.metadata.shared)

    def speed_up(self, present: "Candidate", name: str) -> float:
        return median(present.times[name]) / median(self.times[name])

    def gain(self, present: "Candidate") -> float:
        return geometric_mean(self.speed_up(present, name) for name in self.times)


def prepare(row: Row, tried: list[Candidate], problems: dict[str, Problem], device: str) -> None:
    """Launches each candidate once on every problem, and refuses those that cannot run or do not agree with the first, the present one."""
    for name, problem in problems.items():
        given = call(row, problem, device, max(1, TOKENS[row.dtype] // problem.seq))
        q, k, v, _, *rest = given
        forward = triton_forward.launch_forward(q, k, v, *rest)
        _, written = launch_of(row, given, forward, tried[0].tile)  # by all of them, in turn
        expected = None
        for candidate in tried:
            if candidate.refused:
                continue
            try:
                launch, own = launch_of(row, given, forward, candidate.tile)
                launch.write_to(written, instead_of=own)
                for x in written:
                    x.fill_(torch.nan)
                compiled = launch()
                if device == "cuda":
                    torch.cuda.synchronize()
                    candidate.note(compiled)
            except Exception as error:  # more shared memory or threads than there are, or a compiler that gives up
                candidate.refused = f"{type(error).__name__}: {error}"
                continue
            expected = expected or [x.clone() for x in written]
            difference = max(relative_difference(x, y) for x, y in zip(written, expected))
            if not difference <= max(torch.finfo(DTYPES[row.dtype]).eps, 1e-5):
                candidate.refused = f"differs from the present tile by {difference:.2g} on {name}"
            candidate.launches[name] = launch


def relative_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def milliseconds(launch: Launch, device: str) -> float:
    """The median of calls, on a GPU each behind a matrix product, which evicts its inputs from L2 and gives the CPU time to queue it."""
    if device == "cpu":
        start = time.perf_counter()
        launch()
        return 1e3 * (time.perf_counter() - start)
    square = torch.zeros(4096, 4096, device=device, dtype=torch.bfloat16)

    def timed(calls: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            square @ square
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    first = timed(1)[0]
    return first if first > ROUND_MILLISECONDS else median(timed(min(int(ROUND_MILLISECONDS / first), 50)))


def time_candidates(tried: list[Candidate], device: str) -> list[Candidate]:
    """Those not far behind after one round, the first one, the present tile, always among them; timed ROUNDS times more."""
    present = tried[0]
    tried = [candidate for candidate in tried if candidate.refused is None]
    for i in range(1 + ROUNDS):
        if i == 1:
            best = max(candidate.gain(present) for candidate in tried)
            tried = [candidate for candidate in tried if candidate is present or candidate.gain(present) > best / FAR_BEHIND]
            for candidate in tried:
                candidate.times = {}
        for name in present.launches:
            for candidate in Random(f"{i} {name}").sample(tried, len(tried)):
                candidate.times.setdefault(name, []).append(milliseconds(candidate.launches[name], device))
    return tried


def choose(finalists: list[Candidate]) -> Candidate:
    """The first, the present tile, unless another is faster by LEAST_GAIN, and on no problem slower by as much."""
    present = finalists[0]
    better = [x for x in finalists if all(x.speed_up(present, name) > 1 / LEAST_GAIN for name in x.times)]
    best = max(better, key=lambda x: x.gain(present))
    return best if best.gain(present) >= LEAST_GAIN else present


def tune(row: Row, tiles: dict[Tile, str | None], problems: dict[str, Problem], device: str) -> dict:
    """The row's outcome; tiles: why they are refused already, or None; the present one is the first."""
    tried = [Candidate(tile) for tile in tiles]
    for candidate in tried:
        candidate.refused = tiles[candidate.tile]
    prepare(row, tried, problems, device)
    if tried[0].refused:
        raise RuntimeError(f"{row}: the present tile {tried[0].tile} cannot be used: {tried[0].refused}")
    finalists = time_candidates(tried, device)
    best = choose(finalists)
    return dict(
        **row._asdict(),
        present=tried[0].tile,
        best=best.tile,
        gain=best.gain(tried[0]),
        gains={name: best.speed_up(tried[0], name) for name in problems},
        finalists=[x.tile for x in sorted(finalists, key=lambda x: -x.gain(tried[0]))],
        candidates=[
            dict(tile=x.tile, refused=x.refused, milliseconds=x.times, registers=x.registers, spills=x.spills, shared=x.shared)
            for x in tried
        ],
    )


def table(arch: str, outcomes: list[dict]) -> list[str]:
    """The changed tables' lines for each pass, in the form of tuning.py."""
    found = {Row(*(x[name] for name in Row._fields)): x["best"] for x in outcomes}
    lines = []
    for name, dtype, *kind in (
        (f'_HALF["{arch}"]', "half", False, False), (f'_HALF_WITH_SCORE_FEATURES["{arch}"]', "half", True, False),
        (f'_HALF_BOUNDED["{arch}"]', "half", False, True), ("_FLOAT32", "float32", False, False),
    ):  # fmt: skip
        passes = [which for which in PASSES if any(row[:2] == (which, dtype) and [*row[3:]] == kind for row in found)]
        lines += [name] * bool(passes)
        for which in passes:
            # The half-precision rows of head_dim 16 are those of 64.
            rows = {d: Row(which, dtype, 64 if (d, dtype) == (16, "half") else d, *kind) for d in HEAD_DIMS}
            tiles = {d: found.get(row, row.present(arch)) for d, row in rows.items()}
            if any(kind):  # a table of those that differ
                tiles = {d: tile for d, tile in tiles.items() if tile != rows[d]._replace(score_features=False, bounded=False).present(arch)}
            entries = ", ".join(f"{d}: Tile{tuple(tile)}" for d, tile in tiles.items())
            lines.append(f'    "{which}": {{{entries}}},')
    return lines


def line(outcome: dict) -> str:
    """One row's outcome, with the runners-up."""
    what = f"{outcome['which']:7} {outcome['dtype']:7} {outcome['head_dim']:>3}{' score features' * outcome['score_features']}{' bounded' * outcome['bounded']}"
    what += f"  Tile{tuple(outcome['present'])}"
    refused = sum(x["refused"] is not None for x in outcome["candidates"])
    tried = f"{len(outcome['candidates']) - refused} tried, {refused} refused; fastest {[tuple(tile) for tile in outcome['finalists'][:3]]}"
    if outcome["best"] == outcome["present"]:
        return f"{what} stays ({tried})"
    gains = ", ".join(f"{name} {gain:.2f}" for name, gain in outcome["gains"].items())
    return f"{what} -> Tile{tuple(outcome['best'])}: {outcome['gain']:.2f} times as fast ({gains}; {tried})"


def compiled_by(deadline: float, futures: dict[Tile, Future]) -> dict[Tile, str | None]:
    """Of the tiles that are compiled by then, why they are refused, or None; the present one, the first, is among them in any case."""
    wait(futures.values(), timeout=max(0.0, deadline - time.monotonic()))
    present, *others = futures
    done = [tile for tile in others if not futures[tile].cancel() and futures[tile].done()]
    return {present: None} | {tile: str(futures[tile].exception() or "") or futures[tile].result() for tile in done}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/tune_attention.json")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=[64, 128, 256])
    parser.add_argument("--score-features", action="store_true", help="the half-precision rows with softcap, ALiBi and dropout instead")
    parser.add_argument("--bounded", action="store_true", help="the half-precision rows with windows and documents instead, on such a problem")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["causal", "full", "short"])
    parser.add_argument("--candidates", type=int, default=32, help="tiles tried in a row, the present one among them")
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args(arguments)
    if options.candidates < 2:
        parser.error("--candidates is 2 at least: the present tile is the first")
    if not torch.cuda.is_available():
        print("tune_attention: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    arch = tuning.generation(tuning.compute_capability(torch.device("cuda")))
    problems = {name: PROBLEMS[name] for name in (["bounded"] if options.bounded else options.problems)}
    dtypes = ["half"] if options.score_features or options.bounded else options.dtypes
    rows = [Row(*numbers, options.score_features, options.bounded) for numbers in product(options.passes, dtypes, options.head_dims)]
    result = dict(environment=collect_environment(), arch=arch, problems=problems, rows=[], left_out=[], table=[])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(min(os.cpu_count(), PROCESSES), mp_context=get_context("spawn"))
    futures = {
        row: {tile: pool.submit(compile_tile, row, tile, [*problems.values()]) for tile in candidates(row, arch, options.candidates)}
        for row in rows
    }
    try:
        for row in rows:
            if time.monotonic() > deadline:
                result["left_out"].append(row)
                continue
            result["rows"].append(tune(row, compiled_by(deadline, futures[row]), problems, "cuda"))
            result["table"] = table(arch, result["rows"])
            options.out.write_text(json.dumps(result, indent=1) + "\n")  # after every row: what is measured is kept
            print(line(result["rows"][-1]), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    print(*result["table"], sep="\n")
    for row in result["left_out"]:
        print(f"left out for want of time: {' '.join(map(str, row))}")
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
