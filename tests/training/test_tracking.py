import io
import errno
import fcntl
import json
import logging
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_wandb_server import FakeWandbServer, wandb_without_account
from training import tracking
from training.tracking import ProgressLine, RunRecorder, collect_environment, read_metrics, run_tags


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    with wandb_without_account(tmp_path, monkeypatch):
        yield


def recorder(run_dir: Path, mode="disabled", info=None, **more) -> RunRecorder:
    return RunRecorder(run_dir, info=info or {}, wandb_mode=mode, wandb_project="test", run_name="a-run", **more)


def row(step: int, **more) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": 5.0 - step, "mfu": None, **more}


def start_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    root = Path(tracking.__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(root), **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def run_python(code: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    process = start_python(code)
    return process.wait(timeout=25), *process.communicate()


def test_run_json_holds_the_info_and_the_name(tmp_path):
    with recorder(tmp_path / "new" / "run", info={"config": {"lr": 1e-4}, "corpus_sha256": "abc", "peak": None}):
        pass
    written = json.loads((tmp_path / "new" / "run" / "run.json").read_text())
    assert written == {
        "run_name": "a-run",
        "wandb": {"id": None, "project": "test", "entity": None, "group": None, "tags": []},
        "config": {"lr": 1e-4}, "corpus_sha256": "abc", "peak": None,
        "starts": [{"from_step": 0, "world_size": None, "environment": None}],
    }
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["metrics.jsonl", "run.json"]


def test_disabled_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from training.tracking import RunRecorder\n"
        f"with RunRecorder(Path({str(tmp_path)!r}), info={{}}, wandb_mode='disabled', wandb_project='p', run_name='n') as r:\n"
        "    r.record({'step': 1})\n"
        "print('wandb' in sys.modules, 'torch' in sys.modules)"
    )
    assert run_python(code)[1] == "False False\n"


def test_every_row_is_on_disk_at_once(tmp_path):
    with recorder(tmp_path) as run:
        for step in (1, 2):
            run.record(row(step))
            assert [r["step"] for r in read_metrics(tmp_path)[0]] == list(range(1, step + 1))


def test_non_finite_numbers_are_valid_json_and_survive_the_round_trip(tmp_path):
    with recorder(tmp_path) as run:
        run.record(row(1, loss=math.nan, grad_norm=math.inf, least=-math.inf))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (read,), cut_off = read_metrics(tmp_path)
    assert math.isnan(read["loss"]) and read["grad_norm"] == math.inf and read["least"] == -math.inf
    assert read["mfu"] is None and not cut_off


def test_a_directory_with_metrics_is_not_written_to(tmp_path):
    with recorder(tmp_path, info={"first": 1}) as run:
        run.record(row(1))
    with pytest.raises(ValueError, match="already holds the metrics of a run"):
        recorder(tmp_path, info={"second": 2})
    assert json.loads((tmp_path / "run.json").read_text())["first"] == 1


def test_of_two_runs_started_together_one_is_refused(tmp_path):
    first = recorder(tmp_path, info={"first": 1})
    with pytest.raises(ValueError, match="another run is writing it at this moment; choose another run.name"):
        recorder(tmp_path, info={"second": 2})
    first.record(row(1))
    first.finish()
    assert json.loads((tmp_path / "run.json").read_text())["first"] == 1
    assert len(read_metrics(tmp_path)[0]) == 1


def test_a_run_killed_before_its_first_row_stands_in_nobodys_way(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from training.tracking import RunRecorder\n"
        f"run = RunRecorder(Path({str(tmp_path)!r}), info={{}}, wandb_mode='disabled', wandb_project='p', run_name='n')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_python(code)[0] == -9 and (tmp_path / "metrics.jsonl").exists()
    recorder(tmp_path).finish()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with recorder(tmp_path) as run:
        run.record(row(1))
    assert "metrics.jsonl cannot be locked (Operation not supported)" in caplog.text
    with pytest.raises(ValueError, match="already holds the metrics of a run"):
        recorder(tmp_path)


def test_offline_writes_the_same_rows_to_a_wandb_file(tmp_path):
    with recorder(tmp_path, "offline", info={"config": {"lr": 0.25}}) as run:
        run.record(row(1, val_loss=9.5))
        run.record(row(2, loss=math.nan))
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1, 2]
    (wandb_file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    stored = stored_by_wandb(wandb_file)
    assert stored["history"] == [
        {"step": 1, "tokens": 100, "loss": 4.0, "val_loss": 9.5},
        {"step": 2, "tokens": 200, "loss": "NaN"},
    ]
    assert stored["config"]["config"] == {"lr": 0.25}
    assert stored["step_metric"] == {"*": "tokens"}


def stored_by_wandb(path: Path) -> dict:
    """A .wandb file is a 7-byte header and records: checksum (4 bytes), length (2), kind (1), protobuf (while below 32 kB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {"history": [], "config": {}, "step_metric": {}}
    content = path.read_bytes()[7:]
    while content:
        _checksum, length, _kind = struct.unpack("<IHB", content[:7])
        record, content = Record.FromString(content[7 : 7 + length]), content[7 + length :]
        for item in record.run.config.update:
            found["config"][item.key] = json.loads(item.value_json)
        if record.metric.glob_name:
            found["step_metric"][record.metric.glob_name] = record.metric.step_metric
        history = {item.nested_key[0]: json.loads(item.value_json, parse_constant=str) for item in record.history.item}
        if history:
            found["history"].append({key: value for key, value in history.items() if not key.startswith("_")})
    return found


def test_online_without_a_key_is_one_message_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.wandb=online: no API key .*wandb login.*tracking\.wandb=offline"):
        recorder(tmp_path, "online")
    # The refused start left nothing that stands in the way of the next one.
    recorder(tmp_path, "disabled").finish()


def test_a_dead_server_is_a_warning_and_the_run_is_recorded_offline(tmp_path):
    """All at once, as each waits for wandb to give up."""
    code = (
        "import logging, sys, time; from pathlib import Path; from training.tracking import RunRecorder; start = time.monotonic()\n"
        "logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s', stream=sys.stdout)\n"
        "run = RunRecorder(Path(sys.argv[1]), info={}, wandb_mode='online', wandb_project='p', run_name='n')\n"
        "print(time.monotonic() - start)\n"
        "run.record({'step': 1}); run.finish()"
    )
    with FakeWandbServer("silent") as silent, FakeWandbServer("errors") as errors:
        servers = {"refuses": "http://127.0.0.1:9", "no-name": "https://wandb.invalid", "silent": silent.url, "errors": errors.url}
        processes = {
            case: start_python(code, str(tmp_path / case), WANDB_BASE_URL=server, WANDB_API_KEY="0" * 40)
            for case, server in servers.items()
        }
        results = {case: (process, *process.communicate(timeout=60)) for case, process in processes.items()}
    for case, (process, output, errors) in results.items():
        assert process.returncode == 0, errors
        warning, seconds = output.splitlines()
        assert warning.startswith(f"WARNING wandb did not start with the server {servers[case]}")
        assert warning.endswith(f"upload it later with `python scripts/sync_wandb.py {tmp_path / case}`")
        assert float(seconds) < 30
        assert "Traceback" not in errors
        assert len(read_metrics(tmp_path / case)[0]) == 1
        assert len(list((tmp_path / case / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"tracking\.wandb=offline: the package wandb is not installed"):
        recorder(tmp_path, "offline")


def test_training_goes_on_when_wandb_dies(tmp_path):
    code = (
        "import logging, os, signal, sys, time; from pathlib import Path; from training.tracking import RunRecorder\n"
        "logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s', stream=sys.stdout)\n"
        f"run = RunRecorder(Path({str(tmp_path)!r}), info={{}}, wandb_mode='offline', wandb_project='p', run_name='n')\n"
        "run.record({'step': 1})\n"
        "children = [p for p in Path('/proc').glob('[0-9]*') if f'PPid:\\t{os.getpid()}\\n' in (p / 'status').read_text()]\n"
        "assert children\n"
        f"for child in children: os.kill(int(child.name), signal.SIGKILL)\n"
        "time.sleep(0.5)\n"
        "for step in range(2, 6): run.record({'step': step})\n"
        "run.finish()"
    )
    exit_code, output, errors = run_python(code)
    assert exit_code == 0, errors
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1, 2, 3, 4, 5]
    (warning,) = output.splitlines()
    assert warning.startswith("WARNING wandb failed") and "metrics.jsonl" in warning and "scripts/sync_wandb.py" in warning


def test_a_failed_upload_at_the_end_is_a_warning_and_nobody_else_uploads_meanwhile(tmp_path, caplog):
    run = recorder(tmp_path)

    class Unreachable:
        def finish(self, exit_code):
            with pytest.raises(BlockingIOError):
                tracking.open_locked(tmp_path / "metrics.jsonl")
            raise TimeoutError("not all data was uploaded")

    run._wandb = Unreachable()
    with caplog.at_level(logging.WARNING):
        run.finish()
        run.finish()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not all data was uploaded" in caplog.text
    tracking.open_locked(tmp_path / "metrics.jsonl").close()


def steps(run_dir: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / name).read_text().splitlines()]


def run_to(run_dir: Path, last: int, **more) -> None:
    with recorder(run_dir, **more) as run:
        for step in range((more.get("resume_step") or 0) + 1, last + 1):
            run.record(row(step, skipped=False))


def test_a_resumed_run_goes_on_after_its_checkpoint_and_loses_nothing(tmp_path):
    run_to(tmp_path, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    run_to(tmp_path, 8, resume_step=5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    replaced = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced[:5]] == [6, 7, 8, 9, 10] and replaced[5:] == ['{"step": 11, "lo']
    run_to(tmp_path, 9, resume_step=7)
    assert steps(tmp_path) == list(range(1, 10))
    assert (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()[6:] == [json.dumps(row(8, skipped=False))]


def test_a_resume_where_nothing_is_to_replace_leaves_the_rows_alone(tmp_path):
    run_to(tmp_path, 5)
    run_to(tmp_path, 7, resume_step=5)
    assert steps(tmp_path) == list(range(1, 8))
    assert not (tmp_path / "metrics.replaced.jsonl").exists()


def test_a_resume_from_step_0_replaces_every_row(tmp_path):
    run_to(tmp_path, 3)
    run_to(tmp_path, 2, resume_step=0)
    assert steps(tmp_path) == [1, 2] and steps(tmp_path, "metrics.replaced.jsonl") == [1, 2, 3]


def test_a_last_row_without_its_newline_is_a_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    run_to(tmp_path, 3, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_rows_that_a_power_loss_took_are_one_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x00\x00\x00\n{"step": 3}\n')
    run_to(tmp_path, 6, resume_step=5)
    assert steps(tmp_path) == [1, 3, 6]
    (said,) = [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()]
    assert "lacks 3 of the 5 steps" in said


def test_a_crash_while_rows_are_replaced_loses_none(tmp_path, monkeypatch):
    run_to(tmp_path, 4)

    def crash(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(tracking, "rename_durably", crash)
        recorder(tmp_path, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]
    run_to(tmp_path, 3, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3] and set(steps(tmp_path, "metrics.replaced.jsonl")) == {3, 4}


@pytest.mark.parametrize("resume_step", [None, 1])
def test_a_second_run_is_refused_while_a_resumed_one_writes(tmp_path, resume_step):
    run_to(tmp_path, 3)
    with recorder(tmp_path, resume_step=2) as first:
        with pytest.raises(ValueError, match="another run is writing it at this moment"):
            recorder(tmp_path, resume_step=resume_step)
        first.record(row(3))
    assert steps(tmp_path) == [1, 2, 3]


def test_a_second_run_that_opened_the_file_before_it_was_replaced_is_refused(tmp_path, monkeypatch):
    run_to(tmp_path, 3)
    lock, resumed = fcntl.flock, []

    def lock_late(file, operation):
        if not resumed:
            resumed.append(None)
            resumed[0] = recorder(tmp_path, resume_step=2)  # another process, between this one's opening and locking
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(ValueError, match="another run is writing it at this moment"):
        recorder(tmp_path, resume_step=1)
    resumed[0].record(row(3))
    assert steps(tmp_path) == [1, 2, 3]


def test_sync_writes_the_rows_through_to_the_disk(tmp_path, monkeypatch):
    synced = []
    with recorder(tmp_path) as run:
        run.record(row(1))
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
        run.sync()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]


def starts(run_dir: Path) -> list[tuple]:
    found = json.loads((run_dir / "run.json").read_text())["starts"]
    return [(start["from_step"], start["world_size"], start["environment"]) for start in found]


def test_run_json_lists_the_starts_of_a_run(tmp_path, caplog):
    run_to(tmp_path, 4, info={"world_size": 2, "environment": {"gpu_name": "A"}})
    run_to(tmp_path, 6, info={"world_size": 1, "environment": {"gpu_name": "B"}, "config": {"lr": 2}}, resume_step=3)
    assert starts(tmp_path) == [(0, 2, {"gpu_name": "A"}), (3, 1, {"gpu_name": "B"})]
    assert json.loads((tmp_path / "run.json").read_text())["config"] == {"lr": 2}
    assert not caplog.records
    (tmp_path / "run.json").write_text('{"run_na')
    run_to(tmp_path, 6, resume_step=5)
    assert starts(tmp_path) == [(5, None, None)] and "run.json is damaged" in caplog.text


def test_a_run_keeps_its_wandb_id(tmp_path):
    with recorder(tmp_path, "offline") as run:
        run.record(row(1))
        first = run.wandb_id
    assert len(first) == 8 and list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))
    with recorder(tmp_path, "disabled", resume_step=1) as run:
        assert run.wandb_id is None
    with recorder(tmp_path, "offline", resume_step=1) as run:
        assert run.wandb_id == first
    with recorder(tmp_path, "offline", resume_step=1, wandb_id="checkpoint") as run:
        assert run.wandb_id == "checkpoint"
    assert json.loads((tmp_path / "run.json").read_text())["wandb"]["id"] == "checkpoint"


def test_flags_in_a_row_come_back_as_flags(tmp_path):
    run_to(tmp_path, 1)
    assert read_metrics(tmp_path)[0][0]["skipped"] is False


@pytest.mark.parametrize(
    ("parameters", "size"),
    [(900, "900"), (8_400_000, "8.4M"), (124_439_808, "124M"), (999_700_000, "1.0B"), (1_315_000_000, "1.3B"), (12_850_000_000, "13B")],
)
def test_tags_say_what_a_run_is(parameters, size):
    config = {
        "model": {"sequence_length": 1024}, "attention": {"backend": "triton"}, "zero": {"stage": 3}, "train": {"precision": "bf16"},
    }
    assert run_tags(config, parameters) == [size, "seq1024", "triton", "zero3", "bf16"]
    assert run_tags(config | {"megatron": {"attention": "ours"}}, parameters) == [size, "seq1024", "triton", "megatron", "bf16"]
    assert run_tags(config | {"megatron": {"attention": "megatron"}}, parameters) == [size, "seq1024", "DotProductAttention", "megatron", "bf16"]


def test_a_last_line_cut_off_is_left_out_and_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == ([{"step": 1, "loss": 2.0}], True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"step": 1}\n{"ste\n{"step": 3}\n', "line 2 is damaged"),
        (b'{"step": 1}\n{"ste\n', "line 2 is damaged"),
        (b'{"step": 1}\n[1]\n', "line 2 is damaged"),
        (b'{"step": 1}\n\x00\xff\n{"step": 3}\n', "line 2 is damaged"),
        (b'{"st', "line 1 is damaged"),
    ],
)
def test_damaged_metrics_are_refused_with_the_line(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_environment_names_commit_and_dirty_files(tmp_path, monkeypatch):
    repository = tmp_path.resolve() / "repository"
    repository.mkdir()
    monkeypatch.setattr(tracking, "_REPOSITORY", repository)
    monkeypatch.delenv("GIT_SHA", raising=False)
    assert (collect_environment()["git_sha"], collect_environment()["git_dirty"]) == (None, None)
    git(repository, "init", "-q")
    (repository / "file").write_text("one")
    git(repository, "add", "file")
    git(repository, "commit", "-q", "-m", "first")
    (repository / "untracked").write_text("a run's output")
    assert (collect_environment()["git_sha"], collect_environment()["git_dirty"]) == (git(repository, "rev-parse", "HEAD"), False)
    (repository / "file").write_text("two")
    assert collect_environment()["git_dirty"] is True
    # A copy inside someone else's clone has no commit of its own.
    (repository / "copy").mkdir()
    monkeypatch.setattr(tracking, "_REPOSITORY", repository / "copy")
    assert collect_environment()["git_sha"] is None


def test_git_sha_of_the_environment_counts_outside_a_clone_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_REPOSITORY", tmp_path.resolve())
    monkeypatch.setenv("GIT_SHA", "abc123")
    assert (collect_environment()["git_sha"], collect_environment()["git_dirty"]) == ("abc123", None)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert (collect_environment()["git_sha"], collect_environment()["git_dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(tracking, "_REPOSITORY", tmp_path.resolve() / "copy")
    assert (collect_environment()["git_sha"], collect_environment()["git_dirty"]) == ("abc123", None)


def test_environment_is_json_with_versions():
    import torch

    environment = json.loads(json.dumps(collect_environment()))
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["gpu_count"] == torch.cuda.device_count()
    assert environment["cudnn_version"] == torch.backends.cudnn.version()
    assert environment["date_utc"].endswith("+00:00")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress_row(step: int, **more) -> dict:
    return {"step": step, "loss": 3.5, "tokens_per_second": 512_345.0, "mfu": 0.4321, "elapsed_seconds": 60.0 + 2 * step, **more}


def test_progress_in_a_log_file_is_one_line_every_n_steps():
    stream = io.StringIO()
    progress = ProgressLine(12, every=5, stream=stream)
    for step in range(1, 13):
        progress.update(progress_row(step))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines] == ["step  1/12", "step  5/12", "step 10/12", "step 12/12"]
    assert lines[0] == "step  1/12 | loss 3.5000 | 512k tokens/s | MFU 43.2% | ETA -"
    # Two seconds a step; the minute before the first one is start-up and does not count.
    assert lines[1].endswith("ETA 0:00:14") and lines[3].endswith("ETA 0:00:00")


def test_progress_on_a_terminal_is_rewritten_in_place():
    stream = Terminal()
    progress = ProgressLine(3, stream=stream)
    progress.update(progress_row(1, mfu=None))
    progress.update(progress_row(2, val_loss=1.5, val_perplexity=4.48, val_bits_per_byte=2.16))
    progress.update(progress_row(3))
    progress.close()
    progress.close()
    shown = [line.split("\r\x1b[K")[-1] for line in stream.getvalue().split("\n")]
    assert shown[0].startswith("step 2/3 | loss")
    assert shown[1] == "step 2/3 | validation loss 1.5000 nats/token | perplexity 4.48 | 2.1600 bits/byte"
    assert shown[2].startswith("step 3/3 | loss") and shown[3:] == [""]
    assert "MFU - " in stream.getvalue()


@pytest.mark.parametrize(("speed", "text"), [(7.4, "7"), (987.0, "987"), (5_230.0, "5.23k"), (52_300.0, "52.3k"), (1_284_000.0, "1.28M")])
def test_progress_speed_has_three_digits(speed, text):
    stream = io.StringIO()
    ProgressLine(1, stream=stream).update(progress_row(1, tokens_per_second=speed))
    assert f"| {text} tokens/s |" in stream.getvalue()
