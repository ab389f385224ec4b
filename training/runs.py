"""Runs that were recorded, read back: from run folders, or from the JSON that scripts/compare_runs.py writes of them."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.tracking import METRICS_FILE, RUN_FILE, read_metrics

# The first steps load and compile kernels; speeds are medians of the others.
WARM_UP_STEPS = 5

# What the rows of metrics.jsonl hold that is a number, in the order in which it is written.
COLUMNS = (
    "step", "tokens", "flops", "elapsed_seconds", "loss", "grad_norm", "lr", "step_seconds", "data_seconds",
    "tokens_per_second_per_gpu", "mfu", "hfu", "peak_memory_bytes", "skipped_steps",
)  # fmt: skip
VALIDATION_COLUMNS = ("step", "tokens", "flops", "elapsed_seconds", "val_loss", "val_bits_per_byte")

# Keys that name or store things and change nothing that a run learns.
NEUTRAL_SECTIONS = ("run", "sample", "tracking", "checkpoint")
NEUTRAL_KEYS = ("eval.every", "train.stop_after_skipped")
SEED = "run.seed"


class EmptyRun(ValueError):
    """A run that recorded no step: it is starting at this moment, or it failed before its first one."""


@dataclass
class Run:
    """name: unique among the runs read together. info: what run.json holds. rows: one an optimizer step, as in metrics.jsonl.
    notes: what a reader of its numbers should know."""

    name: str
    source: str
    info: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        return self.info["config"].get("run", {}).get("seed")

    @property
    def planned_steps(self) -> int | None:
        return self.info["config"].get("train", {}).get("steps")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Rows at which the validation loss was measured."""
        return [row for row in self.rows if row.get("val_loss") is not None]

    def column(self, key: str) -> list[float]:
        """The values of `key` in the rows that have one."""
        return [row[key] for row in self.rows if row.get(key) is not None]

    def facts(self) -> dict[str, Any]:
        """What the run was, flat: the config's leaves as section.key, then corpus, processes, device and versions."""
        environment = self.info.get("environment", {})
        facts = {f"{section}.{key}": value for section, keys in self.info["config"].items() for key, value in keys.items()}
        facts["corpus"] = (self.info.get("corpus_sha256") or "unknown")[:12]
        facts["world_size"] = self.info.get("world_size")
        facts["device"] = self.info.get("device_name")
        facts["git_sha"] = (environment.get("git_sha") or "unknown")[:10] + " and changes" * bool(environment.get("git_dirty"))
        facts |= {key: environment.get(key) for key in ("python", "platform", "cuda_version", "cudnn_version")}
        return facts | {f"packages.{name}": version for name, version in environment.get("packages", {}).items()}


def read_runs(path: Path) -> list[Run]:
    """The run of a folder, or the runs of a JSON file.

    Raises EmptyRun, and ValueError or OSError that names what is missing or damaged.
    """
    if path.is_dir():
        return [_read_folder(path)]
    if path.is_file():
        return _read_json(path)
    raise ValueError(f"{path}: no such run folder or JSON file of runs")


def _read_folder(folder: Path) -> Run:
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} holds no {RUN_FILE}: not the folder of a run")
    info = _load_json(folder / RUN_FILE)
    _check_description(info, folder / RUN_FILE)
    metrics = folder / METRICS_FILE
    if not metrics.is_file() or b"\n" not in metrics.read_bytes():
        raise EmptyRun(f"{folder}: no step recorded yet in {METRICS_FILE}")
    rows, cut_off = read_metrics(folder)
    return _checked(
        Run(info["run_name"], str(folder), info, rows, ["the last line was cut off and is left out"] if cut_off else []), metrics
    )


def _read_json(path: Path) -> list[Run]:
    content = _load_json(path)
    # Earlier files hold the list alone.
    described = content.get("runs") if isinstance(content, dict) else content
    if not isinstance(described, list) or not described:
        raise ValueError(f"{path} holds no runs: neither written by scripts/compare_runs.py --json nor a list of runs")
    return [_run_from_json(each, path) for each in described]


def _run_from_json(described: Any, path: Path) -> Run:
    _check_description(described, path)
    try:
        columns = {key: [_number(value) for value in values] for key, values in described["steps"].items()}
        steps = columns.setdefault("step", list(range(1, len(columns["loss"]) + 1)))
        rows = {step: {key: values[index] for key, values in columns.items()} for index, step in enumerate(steps)}
        for evaluation in described["validation"]:
            rows[evaluation["step"]] |= {key: _number(value) for key, value in evaluation.items()}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{path}: the columns of run {described['run_name']} are damaged") from None
    if not rows:
        raise EmptyRun(f"{path}: run {described['run_name']} has no steps")
    info = {key: value for key, value in described.items() if key not in ("steps", "validation")}
    return _checked(Run(described["run_name"], str(path), info, list(rows.values())), path)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _check_description(described: Any, path: Path) -> None:
    if not isinstance(described, dict) or not isinstance(described.get("run_name"), str) or not isinstance(described.get("config"), dict):
        raise ValueError(f"{path} is damaged: not the description of a run with run_name and config")
    if not all(isinstance(section, dict) for section in described["config"].values()):
        raise ValueError(f"{path} is damaged: config is not made of sections")


