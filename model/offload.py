"""Block inputs that wait for the backward pass in the host's memory: pinned, copied beside the computation.

What a checkpointed block keeps is its input alone; a long sequence through many blocks still fills a GPU with those. Here each goes out while
its block is computed, and comes back while the block after it, the one before it in the backward pass, is computed again.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable

import torch

PORTABLE = 1  # cudaHostRegisterPortable


class HostMemoryError(RuntimeError):
    """Block inputs found no room in the host's memory."""


class Offload:
    """Where block inputs wait; a buffer serves again once its input is back. On a CPU they are copied there and back."""

    def __init__(self) -> None:
        self.unused: dict[tuple, list[torch.Tensor]] = defaultdict(list)
        self.newest: Callable[[], Waiting | None] = lambda: None
        self.stream: torch.cuda.Stream | None = None

    def keep(self, x: torch.Tensor) -> "Waiting":
        """Send ``x`` out; the GPU's memory of it is free once the next one is sent, or at once where nobody asks for it again."""
        before = self.newest()
        if before is not None:
            before.leave()
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(x.device)
        waiting = Waiting(self, x.detach(), x.requires_grad, self.newest)
        self.newest = weakref.ref(waiting)
        return waiting

    def buffer(self, x: torch.Tensor) -> torch.Tensor:
        found = self.unused[x.shape, x.dtype]
        return found.pop() if found else pinned_like(x)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event | None:
        """On the side, after all that the GPU was asked for so far; what is returned tells when it is done."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()


class Waiting:
    """One block input. ``here``: it, while the GPU has it, or its copy on the way back; ``done``: the copy under way or made."""

    def __init__(self, offload: Offload, x: torch.Tensor, requires_grad: bool, before: Callable[[], "Waiting | None"]) -> None:
        self.offload, self.requires_grad, self.before = offload, requires_grad, before
        self.device, self.host = x.device, offload.buffer(x)
        self.here: torch.Tensor | None = x
        self.done = offload.copy(x, self.host)

    def leave(self) -> None:
        if self.host is not None:
            self._wait()
            self.here = None

    def come_back(self) -> torch.Tensor:
        """The input, once, in the backward pass; the one before it sets out."""
        self._set_out()
        self._wait()
        x, self.here = self.here, None
        # Its stream copies in order: no later input can reach the buffer before this one has left it.
        self.offload.unused[x.shape, x.dtype].append(self.host)
        self.host = None
        before = self.before()
        if before is not None and before.host is not None:
            before._set_out()
        return x.requires_grad_(self.requires_grad)

    def _set_out(self) -> None:
        if self.here is None:
            # Of the computing stream's memory, which it follows in time: both copy and use come after what held it before.
            self.here = torch.empty_like(self.host, device=self.device)
            self.done = self.offload.copy(self.host, self.here)

    def _wait(self) -> None:
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)


def pinned_like(x: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory, pinned if ``x`` is on a GPU; of its very size, where PyTorch's allocator takes a power of two."""
    host = torch.empty_like(x, device="cpu")
    if x.is_cuda:
        code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, PORTABLE))
        if code != 0:
            raise HostMemoryError(
                f"train.checkpoint_offload: {host.nbytes:,} bytes of the host's memory could not be pinned (CUDA error {code}); "
                "give the run more, raise what may be locked (ulimit -l), shorten model.sequence_length, or use train.checkpoint_offload=false"
            )
        weakref.finalize(host, torch.cuda.cudart().cudaHostUnregister, host.data_ptr())
    return host
