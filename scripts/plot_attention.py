"""Tables, summary and pictures of what scripts/benchmark_attention.py measured.

    python scripts/plot_attention.py runs/benchmark_attention.json [--out FOLDER]

Prints Markdown tables and draws, for each pass, time, speed-up over the baseline, TFLOP/s under the measured ceiling and, of a GPU, peak
memory, over the length of the sequence: FILE-PASS-{time,speedup,tflops,memory}.png, beside the JSON or in FOLDER. A point that is missing
was left out; the tables' last lines say why.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import geometric_mean, linear_regression

OURS = ("hopper", "triton")
MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, help="default: the JSON's folder")
    options = parser.parse_args(arguments)
    result = json.loads(options.json.read_text())
    print(report(result))
    folder = options.out or options.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    for which, rows in by_pass(result["rows"]).items():
        for picture in PICTURES:
            if figure := draw(result, rows, picture):
                file = folder / f"{options.json.stem}-{which}-{picture}.png"
                figure.savefig(file, dpi=150)
                print(f"written to {file}")
    return 0


def by_pass(rows: list[dict]) -> dict[str, list[dict]]:
    return {which: [row for row in rows if row["pass"] == which] for which in dict.fromkeys(row["pass"] for row in rows)}


def measured_names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["measured"]))


# --- summary --------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict], host: dict) -> dict:
    """By pass, and there by backend; None where nothing compares."""
    summary = {}
    for which, chosen in by_pass(rows).items():
        summary[which] = {name: {"memory_grows_as_length_to_the": memory_exponent(chosen, name)} for name in measured_names(chosen)}
        cost = host.get(which, {})
        for name in summary[which].keys() & set(OURS):
            summary[which][name] |= {
                "speed_over_best_peer": spread(speed_over_best_peer(row, name) for row in chosen),
                "speed_over_flex": spread(speed_over(row, name, "flex") for row in chosen),
                "error_over_sdpa": spread(error for row in chosen for error in errors_over(row, name, "sdpa")),
                "error_over_flash_attn": spread(error for row in chosen for error in errors_over(row, name, "flash_attn")),
                "host_time_over_flash_attn": cost[name] / cost["flash_attn"] if {name, "flash_attn"} <= cost.keys() else None,
            }
    return summary


def spread(ratios) -> dict | None:
    ratios = [ratio for ratio in ratios if ratio is not None]
    return dict(count=len(ratios), least=min(ratios), geometric_mean=geometric_mean(ratios), largest=max(ratios)) if ratios else None


def speed_over(row: dict, name: str, other: str) -> float | None:
    measured = row["measured"]
    return measured[other]["milliseconds"] / measured[name]["milliseconds"] if {name, other} <= measured.keys() else None


def speed_over_best_peer(row: dict, name: str) -> float | None:
    return min((ratio for peer in row["measured"] if peer not in OURS and (ratio := speed_over(row, name, peer))), default=None)


def errors_over(row: dict, name: str, other: str) -> list[float]:
    """Of the output, or of each gradient."""
    errors = row["errors"]
    return [error / errors[other][x] for x, error in errors[name].items()] if {name, other} <= errors.keys() else []


def memory_exponent(rows: list[dict], name: str) -> float | None:
    """The largest p of a fit bytes = constant * seq^p, one sequence's, to the cases that differ in their length alone."""
    points = {}
    for row in rows:
        if row["measured"].get(name, {}).get("peak_bytes"):
            point = math.log(row["seq"]), math.log(row["measured"][name]["peak_bytes"] / row["batch"])
            points.setdefault(row["series"], []).append(point)
    return max((linear_regression(*zip(*series)).slope for series in points.values() if len(series) > 1), default=None)


# --- tables ---------------------------------------------------------------------------------------------------------


def line(row: dict) -> str:
    """A row as a line of text."""
    cells = [f"{name} {one['tflops']:.3g}" for name, one in row["measured"].items()]
    over = [f"{name} {ratio:.2f} of the best peer" for name in OURS if (ratio := speed_over_best_peer(row, name))]
    wide = max(((max(one["rounds"]) - min(one["rounds"])) / one["milliseconds"] for one in row["measured"].values()), default=0.0)
    without = [f"without {', '.join(row['left_out'])}"] if row["left_out"] else []
    return f"{label(row)}, TFLOP/s: {'; '.join([', '.join(cells), *over, f'rounds differ by up to {wide:.0%}', *without])}"


def label(row: dict) -> str:
    return f"{row['pass']}, {row['series']}, seq {row['seq']}"


# Title: (how a number is shown, the number: of a case's row and a backend measured in it; None where there is none).
TABLES = {
    "milliseconds": (".4g", lambda row, name: row["measured"][name]["milliseconds"]),
    "TFLOP/s": (".3g", lambda row, name: row["measured"][name]["tflops"]),
    "times as fast as {baseline}": (".2f", lambda row, name: row["measured"][name]["speedup"]),
    "times as fast as the best peer": (".2f", lambda row, name: speed_over_best_peer(row, name) if name in OURS else None),
    "peak MiB": (",.0f", lambda row, name: (peak := row["measured"][name]["peak_bytes"]) and peak / MIB),
    "largest error": (".2e", lambda row, name: max(row["errors"].get(name, {}).values(), default=None)),
}