def _number(value: float | str | None) -> float | None:
    """Undo `to_json`, which writes NaN and infinities as strings."""
    return float(value) if isinstance(value, str) else value


def _checked(run: Run, path: Path) -> Run:
    """`run`, with notes on what its rows lack; ValueError when they cannot be drawn."""
    for row in run.rows:
        for key in (*COLUMNS, *VALIDATION_COLUMNS):
            if not isinstance(row.get(key, 0), int | float | None):
                raise ValueError(f"{path}, step {row['step']}: {key!r} is {row[key]!r}, which is not a number")
        if "tokens" not in row or "loss" not in row:
            raise ValueError(f"{path}, step {row['step']}: no {'loss' if 'tokens' in row else 'tokens'!r} in the row")
    last = run.rows[-1]["step"]
    if run.planned_steps and last < run.planned_steps:
        run.notes.append(f"unfinished, still running or stopped: step {last} of {run.planned_steps}")
    lost = sum(not math.isfinite(loss) for loss in run.column("loss"))
    if lost:
        run.notes.append(f"the loss of {lost} of {len(run.rows)} steps is not finite and is not drawn")
    if not run.evaluations:
        run.notes.append("no validation loss measured yet")
    return run


def name_apart(runs: list[Run]) -> None:
    """Give runs of the same name what tells them apart: where they were read, and a number when that is the same too."""
    for distinction in (lambda run, _: f"[{run.source}]", lambda _, number: f"#{number}"):
        names = [run.name for run in runs]
        for number, run in enumerate(runs, start=1):
            if names.count(run.name) > 1:
                run.name = f"{run.name} {distinction(run, number)}"


@dataclass(frozen=True)
class Summary:
    """A run in a row of numbers; None where nothing was measured.

    Speeds and utilisations are medians over the steps after the first `WARM_UP_STEPS`. A target is reached at the first evaluation whose
    validation loss is at or below it; seconds count evaluations, and not the time between a stop and a resumption.
    """

    steps: int
    tokens: int
    final_val_loss: float | None
    best_val_loss: float | None
    final_val_bits_per_byte: float | None
    tokens_to_target: int | None
    seconds_to_target: float | None
    median_tokens_per_second_per_gpu: float | None
    median_step_seconds: float | None
    median_mfu: float | None
    median_hfu: float | None
    peak_memory_bytes: int | None
    skipped_steps: int
    resumed: int


def best_val_loss(run: Run) -> float | None:
    return min((row["val_loss"] for row in run.evaluations if math.isfinite(row["val_loss"])), default=None)


def summarize(run: Run, target: float | None) -> Summary:
    """target: validation loss, nats per token."""

    def median(key: str) -> float | None:
        values = [row[key] for row in run.rows[WARM_UP_STEPS:] if row.get(key) is not None]
        return statistics.median(values) if values else None

    last = run.evaluations[-1] if run.evaluations else {}
    reached = next((row for row in run.evaluations if target is not None and row["val_loss"] <= target), {})
    return Summary(
        steps=run.rows[-1]["step"],
        tokens=run.rows[-1]["tokens"],
        final_val_loss=last.get("val_loss"),
        best_val_loss=best_val_loss(run),
        final_val_bits_per_byte=last.get("val_bits_per_byte"),
        tokens_to_target=reached.get("tokens"),
        seconds_to_target=reached.get("elapsed_seconds"),
        median_tokens_per_second_per_gpu=median("tokens_per_second_per_gpu"),
        median_step_seconds=median("step_seconds"),
        median_mfu=median("mfu"),
        median_hfu=median("hfu"),
        peak_memory_bytes=max(run.column("peak_memory_bytes"), default=None),
        skipped_steps=run.rows[-1].get("skipped_steps", 0),
        resumed=max(0, len(run.info.get("starts", ())) - 1),
    )


def describe(run: Run, summary: Summary) -> dict[str, Any]:
    """What is kept of a run for good: its description, its summary, and its curves as columns; `read_runs` turns it back."""
    kept = {key: value for key, value in run.info.items() if key != "deepspeed_config"}  # follows from the config
    return (
        kept
        | vars(summary)
        | {
            "validation": [{key: row[key] for key in VALIDATION_COLUMNS if key in row} for row in run.evaluations],
            "steps": {key: [row.get(key) for row in run.rows] for key in COLUMNS if run.column(key)},
        }
    )


def is_neutral(key: str) -> bool:
    """Whether a key of the config only names or stores things."""
    return key != SEED and (key.split(".")[0] in NEUTRAL_SECTIONS or key in NEUTRAL_KEYS)


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """What the runs differ in, neutral keys left out: key -> one value a run, None where a run has no such key.

    The corpora are told by their hash: folders and weights count only beside another hash.
    """
    all_facts = [run.facts() for run in runs]
    keys = dict.fromkeys(key for facts in all_facts for key in facts if not is_neutral(key))
    columns = {key: [facts.get(key) for facts in all_facts] for key in keys}
    found = {key: values for key, values in columns.items() if any(value != values[0] for value in values)}
    if "corpus" not in found:
        found = {key: values for key, values in found.items() if not key.startswith("data.")}
    return found
