"""What memory buys: standard attention (`eager`) against ours on one GPU, at equal checkpointing and loss; what offloaded checkpoints cost.

    python scripts/measure_limits.py --parts speed batch --out docs/results/limits-h200-speed.json
    python scripts/measure_limits.py --plot docs/results/limits-h200-*.json --out docs/results/limits-h200.png

speed     tokens/s over the length of the sequence, --tokens in a step, gpt2-124m
batch     the largest micro batch of sequences of 2048 that trains, gpt2-124m
sequence  the longest sequence that trains, gpt2-124m
offload   tokens/s with and without train.checkpoint_offload from 32,768 tokens on, gpt-1.3b

Every attempt is training by train.py's engine on random tokens, blocks as written (train.compile: false), RoPE, full checkpointing. The
limits are searched in steps of 5% from where the prediction (training/memory.py) puts them, which stands beside them. A step that would take
longer than --longest by the model's FLOPs is not tried: then what is found is what fits into that time, and is called so. All parts, the
default, take some 15 minutes of an H200, each of them less than 6. The JSON is written after every row; the same command again keeps what it
has, and goes on behind it: remove the file to begin anew. Exit status 1 when a row failed otherwise than by its memory. The second form tells
and draws that of several parts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

from scripts.estimate_memory import let_go_of_all, measured_before, train  # noqa: E402
from training.config import Config, ConfigError, load_config  # noqa: E402
from training.distributed import UserFault, join_process_group  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.memory import capacity, estimate, is_out_of_memory, largest_micro_batch, largest_sequence  # noqa: E402

PARTS = ("speed", "batch", "sequence", "offload")
BACKENDS = ("eager", "auto")
EQUAL = (
    "model.positions=rope", "train.activation_checkpointing=full", "train.compile=false",
    "train.gradient_accumulation_steps=1", "train.global_batch_size=null",
)  # fmt: skip
STRIDE = 1.05  # from one attempt at a limit to the next
MFU = 0.5  # what --longest assumes of long sequences: causality is not discounted, and half of that is not computed
GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return plot(options) if options.plot else measure(options)
    except (ConfigError, UserFault) as error:
        print(error, file=sys.stderr)
        return 2


def plot(options: argparse.Namespace) -> int:
    try:
        result = {part: rows for file in options.plot for part, rows in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserFault(f"--plot: not what this program writes: {error}") from None
    print(report(result))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(result).savefig(options.out, dpi=150)
    return 0


def measure(options: argparse.Namespace) -> int:
    from training.tracking import collect_environment, to_json

    join_process_group()
    torch._dynamo.config.recompile_limit = 64  # the loss is compiled for each size; past the limit it would be eager
    before = measured_before(options.out, override=options.override) or {}
    result = {"environment": collect_environment(), "command": " ".join(sys.argv), "override": options.override}
    # A part that is not asked for now stays as it is.
    result |= {part: [row for row in before.get(part, []) if "fault" not in row] for part in PARTS if part in (*options.parts, *before)}

    def known(part: str, **facts: object) -> bool:
        return any(facts.items() <= {key: row.get(key) for key in facts}.items() for row in result[part])

    def note(part: str, row: dict) -> None:
        result[part].append(row)
        print(part, json.dumps({key: value for key, value in row.items() if key != "settings"}), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, to_json(result))

    for part in options.parts:
        of_part = {"speed": speed, "batch": batch, "sequence": sequence, "offload": offload}[part]
        of_part(options, lambda row, part=part: note(part, row), partial(known, part))
    print(f"\n{report(result)}\nwritten to {options.out}")
    return int(any("fault" in row for part in options.parts for row in result[part]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/limits.json", help="a JSON; with --plot a picture, such as .png")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="print what was measured, and draw it to --out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(9, 18)], help="of speed; default: 512 to 131072")
    parser.add_argument("--tokens", type=int, default=32768, help="in a step of speed, unless the sequence is longer")
    parser.add_argument("--offload-lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--steps", type=int, default=4, help="of speed and offload; the first is not counted")
    parser.add_argument("--longest", type=float, default=240, help="seconds of a step beyond which no longer sequence is tried")
    parser.add_argument("--override", nargs="*", default=[], metavar="section.key=value", help="of every attempt, for smaller ones")
    options = parser.parse_args(arguments)
    if options.plot and options.out.suffix == ".json":
        parser.error(f"--out {options.out}: with --plot a picture, such as limits.png")
    if min(*options.lengths, *options.offload_lengths, options.tokens) < 1 or options.steps < 2:
        parser.error("--lengths, --offload-lengths and --tokens are at least 1, --steps at least 2, since the first is not counted")
    return options


# --- the parts --------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, note: Callable[[dict], None], known: Callable[..., bool]) -> None:
    for length in options.lengths:
        for backend in BACKENDS:
            micro = max(1, options.tokens // length)
            config = configure("gpt2-124m", length, micro, f"attention.backend={backend}", *options.override)
            if not known(backend=config.attention.backend, sequence_length=length, micro_batch=micro):
                note(timed(config, options.steps))


def offload(options: argparse.Namespace, note: Callable[[dict], None], known: Callable[..., bool]) -> None:
    for length in options.offload_lengths:
        for moved in ("false", "true"):
            config = configure("gpt-1.3b", length, 1, f"train.checkpoint_offload={moved}", *options.override)
            if not known(offload=moved == "true", sequence_length=length):
                note({"offload": moved == "true", **timed(config, options.steps)})


def batch(options: argparse.Namespace, note: Callable[[dict], None], known: Callable[..., bool]) -> None:
    for backend in BACKENDS:
        settings = (f"attention.backend={backend}", *options.override)
        config = configure("gpt2-124m", 2048, 1, *settings)
        if known(backend=config.attention.backend):
            continue
        predicted = largest_micro_batch(config, 1, total_memory(config))
        note(limit(lambda n, s=settings: configure("gpt2-124m", 2048, n, *s), predicted, 1, None, options))


def sequence(options: argparse.Namespace, note: Callable[[dict], None], known: Callable[..., bool]) -> None:
    for backend in BACKENDS:
        settings = (f"attention.backend={backend}", *options.override)
        config = configure("gpt2-124m", 2048, 1, *settings)
        if known(backend=config.attention.backend):
            continue
        predicted = largest_sequence(config, 1, total_memory(config))
        note(limit(lambda n, s=settings: configure("gpt2-124m", n, 1, *s), predicted, 1024, 2048, options))


def configure(name: str, length: int, micro: int, *settings: str) -> Config:
    sizes = (f"model.sequence_length={length}", f"train.micro_batch_size={micro}")
    return load_config(ROOT / "configs" / f"{name}.yaml", [*EQUAL, *sizes, *settings])[0]


def total_memory(config: Config) -> int:
    """Bytes that tensors may have: all of this GPU's but what its context takes; of a CPU, for trying this script, an H200's."""
    if not torch.cuda.is_available():
        return capacity("H200")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


# --- one attempt ------------------------------------------------------------------------------------------------------


def described(config: Config) -> dict:
    return {
        "backend": config.attention.backend,
        "sequence_length": config.model.sequence_length,
        "micro_batch": config.train.micro_batch_size,
        "predicted_bytes": estimate(config, 1).peak.bytes,
        "predicted_host_bytes": sum(estimate(config, 1).host.values()),
    }


def attempt(config: Config, **options: int | None) -> dict:
    """What ``estimate_memory.train`` says, and whether it fits."""
    began = time.perf_counter()
    try:
        found = {"fits": True, **train(config, **options)}
    except Exception as error:  # whatever it is, the rows after it can still be had
        ran_out = isinstance(error, RuntimeError) and is_out_of_memory(error)
        found = {"fits": False} | ({} if ran_out else {"fault": f"{type(error).__name__}: {error}"[:300]})
    let_go_of_all()
    return described(config) | found | {"seconds": round(time.perf_counter() - began, 1)}


def timed(config: Config, steps: int) -> dict:
    """An attempt with its tokens/s; of what is predicted to need much more than there is, the prediction alone."""
    if estimate(config, 1).peak.bytes > 1.2 * total_memory(config):
        return described(config) | {"fits": False, "tried": False}
    row = attempt(config, steps=steps)
    if row["fits"]:
        row["tokens_per_second"] = row["sequence_length"] * row["micro_batch"] / median(row["step_seconds"][1:])
    return row


class _Broken(Exception):
    """An attempt failed, and not for want of memory."""


def limit(of: Callable[[int], Config], predicted: int, unit: int, first: int | None, options: argparse.Namespace) -> dict:
    """The largest multiple of ``unit`` that trains two steps, the first of them of ``first`` tokens a sequence."""
    tries: list[dict] = []
    in_time = largest_in_time(of, max(unit, predicted), unit, options.longest)

    def fits(n: int) -> bool:
        tries.append(attempt(of(n), steps=2, first=first))
        print(f"  {tries[-1]['backend']}, {n:,}: {'trains' if tries[-1]['fits'] else tries[-1].get('fault', 'out of memory')}", flush=True)
        if "fault" in tries[-1]:
            raise _Broken
        return tries[-1]["fits"]

    try:
        found, by_time = search(fits, min(predicted, in_time), unit, in_time)
    except _Broken:  # which says nothing about memory
        return {"backend": of(unit).attention.backend, "predicted": predicted, "fault": tries[-1]["fault"], "tries": tries}
    largest = next((row for row in reversed(tries) if row["fits"]), {})
    row = {"backend": of(unit).attention.backend, "predicted": predicted, "largest": found, "bounded_by_time": by_time}
    return row | {"at_largest": largest, "tries": tries}


def search(fits: Callable[[int], bool], start: int, unit: int, most: int) -> tuple[int, bool]:
    """(the largest multiple of ``unit`` up to ``most`` that fits, within STRIDE of a limit near ``start``; whether ``most`` is what ended it)."""
    rounded = max(unit, start // unit * unit)

    def next_to(n: int, up: bool) -> int:
        further = int(n * STRIDE if up else n / STRIDE) // unit * unit
        return min(most // unit * unit, max(further, n + unit)) if up else max(unit, min(further, n - unit))

    if not fits(rounded):
        while rounded > unit:
            rounded = next_to(rounded, up=False)
            if fits(rounded):
                return rounded, False
        return 0, False
    while (further := next_to(rounded, up=True)) > rounded:
        if not fits(further):
            return rounded, False
        rounded = further
    return rounded, True


def largest_in_time(of: Callable[[int], Config], predicted: int, unit: int, seconds: float) -> int:
    """The most whose step is expected to take so long; twice the prediction where time is no matter."""
    from training.metering import Meter

    most = 2 * predicted

    def expected(n: int) -> float:
        meter = Meter(of(n), 1, device_name=torch.cuda.get_device_name() if torch.cuda.is_available() else "H200")
        if meter.peak_flops is None:
            raise UserFault(f"--longest: the peak FLOP/s of {meter.device_name} are not known; add it to training/flops.py, or use --parts speed offload")
        return meter.flops_per_token * meter.tokens_per_step / (MFU * meter.peak_flops)

    while most > unit and expected(most) > seconds:
        most = max(unit, int(most / STRIDE) // unit * unit)
    return most


# --- in words, and drawn ----------------------------------------------------------------------------------------------


def report(result: dict) -> str:
    lines = []
    for part in ("sequence", "batch"):
        found = {row["backend"]: row for row in result.get(part, []) if "fault" not in row}
        lines += [f"{part}: {row['backend']} failed: {row['fault']}" for row in result.get(part, []) if "fault" in row]
        for backend, row in found.items():
            peak = row["at_largest"].get("measured_bytes")
            lines.append(
                f"{part}: {backend} trains {row['largest']:,} (predicted {row['predicted']:,})"
                + (f", {peak / GIB:.1f} GiB there, predicted {row['at_largest']['predicted_bytes'] / GIB:.1f}" if peak else "")
                + (", where --longest ended the search, not memory" if row["bounded_by_time"] else "")
            )
        if len(found) == 2 and "eager" in found and found["eager"]["largest"]:
            (ours,) = (row for backend, row in found.items() if backend != "eager")
            lines.append(f"{part}: {ours['largest'] / found['eager']['largest']:.1f} times eager's")
    for length, rows in by_length(result.get("speed", [])).items():
        lines.append(f"speed at {length:,}: " + ", ".join(f"{row['backend']} {told(row)}" for row in rows))
        if all("tokens_per_second" in row for row in rows) and len(rows) == 2:
            lines[-1] += f": {rows[1]['tokens_per_second'] / rows[0]['tokens_per_second']:.2f} times eager's"
    for length, rows in by_length(result.get("offload", [])).items():
        lines.append(f"offload at {length:,}: " + ", ".join(f"{'offloaded' if row['offload'] else 'kept'} {told(row)}" for row in rows))
        if all("tokens_per_second" in row for row in rows) and len(rows) == 2:
            lines[-1] += f": costs {1 - rows[1]['tokens_per_second'] / rows[0]['tokens_per_second']:.1%}"
    return "\n".join(lines)


def told(row: dict) -> str:
    if "fault" in row:
        return f"failed: {row['fault']}"
    if "tokens_per_second" not in row:
        return f"does not fit ({row['predicted_bytes'] / GIB:.0f} GiB predicted)"
    peak = f", {row['measured_bytes'] / GIB:.1f} GiB" if "measured_bytes" in row else ""
    return f"{row['tokens_per_second']:,.0f} tokens/s{peak}"


def by_length(rows: list[dict]) -> dict[int, list[dict]]:
    """What the others are compared with first: a start that goes on writes rows in another order."""
    rows = sorted(rows, key=lambda row: (row["sequence_length"], row["backend"] != "eager", row.get("offload", False)))
    return {length: list(group) for length, group in groupby(rows, key=lambda row: row["sequence_length"])}


def draw(result: dict):
    """Speed over length, the largest batch and the longest sequence, side by side, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = {part: [row for row in result.get(part, []) if "fault" not in row] for part in ("speed", "batch", "sequence")}
    parts = [part for part, rows in result.items() if rows]
    figure, axes = pyplot.subplots(1, max(1, len(parts)), figsize=(5 * max(1, len(parts)), 4.5), layout="constrained", squeeze=False)
    for axis, part in zip(axes[0], parts, strict=False):
        (draw_speed if part == "speed" else draw_limit)(axis, part, result[part])
    return figure


