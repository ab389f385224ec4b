"""How a run is stopped: a signal to any process, or the launcher's death, leads to one checkpoint and the end of every process in time."""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil

from training.files import write_atomically

OUTCOME_FILE = "outcome.json"
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: started again it goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Without its launcher a process has this long to reach the end of a step and begin its checkpoint: a hung one must not hold its GPU.
_ORPHAN_SECONDS = 12
_SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "tcsh"}


def write_outcome(run_dir: Path, outcome: str, **details: Any) -> None:
    """Leave the marker of how the run's last start ended: ``finished`` or ``stopped``.  A crash leaves none."""
    write_atomically(run_dir / OUTCOME_FILE, json.dumps({"outcome": outcome, **details}, indent=2) + "\n")


def has_finished(run_dir: Path) -> bool:
    try:
        return json.loads((run_dir / OUTCOME_FILE).read_text(encoding="utf-8"))["outcome"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _launchers() -> list[psutil.Process]:
    """The processes that started this one as a rank: the launcher, and above DeepSpeed's the ``deepspeed`` command."""
    if "RANK" not in os.environ:
        return []
    parent = psutil.Process().parent()
    if parent is None or parent.pid == 1 or parent.name() in _SHELLS:
        return []
    above = parent.parent()
    is_command = above is not None and any(Path(part).name in ("deepspeed", "deepspeed.launcher.runner") for part in above.cmdline()[:4])
    return [parent, above] if is_command else [parent]


# Looked up when this module is imported, which train.py does first: torch takes seconds, in which a launcher can die.
_AT_START, _PID_AT_START = _launchers(), os.getpid()


class StopRequests:
    """Watches for signals and for the launcher's death from a thread of its own, so that a process stuck in a collective ends too.

    Before ``begin_loop`` there is nothing to save, and a request ends the process at once, with the marker.  From then on the loop asks
    ``reason`` after each step; a process that has not ended ``grace_seconds`` after the request is ended.  A second Ctrl-C ends it at once.
    """

    def __init__(self, run_dir: Path, *, grace_seconds: float):
        self.reason: str | None = None
        self.saving = False
        self._run_dir, self._grace_seconds = run_dir, grace_seconds
        self._in_loop = False
        self._deadline = self._orphan_deadline = float("inf")
        # A program that forks runs, as tests do, is not what started them.
        self._launchers = _AT_START if os.getpid() == _PID_AT_START else _launchers()
        self._arrived, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        # Python's own handlers wait for the main thread, which may be inside NCCL; the wakeup descriptor is written at once.
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        self._wakeup = wakeup  # open as long as signals may come
        # Processes forked to write a checkpoint share it: one Ctrl-C, which reaches them too, would count as several.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="stop requests", daemon=True).start()

    def begin_loop(self) -> None:
        self._in_loop = True

    def _watch(self) -> None:
        while True:
            readable, _, _ = select.select([self._arrived], [], [], 1.0)
            if readable:
                for number in self._arrived.recv(64):
                    self._request(number)
            if self.reason is None and any(map(_is_gone, self._launchers)):
                self._orphan_deadline = time.monotonic() + _ORPHAN_SECONDS
                self._stop("the launcher's death")
            now = time.monotonic()
            if now > self._deadline or (now > self._orphan_deadline and not self.saving):
                self._end(f"not stopped in time after {self.reason}", 1)

    def _request(self, number: int) -> None:
        if number not in SIGNALS:
            return
        name = signal.Signals(number).name
        if name == self.reason == "SIGINT":
            self._end("second Ctrl-C", 128 + number)
        if self.reason is None:
            self._stop(name)

    def _stop(self, reason: str) -> None:
        self.reason = reason
        self._deadline = time.monotonic() + self._grace_seconds
        if not self._in_loop:
            with contextlib.suppress(OSError):  # no marker on a full disk, but the end all the same
                if not has_finished(self._run_dir):
                    write_outcome(self._run_dir, "stopped", reason=reason, step=None, checkpoint=None)
            self._end(f"stopped by {reason} before the first step" if os.environ.get("RANK", "0") == "0" else None, STOPPED_EXIT_CODE)

    def _end(self, why: str | None, exit_code: int) -> NoReturn:
        """End this process and what it started, such as compilers, whatever its main thread is doing."""
        try:
            if why:
                print(f"\nrank {os.environ.get('RANK', 0)}: {why}", file=sys.stderr, flush=True)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        finally:
            os._exit(exit_code)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
