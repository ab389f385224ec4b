"""The timeline of one program of the Hopper forward, from clock reads inside the kernel: its events as JSON, and a picture of them.

    python scripts/trace_attention.py --head-dim 128 --out runs/trace_attention-128.json    # on a Hopper GPU; the PNG goes beside it
    python scripts/trace_attention.py --from runs/trace_attention-128.json                  # draws it again, anywhere

A warpgroup knows when it issued a matrix product and when its wait for it ended, not when the product did: that may be long before. So the
overlap of softmax and matrix units has two bounds. At most: a product runs from its issue to the end of its wait. At least: units at peak
rate work the products off in the order of their issue; as long as these have work left, the real ones have too.
"""

import argparse
import json
import sys
from bisect import bisect_left
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOKENS, HIDDEN = 16384, 2048  # batch * seq and heads * head_dim
QUERIES = 64  # of a warpgroup
PEAK = 2048  # multiply-adds a clock of a Hopper multiprocessor's matrix units, operands in half precision
ROUNDS = 7
ENDS = {
    "scores": ("scores issued", "scores ready"),
    "softmax": ("scores ready", "softmax done"),
    "output": ("output issued", "output ready"),
}
PRODUCTS = ("scores", "output")
COLOURS = {"scores": "#4477aa", "output": "#66ccee", "softmax": "#eebb44", "softmax alone": "#cc3311"}
TILES_SHOWN = 4  # of keys, in each of the picture's two parts


class Span(NamedTuple):
    start: int  # cycles since the program's first event
    end: int
    kind: str  # of ENDS
    partition: str
    tile: int  # of keys, counted over all items of the program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, choices=[64, 128], default=128)
    parser.add_argument("--mask", choices=["causal", "full"], default="full")
    parser.add_argument("--seq", type=int, default=4096, help="a divisor of 16384")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/trace_attention.json", metavar="EVENTS.json")
    parser.add_argument("--from", type=Path, dest="recorded", metavar="EVENTS.json", help="draw what was recorded before")
    options = parser.parse_args()
    path = options.recorded or options.out
    try:
        if options.recorded:
            trace = json.loads(path.read_text())
        else:
            trace = record(options.head_dim, options.mask == "causal", options.seq)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(trace) + "\n")
        draw(trace, path.with_suffix(".png"))
    except ValueError as error:
        print(f"trace_attention: {error}", file=sys.stderr)
        return 2
    print(report(trace), f"{path}, {path.with_suffix('.png')}", sep="\n")
    return 0


