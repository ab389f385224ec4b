"""Draw one or many runs from their run.json and metrics.jsonl, without wandb.

    python scripts/plot_run.py RUN_DIR [RUN_DIR ...] --out loss.png [--x tokens|step|flops|hours] [--smooth STEPS]

Above: training loss (smoothed, over the raw values drawn faint) and validation loss (points). Below: throughput.
Exit code 2 and one line on stderr when a run cannot be read.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from training.tracking import METRICS_FILE, RUN_FILE, read_metrics

# name on the command line -> key of a row, what one unit of the axis is worth, label
X_AXES = {
    "tokens": ("tokens", 1, "training tokens"),
    "step": ("step", 1, "optimizer step"),
    "flops": ("flops", 1, "model FLOPs"),
    "hours": ("elapsed_seconds", 3600, "hours"),
}
# By default the loss is averaged over this share of a run's steps.
SMOOTHED_SHARE = 0.02


@dataclass
class Run:
    name: str
    info: dict[str, Any]
    rows: list[dict[str, Any]]

    def series(self, key: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the rows that hold `key`, float64 [rows]; values that are not finite become NaN, which is not drawn."""
        x_key, unit, _ = X_AXES[x]
        rows = [row for row in self.rows if row.get(key) is not None]
        try:
            xs = np.array([row[x_key] for row in rows], dtype=float) / unit
            ys = np.array([row[key] for row in rows], dtype=float)
        except KeyError:
            raise ValueError(f"run {self.name}: a row of {METRICS_FILE} has no {x_key!r}; choose another --x") from None
        except (TypeError, ValueError):
            raise ValueError(f"run {self.name}: {METRICS_FILE} holds a value of {key!r} or {x_key!r} that is not a number") from None
        return xs, np.where(np.isfinite(ys), ys, np.nan)


def read_run(run_dir: Path) -> Run:
    """Raises ValueError or OSError that names what is missing or damaged."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run directory")
    for name in (RUN_FILE, METRICS_FILE):
        if not (run_dir / name).is_file():
            raise ValueError(f"{run_dir} holds no {name}: not the directory of a run")
    try:
        info = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        name = info["run_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{run_dir / RUN_FILE} is damaged: not a JSON object with a run_name") from None
    rows, cut_off = read_metrics(run_dir)
    if cut_off:
        print(f"{run_dir / METRICS_FILE}: the last line was cut off and is left out", file=sys.stderr)
    return Run(name, info, rows)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values around each one, [n] -> [n]; the window shrinks at both ends and stays centred."""
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low, high = index - half, index + half + 1
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw(runs: list[Run], x: str, smooth: int | None) -> Figure:
    figure, (loss_axes, speed_axes) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1), layout="constrained")
    for number, run in enumerate(runs):
        labels = ("training", "validation") if len(runs) == 1 else (run.name, None)
        draw_run(run, x, smooth, loss_axes, speed_axes, color=f"C{number % 10}", labels=labels)
    device = {run.info.get("environment", {}).get("gpu_name") for run in runs} - {None}
    loss_axes.set_ylabel("loss (nats per token)")
    speed_axes.set_ylabel("tokens/s per GPU" if device else "tokens/s per process")
    speed_axes.set_xlabel(X_AXES[x][2])
    speed_axes.set_ylim(bottom=0)
    speed_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if x != "hours":
        speed_axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss_axes, speed_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(runs), fontsize=11)
    if len(runs) > 1:
        loss_axes.plot([], [], "o", color="0.4", markersize=4, label="validation")
    loss_axes.legend(frameon=False)
    return figure


def draw_run(
    run: Run, x: str, smooth: int | None, loss_axes: Axes, speed_axes: Axes, *, color: str, labels: tuple[str, str | None]
) -> None:
    training_label, validation_label = labels
    xs, loss = run.series("loss", x)
    window = smooth or max(1, round(SMOOTHED_SHARE * len(loss)))
    loss_axes.plot(xs, loss, color=color, alpha=0.25, linewidth=0.8)
    loss_axes.plot(xs, moving_average(loss, window), color=color, linewidth=1.6, label=training_label)
    lost = int(np.isnan(loss).sum())
    if lost:
        print(f"run {run.name}: the loss of {lost} of {len(loss)} steps is not finite and is not drawn", file=sys.stderr)
    point = {"color": color, "markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.8}
    loss_axes.plot(*run.series("val_loss", x), "o", label=validation_label, **point)
    speed_axes.plot(*run.series("tokens_per_second_per_gpu", x), color=color, linewidth=1.2)


def title(runs: list[Run]) -> str:
    """The corpus, without which a loss says nothing, and the name when there is only one run."""
    corpora = {str(run.info.get("corpus_sha256", "unknown"))[:12] for run in runs}
    corpus = f"corpus {corpora.pop()}" if len(corpora) == 1 else "different corpora: losses are not comparable"
    return f"{runs[0].name} ({corpus})" if len(runs) == 1 else corpus


def name_apart(runs: list[Run], run_dirs: list[Path]) -> None:
    """Give runs of the same name their directory as well."""
    names = [run.name for run in runs]
    for run, run_dir in zip(runs, run_dirs, strict=True):
        if names.count(run.name) > 1:
            run.name = f"{run.name} [{run_dir}]"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw one or many runs from run.json and metrics.jsonl.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, help="the picture; its suffix (.png, .svg, .pdf) chooses the format")
    parser.add_argument("--x", choices=tuple(X_AXES), default="tokens")
    parser.add_argument("--smooth", type=int, metavar="STEPS", help="steps to average over, 1 for none (default: 2%% of the run)")
    options = parser.parse_args(arguments)
    if options.smooth is not None and options.smooth < 1:
        parser.error(f"--smooth {options.smooth}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        runs = [read_run(run_dir) for run_dir in options.run_dirs]
        name_apart(runs, options.run_dirs)
        figure = draw(runs, options.x, options.smooth)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=150)
    except (ValueError, OSError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
