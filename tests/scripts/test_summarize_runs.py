import json
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "scripts/summarize_runs.py"]


@pytest.fixture
def run_dir(tmp_path):
    """A run of 9 steps whose first five are slow, evaluated once."""
    folder = tmp_path / "fast"
    folder.mkdir()
    described = {"run_name": "fast", "corpus_sha256": "abc", "device_name": "NVIDIA H200", "world_size": 2, "peak_flops_per_gpu": 1e15,
                 "parameters": {"total": 7}, "environment": {}, "config": {"attention": {"backend": "triton"}, "train": {
                     "activation_checkpointing": "full", "micro_batch_size": 4}}}
    (folder / "run.json").write_text(json.dumps(described))
    rows = [{"step": step, "loss": 5.0 - step / 10, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 100, "step_seconds": 1.0, "data_seconds": 0.0,
             "tokens_per_second_per_gpu": 10.0 if step <= 5 else 1000.0 + step, "mfu": 0.01 if step <= 5 else 0.4, "peak_memory_bytes": step * 2**30}
            for step in range(1, 10)]
    rows[-1] |= {"val_loss": 4.25, "val_perplexity": 70.1, "val_bits_per_byte": 2.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_table_and_json(run_dir, tmp_path):
    done = subprocess.run([*COMMAND, run_dir, "--out", tmp_path / "out/runs.json"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[2] == "| fast | 2 x NVIDIA H200 | triton | full | 4 | 1,008 | 40.0% | 9.0 GiB | 9 | 4.2500 | 2.5000 |"
    (run,) = json.loads((tmp_path / "out/runs.json").read_text())
    assert run["median_tokens_per_second_per_gpu"] == 1007.5
    assert run["validation"] == [{"step": 9, "tokens": 900, "val_loss": 4.25, "val_bits_per_byte": 2.5}]
    assert run["steps"]["loss"][0] == 4.9 and len(run["steps"]["lr"]) == 9


def test_losses_that_are_not_finite_are_valid_json(run_dir, tmp_path):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"loss": "NaN", "val_loss": "Infinity"}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([*COMMAND, run_dir, "--out", tmp_path / "runs.json"], capture_output=True, text=True, check=True)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (run,) = json.loads((tmp_path / "runs.json").read_text(), parse_constant=refuse)
    assert run["steps"]["loss"][-1] == "NaN" and run["validation"][0]["val_loss"] == "Infinity"


def test_a_folder_without_a_run_and_a_run_too_short_are_named(run_dir, tmp_path):
    done = subprocess.run([*COMMAND, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"{tmp_path}: not a run's folder")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:4]))
    done = subprocess.run([*COMMAND, run_dir], capture_output=True, text=True)
    assert done.returncode == 2 and "4 steps" in done.stderr and "Traceback" not in done.stderr
    (run_dir / "metrics.jsonl").unlink()
    done = subprocess.run([*COMMAND, run_dir], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"{run_dir}: not a run's folder (No such file or directory: metrics.jsonl)\n"
