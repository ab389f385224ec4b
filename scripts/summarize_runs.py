#!/usr/bin/env python3
"""A table of runs, and one JSON with their curves: what docs/results keeps of them.

    python scripts/summarize_runs.py RUN_DIR [RUN_DIR ...] --out docs/results/NAME.json
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.tracking import RUN_FILE, read_metrics, to_json  # noqa: E402

# The first steps load and compile kernels; speed is the median of the others.
WARM_UP_STEPS = 5
COLUMNS = ("loss", "grad_norm", "lr", "tokens", "step_seconds", "data_seconds", "tokens_per_second_per_gpu", "mfu", "peak_memory_bytes")


def summarize(run_dir: Path) -> dict:
    """What a run was, how fast, how much memory, how well; and its curves as columns.

    Raises ValueError when the folder holds no run or too few steps to judge its speed.
    """
    try:
        described = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        rows, _ = read_metrics(run_dir)
    except OSError as error:
        raise ValueError(f"{run_dir}: not a run's folder ({error.strerror}: {Path(error.filename).name})") from None
    steady = rows[WARM_UP_STEPS:]
    if not steady:
        raise ValueError(f"{run_dir}: {len(rows)} steps, and the first {WARM_UP_STEPS} do not count for speed; run more steps")
    mfus = [row["mfu"] for row in steady if row["mfu"] is not None]
    validation = [{key: row[key] for key in ("step", "tokens", "val_loss", "val_bits_per_byte")} for row in rows if "val_loss" in row]
    return {
        "run_name": described["run_name"],
        "config": described["config"],
        "environment": described["environment"],
        "corpus_sha256": described["corpus_sha256"],
        "device_name": described["device_name"],
        "world_size": described["world_size"],
        "parameters": described["parameters"],
        "peak_flops_per_gpu": described["peak_flops_per_gpu"],
        "median_tokens_per_second_per_gpu": statistics.median(row["tokens_per_second_per_gpu"] for row in steady),
        "median_step_seconds": statistics.median(row["step_seconds"] for row in steady),
        "median_mfu": statistics.median(mfus) if mfus else None,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        "validation": validation,
        "steps": {column: [row[column] for row in rows] for column in COLUMNS},
    }


def table(runs: list[dict]) -> str:
    """Markdown, one run a row."""
    lines = ["| run | GPUs | attention | checkpointing | micro batch | tokens/s/GPU | MFU | peak memory | steps | validation loss | bits/byte |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for run in runs:
        train, mfu = run["config"]["train"], run["median_mfu"]
        loss, bits = (f"{run['validation'][-1][key]:.4f}" if run["validation"] else "-" for key in ("val_loss", "val_bits_per_byte"))
        lines.append(
            f"| {run['run_name']} | {run['world_size']} x {run['device_name']} | {run['config']['attention']['backend']} "
            f"| {train['activation_checkpointing']} | {train['micro_batch_size']} | {run['median_tokens_per_second_per_gpu']:,.0f} "
            f"| {'-' if mfu is None else f'{mfu:.1%}'} | {run['peak_memory_bytes'] / 2**30:.1f} GiB | {len(run['steps']['loss'])} | {loss} | {bits} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="write summaries and curves here as JSON")
    arguments = parser.parse_args()
    try:
        runs = [summarize(run_dir) for run_dir in arguments.runs]
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(to_json(runs) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
