"""Runs of train.py in processes forked from one that has imported everything: a start costs a second instead of ten.

The program that uses this must run by itself, not inside pytest, with nothing but the main thread.
"""

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import train
from training.distributed import free_port, load_op

load_op("ShareMemCommBuilder")  # once for all


class ForkedRun:
    """``train.py arguments`` on a few CPU processes below a launcher that treats them as DeepSpeed's does.

    Args:
        hook: called with the rank in each rank's process before train.py starts, to wrap functions of its modules there.
        log: standard output and error of all processes are appended to it.
    """

    def __init__(self, arguments: list[str], *, processes: int = 2, log: Path, hook: Callable[[int], None] = lambda rank: None):
        pids_file = log.with_name(f"{log.name}.pids")
        pids_file.unlink(missing_ok=True)
        self.launcher = os.fork()
        if self.launcher == 0:
            os.setsid()
            with log.open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            _launch(arguments, processes, pids_file, hook)
        while not pids_file.exists():
            time.sleep(0.01)
        self.ranks = [int(pid) for pid in pids_file.read_text().split()]
        self.code: int | None = None

    def kill(self, target: int | str, number: int = signal.SIGKILL) -> None:
        """``target``: a rank, or "launcher"."""
        try:
            os.kill(self.launcher if target == "launcher" else self.ranks[target], number)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float) -> float:
        """Seconds until the launcher and every rank are gone; those still there after ``seconds`` are killed, which raises TimeoutError."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.code is None:
                pid, status = os.waitpid(self.launcher, os.WNOHANG)
                if pid:
                    self.code = os.waitstatus_to_exitcode(status)
            if self.code is not None and not any(map(_is_alive, self.ranks)):
                return time.monotonic() - began
            time.sleep(0.02)
        left = [target for target, pid in zip(("launcher", *range(len(self.ranks))), (self.launcher, *self.ranks), strict=True) if _is_alive(pid)]
        for pid in (self.launcher, *self.ranks):
            if _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        raise TimeoutError(f"still there after {seconds} s: {left}")


def import_what_a_run_imports(arguments: list[str], *, log: Path) -> None:
    """Make one short run, and import here every module that it had imported by its end: libraries import late, and slowly."""
    names = log.with_name("modules")

    def note_modules(rank: int) -> None:
        end_process = train.end_process

        def noting(*codes: int) -> None:
            if rank == 0:
                names.write_text("\n".join(sys.modules))
            end_process(*codes)

        train.end_process = noting

    ForkedRun(arguments, log=log, hook=note_modules).wait(180)
    for name in names.read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # the forks' collections need not walk all this


def _launch(arguments: list[str], processes: int, pids_file: Path, hook: Callable[[int], None]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job, as tests may be, is started without
    port = free_port()
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.argv = ["train.py", *arguments]
            try:
                hook(rank)
                train.main()
            except SystemExit as ended:
                os._exit(ended.code)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    written = pids_file.with_name(f"{pids_file.name}.tmp")
    written.write_text(" ".join(map(str, pids)))
    written.rename(pids_file)
    alive = set(pids)
    while alive:
        pid, status = os.wait()
        alive.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code:  # DeepSpeed's launcher gives the others 30 s after SIGTERM
            for other in alive:
                os.kill(other, signal.SIGTERM)
            deadline = time.monotonic() + 3
            while alive and time.monotonic() < deadline:
                gone, _ = os.waitpid(-1, os.WNOHANG)
                alive.discard(gone)
                time.sleep(0.02)
            for other in alive:
                os.kill(other, signal.SIGKILL)
            os._exit(code & 0xFF)
    os._exit(0)


def _is_alive(pid: int) -> bool:
    """Running: not gone, and not a zombie that only its parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
