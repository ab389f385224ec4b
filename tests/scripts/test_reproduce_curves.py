"""scripts/reproduce_curves.sh: whose Python it runs, and what it runs."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from training.config import load_config

ROOT = Path(__file__).parents[2]


def reproduce(folder: Path, part: str, *, has_venv: bool = False, gpus: int = 1, together: int = 1) -> list[str]:
    """The commands that a part runs, each after the folder of its program; the programs do nothing but tell, and a training run ends once
    `together` GPUs have had one."""
    (folder / "trained").mkdir()
    train = f'touch "{folder}/trained/$3"; while [ $(ls "{folder}/trained" | wc -l) -lt {together} ]; do sleep 0.05; done; '
    for name in ("scripts", "launch"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "scripts/reproduce_curves.sh", folder / "scripts")
    shutil.copy(ROOT / "launch/environment.sh", folder / "launch")
    for place in ["own"] + [".venv/bin"] * has_venv:
        (folder / place).mkdir(parents=True)
        for name in ("python", "python3", "deepspeed"):
            program = folder / place / name
            wait = train if name == "deepspeed" else ""
            program.write_text(f'#!/bin/sh\ncase $1 in -c) echo {gpus} ;; *) {wait}echo "{place} $*" ;; esac\n')
            program.chmod(0o755)
    if has_venv:
        (folder / ".venv/bin/activate").write_text(f"PATH={folder}/.venv/bin:$PATH\n")
    result = subprocess.run(["bash", folder / "scripts/reproduce_curves.sh", part], capture_output=True, text=True, timeout=60,
                            env={"PATH": f"{folder}/own:{os.environ['PATH']}"})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("has_venv", [True, False])
def test_the_virtual_environment_is_used_where_there_is_one(tmp_path, has_venv):
    used = ".venv/bin" if has_venv else "own"
    command = "scripts/prepare_data.py --source python-source --tokenizer gpt2 --out data/python-source-gpt2"
    assert reproduce(tmp_path, "data", has_venv=has_venv) == [f"{used} {command}"]


@pytest.mark.parametrize("part, gpus, runs, steps", [("seeds", 3, 8, 150), ("documents", 1, 3, 75), ("documents", 8, 3, 75)])
def test_short_runs_are_spread_over_the_gpus(tmp_path, part, gpus, runs, steps):
    together = min(gpus, runs)
    *trained, compared = (line.split() for line in reproduce(tmp_path, part, gpus=gpus, together=together))
    configs = {}
    for words in trained:
        file, *overrides = words[words.index("--config") + 1 :]
        config, _ = load_config(ROOT / file, [each for each in overrides if not each.startswith("attention.backend=")])  # those need a GPU
        configs[config.run.name] = config, words[words.index("--include") + 1]
    assert len(configs) == len(trained) == runs
    devices = {device for _, device in configs.values()}
    assert len(devices) == together and devices <= {f"localhost:{gpu}" for gpu in range(gpus)}
    assert compared[1] == "scripts/compare_runs.py" and f"docs/results/{part}.json" in compared
    for config, _ in configs.values():
        assert config.train.steps == steps and config.run.output_dir == f"runs/{part}"
        assert config.train.micro_batch_size * config.model.sequence_length == 32 * 1024
        assert config.attention.document_mask == (part == "documents" and config.run.name != "triton-unmasked")


@pytest.mark.parametrize("part, runs, results", [("precisions", 5, ["precisions"]), ("modes", 21, ["modes"]), ("hopper", 8, ["hopper-124m", "hopper-1.3b"])])
def test_the_runs_of_other_parts_are_configurations_that_load(tmp_path, part, runs, results):
    commands = [line.split() for line in reproduce(tmp_path, part)]
    names = set()
    for words in commands[:runs]:
        file, *overrides = words[words.index("--config") + 1 :]
        # Without a GPU attention is that of the CPU, which selective checkpointing knows too.
        names.add(load_config(ROOT / file, [each for each in overrides if each != "attention.backend=hopper"])[0].run.name)
    assert len(names) == runs and len(commands) == runs + len(results)
    assert all(f"docs/results/{result}.json" in words for result, words in zip(results, commands[runs:]))


@pytest.mark.parametrize("gpus", [1, 4])
def test_time_to_a_loss_is_taken_of_runs_that_differ_in_attention_alone(tmp_path, gpus):
    *trained, compared = (line.split() for line in reproduce(tmp_path, "to_loss", gpus=gpus))
    seen = set()
    for words in trained:
        processes, (file, *overrides) = words[words.index("--include") + 1].count(",") + 1, words[words.index("--config") + 1 :]
        config, _ = load_config(ROOT / file, overrides, world_size=processes)
        seen.add((config.run.name, processes))
        assert config.train.micro_batch_size == 32 and config.eval.every == 10
    assert seen == {(f"{name}-{count}gpu", count) for name in ("eager", "sdpa", "ours") for count in {1, gpus}} and len(trained) == len(seen)
    assert compared[compared.index("--target") + 1] == "3.0" and "docs/results/to_loss.json" in compared
