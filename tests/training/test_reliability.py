"""train.py stopped, resumed, killed, converted, and given damaged checkpoints: what it leaves and what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint_contents import tensor_hashes
from training.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliability")
    done = subprocess.run([sys.executable, "-m", "tests.training.reliability_worker", str(folder)], cwd=ROOT, capture_output=True, text=True)
    logs = "".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted((folder / "logs").glob("*"), key=lambda log: log.stat().st_mtime)[-3:])
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return json.loads((folder / "seen.json").read_text())


def curve(folder: Path, run: str) -> list[tuple]:
    return [(row["step"], row["tokens"], row["lr"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / "runs" / run)[0]]


def test_ten_steps_and_ten_more_are_twenty_bit_for_bit(folder, seen):
    assert seen["exact"]["stopped"]["outcome"] == {"outcome": "stopped", "reason": "SIGTERM", "step": 10,
                                                  "checkpoint": str(folder / "runs/parts/checkpoints/step_00000010")}
    assert curve(folder, "parts") == curve(folder, "whole")[:20] and len(curve(folder, "parts")) == 20
    parts, whole = (tensor_hashes(folder / "runs" / run / "checkpoints/step_00000020") for run in ("parts", "whole"))
    assert parts == whole and len(whole) == 6
    started = json.loads((folder / "runs/parts/run.json").read_text())["starts"]
    assert [start["from_step"] for start in started] == [0, 10]


def test_time_goes_on_where_it_stopped(folder):
    elapsed = [row["elapsed_seconds"] for row in read_metrics(folder / "runs/parts")[0]]
    assert elapsed == sorted(elapsed) and elapsed[10] - elapsed[9] < 20


def test_two_one_and_two_processes_read_the_same_data_and_lose_only_rounding(folder, seen):
    assert [seen["exact"][f"elastic_{part}"]["code"] for part in range(3)] == [75, 75, 0]
    elastic, whole = curve(folder, "elastic"), curve(folder, "elastic-whole")
    assert len(elastic) == 20
    for found, expected in zip(elastic, whole, strict=True):
        assert found[:3] == expected[:3]
        assert found[3:] == pytest.approx(expected[3:], rel=1e-5)
    worlds = [start["world_size"] for start in json.loads((folder / "runs/elastic/run.json").read_text())["starts"]]
    assert worlds == [2, 1, 2]


def test_every_signal_at_every_moment_leaves_one_checkpoint_and_a_marker(seen):
    assert len(seen["signals"]) == 27
    for case in seen["signals"]:
        what = f"{case['signal']} to {case['victim']} at {case['moment']}: {case['output'][-1500:]}"
        assert case["seconds"] < 15, what
        assert case["outcome"]["outcome"] == "stopped", what
        if case["moment"] == "start":
            assert case["checkpoints"] == [] and case["outcome"]["step"] is None, what
        else:
            assert case["checkpoints"] == ["step_00000008"] and case["outcome"]["step"] == 8, what
            assert case["outcome"]["reason"] == ("the launcher's death" if case["victim"] == "launcher" else case["signal"]), what
            assert case["output"].count("the same command goes on from") == 1, what
        if case["victim"] != "launcher":
            assert case["code"] == 75, what


DAMAGED = {
    "shard truncated": "zero_pp_rank_1_mp_rank_00_optim_states.pt has", "shard empty": "zero_pp_rank_1_mp_rank_00_optim_states.pt has 0 bytes",
    "one bit flipped": "zero_pp_rank_1_mp_rank_00_optim_states.pt was altered", "shard deleted": "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing",
    "generators deleted": "rng_rank_00001.pt is missing", "state truncated": "state.json has", "manifest deleted": "manifest.json is missing",
    "manifest truncated": "manifest.json is damaged", "manifest emptied": "manifest.json is damaged", "newest empty": "manifest.json is missing",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, seen, case):
    run = seen["damage"][case]
    assert f"checkpoints/step_00000012 is damaged and passed over: {DAMAGED[case]}" in run["output"], run["output"]
    assert run["resumed"] == 8 and run["code"] == 0 and run["output"].count("passed over") == 1
    assert (folder / "runs" / case / "checkpoints/step_00000012.damaged").is_dir() and run["checkpoints"][-1] == "step_00000008"
    assert curve(folder, case) == curve(folder, "parts")


@pytest.mark.parametrize("case", ["half a newer one", "latest deleted", "latest garbled"])
def test_what_is_not_part_of_a_checkpoint_does_not_matter(folder, seen, case):
    run = seen["damage"][case]
    assert run["resumed"] == 12 and run["code"] == 0 and "damaged" not in run["output"]
    assert curve(folder, case) == curve(folder, "parts")
    assert not list((folder / "runs" / case / "checkpoints").glob("*.tmp"))


def test_several_damaged_checkpoints(folder, seen):
    assert seen["damage"]["two damaged"]["resumed"] == 4 and seen["damage"]["two damaged"]["output"].count("passed over") == 2
    assert curve(folder, "two damaged") == curve(folder, "parts")
    run = seen["damage"]["all damaged"]
    assert run["code"] == 2 and run["output"].count(" is damaged: ") == 3 and "no intact checkpoint is left" in run["output"]
    assert run["checkpoints"] == ["step_00000012", "step_00000008", "step_00000004"], "nothing is removed"


def test_rows_after_the_checkpoint_are_computed_again_and_kept_aside(folder, seen):
    replaced = [json.loads(line)["step"] for line in (folder / "runs/shard deleted/metrics.replaced.jsonl").read_text().splitlines()]
    assert replaced == [9, 10, 11, 12]
    early = [json.loads(line)["step"] for line in (folder / "runs/early/metrics.replaced.jsonl").read_text().splitlines()]
    assert early == [1, 2, 3, 4] and seen["crashed"]["early"][1]["code"] == 0
    assert curve(folder, "early") == curve(folder, "late") == curve(folder, "parts")
    assert "metrics.replaced.jsonl" in seen["crashed"]["early"][1]["output"]


def test_no_checkpoint_where_none_is_wanted(seen):
    (run,) = seen["crashed"]["none"]
    assert run["code"] == 75 and run["checkpoints"] == [] and run["outcome"]["checkpoint"] is None and "nothing was saved" in run["output"]


def test_a_checkpoint_that_would_run_code_is_refused(seen):
    assert len(seen["untrusted"]) == 4
    for case, run in seen["untrusted"].items():
        assert not run["ran"] and run["code"] == 2 and "would run code" in run["output"], case


REFUSED = {
    "missing": "does not exist", "run without": "holds no checkpoint", "damaged": "step_00000012 is damaged", "branch again": "already holds checkpoints",
    "older of its own": "has newer checkpoints", "never": "already holds checkpoints", "other run's": "already holds checkpoints", "finished": "holds a finished run",
    "other batch": "train.global_batch_size: 4 -> 8", "other model": "model.layers: 1 -> 2", "other seed": "run.seed: 1234 -> 7", "fewer steps": "12 steps are done",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_asked_for_and_cannot_be_is_refused(seen, case):
    run = seen["asked_for"][case]
    assert run["code"] == 2 and REFUSED[case] in run["output"] and "Traceback" not in run["output"], run["output"]


def test_a_run_branches_off_from_another_ones_checkpoint(folder, seen):
    branch = curve(folder, "branch")
    assert [row[0] for row in branch] == list(range(9, 21)) and seen["asked_for"]["branch"]["code"] == 0
    assert "changed since the checkpoint: optimizer.lr: 0.01 -> 0.005" in seen["asked_for"]["branch"]["output"]
    assert branch[0][3] == curve(folder, "parts")[8][3], "the first loss is computed before the other learning rate tells"
    assert branch[1][3] != curve(folder, "parts")[9][3]
    assert curve(folder, "branch2") == curve(folder, "parts")[12:]


def test_a_decay_that_begins_at_a_checkpoint_is_that_of_an_uninterrupted_run(folder, seen):
    assert curve(folder, "decayed") == curve(folder, "decayed-whole")[8:] and len(curve(folder, "decayed")) == 6
    branch, whole = (tensor_hashes(folder / "runs" / run / "checkpoints/step_00000014") for run in ("decayed", "decayed-whole"))
    assert branch == whole
    assert [row[2] for row in curve(folder, "stable")[2:]] == [0.01] * 8 and curve(folder, "stable")[:8] == curve(folder, "decayed-whole")[:8]
    output = seen["decays"]["branch"]["output"]
    assert "changed since the checkpoint: optimizer.schedule: constant -> wsd" in output
    assert "all 8 steps so far had the one that this configuration gives them" in output
    late = seen["decays"]["late"]
    assert late["code"] == 0 and "learning rate: step 6 had 0.01 and would have" in late["output"] and "no uninterrupted run has this curve" in late["output"]


def test_a_finished_run_goes_on_with_more_steps(folder, seen):
    assert seen["asked_for"]["longer"]["code"] == 0
    assert [row["step"] for row in read_metrics(folder / "runs/whole")[0]] == list(range(1, 25))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_full_disk_is_told_by_the_rank_that_met_it(seen, where):
    run = seen["disk_full"][where]
    assert run["code"] == 2 and "could not be written: [Errno 28] No space left on device" in run["output"] and run["checkpoints"] == [], run["output"]


def test_a_run_that_diverges_stops_and_says_what_to_look_at(folder, seen):
    run = seen["diverging"]
    rows = read_metrics(folder / "runs/diverging")[0]
    assert run["code"] == 2 and "steps 2 to 4 were skipped" in run["output"] and "lower optimizer.lr" in run["output"] and "Traceback" not in run["output"]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 3] and run["checkpoints"] == []


def test_a_hung_rank_does_not_outlive_a_signal_or_its_launcher(seen):
    assert 2 < seen["hung"]["signal"]["seconds"] < 10, "checkpoint.stop_seconds was 3"
    assert seen["hung"]["launcher"]["seconds"] < 15
