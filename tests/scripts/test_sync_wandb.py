import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import sync_wandb
from tests.fake_wandb_server import FakeWandbServer, wandb_without_account
from training import tracking, wandb_run
from training.tracking import RunRecorder

# One start of a run in a process of its own: its folder, mode, first and last step; it ends as a crash does.
CRASHING_START = """
import os, signal, sys; from pathlib import Path; from training.tracking import RunRecorder
folder, mode, first, last = sys.argv[1:]
info = {"world_size": 2, "config": {"lr": 1}}
run = RunRecorder(Path(folder), info=info, wandb_mode=mode, wandb_project="p", run_name="n", resume_step=int(first) - 1 or None)
for step in range(int(first), int(last) + 1): run.record({"step": step, "tokens": 100 * step, "from": int(first)})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    with wandb_without_account(tmp_path, monkeypatch), FakeWandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server


def crash(run_dir: Path, mode: str, first: int, last: int) -> None:
    root = Path(tracking.__file__).resolve().parents[1]
    process = subprocess.run(
        [sys.executable, "-c", CRASHING_START, run_dir, mode, str(first), str(last)],
        env={**os.environ, "PYTHONPATH": str(root)}, timeout=60,
    )
    assert process.returncode == -9


def start(run_dir: Path, mode: str, after: int | None = None, world_size: int = 1) -> RunRecorder:
    return RunRecorder(
        run_dir, info={"world_size": world_size, "config": {"lr": 1}}, run_name="n", wandb_mode=mode, wandb_project="p", wandb_group="g",
        wandb_tags=["124M"], resume_step=after,
    )


def record(run: RunRecorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.record({"step": step, "tokens": 100 * step, "from": first})


def wandb_id(run_dir: Path) -> str:
    return json.loads((run_dir / "run.json").read_text())["wandb"]["id"]


def page(server: FakeWandbServer, run_dir: Path) -> tuple:
    """What the server shows: (step, which start recorded it), name, group, tags, config, axis."""
    run = server.runs[wandb_id(run_dir)]
    config = {key: item["value"] for key, item in run.config().items()}
    internal = config.pop("_wandb")
    rows = [(line["_step"], line["from"]) for line in run.history()]
    shown = {key: run.attributes.get(key) for key in ("displayName", "groupName", "tags")}
    return rows, shown, config, [metric["2"] for metric in internal["m"] if "2" in metric]


def test_offline_starts_that_overlap_are_uploaded_once(tmp_path, server, capsys):
    run_dir = tmp_path / "run"
    crash(run_dir, "offline", 1, 10)
    with start(run_dir, "offline", after=5) as run:
        record(run, 6, 20)
    assert server.runs == {}
    assert sync_wandb.main([str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith(f"{run_dir}: 20 steps sent")
    expected = [(step, 1 if step <= 5 else 6) for step in range(1, 21)]
    rows, shown, config, axis = page(server, run_dir)
    assert rows == expected
    assert shown == {"displayName": "n", "groupName": "g", "tags": ["124M"]}
    assert config["config"] == {"lr": 1} and [start["world_size"] for start in config["starts"]] == [2, 1]
    assert axis == ["*"]
    assert sync_wandb.main([str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith(f"{run_dir}: 0 steps sent")
    assert page(server, run_dir)[0] == expected and len(server.runs) == 1


def test_an_online_run_that_crashes_and_resumes_shows_each_step_once(tmp_path, server):
    run_dir = tmp_path / "run"
    # Killed before wandb uploads for the first time: the resumed start brings the steps before it as well.
    crash(run_dir, "online", 1, 10)
    with start(run_dir, "online", after=5) as run:
        record(run, 6, 20)
    with start(run_dir, "online", after=15, world_size=4) as run:
        record(run, 16, 22)
    rows, shown, config, axis = page(server, run_dir)
    # wandb cannot replace what it was given: 16 to 20 are the rows that it saw first.
    assert rows == [(step, 1 if step <= 5 else 6 if step <= 20 else 16) for step in range(1, 23)]
    assert shown["tags"] == ["124M"] and axis == ["*"]
    assert config["world_size"] == 4 and [start["from_step"] for start in config["starts"]] == [0, 5, 15]
    assert sync_wandb.main([str(run_dir)]) == 0
    assert page(server, run_dir) == (rows, shown, config, axis)
    # Steps that the server has were not sent at all; wandb would have told of each here.
    logs = [path.read_text() for path in run_dir.glob("wandb/run-*/logs/debug-internal.log")]
    assert len(logs) == 3 and not any("ignoring partial history" in log for log in logs)


def test_a_server_that_dies_in_mid_run_holds_nothing_up_and_gets_the_rest_later(tmp_path, server, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "_FINISH_SECONDS", 2)
    run_dir = tmp_path / "run"
    run = start(run_dir, "online")
    record(run, 1, 5)
    server.condition = "silent"
    began = time.monotonic()
    record(run, 6, 500)
    assert time.monotonic() - began < 5
    run.finish()
    assert time.monotonic() - began < 10
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("training")]
    assert warning.startswith("wandb failed") and warning.endswith("when the run has ended") and f"sync_wandb.py {run_dir}`" in warning
    server.condition = "well"
    assert sync_wandb.main([str(run_dir)]) == 0
    assert server.steps(wandb_id(run_dir)) == list(range(1, 501))


def test_a_run_without_wandb_gets_an_id_and_keeps_it(tmp_path, server):
    with start(tmp_path / "run", "disabled") as run:
        record(run, 1, 3)
    for _ in range(2):
        assert sync_wandb.main([str(tmp_path / "run")]) == 0
    assert server.steps(wandb_id(tmp_path / "run")) == [1, 2, 3] and len(server.runs) == 1
    with start(tmp_path / "run", "online", after=3) as run:
        record(run, 4, 5)
    assert server.steps(run.wandb_id) == [1, 2, 3, 4, 5] and len(server.runs) == 1


def test_a_mistake_is_one_line_and_the_other_runs_are_uploaded(tmp_path, server, capsys):
    with start(tmp_path / "good", "disabled") as run:
        record(run, 1, 2)
    start(tmp_path / "empty", "disabled").finish()
    with start(tmp_path / "busy", "disabled") as run:
        record(run, 1, 1)
        assert sync_wandb.main([str(tmp_path / name) for name in ("missing", "empty", "busy", "good")]) == 2
    output, errors = capsys.readouterr()
    assert output.startswith(f"{tmp_path / 'good'}: 2 steps sent")
    expected = ["missing: not the directory of a run", "is empty", "is being recorded"]
    assert all(text in line for text, line in zip(expected, errors.splitlines(), strict=True))


def test_rows_that_the_server_refuses_are_not_called_uploaded(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setattr(sync_wandb, "CHECK_AFTER_SECONDS", (0,))
    with start(tmp_path / "run", "disabled") as run:
        record(run, 1, 2)
    server.condition = "no rows"
    assert sync_wandb.main([str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not show step 2" in line
    server.condition = "well"
    assert sync_wandb.main([str(tmp_path / "run")]) == 0
    assert server.steps(wandb_id(tmp_path / "run")) == [1, 2]


def test_without_a_key_or_a_server_it_ends_with_one_line(tmp_path, server, capsys, monkeypatch):
    with start(tmp_path / "run", "disabled") as run:
        record(run, 1, 2)
    monkeypatch.setattr(wandb_run, "_START_SECONDS", 1)
    server.condition = "errors"
    assert sync_wandb.main([str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sync_wandb:") and server.url in line
    monkeypatch.delenv("WANDB_API_KEY")
    assert sync_wandb.main([str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no API key" in line and server.runs == {}
