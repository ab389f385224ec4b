"""What a call costs the CPU: operators of torch.library without custom_op's wrappers, kernels started without Triton's.

Both look at every argument anew in each call, which takes longer than a small problem takes on the GPU. In autograd's thread, whose caches
are cold, each of Python's calls costs several times what it does in a loop: what can be found out once is `planned`.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from itertools import repeat
from operator import or_

import torch
import triton
from torch import _C
from torch.autograd.function import once_differentiable
from triton.compiler import CompiledKernel

from kernels.attention.backends import INTERPRETED

LIBRARY = torch.library.Library("recipe", "FRAGMENT")
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float}  # inputs that are what they seem

# By an operator's id, since its hash is a function in Python: what it does where eager autograd alone takes part in a call.
_eager: dict[int, Callable] = {}


def operator(schema: str, fake: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator: makes of a function the operator recipe::`schema`; `fake` returns empty tensors like its results, which it must not share.
    The device of the first input, a tensor, is the current one within, as Triton expects."""

    def define(function: Callable) -> torch._ops.OpOverload:
        def on_device(x, *inputs):
            if not x.is_cuda or x.get_device() == torch.cuda.current_device():
                return function(x, *inputs)
            with torch.cuda.device_of(x):
                return function(x, *inputs)

        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, on_device, "CompositeExplicitAutograd")
        torch.library.register_fake(f"recipe::{name}", fake, lib=LIBRARY)
        operator = getattr(torch.ops.recipe, name).default
        _eager[id(operator)] = on_device
        return operator

    return define


def call(operator: torch._ops.OpOverload, *inputs):
    """operator(*inputs); where nobody looks on (no torch.compile, no mode such as selective checkpointing's, no torch.func, no subclass of
    tensors) past the dispatcher, which would take 20 to 40 us to bring a dozen inputs back to Python."""
    if torch.compiler.is_dynamo_compiling() or _C._len_torch_dispatch_stack() > 0 or _C._functorch.peek_interpreter_stack() is not None:
        return operator(*inputs)
    if not PLAIN.issuperset(map(type, inputs)):
        return operator(*inputs)
    return _eager[id(operator)](*inputs)


def differentiable(operator: torch._ops.OpOverload, save_for_backward: Callable, differentiate: Callable) -> None:
    """Gives an operator gradients, once differentiable.

    Args:
        save_for_backward: of (ctx, inputs, outputs). PyTorch leaves out the last inputs where they are the schema's defaults.
        differentiate: of (ctx, *gradients of the outputs); returns those of all inputs of the schema, None where there is none.
    """

    name = operator.name().removeprefix("recipe::")

    def recorded(compute, keysets: int):
        """compute(*inputs), recorded by autograd where an input needs a gradient; before the schema's inputs there may be a keyset."""

        def forward(ctx, *inputs):
            outputs = compute(*inputs)
            save_for_backward(ctx, inputs[keysets:], outputs)
            return outputs

        def backward(ctx, *gradients):
            if torch.is_grad_enabled():  # then the backward itself is recorded
                return once(ctx, *gradients)
            return (None,) * keysets + differentiate(ctx, *gradients)

        once = once_differentiable(backward)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        node = type(name, (torch.autograd.Function,), methods)
        # Function.apply looks at each input for what torch.func has left of it; `call` has seen that torch.func is not at work.
        apply = node.apply if keysets else super(torch.autograd.Function, node).apply

        def record(*inputs):
            return (apply if torch.is_grad_enabled() and _C._any_requires_grad(*inputs) else compute)(*inputs)

        return record

    def redispatch(keyset, *inputs):
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *inputs)

    LIBRARY.impl(name, recorded(redispatch, keysets=1), "Autograd", with_keyset=True)
    _eager[id(operator)] = recorded(_eager[id(operator)], keysets=0)


MOST_CALLS = 4096  # kept: lengths that differ from call to call would fill the memory

# Decorator of what follows from shapes, strides and numbers alone: found out once. (Tests change the tiles of Triton's interpreter.)
planned = (lambda function: function) if INTERPRETED else lru_cache(MOST_CALLS)

_compiled: dict[tuple, Callable] = {}
_calls: dict[tuple, Callable] = {}


def strides(*tensors: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple([x.stride() for x in tensors])


def _starter(compiled: CompiledKernel, device: int) -> Callable[[int, tuple], None]:
    """Of (programs, arguments): compiled[(programs, 1, 1)](*arguments), without what Triton makes for profilers' hooks where there are none.

    arguments: addresses in place of tensors: for each tensor Triton's launcher would ask the driver whether a GPU can read it.
    """

    def start_with_hooks(programs, arguments):
        compiled[(programs, 1, 1)](*arguments)

    def start(programs, arguments):
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True):
            start_with_hooks(programs, arguments)
        else:
            run(programs, 1, 1, current_stream(device), function, metadata, None, None, None, *arguments)

    if not isinstance(compiled, CompiledKernel):
        return start_with_hooks
    hooks, current_stream = triton.knobs.runtime, triton.runtime.driver.active.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return start


def launch(kernel, programs: int, descriptors: tuple, tensors: tuple, rest: tuple, key: tuple, options: dict) -> None:
    """kernel[(programs,)](*descriptors, *tensors, *rest, **options), found by `key`, all that its compilation depends on, the device's
    index first; each of tensors may be None."""
    key = id(kernel), *key
    if start := _compiled.get(key):
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        start(programs, (*descriptors, *addresses, *rest))
    else:
        _compiled[key] = _starter(kernel[(programs, 1, 1)](*descriptors, *tensors, *rest, **options), key[1])


def launch_specialised(kernel, programs: int, tensors: tuple, numbers: tuple, constants: tuple, **options) -> None:
    """kernel[(programs,)](*tensors, *numbers, *constants, **options), on the current device.

    Args:
        tensors: each may be None.
        numbers: an int, a float or None, each of one type in all calls: 1 finds what was compiled for 1.0.
        constants: what the kernel declares tl.constexpr.
    """
    if not isinstance(kernel, triton.JITFunction):  # the interpreter's
        kernel[(programs,)](*tensors, *numbers, *constants, **options)
        return
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    dtypes = map(getattr, tensors, repeat("dtype"), repeat(None))
    # Without loops in Python: most often all are multiples of 16.
    aligned = reduce(or_, filter(None, addresses), 0) % 16 == 0 or tuple([address and address % 16 == 0 for address in addresses])
    device = torch.cuda.current_device()
    # By the numbers themselves, and not by what of them Triton compiles for (their width, whether 16 divides them, whether they are 1):
    # that takes longer to find out than all else here, and is left to Triton, once for each shape. (A kernel's own hash takes long, too.)
    key = id(kernel), device, numbers, constants, aligned, *options.values(), *dtypes
    if start := _calls.get(key):
        start(programs, (*addresses, *numbers, *constants))
        return
    if len(_calls) == MOST_CALLS:
        _calls.clear()
    _calls[key] = _starter(kernel[(programs, 1, 1)](*tensors, *numbers, *constants, **options), device)
