"""The process group, and how every rank learns of one rank's fault."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

USER_FAULT_EXIT_CODE = 2
Result = TypeVar("Result")


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
    """Turn a user's mistake (ValueError) into one message on rank 0 and exit code 2 on every rank."""
    try:
        yield
    except ValueError as error:
        if ranks.rank == 0:
            print(f"\n{error}", file=sys.stderr, flush=True)
        else:
            # The launcher ends every rank as soon as one has exited: rank 0 must have spoken before another leaves.
            time.sleep(10)
        sys.exit(USER_FAULT_EXIT_CODE)


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


def join_process_group() -> None:
    """Start torch.distributed through DeepSpeed (NCCL on GPUs, gloo on CPUs); a process without a launcher is a world of one."""
    import deepspeed
    import torch

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective, which takes the current device
    deepspeed.init_distributed(verbose=False)


def together(work: Callable[[], Result], *, here: bool = True) -> Result | None:
    """Run ``work`` on the ranks where ``here`` holds; a ValueError on any of them is raised on all.

    Without this, the ranks that are well would wait for the one that is not until the process group times out.
    """
    import torch.distributed as dist

    result, fault = None, None
    if here:
        try:
            result = work()
        except ValueError as error:
            fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for found in faults:
        if found is not None:
            raise ValueError(found)
    return result


def leave_process_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
