"""Weak scaling in one host: each GPU keeps its work while there are more of them; one JSON, a table and a picture of tokens/s/GPU.

    python scripts/benchmark_scaling.py --configs gpt2-124m gpt-1.3b --gpus 1 2 4 8 --contenders ours fsdp2_compile --profile ours fsdp2_compile
    python scripts/benchmark_scaling.py --configs gpt-6.7b,train.activation_checkpointing=full,train.global_batch_size=16 --gpus 8

Every number of GPUs is a run of scripts/benchmark_training.py, which says what cases, contenders and micro batches are, and takes what else
is given here. A case's train.global_batch_size is what one GPU has in a step; on n of them it is n times that.

**Efficiency** is tokens/s/GPU over that of the same contender on the fewest GPUs in the list. **Hidden** is the share of NCCL's time in which
other kernels run too, of those in --profile. The JSON holds every run's rows, each with its `gpus`; it is written after every run.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import benchmark_training  # noqa: E402
from training.config import ConfigError  # noqa: E402
from training.files import write_atomically  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options, passed_on = parse(arguments)
    folder, failed = options.out.with_suffix(""), False
    result = {"command": " ".join(sys.argv), "rows": []}
    for number, (case, gpus) in enumerate(product(options.configs, options.gpus)):
        out = folder / f"{case.split(',')[0].split('/')[-1]}-{number}-{gpus}gpu.json"
        failed |= benchmark_training.main(asked(case, gpus, [*passed_on, "--out", str(out)])) != 0
        run = json.loads(out.read_text(encoding="utf-8"))
        result |= {"environment": run["environment"], "steps": run["steps"], "warmup": run["warmup"]}
        result["rows"] += [row | {"config": case, "gpus": gpus} for row in run["rows"]]
        for row in result["rows"]:
            row["efficiency"] = efficiency(row, result["rows"])
        write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    draw(result).savefig(options.out.with_suffix(".png"), dpi=150)
    print(f"\n{table(result)}\n\nwritten to {options.out} and {options.out.with_suffix('.png').name}")
    return int(failed)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Its own options, and those for benchmark_training.py, which has looked at them for every run before the first begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, metavar="NAME[,section.key=value...]", help="as benchmark_training.py takes them")
    parser.add_argument("--gpus", type=int, nargs="+", required=True, help="how many, one run after another")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmark_scaling.json")
    options, passed_on = parser.parse_known_args(arguments)
    options.gpus.sort()
    try:
        for case in options.configs:
            for gpus in reversed(options.gpus):
                benchmark_training.parse(asked(case, gpus, passed_on))
    except ConfigError as error:
        parser.error(str(error))
    return options, passed_on


def asked(case: str, gpus: int, passed_on: list[str]) -> list[str]:
    """benchmark_training.py's arguments for so many GPUs, each with the work of one."""
    share = benchmark_training.case_config(case, 1, micro_batch=1).train.global_batch_size
    return ["--configs", f"{case},train.global_batch_size={share * gpus}", "--gpus", str(gpus), *passed_on]


def efficiency(row: dict, rows: list[dict]) -> float | None:
    """tokens/s/GPU over that on the fewest GPUs; None of a row that was left out."""
    same = [each for each in rows if "step_ms" in each and (each["config"], each["contender"]) == (row["config"], row["contender"])]
    if "step_ms" not in row:
        return None
    return row["tokens_per_second_per_gpu"] / min(same, key=lambda each: each["gpus"])["tokens_per_second_per_gpu"]


def table(result: dict) -> str:
    """Markdown, a table a case."""
    head = ["contender", "GPUs", "micro x acc.", "step ms", "tokens/s/GPU", "MFU", "efficiency", "NCCL ms", "hidden", "GB", "ours / it"]
    gpu, lines = result["environment"]["gpu_name"] or "CPU", []
    for case in dict.fromkeys(row["config"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["config"] == case]
        ours = {row["gpus"]: row.get("tokens_per_second_per_gpu") for row in rows if row["contender"] == "ours"}
        lines += ["", f"{case} a GPU, {gpu}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in rows if "step_ms" in row):
            profile, speed = row.get("profile", {}), row["tokens_per_second_per_gpu"]
            cells = [
                row["contender"], str(row["gpus"]), f"{row['micro_batch']} x {row['accumulation']}", f"{row['step_ms']:.1f}", f"{speed:,.0f}",
                _number(row["mfu"], 3), _number(row["efficiency"], 3), _number(profile.get("communication_ms"), 1),
                _number(profile.get("communication_hidden_share"), 2), f"{row['allocated_gb']:.1f}",
                _number(ours[row["gpus"]] / speed if ours.get(row["gpus"]) and row["contender"] != "ours" else None, 3),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += [""] + [f"{row['contender']}, {row['gpus']} GPUs: left out: {row['left_out']}" for row in rows if "left_out" in row]
    return "\n".join(lines).strip()


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def draw(result: dict):
    """matplotlib Figure: tokens/s/GPU over GPUs, a panel a case, with the line of no loss from each contender's first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["config"] for row in result["rows"]))
    figure, panels = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4), squeeze=False, layout="constrained")
    for panel, case in zip(panels[0], cases, strict=True):
        measured = [row for row in result["rows"] if row["config"] == case and "step_ms" in row]
        for contender in dict.fromkeys(row["contender"] for row in measured):
            rows = [row for row in measured if row["contender"] == contender]
            gpus, speeds = [row["gpus"] for row in rows], [row["tokens_per_second_per_gpu"] for row in rows]
            (line,) = panel.plot(gpus, speeds, marker="o", label=contender)
            panel.plot(gpus, [speeds[0]] * len(gpus), linestyle=":", linewidth=1, color=line.get_color())
        panel.set(title=case, xlabel="GPUs", ylabel="tokens/s/GPU", xticks=sorted({row["gpus"] for row in measured}))
        panel.set_ylim(bottom=0)
        if measured:
            panel.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
