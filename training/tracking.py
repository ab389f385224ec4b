"""What a run leaves behind: run.json (what was run), metrics.jsonl (one row an optimizer step), wandb, and the progress line.

metrics.jsonl is the truth; wandb shows the same rows. Both files lie in the run directory.
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
from typing import Any, Literal, TextIO

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

_WANDB_START_SECONDS = 10
# What is not uploaded by then stays on disk, and `wandb sync` sends it: better than GPUs held by a dead server.
_WANDB_FINISH_SECONDS = 60

_REPOSITORY = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pydantic", "PyYAML", "tokenizers", "wandb")

logger = logging.getLogger(__name__)


class RunRecorder:
    """Writes a run's description and its metrics; one per run, on rank 0 only. Use it as a context manager or call `finish`.

    run_dir: created when absent. metrics.jsonl is locked for this run, then run.json (`info` with run_name) is written atomically, then
    wandb starts.
    info: JSON-serialisable; also becomes the wandb config.
    wandb_mode: "online", "offline" (files under run_dir/wandb, for `wandb sync`) or "disabled" (wandb is not imported).

    Raises ValueError when run_dir already holds metrics, when another run is writing there, and when wandb cannot start; the message
    names the remedy.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        info: dict[str, Any],
        wandb_mode: Literal["online", "offline", "disabled"],
        wandb_project: str,
        wandb_entity: str | None = None,
        wandb_group: str | None = None,
        wandb_tags: Sequence[str] = (),
        run_name: str,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _open_for_one_run(run_dir / METRICS_FILE)
        _write_json_atomically(run_dir / RUN_FILE, {"run_name": run_name, **info})
        self._wandb_dir = run_dir / "wandb"
        self._wandb_run = None
        if wandb_mode == "disabled":
            return
        try:
            self._wandb_run = _start_wandb(
                wandb_mode,
                dir=run_dir,
                config=info,
                project=wandb_project,
                entity=wandb_entity,
                group=wandb_group,
                tags=list(wandb_tags),
                name=run_name,
            )
        except ValueError:
            self._metrics.close()
            raise

    def record(self, row: dict[str, Any]) -> None:
        """Append one optimizer step: `row` maps names to int, float, str or None, and holds "step".

        It is written as by `to_json`, which `read_metrics` turns back.
        """
        self._metrics.write(to_json(row) + "\n")
        self._metrics.flush()
        if self._wandb_run is not None:
            try:
                self._wandb_run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
            except Exception as error:
                self._drop_wandb(error)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and end the wandb run, waiting at most 60 s for its uploads; a second call does nothing."""
        self._metrics.close()
        if self._wandb_run is not None:
            try:
                self._wandb_run.finish(exit_code=exit_code)
                self._wandb_run = None
            except Exception as error:
                self._drop_wandb(error)

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if exception_type is None else 1)

    def _drop_wandb(self, error: Exception) -> None:
        """Go on without wandb: whatever its service, the network or the disk raised must not end a run that has its rows on disk."""
        self._wandb_run = None
        logger.warning(
            "wandb failed (%s); every row is in %s, and what wandb stored under %s can be sent with `wandb sync`",
            _first_line(error),
            self._metrics.name,
            self._wandb_dir,
        )


def _open_for_one_run(path: Path) -> TextIO:
    """Opened for appending, empty, and locked until it is closed or the process ends, so that a run that died before its first row
    stands in nobody's way."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path}: another run is writing it at this moment; choose another run.name") from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): two runs of this name at once would mix their rows", path, error.strerror)
    if os.fstat(file.fileno()).st_size > 0:
        file.close()
        raise ValueError(f"{path} already holds the metrics of a run; choose another run.name or move it away")
    return file


def _start_wandb(mode: str, **arguments: Any) -> Any:
    """wandb.init with every failure turned into one ValueError that names the remedy."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"tracking.wandb={mode}: the package wandb is not installed; run `pip install wandb`, or set tracking.wandb=disabled"
        ) from None
    settings = wandb.Settings(
        mode=mode,
        silent=True,
        init_timeout=_WANDB_START_SECONDS,
        finish_timeout=_WANDB_FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    try:
        wandb.setup(settings)
        # Asked first because wandb.init would stop the run at a prompt for the key when a terminal is attached.
        has_key = mode == "offline" or wandb.login(prompt=False, verify=False)
        run = wandb.init(settings=settings, **arguments) if has_key else None
    except Exception as error:
        instead = "offline" if mode == "online" else "disabled"
        raise ValueError(f"tracking.wandb={mode}: wandb did not start: {_first_line(error)}; use tracking.wandb={instead}") from None
    if run is None:
        raise ValueError(
            f"tracking.wandb=online: no API key for {wandb.setup().settings.base_url}; run `wandb login` or set WANDB_API_KEY, "
            "or use tracking.wandb=offline"
        )
    run.define_metric("*", step_metric="tokens")
    if mode == "online":
        logger.info("wandb: %s", run.url)
    else:
        logger.info("wandb is offline; upload with `wandb sync %s`", run.settings.sync_dir)
    return run


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows of run_dir/metrics.jsonl, non-finite numbers as floats again, and whether a last line cut off by a crash was left out.

    Raises FileNotFoundError, and ValueError that names the line when the file is empty or damaged anywhere else.
    """
    path = run_dir / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not a row of metrics with a step")
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n") and rows:
                return rows, True
            raise ValueError(f"{path}, line {number} is damaged: {_first_line(error)}") from None
        rows.append({key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()})
    if not rows:
        raise ValueError(f"{path} is empty: the run recorded no step")
    return rows, False


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
            self._stream.write(f"\r\x1b[K{text[: columns - 1]}")
            self._line_is_open = True
        elif is_first or step % self._every == 0 or step == self._total_steps:
            self._stream.write(text + "\n")
        self._stream.flush()
        if "val_loss" in row:
            self.note(
                f"step {step:>{len(str(self._total_steps))}}/{self._total_steps} | validation loss {row['val_loss']:.4f} nats/token | "
                f"perplexity {row['val_perplexity']:.2f} | {row['val_bits_per_byte']:.4f} bits/byte"
            )

    def note(self, text: str) -> None:
        """Print a line of its own, leaving the progress line as it stands above it."""
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that is being rewritten, so that what follows starts on a fresh one."""
        if self._line_is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._line_is_open = False

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


def _write_json_atomically(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(to_json(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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


def _short(number: float) -> str:
    """Three significant digits: 987, 52.3k, 1.28M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
