"""launch/environment.sh: where there are GPUs that torch cannot use, it stops instead of training on the CPU."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = """
from types import SimpleNamespace
__version__ = "2.11.0+cu130"
version = SimpleNamespace(cuda="13.0")
cuda = SimpleNamespace(device_count=lambda: {gpus})
"""


@pytest.fixture
def environment(tmp_path):
    """Source environment.sh where torch sees ``gpus`` GPUs and nvidia-smi exits with ``smi_exit``; returns (exit code, output, errors)."""
    for folder in ("launch", ".venv/bin", "site"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    smi = tmp_path / ".venv/bin/nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$SMI_EXIT" = 0 ] && printf "550.54\\n550.54\\n" || echo "No devices were found"\nexit $SMI_EXIT\n')
    smi.chmod(0o755)

    def source(*, gpus, smi_exit, **variables):
        (tmp_path / "site/torch.py").write_text(TORCH.format(gpus=gpus))
        variables |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
        variables["SMI_EXIT"] = str(smi_exit)
        script = f'set -euo pipefail; source {tmp_path}/launch/environment.sh; echo "$gpus ${{DS_ACCELERATOR:-}}"'
        result = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout, result.stderr

    return source


def test_gpus_that_torch_cannot_use_stop_everything(environment):
    code, output, message = environment(gpus=0, smi_exit=0)
    assert code == 1 and output == ""
    assert "(driver 550.54)" in message and "torch 2.11.0+cu130, built for CUDA 13.0" in message
    assert "TORCH_INDEX_URL=" in message and "export CUDA_VISIBLE_DEVICES=" in message


@pytest.mark.parametrize(("machine", "output"), [
    ({"gpus": 0, "smi_exit": 0, "CUDA_VISIBLE_DEVICES": ""}, "0 cpu\n"),  # hidden on purpose
    ({"gpus": 0, "smi_exit": 6}, "0 cpu\n"),
    ({"gpus": 2, "smi_exit": 0}, "2 \n"),
])
def test_other_machines_go_on(environment, machine, output):
    assert environment(**machine) == (0, output, "")
