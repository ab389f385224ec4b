"""What a run leaves behind: run.json (what was run), metrics.jsonl (one row an optimizer step), wandb, and the progress line.

metrics.jsonl is the truth; wandb shows the same rows. All of it lies in the run directory.
"""

import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from training.files import rename_durably, write_atomically
from training.wandb_run import WandbRun, new_run_id, one_line, start_live, sync_command

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPLACED_FILE = "metrics.replaced.jsonl"

_REPOSITORY = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "numpy", "pydantic", "PyYAML", "tokenizers", "wandb")

logger = logging.getLogger(__name__)


class RunRecorder:
    """Writes a run's description and its metrics; one per run, on rank 0 only. Use it as a context manager or call `finish`.

    run_dir: created when absent. metrics.jsonl is locked for this run, then run.json is written atomically, then wandb starts.
    info: JSON-serialisable. run.json holds it with run_name, "wandb" (which run there) and "starts": for each start of the run, the step
    it went on from, and world_size and environment out of info. All but the name and "wandb" is also the wandb config.
    wandb_mode: "online" (offline with a warning when the server is dead), "offline" (files under run_dir/wandb, uploaded by
    scripts/sync_wandb.py) or "disabled" (wandb is not imported).
    wandb_id: the run's id in wandb out of the checkpoint; None takes the one in run.json when resuming, or a new one.
    resume_step: None for a new run. N goes on after optimizer step N: rows of later steps, which will be computed again, and lines that
    are damaged move from metrics.jsonl to metrics.replaced.jsonl.

    `wandb_id` (None when disabled) belongs into every checkpoint.

    Raises ValueError when a new run's run_dir already holds metrics, when another run is writing there, and when wandb cannot start for
    another reason than its server; the message names the remedy.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        info: dict[str, Any],
        run_name: str,
        wandb_mode: Literal["online", "offline", "disabled"],
        wandb_project: str,
        wandb_entity: str | None = None,
        wandb_group: str | None = None,
        wandb_tags: Sequence[str] = (),
        wandb_id: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._wandb: WandbRun | None = None
        self._metrics, rows = _open_for_recording(run_dir / METRICS_FILE, resume_step)
        try:
            before = {} if resume_step is None else _read_description_if_any(run_dir)
            run_id = wandb_id or before.get("wandb", {}).get("id") or (None if wandb_mode == "disabled" else new_run_id())
            start = {"from_step": resume_step or 0, "world_size": info.get("world_size"), "environment": info.get("environment")}
            description = {
                "run_name": run_name,
                "wandb": {
                    "id": run_id, "project": wandb_project, "entity": wandb_entity, "group": wandb_group, "tags": list(wandb_tags),
                },
                **info,
                "starts": [*before.get("starts", []), start],
            }
            write_description(run_dir, description)
            self.wandb_id = None if wandb_mode == "disabled" else run_id
            if wandb_mode != "disabled":
                self._wandb = start_live(description, mode=wandb_mode, run_dir=run_dir)
                if self._wandb.online:  # what an earlier start could not upload comes first: later it would be refused
                    self._show(rows)
        except BaseException:
            self._metrics.close()
            raise

    def record(self, row: dict[str, Any]) -> None:
        """Append one optimizer step: `row` maps names to int, float, bool, str or None, and holds "step".

        It is written as by `to_json`, which `read_metrics` turns back.
        """
        self._metrics.write(to_json(row) + "\n")
        self._metrics.flush()
        self._show([row])

    def sync(self) -> None:
        """Return when every recorded row would survive a power loss: called before a checkpoint that counts on them is published."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def finish(self, exit_code: int = 0) -> None:
        """End the wandb run, waiting at most 30 s for its uploads, and close the file; a second call does nothing.

        The file stays locked until then: another start, or scripts/sync_wandb.py, would upload the same steps again.
        """
        try:
            if self._wandb is not None:
                self._wandb.finish(exit_code)
                self._wandb = None
        except Exception as error:
            self._drop_wandb(error)
        finally:
            self._metrics.close()

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if exception_type is None else 1)

    def _show(self, rows: list[dict[str, Any]]) -> None:
        try:
            for row in rows if self._wandb else ():
                self._wandb.log(row)
        except Exception as error:
            self._drop_wandb(error)

    def _drop_wandb(self, error: Exception) -> None:
        """Go on without wandb: whatever its service, the network or the disk raised must not end a run that has its rows on disk."""
        self._wandb = None
        logger.warning(
            "wandb failed (%s); every row is in %s, and what the server lacks can be sent with `%s` when the run has ended",
            one_line(error), self._run_dir / METRICS_FILE, sync_command(self._run_dir),
        )


