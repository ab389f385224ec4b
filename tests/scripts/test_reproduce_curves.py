"""scripts/reproduce_curves.sh: whose Python it runs."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("has_venv", [True, False])
def test_the_virtual_environment_is_used_where_there_is_one(tmp_path, has_venv):
    for folder in ("scripts", "launch"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "scripts/reproduce_curves.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
    for folder in ["own"] + [".venv/bin"] * has_venv:
        (tmp_path / folder).mkdir(parents=True)
        for name in ("python", "python3"):
            program = tmp_path / folder / name
            program.write_text(f'#!/bin/sh\ncase $1 in -c) echo 1 ;; *) echo "{folder} $*" ;; esac\n')
            program.chmod(0o755)
    if has_venv:
        (tmp_path / ".venv/bin/activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    result = subprocess.run(["bash", tmp_path / "scripts/reproduce_curves.sh", "data"], capture_output=True, text=True, timeout=60,
                            env={"PATH": f"{tmp_path}/own:{os.environ['PATH']}"})
    assert result.returncode == 0, result.stderr
    used = ".venv/bin" if has_venv else "own"
    assert result.stdout == f"{used} scripts/prepare_data.py --source python-source --tokenizer gpt2 --out data/python-source-gpt2\n"
