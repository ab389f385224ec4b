"""Starting programs under the DeepSpeed launcher, as users do, on a few CPU processes or on GPUs."""

import os
import subprocess
import sys
from pathlib import Path

from training.distributed import free_port

ROOT = Path(__file__).resolve().parents[1]


def deepspeed_start(program: str | Path, *arguments: str | Path, processes: int = 2, gpus: bool = False, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """Start ``deepspeed program arguments`` from the repository's root, or ``cwd``, in a session of its own, on CPUs unless ``gpus``."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", processes, "--master_port", free_port(), program, *arguments]
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [str(part) for part in command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **({} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": search_path, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment})


def deepspeed_run(program: str | Path, *arguments: str | Path, timeout: float = 600, **options) -> subprocess.CompletedProcess:
    """As ``deepspeed_start``; returns the program's output and exit code."""
    started = deepspeed_start(program, *arguments, **options)
    try:
        stdout, stderr = started.communicate(timeout=timeout)
    except BaseException:
        os.killpg(started.pid, 9)
        raise
    return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)