def record(head_dim: int, causal: bool, seq: int) -> dict:
    """One traced launch, and what tracing costs. Of its programs the one with the median overlap is kept, and the extremes of all.
    ValueError where the kernel does not run, or holds no clock reads."""
    import torch

    from kernels.attention import unsupported

    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here; --from draws what was recorded on one")
    asked = dict(device_type="cuda", dtype=torch.bfloat16, head_dim=head_dim, compute_capability=torch.cuda.get_device_capability())
    if reason := unsupported("hopper", **asked):
        raise ValueError(reason)

    from kernels.attention.hopper_forward import launch_forward, new_trace
    from kernels.attention.tuning import hopper_tile
    from training.tracking import collect_environment

    q, k, v = (torch.randn(TOKENS // seq, seq, HIDDEN // head_dim, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    clocks = new_trace(q, k, causal)

    def call(trace=None):
        return launch_forward(q, k, v, causal, head_dim**-0.5, trace)

    milliseconds = time_in_turn({"plain": call, "traced": lambda: call(clocks)})
    clocks.zero_()
    for traced, plain in zip(call(clocks), call()):
        assert torch.equal(traced, plain), "the traced kernel computes something else"
    common = dict(
        environment=collect_environment(),
        case=dict(head_dim=head_dim, causal=causal, seq=seq, batch=q.shape[0], heads=q.shape[2], dtype="bfloat16"),
        tile=hopper_tile(head_dim, causal, seq, seq)._asdict(),
        milliseconds=milliseconds,
    )
    programs = [common | dict(program=i, clocks=by_event(program)) for i, program in enumerate(clocks.tolist()) if program[0][0][0]]
    programs.sort(key=lambda trace: overlap(trace)["at_least"])
    extremes = [overlap(programs[i])["at_least"] for i in (0, -1)]
    return programs[len(programs) // 2] | dict(at_least_of_all_programs=extremes)


def time_in_turn(calls: dict) -> dict[str, float]:
    """The median of the rounds, each a median too."""
    from triton.testing import do_bench

    rounds = [{name: do_bench(call, warmup=10, rep=40, return_mode="median") for name, call in calls.items()} for _ in range(ROUNDS)]
    return {name: median(times[name] for times in rounds) for name in calls}


def by_event(program: list[list[list[int]]]) -> dict[str, dict[str, list[int | None]]]:
    """partition -> event -> clock of each tile, from [partition, tile, event]: cycles since the first of all, None for what did not happen.
    The last tile's place, where all later ones wrote too, is left out."""
    from kernels.attention.hopper_forward import EVENTS

    first = min(clock for tiles in program for events in tiles for clock in events if clock)
    names = [f"warpgroup {i}" for i in range(len(program) - 1)] + ["load"]
    columns = {name: dict(zip(EVENTS, zip(*tiles[:-1]))) for name, tiles in zip(names, program)}
    return {
        name: {event: [clock - first if clock else None for clock in clocks] for event, clocks in events.items() if any(clocks)}
        for name, events in columns.items()
    }


def spans(trace: dict, *kinds: str) -> list[Span]:
    """All of these kinds, by their start."""
    found = []
    for partition, events in trace["clocks"].items():
        for kind in kinds:
            pairs = zip(*(events.get(end, ()) for end in ENDS[kind]))
            found += [Span(*pair, kind, partition, tile) for tile, pair in enumerate(pairs) if None not in pair]
    return sorted(found)


def at_peak_rate(trace: dict) -> list[Span]:
    """The products on matrix units that work them off in the order of their issue, each at peak rate."""
    cycles = QUERIES * trace["tile"]["keys"] * trace["case"]["head_dim"] // PEAK
    done, idle_before = [], 0
    for product in spans(trace, *PRODUCTS):
        start = max(product.start, idle_before)
        idle_before = start + cycles
        done.append(product._replace(start=start, end=idle_before))
    return done


def union(of: list[Span]) -> list[tuple[int, int]]:
    """Disjoint, in order."""
    merged: list[tuple[int, int]] = []
    for start, end, *_ in sorted(of):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def pieces(span: Span, disjoint: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of a span that lie in them."""
    near = disjoint[max(0, bisect_left(disjoint, (span.start,)) - 1) : bisect_left(disjoint, (span.end,))]
    return [(max(span.start, start), min(span.end, end)) for start, end in near if span.start < end]


def overlap(trace: dict) -> dict[str, float]:
    """The share of the softmaxes' time under a product of the same multiprocessor, at most and at least; and that of all time in which the
    matrix units work, at peak rate."""
    softmaxes, products, worked_off = spans(trace, "softmax"), spans(trace, *PRODUCTS), at_peak_rate(trace)
    total = sum(span.end - span.start for span in softmaxes)

    def share(of):
        disjoint = union(of)
        return sum(end - start for span in softmaxes for start, end in pieces(span, disjoint)) / total

    time = max(span.end for span in products) - products[0].start
    return dict(at_most=share(products), at_least=share(worked_off), matrix_units=sum(span.end - span.start for span in worked_off) / time)


def report(trace: dict) -> str:
    case, tile, times, shares = trace["case"], trace["tile"], trace["milliseconds"], overlap(trace)
    low, high = trace["at_least_of_all_programs"]
    return (
        f"{name_of(case)}: {tile['warpgroups']} warpgroups, {tile['keys']} keys a tile\n"
        f"softmax under a matrix product: at least {shares['at_least']:.0%}, at most {shares['at_most']:.0%} of its time "
        f"(program {trace['program']}; at least {low:.0%} to {high:.0%} in all programs)\n"
        f"matrix units at work: {shares['matrix_units']:.0%} of the time, were they at peak rate\n"
        f"tracing costs {times['traced'] / times['plain'] - 1:.1%}: {times['traced']:.3f} ms, plain {times['plain']:.3f} ms"
    )


def name_of(case: dict) -> str:
    return f"head_dim {case['head_dim']}, {'causal' if case['causal'] else 'full'}, seq {case['seq']}"


def known_tiles(events: dict, event: str) -> dict[int, int]:
    """Tile -> clock, where the event happened."""
    return {tile: clock for tile, clock in enumerate(events.get(event, ())) if clock is not None}


def windows(trace: dict) -> dict[str, tuple[int, int]]:
    """Title -> first and last cycle: some tiles in the middle of an item, and those about the border to the next."""
    known = {event: known_tiles(trace["clocks"]["warpgroup 0"], event) for event in trace["clocks"]["warpgroup 0"]}
    first, last = list(known["item taken"]), list(known.get("item stored", ()))
    if len(first) < 2 or not last:
        raise ValueError("the trace holds no whole item and the beginning of the next; take a shorter --seq")
    ready = known["scores ready"]
    busy = [set(known_tiles(events, "scores ready")) for name, events in trace["clocks"].items() if name != "load"]
    # One in which every warpgroup has work: the last tile of queries may be short, and a warpgroup past the end passes its keys by.
    whole = [i for i, (a, b) in enumerate(zip(first[:-1], last)) if all((a + b) // 2 in tiles for tiles in busy)]
    if not whole:
        raise ValueError("the trace holds no item in which every warpgroup computes; take a shorter --seq")
    item = whole[len(whole) // 2]

    def about(tile):
        ends = (min(ready, key=lambda other: abs(other - end)) for end in (tile - TILES_SHOWN // 2, tile + TILES_SHOWN // 2))
        return tuple(ready[end] for end in ends)

    return {"in the middle of an item": about((first[item] + last[item]) // 2), "from one item to the next": about(last[item] + 1)}


def draw(trace: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = ["load", *(name for name in trace["clocks"] if name != "load"), "matrix units"]
    figure, parts = plt.subplots(2, 1, figsize=(14, 2.4 + 1.5 * len(rows)), layout="constrained")
    for axes, (title, window) in zip(parts, windows(trace).items()):
        draw_window(axes, trace, rows, *window)
        axes.set_title(title, loc="left", fontsize=10)
    parts[1].set_xlabel("cycles of the multiprocessor since the program's first event")
    names = {
        "scores": "S = Q K^T, from issue to the end of its wait",
        "output": "O += P V, likewise",
        "softmax": "softmax of S, a product surely unfinished",
        "softmax alone": "softmax of S, matrix units perhaps idle",
    }
    figure.legend(handles=[Patch(color=COLOURS[name], label=text) for name, text in names.items()], loc="outside lower center", ncols=4)
    shares = overlap(trace)
    figure.suptitle(
        f"One program of the Hopper forward, {name_of(trace['case'])}: "
        f"{shares['at_least']:.0%} to {shares['at_most']:.0%} of the softmax under a matrix product"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_window(axes, trace: dict, rows: list[str], start: int, end: int) -> None:
    """A lane a row; a warpgroup's has its two products above its softmax. Numbers are tiles of keys."""
    top = {name: len(rows) - i for i, name in enumerate(rows)}  # of a lane, which is 0.9 high

    def bar(pieces, bottom, height, colour, text=""):
        seen = [(max(a, start), min(b, end)) for a, b in pieces if a < end and start < b]
        axes.broken_barh([(a, b - a) for a, b in seen], (bottom, height), facecolors=colour, edgecolors="white", linewidth=0.5)
        if text and seen and seen[-1][1] - seen[0][0] > (end - start) / 40:
            axes.text((seen[0][0] + seen[-1][1]) / 2, bottom + height / 2, text, ha="center", va="center", fontsize=7, clip_on=True)

    for bottom, event in ((0.45, "keys requested"), (0.0, "values requested")):
        for tile, clock in enumerate(trace["clocks"]["load"][event]):
            if clock is not None and start <= clock <= end:
                axes.plot(clock, top["load"] - 0.9 + bottom + 0.2, marker=5, color="black")
                axes.text(clock, top["load"] - 0.9 + bottom + 0.2, f"   {event[0].upper()} {tile}", va="center", fontsize=7, clip_on=True)
    offsets = {"scores": (0.6, 0.3), "output": (0.3, 0.3), "softmax": (0.0, 0.3)}
    certain = union(at_peak_rate(trace))
    for span in spans(trace, *ENDS):
        bottom, height = top[span.partition] - 0.9 + offsets[span.kind][0], offsets[span.kind][1]
        bar([span[:2]], bottom, height, COLOURS["softmax alone" if span.kind == "softmax" else span.kind], f"{span.kind} {span.tile}")
        if span.kind == "softmax":
            bar(pieces(span, certain), bottom, height, COLOURS["softmax"])
    for span in at_peak_rate(trace):
        letter = "S" if span.kind == "scores" else "O"
        bar([span[:2]], top["matrix units"] - 0.9, 0.9, COLOURS[span.kind], f"{letter} {span.tile}\n{span.partition.split()[-1]}")
    axes.set_xlim(start, end)
    axes.set_ylim(0, len(rows) + 0.1)
    axes.set_yticks([top[name] - 0.45 for name in rows], [*rows[:-1], "matrix units\n(at peak rate)"])


if __name__ == "__main__":
    sys.exit(main())
