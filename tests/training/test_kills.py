"""kill -9 of either rank and of the launcher at 50 points of one run: it always goes on from its last complete checkpoint, to the same end."""

import itertools
import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint_contents import tensor_hashes
from tests.training.kill_worker import STEPS
from training.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, seed = tmp_path_factory.mktemp("kills"), secrets.randbelow(2**32)
    done = subprocess.run([sys.executable, "-m", "tests.training.kill_worker", str(folder), str(seed)], cwd=ROOT, capture_output=True, text=True)
    logs = "".join(log.read_text()[-4000:] for log in folder.glob("*.log"))
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}{logs}"
    print("seed", seed)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return json.loads((folder / "seen.json").read_text())


def test_every_start_goes_on_from_the_newest_complete_checkpoint(seen):
    assert len(seen["points"]) == 50 and {point["victim"] for point in seen["points"]} == {0, 1, "launcher"}
    went_on = [(after["resumed"], before["left"]) for before, after in itertools.pairwise(seen["points"]) if after["resumed"] is not None]
    assert all(resumed == left for resumed, left in went_on), went_on
    assert len(went_on) > 30, "the others were killed before they could say so"
    assert seen["codes"] == [0, 0]


def test_no_folder_that_looks_complete_is_damaged(seen):
    assert all(point["damaged"] == [] for point in seen["points"])


def test_no_process_outlives_its_launcher_by_15_seconds(seen):
    assert max(point["seconds"] for point in seen["points"]) < 15


def test_the_killed_run_ends_as_an_undisturbed_one_bit_for_bit(folder):
    rows = [[(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / "runs" / name)[0]] for name in ("killed", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    final = [tensor_hashes(folder / "runs" / name / "checkpoints" / f"step_{STEPS:08d}") for name in ("killed", "whole")]
    assert final[0] == final[1] and len(final[0]) == 6, "parameters, optimizer states and random generators of two ranks"
