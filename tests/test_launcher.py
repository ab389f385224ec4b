"""train.py under the real launcher, two processes: what happens when the launcher is stopped, killed, or finds what a dead run left."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.launching import deepspeed_run, deepspeed_start
from training.corpus import write_corpus
from training.tokenizers import load_tokenizer
from training.tracking import read_metrics

TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 40
STEPS = 2000  # more than any of these runs gets to


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launcher")
    write_corpus(folder / "sonnet", tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT], "validation": [TEXT]}, provenance={})
    (folder / "tiny.yaml").write_text(f"""
run: {{output_dir: {folder}/runs}}
model: {{layers: 1, hidden_size: 32, heads: 1, vocab_size: 257, sequence_length: 32}}
data: {{corpus: {folder}/sonnet}}
train: {{steps: {STEPS}, global_batch_size: 4, precision: fp32}}
optimizer: {{warmup_steps: 0}}
eval: {{every: 0, sequences: 2}}
tracking: {{log_every: 1, wandb: disabled}}
""")
    return folder / "tiny.yaml"


def family(process) -> list[psutil.Process]:
    """The deepspeed command, launch.py, and the ranks."""
    command = psutil.Process(process.pid)
    (launch,) = command.children()
    return [command, launch, *launch.children()]


def seconds_until_gone(processes: list[psutil.Process], limit: float) -> float:
    began = time.monotonic()
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() - began > limit:
            left = [process.cmdline() for process in processes if process.is_running()]
            for process in processes:
                process.kill()
            raise TimeoutError(f"still there: {left}")
        time.sleep(0.1)
    return time.monotonic() - began


ENDS = {
    "SIGTERM to the deepspeed command": lambda command, launch, *ranks: command.terminate(),
    "SIGUSR1 to the deepspeed command": lambda command, launch, *ranks: command.send_signal(signal.SIGUSR1),
    "SIGTERM to launch.py": lambda command, launch, *ranks: launch.terminate(),
    "kill -9 of launch.py": lambda command, launch, *ranks: launch.kill(),
    "Ctrl-C": lambda command, launch, *ranks: os.killpg(command.pid, signal.SIGINT),
}


@pytest.mark.parametrize("end", ENDS)
def test_one_checkpoint_a_marker_and_no_orphan(run_file, end):
    name = end.replace(" ", "-")
    run = deepspeed_start("train.py", "--config", run_file, f"run.name={name}")
    printed = []
    reader = threading.Thread(target=lambda: printed.extend(line for line in run.stdout), daemon=True)
    reader.start()
    deadline = time.monotonic() + 120
    while not any(line.startswith("step") for line in printed):
        assert time.monotonic() < deadline and run.poll() is None, "".join(printed) + run.stderr.read()
        time.sleep(0.1)
    processes = family(run)
    assert len(processes) == 4
    ENDS[end](*processes)
    seconds = seconds_until_gone(processes, limit=60)
    print(f"{end}: all processes gone after {seconds:.1f} s, exit code {run.wait()}")
    assert seconds < 15
    run_dir = run_file.parent / "runs" / name
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "stopped" and outcome["step"] == read_metrics(run_dir)[0][-1]["step"]
    assert [each.name for each in (run_dir / "checkpoints").glob("step_*")] == [f"step_{outcome['step']:08d}"]


def test_the_next_start_goes_on(run_file):
    done_before = json.loads((run_file.parent / "runs/Ctrl-C/outcome.json").read_text())["step"]
    done = deepspeed_run("train.py", "--config", run_file, "run.name=Ctrl-C", f"train.steps={done_before + 3}")
    assert done.returncode == 0 and f"{done_before} of {done_before + 3} steps are done" in done.stdout
    assert [row["step"] for row in read_metrics(run_file.parent / "runs/Ctrl-C")[0]] == list(range(1, done_before + 4))


def test_no_shared_memory_is_left_behind(run_file):
    """DeepSpeed's buffers, 66 MiB a process, would stay in memory until the machine is restarted."""
    done = deepspeed_run("train.py", "--config", run_file, "run.name=clean", "train.steps=1")
    port = done.args[done.args.index("--master_port") + 1]
    assert done.returncode == 0 and not list(Path("/dev/shm").glob(f"deepspeed*_{port}_*"))


def test_a_compilation_that_was_killed_does_not_hold_up_later_runs(run_file, tmp_path, monkeypatch):
    """torch's mark of a compilation under way outlives a killed process, and whoever finds it waits for its end."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    Path(_get_build_directory("deepspeed_shm_comm", verbose=False), "lock").touch()
    done = deepspeed_run("train.py", "--config", run_file, "run.name=after", "train.steps=1", timeout=120)
    assert done.returncode == 0, done.stderr
