"""The process group, and how every rank learns of one rank's fault."""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from model.config import ModelFault
from training.config import ConfigError

USER_FAULT_EXIT_CODE = 2
Result = TypeVar("Result")


class UserFault(ValueError):
    """Something the user can mend, told in one message; other exceptions are ours and keep their traceback."""


class LoneFault(UserFault):
    """One that the other ranks cannot be told of, because they wait in a library: they learn of it by this rank's end."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run's; read from the environment that the launcher sets."""

    rank: int
    local_rank: int
    world: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        return cls(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))


@contextlib.contextmanager
def one_clear_message(ranks: Ranks) -> Iterator[None]:
    """Turn a user's mistake into one message on rank 0 and exit code 2 on every rank."""
    try:
        yield
    except (ConfigError, UserFault, ModelFault) as error:
        if ranks.rank != 0 and not isinstance(error, LoneFault):
            # The launcher ends every rank as soon as one has exited: rank 0 must have spoken before another leaves.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        if ranks.local_rank == 0 or isinstance(error, LoneFault):
            # Still here on another host than rank 0's: its fault may be this host's alone.
            print(f"\n{f'rank {ranks.rank}: ' * (ranks.rank > 0)}{error}", file=sys.stderr, flush=True)
        _exit_at_once(USER_FAULT_EXIT_CODE)


@contextlib.contextmanager
def output_to(file: Path | None) -> Iterator[None]:
    """Send what is written to standard output, by compilers and C++ code too, to the end of ``file``; None leaves it alone."""
    if file is None:
        yield
        return
    sys.stdout.flush()
    terminal = os.dup(1)
    with open(file, "a") as log:
        os.dup2(log.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(terminal, 1)
        os.close(terminal)


def free_port() -> int:
    """A TCP port that nobody on this host listens on, for the processes of a run to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load_op(name: str) -> None:
    """Load one of DeepSpeed's C++ extensions, compiled at its first use on a machine.

    torch marks a compilation by a file, which outlives a process that is killed then and makes every later start wait for it without end.
    A file lock ends with its holder: whoever has it finds no other run at work, only what a dead one left.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder(name)
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder / "recipe.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def join_process_group() -> None:
    """Start torch.distributed through DeepSpeed (NCCL on GPUs, gloo on CPUs); a process without a launcher is a world of one."""
    import deepspeed
    import torch

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective, which takes the current device
    else:
        load_op("ShareMemCommBuilder")  # init_distributed needs it on CPUs
    deepspeed.init_distributed(verbose=False)
    if not torch.cuda.is_available():
        _unlink_shared_buffer()


def _unlink_shared_buffer() -> None:
    """Take the name from this rank's buffer for collectives in shared memory, 66 MiB, which DeepSpeed leaves in /dev/shm for ever.

    Once every rank has mapped it nobody needs the name, and without it the memory is freed with the last process, however that ends.
    """
    import torch.distributed as dist

    dist.barrier()
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


@cache
def sequence_group(size: int):
    """This process's ``model.sequence.SequenceGroup``: of every ``size`` ranks in a row, neighbours on a host; None of one rank.

    Every rank calls it, in the same order of sizes.
    """
    import torch.distributed as dist

    from model.sequence import SequenceGroup

    if size == 1:
        return None
    group, _ = dist.new_subgroups(size)
    return SequenceGroup(group, dist.get_rank() % size, size)


def together(work: Callable[[], Result], *, here: bool = True) -> Result | None:
    """Run ``work`` on the ranks where ``here`` holds; if it fails on any of them, every rank raises.

    A ValueError or OSError becomes a UserFault; another exception keeps its traceback where it was raised.  Without this, the
    ranks that are well would wait for the one that is not until the process group times out.
    """
    result, error = None, None
    if here:
        try:
            result = work()
        except Exception as caught:
            error = caught
    mends = isinstance(error, (ValueError, OSError))
    faults = gather(None if error is None else (mends, str(error) if mends else repr(error)))
    if error is not None and not mends:
        raise error
    for rank, fault in enumerate(faults):
        if fault is not None:
            raise UserFault(fault[1]) if fault[0] else RuntimeError(f"rank {rank} failed: {fault[1]}")
    return result


def from_first_rank(work: Callable[[], Result]) -> Result:
    """What ``work`` returns on rank 0, on every rank; if it fails there, every rank raises as in ``together``."""
    import torch.distributed as dist

    box = [together(work, here=dist.get_rank() == 0)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, device) -> bool:
    """Whether ``flag`` holds on one rank at least; ``device`` is a ``torch.device`` of the process group's kind."""
    import torch
    import torch.distributed as dist

    flags = torch.tensor(flag, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def gather(value: Result) -> list[Result]:
    """Every rank's value, in the order of the ranks, on every rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(key: str, value: str) -> None:
    """Raise UserFault on every rank unless all of them have the same value of a setting that each resolved for itself."""
    values = gather(value)
    if len(set(values)) > 1:
        found = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(values))
        raise UserFault(f"{key} differs between the processes ({found}); their GPUs or packages differ; name one that all of them have")


def end_process(exit_code: int = 0) -> NoReturn:
    """Leave the process group and end this process, its work done; all ranks at once, because the launcher ends those who stay behind."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    _exit_at_once(exit_code)


def _exit_at_once(exit_code: int) -> NoReturn:
    """End this process without the interpreter's own shutdown.

    A thread of gloo that drops its last tensor meanwhile aborts the process ("terminate called without an active exception", seen on a
    loaded machine), which turns a finished run into a failed one, and a clear message into an abort.
    """
    with contextlib.suppress(OSError):  # whoever read the output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
