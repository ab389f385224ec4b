"""Compare runs, or look at one: what differs, what came out, curves, and a verdict set against the spread of seeds.

    python scripts/compare_runs.py RUN [RUN ...] [--png FILE] [--html FILE] [--json FILE]

RUN is a run folder (run.json and metrics.jsonl) or a JSON file that --json wrote; any mix of them. The tables are Markdown. The HTML page
holds everything in one file. Exit code 2 and a line on stderr for each run that cannot be read; an empty run is said and left out.
"""

import argparse
import html
import math
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from training.comparison import Group, Verdict, group_runs, judge, short_key, show
from training.runs import WARM_UP_STEPS, EmptyRun, Run, Summary, best_val_loss, describe, differing, name_apart, read_runs, summarize
from training.tracking import to_json

PAGE = Path(__file__).with_suffix(".html")
# Okabe and Ito's colours, which colour-blind people tell apart (without yellow and black, illegible on white or on black), and three more.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a63d2", "#a0522d", "#7a8b2a", "#888888")
# Strokes of runs of one colour, as SVG's stroke-dasharray.
DASHES = ((), (6, 3), (2, 2), (8, 2, 2, 2))
# By default the loss is averaged over this share of a run's steps.
SMOOTHED_SHARE = 0.02
# Of several runs the first part is cut off above, because its fall would flatten all that comes after.
HIDDEN_SHARE = 0.1
# The page draws longer runs as means over neighbouring steps.
MOST_POINTS = 1500
# axis -> key of a row, what one unit of the axis is worth, label
X_AXES = {"tokens": ("tokens", 1, "training tokens"), "flops": ("flops", 1, "model FLOPs"), "hours": ("elapsed_seconds", 3600, "hours")}
Y_AXES = {
    "loss": "loss, nats per token",
    "tokens_per_second_per_gpu": "tokens/s per GPU",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}


@dataclass(frozen=True)
class Style:
    label: str
    color: str
    dash: tuple[int, ...]


@dataclass
class Report:
    runs: list[Run]
    groups: list[Group]
    verdict: Verdict
    target: float | None
    summaries: list[Summary]
    styles: list[Style]


def make_report(runs: list[Run], *, target: float | None, baseline: str | None, by: list[str]) -> Report:
    groups = group_runs(runs, by)
    if target is None and len(runs) > 1:
        target = max((best for run in runs if (best := best_val_loss(run)) is not None), default=None)
    return Report(runs, groups, judge(groups, baseline), target, [summarize(run, target) for run in runs], choose_styles(runs, groups))


def choose_styles(runs: list[Run], groups: list[Group]) -> list[Style]:
    """One colour a configuration where several have been run with several seeds, one colour a run otherwise; labels say what differs."""
    color_is_group = 1 < len(groups) < len(runs)
    styles = {}
    for number, group in enumerate(groups):
        seeds = [run.seed for run in group.runs]
        for index, run in enumerate(group.runs):
            parts = [group.label] * (len(groups) > 1) + [f"seed {run.seed}"] * (len(seeds) > 1)
            label = ", ".join(parts) if parts and seeds.count(run.seed) == 1 else run.name
            color, dash = (number, index) if color_is_group else (len(styles), 0)
            styles[run.name] = Style(label, COLORS[color % len(COLORS)], DASHES[dash % len(DASHES)])
    return [styles[run.name] for run in runs]


# --- tables ---------------------------------------------------------------------------------------------------------