def numbers(rows: list[dict], title: str) -> dict[str, list[float | None]]:
    """A table's columns, a number a row, of the backends that have any."""
    _, number = TABLES[title]
    columns = {name: [number(row, name) if name in row["measured"] else None for row in rows] for name in measured_names(rows)}
    return {name: column for name, column in columns.items() if set(column) != {None}}


def report(result: dict) -> str:
    """Markdown: the tables of every pass, who was left out and why, host times, summary."""
    blocks = [table(rows, title, result) for rows in by_pass(result["rows"]).values() for title in TABLES if numbers(rows, title)]
    blocks += left_out_lines(result)
    for which, host in result["host_microseconds"].items():
        blocks.append(f"{which}: host microseconds a call: {', '.join(f'{name} {cost:.0f}' for name, cost in host.items())}")
    for which, names in result["summary"].items():
        for name, figures in names.items():
            said = [f"{what.replace('_', ' ')} {figure_text(figure)}" for what, figure in figures.items() if figure is not None]
            blocks += [f"{which}: {name}: {'; '.join(said)}"] if said else []
    ceiling = result["matmul_ceiling"]
    blocks.append(f"a matrix product of {ceiling['size']}^3: {ceiling['median']:.3g} TFLOP/s")
    return "\n\n".join(blocks)


def table(rows: list[dict], title: str, result: dict) -> str:
    """A line a case, a column a backend."""
    form, _ = TABLES[title]
    columns = {"case": [row["series"] for row in rows], "seq": [str(row["seq"]) for row in rows]}
    for name, column in numbers(rows, title).items():
        columns[name] = ["-" if number is None else format(number, form) for number in column]
    padded = []
    for name, column in columns.items():
        width = max(map(len, [name, *column]))
        padded.append([name.ljust(width), "-" * width, *(cell.ljust(width) for cell in column)])
    lines = [f"| {' | '.join(cells)} |" for cells in zip(*padded, strict=True)]
    return "\n".join([f"{rows[0]['pass']}: {title.format(**result)}", "", *lines])


def left_out_lines(result: dict) -> list[str]:
    labels = {}
    for row in result["rows"]:
        for name, reason in row["left_out"].items():
            labels.setdefault((name, reason), []).append(label(row))
    count = len(result["rows"])
    lines = [f"{name} is not in {len(of)} of {count} rows ({of[0]}{'; ...' * (len(of) > 1)}): {why}" for (name, why), of in labels.items()]
    return lines + [f"{name} has no host time: {why}" for name, why in result["host_left_out"].items()]


def figure_text(figure: float | dict) -> str:
    if isinstance(figure, float):
        return f"{figure:.2f}"
    return f"{figure['geometric_mean']:.3f} ({figure['least']:.3f} to {figure['largest']:.3f}, of {figure['count']})"


# --- pictures -------------------------------------------------------------------------------------------------------

# Of a file's name: the table that it draws, and whether its axis is logarithmic.
PICTURES = {
    "time": ("milliseconds", True),
    "speedup": ("times as fast as {baseline}", True),
    "tflops": ("TFLOP/s", False),
    "memory": ("peak MiB", True),
}


def draw(result: dict, rows: list[dict], picture: str):
    """matplotlib Figure of one pass, a panel a series; None when there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title, logarithmic = PICTURES[picture]
    columns = numbers(rows, title)
    if not columns:
        return None
    names = measured_names(result["rows"])  # a backend has the same colour in all pictures
    panels = list(dict.fromkeys(row["series"] for row in rows))
    wide = min(len(panels), 4)
    high = math.ceil(len(panels) / wide)
    figure, grid = plt.subplots(high, wide, figsize=(2 + 3.5 * wide, 1.5 + 3 * high), squeeze=False, sharey=True, layout="constrained")
    for axes, series in zip(grid.flat, panels, strict=False):
        for name, column in columns.items():
            points = [(row["seq"], y) for row, y in zip(rows, column, strict=True) if row["series"] == series]
            style = dict(color=f"C{names.index(name)}", marker="o", markersize=4, linewidth=2.2 if name in OURS else 1.2)
            axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
        if title == "TFLOP/s":
            ceiling = result["matmul_ceiling"]["median"]
            axes.axhline(ceiling, color="0.4", linestyle="--", linewidth=1, label=f"matrix product, {ceiling:.3g}")
        dress(axes, series, sorted({row["seq"] for row in rows}), logarithmic)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(title.format(**result))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2 + 2 * wide, frameon=False)
    device = result["environment"]["gpu_name"] if result["device"] == "cuda" else "CPU"
    figure.suptitle(f"attention, {rows[0]['pass']}, {result['dtype']}, {device}", fontsize=11)
    return figure


def dress(axes, title: str, seqs: list[int], logarithmic: bool) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_title(title, fontsize=9)
    axes.set_xlabel("sequence length")
    axes.set_xscale("log", base=2)
    axes.set_xticks(seqs, map(str, seqs), fontsize=8)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
