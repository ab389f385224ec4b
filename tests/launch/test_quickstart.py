"""launch/quickstart.sh: how many processes it starts, on which devices, and into which folder."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(tmp_path):
    """Run quickstart.sh on a machine with ``gpus`` GPUs, with nothing installed; returns its output and the launcher's arguments."""
    for folder in ("launch", "configs", "bin", "data/shakespeare-bytes"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/shakespeare-bytes/manifest.json").touch()
    shutil.copy(ROOT / "launch/quickstart.sh", tmp_path / "launch")
    (tmp_path / "configs/quickstart.yaml").write_text("train:\n  global_batch_size: 48  # sequences\n")
    (tmp_path / "launch/install.sh").touch()
    (tmp_path / "launch/environment.sh").write_text(f'cd "{tmp_path}"; PATH={tmp_path}/bin:$PATH; gpus=$GPUS\n')
    programs = {"python": "echo 29511", "deepspeed": f'printf "%s\\n" "$@" >{tmp_path}/arguments; exit $LAUNCHER_EXIT'}
    for name, body in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    def run(*overrides, gpus=0, launcher_exit=0, visible=""):
        environment = {"PATH": os.environ["PATH"], "GPUS": str(gpus), "LAUNCHER_EXIT": str(launcher_exit), "CUDA_VISIBLE_DEVICES": visible}
        (tmp_path / "arguments").unlink(missing_ok=True)
        command = ["bash", tmp_path / "launch/quickstart.sh", *overrides]
        result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
        assert result.returncode == launcher_exit, result.stderr
        assert "quickstart.sh: line" not in result.stderr
        return result.stdout, (tmp_path / "arguments").read_text().split()

    run.folder = tmp_path
    return run


def value(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def test_two_processes_without_a_gpu(quickstart):
    output, arguments = quickstart("train.steps=50")
    assert value(arguments, "--num_gpus") == "2"
    assert arguments[-1] == "train.steps=50" and value(arguments, "--config") == "configs/quickstart.yaml"
    assert f"{quickstart.folder}/runs/quickstart/loss.png" in output and f"{quickstart.folder}/runs/quickstart/metrics.jsonl" in output


def test_every_gpu_is_used(quickstart):
    output, arguments = quickstart(gpus=4)
    assert value(arguments, "--include") == "localhost:0,1,2,3" and "using" not in output


@pytest.mark.parametrize(("gpus", "override", "used"), [(5, [], 4), (7, [], 6), (4, ["train.global_batch_size=6"], 3)])
def test_gpus_that_do_not_divide_the_batch_are_left_out_and_named(quickstart, gpus, override, used):
    output, arguments = quickstart(*override, gpus=gpus)
    assert value(arguments, "--include") == "localhost:" + ",".join(map(str, range(used)))
    assert f"using {used} of {gpus} GPUs" in output


def test_visible_devices_are_kept_to(quickstart):
    _, arguments = quickstart(gpus=2, visible="3,5")
    assert value(arguments, "--include") == "localhost:3,5"


@pytest.mark.parametrize("batch", ["null", "many"])
def test_a_batch_that_is_no_number_is_left_to_train_py(quickstart, batch):
    _, arguments = quickstart(f"train.global_batch_size={batch}", gpus=5)
    assert value(arguments, "--include") == "localhost:0,1,2,3,4" and arguments[-1] == f"train.global_batch_size={batch}"


@pytest.mark.parametrize("devices", ["GPU-8932f937-d72c,GPU-1132f937-d72d", "MIG-GPU-8932f937/1/0,MIG-GPU-8932f937/2/0"])
def test_devices_named_by_uuid_are_refused_with_the_remedy(quickstart, devices):
    command = ["bash", quickstart.folder / "launch/quickstart.sh"]
    environment = {"PATH": os.environ["PATH"], "GPUS": "2", "CUDA_VISIBLE_DEVICES": devices}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and not (quickstart.folder / "arguments").exists()
    (message,) = result.stderr.splitlines()
    assert devices in message and "CUDA_VISIBLE_DEVICES=0,1" in message


def test_a_run_is_never_overwritten(quickstart):
    for taken in ("quickstart", "quickstart-2"):
        (quickstart.folder / "runs" / taken).mkdir(parents=True)
    _, arguments = quickstart()
    assert "run.name=quickstart-3" in arguments


def test_the_users_folder_and_name_win(quickstart):
    output, arguments = quickstart("run.output_dir=mine", "run.name=first")
    assert arguments[-2:] == ["run.output_dir=mine", "run.name=first"] and f"{quickstart.folder}/mine/first/loss.png" in output


def test_a_failed_run_is_a_failure(quickstart):
    output, _ = quickstart(launcher_exit=3)
    assert "loss.png" not in output