def difference_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and one row a run; empty when the runs differ in nothing."""
    columns = differing(report.runs)
    header = [short_key(key, list(columns)) for key in columns]
    return header, [[show(values[row]) for values in columns.values()] for row in range(len(report.runs))] if columns else []


def result_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and one row a run, without the columns that no run fills."""
    target = _number(report.target, ".4f")
    columns = {
        "steps": [_steps(run) for run in report.runs],
        "tokens": [f"{summary.tokens:,}" for summary in report.summaries],
        "val loss": [_number(summary.final_val_loss, ".4f") for summary in report.summaries],
        "best": [_number(summary.best_val_loss, ".4f") for summary in report.summaries],
        "bits/byte": [_number(summary.final_val_bits_per_byte, ".4f") for summary in report.summaries],
        f"tokens to {target}": [_number(summary.tokens_to_target, ",") for summary in report.summaries],
        f"time to {target}": [_duration(summary.seconds_to_target) for summary in report.summaries],
        "tokens/s/GPU": [_number(summary.median_tokens_per_second_per_gpu, ",.0f") for summary in report.summaries],
        "MFU": [_number(summary.median_mfu, ".1%") for summary in report.summaries],
        "HFU": [_number(summary.median_hfu, ".1%") for summary in report.summaries],
        "peak GiB": [_number(summary.peak_memory_bytes and summary.peak_memory_bytes / 2**30, ".1f") for summary in report.summaries],
        "skipped": [str(summary.skipped_steps or "-") for summary in report.summaries],
        "resumed": [str(summary.resumed or "-") for summary in report.summaries],
    }
    columns = {name: values for name, values in columns.items() if set(values) != {"-"}}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _steps(run: Run) -> str:
    last = run.rows[-1]["step"]
    return f"{last} of {run.planned_steps}" if run.planned_steps and last < run.planned_steps else str(last)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def legend_of_tables(report: Report) -> str:
    speed = f"Speeds and utilisations are medians without the first {WARM_UP_STEPS} steps."
    if report.target is None:
        return f"Validation losses are in nats per token. {speed}"
    return (
        f"Validation losses are in nats per token. {report.target:.4f} is reached at the first evaluation at or below it; unless --target "
        f"says otherwise, this is the worst of the runs' best, which each of them reached. {speed}"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    aligned = [
        [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    rule = ["-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths)]
    lines = ["| " + " | ".join(row) + " |" for row in aligned]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def terminal_text(report: Report) -> str:
    names = [run.name for run in report.runs]
    blocks = []
    for header, rows in (difference_table(report), result_table(report)):
        if rows:
            blocks.append(markdown(["run", *header], [[name, *row] for name, row in zip(names, rows, strict=True)]))
    blocks.append(legend_of_tables(report))
    if notes := notes_of(report):
        blocks.append("\n".join(notes))
    if len(report.runs) > 1:
        blocks.append(
            "\n".join([report.verdict.headline, *(f"  - {sentence}" for sentence in report.verdict.findings), *report.verdict.basis])
        )
    return "\n\n".join(blocks)


def notes_of(report: Report) -> list[str]:
    return [f"{run.name}: {note}" for run in report.runs for note in run.notes]


# --- curves ---------------------------------------------------------------------------------------------------------


def series(run: Run, key: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the rows that hold both, float64 [rows]; values that are not finite become NaN, which is not drawn."""
    x_key, unit, _ = X_AXES[x]
    points = [(row[x_key], row[key]) for row in run.rows if row.get(key) is not None and row.get(x_key) is not None]
    xs, ys = np.array(points, dtype=float).reshape(-1, 2).T
    return xs / unit, np.where(np.isfinite(ys), ys, np.nan)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values around each one, [n] -> [n].

    The window stays centred at the start, where the loss falls steeply, by shrinking; at the end it keeps what lies before, so that the
    last value is no single step's.
    """
    index = np.arange(len(values))
    before = np.minimum(window // 2, index)
    after = np.minimum(before, len(values) - 1 - index)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low, high = index - before, index + after + 1
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def smoothed_loss(run: Run, x: str) -> tuple[np.ndarray, np.ndarray]:
    xs, loss = series(run, "loss", x)
    return xs, moving_average(loss, max(1, round(SMOOTHED_SHARE * len(loss))))


def title_of(report: Report) -> str:
    """The corpus, without which a loss says nothing, and the name when there is only one run."""
    corpora = {run.facts()["corpus"] for run in report.runs}
    corpus = f"corpus {corpora.pop()}" if len(corpora) == 1 else "different corpora: losses are not comparable"
    return f"{report.runs[0].name} ({corpus})" if len(report.runs) == 1 else f"{len(report.runs)} runs, {corpus}"


def draw(report: Report) -> Any:
    """matplotlib Figure: loss over every x axis that a run has, and speed; one run gets its loss over tokens and its speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if len(report.runs) == 1:
        figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1), layout="constrained")
        _draw_loss(axes[0], report, "tokens")
        axes[0].set_xlabel("")
        axes[0].legend(frameon=False)
    else:
        present = [x for x in X_AXES if any(len(series(run, "loss", x)[0]) for run in report.runs)]
        rows = math.ceil((len(present) + 1) / 2)
        figure, axes = plt.subplots(rows, 2, figsize=(13, 1 + 4.5 * rows), layout="constrained")
        axes = axes.flatten()
        for x, loss_axes in zip(present, axes[:-1], strict=False):
            _draw_loss(loss_axes, report, x)
        for unused in axes[len(present) : -1]:
            unused.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) > 35 else 4, frameon=False)
    _draw_speed(axes[-1], report)
    figure.suptitle(title_of(report), fontsize=11)
    return figure


def _draw_loss(axes: Any, report: Report, x: str) -> None:
    several = len(report.runs) > 1
    kept = []
    for run, style in zip(report.runs, report.styles, strict=True):
        xs, smooth = smoothed_loss(run, x)
        axes.plot(*series(run, "loss", x), color=style.color, alpha=0.25 if len(report.runs) < 5 else 0.12, linewidth=0.8)
        axes.plot(xs, smooth, color=style.color, linestyle=_linestyle(style), linewidth=1.6, label=style.label if several else "training")
        point = {"color": style.color, "markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.8}
        axes.plot(*series(run, "val_loss", x), "o", label=None if several else "validation", **point)
        kept += [*smooth[round(HIDDEN_SHARE * len(smooth)) :], *series(run, "val_loss", x)[1]]
    if several:
        axes.plot([], [], "o", color="0.5", markeredgecolor="black", markersize=5, label="validation")
        low, high = np.nanmin(kept, initial=math.inf), np.nanmax(kept, initial=-math.inf)
        if low < high:
            axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    _dress(axes, x, Y_AXES["loss"])


def _draw_speed(axes: Any, report: Report) -> None:
    from matplotlib.ticker import EngFormatter

    for run, style in zip(report.runs, report.styles, strict=True):
        axes.plot(*series(run, "tokens_per_second_per_gpu", "tokens"), color=style.color, linestyle=_linestyle(style), linewidth=1)
    on_gpu = any(run.info.get("environment", {}).get("gpu_name") for run in report.runs)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _dress(axes, "tokens", Y_AXES["tokens_per_second_per_gpu"] if on_gpu else "tokens/s per process")


def _dress(axes: Any, x: str, y_label: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(X_AXES[x][2])
    axes.set_ylabel(y_label)
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _linestyle(style: Style) -> Any:
    return (0, style.dash) if style.dash else "-"


# --- JSON and HTML --------------------------------------------------------------------------------------------------


def to_record(report: Report) -> dict[str, Any]:
    groups = [
        {
            "label": group.label,
            "runs": [run.name for run in group.runs],
            "losses": [{"seed": seed, "val_loss": loss} for seed, loss in group.losses.items()],
        }
        for group in report.groups
    ]
    return {
        "target": report.target,
        "verdict": asdict(report.verdict),
        "configurations": groups,
        "runs": [describe(run, summary) for run, summary in zip(report.runs, report.summaries, strict=True)],
    }


def page(report: Report) -> str:
    """The HTML page, whole: the template with the texts, the table and the data of the curves put in."""
    escape, verdict = html.escape, report.verdict
    differences, results = difference_table(report), result_table(report)
    filled = {
        "TITLE": escape(title_of(report)),
        "HEADLINE": escape(verdict.headline if len(report.runs) > 1 else ""),
        "FINDINGS": "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.findings),
        "BASIS": escape(" ".join(verdict.basis)),
        "HEADER": "".join(
            f'<th class="{kind}">{escape(name)}</th>'
            for kind, (header, _) in (("given", differences), ("found", results))
            for name in header
        ),
        "ROWS": "".join(
            _html_row(run, style, given, found)
            for run, style, given, found in zip(
                report.runs, report.styles, differences[1] or [[]] * len(report.runs), results[1], strict=True
            )
        ),
        "LEGEND": escape(legend_of_tables(report)),
        "NOTES": "".join(f"<li>{escape(note)}</li>" for note in notes_of(report)),
        "DATA": to_json(_page_data(report)).replace("<", "\\u003c"),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, value in filled.items():
        text = text.replace(f"<!--{name}-->", value)
    return text


def _html_row(run: Run, style: Style, given: list[str], found: list[str]) -> str:
    cells = "".join(f'<td class="{kind}">{html.escape(cell)}</td>' for kind, row in (("given", given), ("found", found)) for cell in row)
    return f'<tr><th scope="row"><i style="background:{style.color}"></i>{html.escape(run.name)}</th>{cells}</tr>'


def _page_data(report: Report) -> dict[str, Any]:
    margins = {comparison.group: comparison.pooled for comparison in report.verdict.comparisons}
    baseline = report.verdict.comparisons[0].baseline if margins else None
    styles = {run.name: style for run, style in zip(report.runs, report.styles, strict=True)}
    groups = [
        {
            "label": group.label,
            "color": styles[group.runs[0].name].color,
            "losses": {str(seed): loss for seed, loss in group.losses.items()},
            "margin": margins[group.label].margin if group.label in margins else None,
            "baseline": group.label == baseline,
        }
        for group in report.groups
        if group.losses
    ]
    return {
        "xAxes": {x: label for x, (_, _, label) in X_AXES.items()},
        "yAxes": Y_AXES,
        "smoothedShare": SMOOTHED_SHARE,
        "hiddenShare": HIDDEN_SHARE if len(report.runs) > 1 else 0,
        "groups": groups,
        "runs": [
            {"label": style.label, "color": style.color, "dash": " ".join(map(str, style.dash)), **_page_curves(run)}
            for run, style in zip(report.runs, report.styles, strict=True)
        ],
    }


def _page_curves(run: Run) -> dict[str, Any]:
    """The columns of a run, thinned to at most `MOST_POINTS`, and those of its evaluations; null where a value is missing or not finite."""

    def columns(rows: list[dict], keys: dict[str, tuple[str, int]], thin: int) -> dict[str, list]:
        return {
            name: [_mean_of(rows[start : start + thin], key, unit) for start in range(0, len(rows), thin)]
            for name, (key, unit) in keys.items()
            if any(row.get(key) is not None for row in rows)
        }

    thin = math.ceil(len(run.rows) / MOST_POINTS)
    x_keys = {x: (key, unit) for x, (key, unit, _) in X_AXES.items()}
    return {
        "stepsPerPoint": thin,
        "curve": columns(run.rows, x_keys | {y: (y, 1) for y in Y_AXES} | {"step": ("step", 1)}, thin),
        "validation": columns(run.evaluations, x_keys | {"loss": ("val_loss", 1), "step": ("step", 1)}, 1),
    }


def _mean_of(rows: list[dict], key: str, unit: int) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return float(f"{sum(values) / len(values) / unit:.6g}") if values else None


# --- the program ----------------------------------------------------------------------------------------------------


def read_all(paths: list[Path]) -> list[Run]:
    """Raises ValueError with every fault, a line each."""
    runs, faults = [], []
    for path in paths:
        try:
            runs += read_runs(path)
        except EmptyRun as error:
            print(f"compare_runs: left out: {error}", file=sys.stderr)
        except (ValueError, OSError) as error:
            faults.append(str(error))
    if not runs and not faults:
        faults.append("no run is left to compare")
    if faults:
        raise ValueError("\ncompare_runs: ".join(faults))
    name_apart(runs)
    return runs


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a JSON file of runs")
    parser.add_argument(
        "--target",
        type=float,
        metavar="LOSS",
        help="tokens and time are counted to this validation loss (default: the worst of several runs' best, which every run reaches)",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="a run of the configuration that the others are compared with, or its label in the verdict "
        "(default: the one with the most seeds)",
    )
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="runs that differ in this too are not one configuration: git_sha, world_size, device, packages.torch, ...",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves (.svg and .pdf too)")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="tables, verdict and interactive curves as one page that needs nothing else"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="summaries, verdict and every step's numbers; a RUN for later")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        report = make_report(read_all(options.runs), target=options.target, baseline=options.baseline, by=options.by)
        for path in filter(None, (options.png, options.html, options.json)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if options.png:
            draw(report).savefig(options.png, dpi=150)
        if options.html:
            options.html.write_text(page(report), encoding="utf-8")
        if options.json:
            options.json.write_text(to_json(to_record(report)) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    print(terminal_text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
