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


def test_the_training_step_takes_a_free_port(tmp_path, monkeypatch):
    ports = []

    def command(arguments, deadline):
        if "train.py" in arguments:
            ports.append(int(arguments[arguments.index("--master_port") + 1]))
            (tmp_path / "runs").mkdir(exist_ok=True)
            (tmp_path / "runs/metrics.jsonl").write_text("".join(json.dumps({"loss": 5.0 - step / 10}) + "\n" for step in range(30)))
        return 0, ""

    monkeypatch.setattr(gpu_check, "command", command)
    for _ in range(3):
        assert gpu_check.run_training(tmp_path, time.monotonic() + 60)["passed"]
    assert len(set(ports)) > 1 and all(port > 1023 for port in ports)
