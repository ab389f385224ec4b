"""Runs as train.py records them, with numbers that a test knows."""

import json
from pathlib import Path
from typing import Any

from training.runs import Run
from training.tracking import to_json


def description(name: str, seed: int = 1, *, settings: dict[str, Any] | None = None, **others: Any) -> dict:
    """run.json. settings: section.key -> value."""
    config: dict[str, dict] = {
        "run": {"name": name, "output_dir": "runs", "seed": seed},
        "attention": {"backend": "triton"},
        "data": {"corpus": "data/x"},
        "train": {"steps": 40, "micro_batch_size": 4},
        "eval": {"every": 10, "sequences": 64},
        "tracking": {"tags": []},
    }
    for key, value in (settings or {}).items():
        section, name_of_key = key.split(".")
        config.setdefault(section, {})[name_of_key] = value
    environment = {"git_sha": "c0ffee", "git_dirty": False, "gpu_name": "NVIDIA H200", "packages": {"torch": "2.11.0"}}
    return {
        "run_name": name,
        "config": config,
        "deepspeed_config": {"x": 1},
        "environment": environment,
        "corpus_sha256": "abc",
        "device_name": "NVIDIA H200",
        "world_size": 2,
        "parameters": {"total": 7},
        "peak_flops_per_gpu": 1e15,
    } | others


def rows(steps: int = 40, *, final: float = 3.0, every: int = 10) -> list[dict]:
    """Losses fall by 0.1 a step to `final`, where the validation loss ends too; 36 seconds and 1,000 tokens a step, the first five slow."""
    made = []
    for step in range(1, steps + 1):
        slow = step <= 5
        loss = final + 0.1 * (steps - step)
        row = {
            "step": step,
            "tokens": 1000 * step,
            "flops": 10**12 * step,
            "elapsed_seconds": 36.0 * step,
            "loss": loss,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_second": 20.0 if slow else 2000.0 + 2 * step,
            "tokens_per_second_per_gpu": 10.0 if slow else 1000.0 + step,
            "step_seconds": 9.0 if slow else 1.0,
            "data_seconds": 0.0,
            "mfu": 0.01 if slow else 0.4,
            "hfu": 0.02 if slow else 0.5,
            "peak_memory_bytes": min(step, 9) * 2**30,
        }
        if step % every == 0:
            row |= {"val_loss": loss, "val_perplexity": 20.0, "val_bits_per_byte": loss / 2}
        made.append(row)
    return made


def recorded(name: str, seed: int = 1, *, final: float = 3.0, steps: int = 40, **others: Any) -> Run:
    return Run(name, f"runs/{name}", description(name, seed, **others), rows(steps, final=final))


def write_run(
    folder: Path, name: str | None = None, seed: int = 1, *, metrics: list[dict] | None = None, final: float = 3.0, **others: Any
) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(description(name or folder.name, seed, **others)))
    (folder / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in (rows(final=final) if metrics is None else metrics)))
    return folder