def open_locked(path: Path) -> TextIO:
    """The metrics file, opened for appending and locked until it is closed or the process ends, so that a run that died stands in
    nobody's way. Raises BlockingIOError while another run holds it."""
    while True:
        file = path.open("a", encoding="utf-8")
        _lock(file)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # a resumed run put another file in its place between opening and locking


def _lock(file: TextIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): two runs of this name at once would mix their rows", file.name, error.strerror)


def _open_for_recording(path: Path, resume_step: int | None) -> tuple[TextIO, list[dict[str, Any]]]:
    """The locked file, and the rows in it that the run goes on from."""
    try:
        file = open_locked(path)
    except BlockingIOError:
        raise ValueError(f"{path}: another run is writing it at this moment; choose another run.name") from None
    try:
        if resume_step is not None:
            return _go_on_after(resume_step, path, file)
        if os.fstat(file.fileno()).st_size > 0:
            raise ValueError(f"{path} already holds the metrics of a run; choose another run.name or move it away")
        return file, []
    except BaseException:
        file.close()
        raise


def _go_on_after(last_step: int, path: Path, file: TextIO) -> tuple[TextIO, list[dict[str, Any]]]:
    """Leave the rows of steps up to last_step, ascending, in the file; what else it holds moves to REPLACED_FILE."""
    content = path.read_bytes()
    kept, rows, replaced = [], [], []
    for line in content.splitlines():
        try:
            row = _parse_row(line)
            belongs = (rows[-1]["step"] if rows else 0) < row["step"] <= last_step
        except ValueError:
            belongs = False
        if belongs:
            rows.append(row)
        (kept if belongs else replaced).append(line + b"\n")
    if len(rows) < last_step:
        logger.warning("%s lacks %d of the %d steps before this start; the run goes on", path, last_step - len(rows), last_step)
    if replaced:
        with (path.parent / REPLACED_FILE).open("ab") as aside:
            _write_durably(aside, b"".join(replaced))
    if b"".join(kept) != content:
        file = _put_in_place(path, b"".join(kept), held=file)
    return file, rows


def _put_in_place(path: Path, content: bytes, *, held: TextIO) -> TextIO:
    """Replace the locked file atomically by one of this content, locked as well; the new one is opened for appending.

    The new file is locked before it gets its name and the old one is let go after that, so whoever opens the name finds a lock.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        _write_durably(file, content)
    replacement = temporary.open("a", encoding="utf-8")
    _lock(replacement)
    rename_durably(temporary, path)
    held.close()
    return replacement


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows of run_dir/metrics.jsonl, non-finite numbers as floats again, and whether a last line cut off by a crash was left out.

    Raises FileNotFoundError, and ValueError that names the line when the file is empty or damaged anywhere else.
    """
    path = run_dir / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parse_row(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n") and rows:
                return rows, True
            raise ValueError(f"{path}, line {number} is damaged: {one_line(error)}") from None
    if not rows:
        raise ValueError(f"{path} is empty: the run recorded no step")
    return rows, False


def _parse_row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("not a row of metrics with a step")
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def read_description(run_dir: Path) -> dict[str, Any]:
    """What run_dir/run.json holds. Raises FileNotFoundError, and ValueError when it is damaged."""
    path = run_dir / RUN_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(description, dict) and "run_name" in description):
            raise ValueError("not an object with a run_name")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None
    return description


def _read_description_if_any(run_dir: Path) -> dict[str, Any]:
    try:
        return read_description(run_dir)
    except (OSError, ValueError) as error:
        logger.warning("the earlier starts of this run are not known: %s", error)
        return {}


def write_description(run_dir: Path, description: dict[str, Any]) -> None:
    """Replace run_dir/run.json atomically."""
    write_atomically(run_dir / RUN_FILE, to_json(description, indent=2) + "\n")


