"""scripts/verify_checkpoint.py on folders with a manifest; real checkpoints are in tests/test_train.py and tests/training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training.manifest import seal, write_manifest

ROOT = Path(__file__).resolve().parents[2]


def verify(*paths: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts/verify_checkpoint.py", *paths], capture_output=True, text=True)


@pytest.fixture
def run_dir(tmp_path):
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        layout = {"world_size": 2, "zero_stage": 3, "precision": "bf16"}
        (folder / "state.json").write_text(json.dumps({"loop": {"step": step}, "layout": layout, "config": {}}))
        (folder / "part.pt").write_bytes(bytes(range(256)) * step)
        write_manifest(folder, {file.name: seal(file) for file in folder.iterdir()})
    (tmp_path / "checkpoints" / "step_00000015.tmp").mkdir()
    return tmp_path


def test_intact_ones(run_dir):
    done = verify(run_dir)
    assert done.returncode == 0 and done.stdout.count(": intact (") == 2 and "step 10, 2 files" in done.stdout and ".tmp" not in done.stdout


def test_damaged_ones(run_dir):
    part = run_dir / "checkpoints/step_00000005/part.pt"
    content = bytearray(part.read_bytes())
    content[7] ^= 1
    part.write_bytes(content)
    done = verify(run_dir)
    assert done.returncode == 1 and "step_00000005: DAMAGED: part.pt was altered" in done.stdout and "step_00000010: intact" in done.stdout
    assert verify(run_dir / "checkpoints/step_00000010").returncode == 0


def test_nothing_to_check(tmp_path):
    done = verify(tmp_path)
    assert done.returncode == 2 and "no checkpoint here" in done.stderr and "Traceback" not in done.stderr
