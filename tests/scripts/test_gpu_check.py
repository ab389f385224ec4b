"""scripts/gpu_check.py, as far as it goes without a GPU."""
import json
import subprocess
import sys
import time

from scripts import gpu_check
from training.tracking import collect_environment


def test_is_imported_without_deepspeed_and_says_that_there_is_no_gpu(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('not installed')")
    done = subprocess.run([sys.executable, gpu_check.__file__], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr == "gpu_check: torch sees no CUDA GPU here; run it on a machine that has one\n"


def test_the_summary_names_gpu_versions_and_commit():
    environment = collect_environment() | {"gpu_name": "NVIDIA H200", "git_sha": "abc123"}
    step = {"passed": True, "seconds": 1.0}
    text = gpu_check.summary(json.loads(json.dumps({"environment": environment, "tests": step, "kernel_times": step, "training": step})))
    packages = environment["packages"]
    assert text.splitlines()[0] == f"NVIDIA H200, torch {packages['torch']}, triton {packages['triton']}, git abc123"


def test_training_passes_when_both_precisions_learn_as_they_did(tmp_path, monkeypatch):
    def outcome(fails: str | None) -> dict:
        def command(arguments, deadline):
            words = list(map(str, arguments))
            return (1, "FAILED") if fails in words else (0, f"{words[-1]}\nPASSED")

        monkeypatch.setattr(gpu_check, "command", command)
        return gpu_check.run_training(tmp_path, time.monotonic() + 60)

    passed = outcome(None)
    assert passed == {"passed": True, "bf16": ["train.precision=bf16", "PASSED"], "fp32": ["attention.backend=triton", "PASSED"]}
    for fails in ("scripts/prepare_data.py", "train.precision=bf16", "attention.backend=triton"):
        failed = outcome(fails)
        assert not failed["passed"] and failed["exit_code"] == 1 and fails in failed["command"]


def test_kernel_times_are_those_of_the_benchmark(tmp_path, monkeypatch):
    """On the CPU, which the benchmark takes where there is no GPU."""
    monkeypatch.setattr(gpu_check, "BACKENDS", ("eager", "sdpa"))
    monkeypatch.setattr(gpu_check, "SEQS", (128,))
    times = gpu_check.run_kernel_times(tmp_path, time.monotonic() + 100)
    assert times["passed"] and {row["pass"] for row in times["rows"]} == {"forward", "backward"}
    step = {"passed": True, "seconds": 1.0}
    environment = collect_environment() | {"gpu_name": "NVIDIA H200"}
    text = gpu_check.summary({"environment": environment, "tests": step, "kernel_times": step | times, "training": step})
    assert all(row["series"] in text for row in times["rows"])
    assert f"{times['rows'][0]['measured']['sdpa']['tflops']:.3g}" in text
