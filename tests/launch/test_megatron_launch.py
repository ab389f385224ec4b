"""launch/megatron.sh: what it installs and how many processes it starts."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("gpus", "processes"), [(4, "4"), (0, "1")])
def test_it_installs_the_extra_and_starts_a_process_for_every_gpu(tmp_path, gpus, processes):
    for folder in ("launch", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "launch/megatron.sh", tmp_path / "launch")
    (tmp_path / "launch/install.sh").touch()
    (tmp_path / "launch/environment.sh").write_text(f'cd "{tmp_path}"; PATH={tmp_path}/bin:$PATH; gpus={gpus}\n')
    for name in ("python", "torchrun"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >>{tmp_path}/called\n')
        program.chmod(0o755)
    subprocess.run(["bash", tmp_path / "launch/megatron.sh", "--config", "file.yaml", "train.steps=5"], env={"PATH": os.environ["PATH"]}, cwd="/",
                   check=True, timeout=60)  # fmt: skip
    installed, started = (tmp_path / "called").read_text().split("torchrun\n")
    assert installed.startswith("python\n-m\npip\ninstall\n") and installed.endswith("-r\nrequirements-megatron.txt\n")
    assert started.split() == ["--standalone", "--nproc_per_node", processes, "scripts/megatron_pretrain.py", "--config", "file.yaml", "train.steps=5"]
