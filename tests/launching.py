"""Starting programs under the DeepSpeed launcher, as users do, on a few CPU processes or on GPUs."""

import os
import subprocess
import sys
from pathlib import Path

from training.distributed import free_port

ROOT = Path(__file__).resolve().parents[1]


def deepspeed_run(program: str | Path, *arguments: str | Path, processes: int = 2, gpus: bool = False, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run ``deepspeed program arguments`` from the repository's root, on CPUs unless ``gpus``; returns its output and exit code."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", processes, "--master_port", free_port(), program, *arguments]
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **({} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}), "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path,
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment})