def _write_durably(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def run_tags(config: dict[str, Any], parameters: int) -> list[str]:
    """What one looks for runs by, from a resolved configuration: size, sequence length, attention backend (or Megatron's own), ZeRO stage
    (or megatron) and precision, as in ["124M", "seq1024", "triton", "zero3", "bf16"]."""
    return [
        _model_size(parameters),
        f"seq{config['model']['sequence_length']}",
        "DotProductAttention" if config.get("megatron", {}).get("attention") == "megatron" else config["attention"]["backend"],
        "megatron" if "megatron" in config else f"zero{config['zero']['stage']}",
        config["train"]["precision"],
    ]


def collect_environment() -> dict[str, Any]:
    """What a result depends on besides the config: date, versions, commit and GPU. No host or user name.

    git_dirty tells whether tracked files differ from the commit. Outside a clone (a copied tree, a container) git_sha is what the
    environment variable GIT_SHA says, None without it, and git_dirty is None.
    """
    import torch  # here, so that reading metrics does not wait for it

    has_gpu = torch.cuda.is_available()
    git_sha, git_dirty = _git_state()
    return {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "git_sha": git_sha,
        "git_dirty": git_dirty,
        "gpu_name": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_count": torch.cuda.device_count(),
        "cuda_version": torch.version.cuda,
        "cudnn_version": torch.backends.cudnn.version(),
    }


class ProgressLine:
    """The one progress line of a run, for rank 0: rewritten in place on a terminal, one line every `every` steps in a log file."""

    def __init__(self, total_steps: int, *, every: int = 10, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._every = every
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._line_is_open = False
        self._first: tuple[int, float] | None = None

    def update(self, row: dict[str, Any]) -> None:
        """Show one row of metrics; validation results, when it holds some, get a line of their own."""
        step = row["step"]
        is_first = self._first is None
        text = self._format(row)
        if self._in_place:
            columns = shutil.get_terminal_size().columns
            self._write(f"\r\x1b[K{text[: columns - 1]}")
            self._line_is_open = True
        elif is_first or step % self._every == 0 or step == self._total_steps:
            self._write(text + "\n")
        if "val_loss" in row:
            self.note(
                f"step {step:>{len(str(self._total_steps))}}/{self._total_steps} | validation loss {row['val_loss']:.4f} nats/token | "
                f"perplexity {row['val_perplexity']:.2f} | {row['val_bits_per_byte']:.4f} bits/byte"
                + "".join(f" | {key.removeprefix('val_loss/')} {value:.4f}" for key, value in row.items() if key.startswith("val_loss/"))
            )

    def note(self, text: str) -> None:
        """Print a line of its own, leaving the progress line as it stands above it."""
        self.close()
        self._write(text + "\n")

    def close(self) -> None:
        """End the line that is being rewritten, so that what follows starts on a fresh one."""
        if self._line_is_open:
            self._write("\n")
            self._line_is_open = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # whoever read it is gone, as `| tee` is after Ctrl-C: no reason to lose the run
            self._stream = open(os.devnull, "w")

    def _format(self, row: dict[str, Any]) -> str:
        step, total = row["step"], self._total_steps
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        return (
            f"step {step:>{len(str(total))}}/{total} | loss {row['loss']:.4f} | {_short(row['tokens_per_second'])} tokens/s | "
            f"MFU {mfu} | ETA {self._time_left(step, row['elapsed_seconds'])}"
        )

    def _time_left(self, step: int, elapsed_seconds: float) -> str:
        """From the steps after the first one shown: compilation makes that one too slow to judge by."""
        if self._first is None:
            self._first = (step, elapsed_seconds)
        first_step, first_elapsed = self._first
        if step == first_step:
            return "-"
        seconds_per_step = (elapsed_seconds - first_elapsed) / (step - first_step)
        return str(timedelta(seconds=round((self._total_steps - step) * seconds_per_step)))


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON has no NaN or infinity, and null would hide which of them it was: they become the strings "NaN", "Infinity" and
    "-Infinity", which float() turns back."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities, at any depth, replaced by their names in _NON_FINITE."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _git_state() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout.strip()

    try:
        # An unpacked archive may lie inside someone else's clone, whose commit says nothing about this code.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == _REPOSITORY:
            return git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no") != ""
    except (OSError, subprocess.CalledProcessError):
        pass
    return os.environ.get("GIT_SHA") or None, None


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model_size(parameters: int) -> str:
    """As models are called: 124M, 1.3B, 13B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= 0.9995 * size:  # 999.7 million is 1.0B
            number = parameters / size
            return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"
    return str(parameters)


def _short(number: float) -> str:
    """Three significant digits: 987, 52.3k, 1.28M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"
