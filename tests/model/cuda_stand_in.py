"""Lets megatron-core, which asks for "cuda" by name, run on a machine without a GPU: what is asked for there is made on the CPU.

What it stands in for: the device of new tensors, ``Tensor.cuda()``, the names of tensor types, torch's CUDA generator (the CPU's takes its
place, so Megatron's tracker of generators works) and synchronisation. Not for streams or kernels: Megatron's own that are written in CUDA are
absent as they are without Apex and Transformer Engine.
"""

import contextlib
from functools import wraps
from unittest import mock

import torch
from megatron.core.tensor_parallel import random

_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randint", "tensor", "zeros")


def _on_cpu(make):
    @wraps(make)
    def made(*arguments, **options):
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return make(*arguments, **options)

    return made


def _type_on_gpu(name):
    @wraps(name)
    def named(tensor, *arguments, **options):
        found = name(tensor, *arguments, **options)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    return named


@contextlib.contextmanager
def cuda_on_cpu():
    generator = {"get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda state, *_: torch.set_rng_state(state), "manual_seed": torch.manual_seed}
    machine = {"current_device": lambda: "cpu", "synchronize": lambda *_: None, "empty_cache": lambda: None}
    tracker = {"_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(), "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state)}
    with contextlib.ExitStack() as stack:
        for owner, functions in (
            (torch, {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}),
            (torch.Tensor, {"cuda": lambda tensor, *_, **__: tensor, "type": _type_on_gpu(torch.Tensor.type)}),
            (torch.cuda, generator | machine),
            (random, tracker),
        ):
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(owner, name, function))
        # The tracker would warn that the CPU's generator moved, which here is the one that shall.
        stack.enter_context(mock.patch.object(random.logging.getLogger(random.__name__), "disabled", True))
        yield
