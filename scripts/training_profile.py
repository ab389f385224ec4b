"""What a profile of training steps says: how busy the GPU was, with what, whether communication was hidden, what the host did.

    python scripts/training_profile.py TRACE.json.gz --steps 3      a trace of scripts/benchmark_training.py --profile, summarised again
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

PROFILED = "profiled steps"  # the span around all of them, which ends when the GPU has done
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 20
# As PyTorch writes them at NCCL's kernels.
BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Long": 8, "Int": 4, "Byte": 1, "Char": 1, "Bool": 1}

Interval = tuple[float, float]  # begin and end in microseconds


def union(intervals: list[Interval]) -> list[Interval]:
    """The same moments as disjoint intervals, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: list[Interval]) -> float:
    """Of their union, in microseconds."""
    return sum(end - begin for begin, end in union(intervals))


def common(some: list[Interval], others: list[Interval]) -> float:
    """Microseconds that lie in both unions."""
    return length(some) + length(others) - length([*some, *others])


def read_trace(file: Path) -> list[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as trace:
        return json.load(trace)["traceEvents"]


def summarise(events: list[dict], steps: int) -> dict:
    """Times are milliseconds a step, shares are of the wall-clock time of all steps.

    events: of a Chrome trace by torch.profiler, with one span named ``PROFILED`` around so many steps.

    Returns:
        device_busy_share: a kernel or a copy is running; None without a GPU, as are those of communication.
        communication_ms, communication_hidden_share: NCCL's kernels, and how much of their time other kernels run too.
        communicated_gb: by collective, a rank's larger side of each call: what all-gathers give, what reduce-scatters take.
        host_working_ms, host_waiting_ms: outside and inside of calls that wait for the GPU (cuda...Synchronize, on any thread).
        launches: kernels a step. top: the kernels that take most, by name.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    whole = next(event for event in spans if event["name"] == PROFILED and event.get("cat") == "user_annotation")
    begin, end = _interval(whole)
    inside = [event for event in spans if begin <= event["ts"] <= end]
    on_gpu = [event for event in inside if event.get("cat") in ON_GPU]
    kernels = [event for event in on_gpu if event["cat"] == "kernel"]
    communication = [_interval(event) for event in kernels if _is_communication(event["name"])]
    computing = [_interval(event) for event in kernels if not _is_communication(event["name"])]
    waits = [_interval(event) for event in inside if event.get("cat") in ("cuda_runtime", "cuda_driver") and "Synchronize" in event["name"]]
    waiting = common(waits, [(begin, end)])

    def a_step(microseconds: float) -> float:
        return microseconds / 1000 / steps

    return {
        "steps": steps,
        "wall_ms": a_step(end - begin),
        "device_busy_share": length(list(map(_interval, on_gpu))) / (end - begin) if on_gpu else None,
        "communication_ms": a_step(length(communication)) if on_gpu else None,
        "communication_hidden_share": common(communication, computing) / length(communication) if communication else None,
        "communicated_gb": _communicated(kernels, steps),
        "host_working_ms": a_step(end - begin - waiting),
        "host_waiting_ms": a_step(waiting),
        "launches": len(kernels) / steps,
        "top": _top(kernels, steps),
    }


def _interval(event: dict) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _is_communication(name: str) -> bool:
    return "nccl" in name.lower()


def _communicated(kernels: list[dict], steps: int) -> dict[str, float]:
    volume = defaultdict(float)
    for told in (kernel.get("args", {}) for kernel in kernels):
        if "Collective name" in told:
            elements = max(told["In msg nelems"], told["Out msg nelems"])
            volume[told["Collective name"]] += elements * BYTES.get(told["dtype"], float("nan")) / 1e9 / steps
    return dict(volume)


def _top(kernels: list[dict], steps: int) -> list[dict]:
    durations = defaultdict(list)
    for kernel in kernels:
        durations[kernel["name"]].append(kernel["dur"])
    ordered = sorted(durations.items(), key=lambda item: -sum(item[1]))[:TOP]
    return [{"name": name, "ms": sum(each) / 1000 / steps, "calls": len(each) / steps} for name, each in ordered]


def report(summary: dict) -> str:
    """The summary as text."""

    def share(of: float | None) -> str:
        return "unknown" if of is None else f"{of:.1%}"

    communication = "none" if summary["communication_hidden_share"] is None else (
        f"{summary['communication_ms']:.2f} ms a step, {share(summary['communication_hidden_share'])} of it while other kernels run")
    volume = "".join(f"; {name} {gb:.3f} GB" for name, gb in summary["communicated_gb"].items())
    theory = "".join(f"; {name} in theory {gb:.3f} GB" for name, gb in summary.get("theory_gb", {}).items())
    lines = [
        f"wall-clock     {summary['wall_ms']:.2f} ms a step, profiled",
        f"device busy    {share(summary['device_busy_share'])}",
        f"communication  {communication}{volume}{theory}",
        f"host           {summary['host_working_ms']:.2f} ms a step at work, {summary['host_waiting_ms']:.2f} ms waiting for the GPU; "
        f"{summary['launches']:,.0f} kernels a step",
    ]
    lines += [f"  {kernel['ms']:9.3f} ms  {kernel['calls']:7.1f} x  {kernel['name'][:110]}" for kernel in summary["top"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE.json.gz")
    parser.add_argument("--steps", type=int, required=True, help="that were profiled")
    options = parser.parse_args()
    print(report(summarise(read_trace(options.trace), options.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