def draw_speed(axis, part: str, rows: list[dict]) -> None:
    measured = [row for row in rows if "tokens_per_second" in row]
    for backend in dict.fromkeys(row["backend"] for row in measured):
        points = [(row["sequence_length"], row["tokens_per_second"]) for row in measured if row["backend"] == backend]
        axis.plot(*zip(*points, strict=True), marker="o", label=backend)
    axis.set(yscale="log", xlabel="sequence length", ylabel="tokens/s", title="gpt2-124m, full checkpointing")
    axis.set_xscale("log", base=2)
    axis.legend()


def draw_limit(axis, part: str, rows: list[dict]) -> None:
    bars = axis.bar([row["backend"] for row in rows], [row["largest"] for row in rows])
    axis.bar_label(bars, [f"{row['largest']:,}{' or more' * row['bounded_by_time']}" for row in rows], label_type="center", color="white")
    axis.scatter([row["backend"] for row in rows], [row["predicted"] for row in rows], marker="_", s=2000, color="black", label="predicted")
    axis.set(title={"batch": "largest micro batch at 2,048 tokens", "sequence": "longest sequence"}[part], yscale="log")
    axis.set_ylim(bottom=min(row["predicted"] for row in rows) / 4)
    axis.legend(loc="upper left", markerscale=0.4)


if __name__ == "__main__":
    raise SystemExit(main())
