"""What a call costs the CPU: operators of torch.library without custom_op's wrappers, kernels started without Triton's.

Both look at every argument anew in each call, which takes longer than a small problem takes on the GPU.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import _C
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("recipe", "FRAGMENT")
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float}  # inputs that are what they seem

_eager: dict[torch._ops.OpOverload, Callable] = {}  # what an operator does where eager autograd alone takes part in a call


def operator(schema: str, fake: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator: makes of a function the operator recipe::`schema`; `fake` returns empty tensors like its results, which it must not share."""

    def define(function: Callable) -> torch._ops.OpOverload:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"recipe::{name}", fake, lib=LIBRARY)
        operator = getattr(torch.ops.recipe, name).default
        _eager[operator] = function
        return operator

    return define


def call(operator: torch._ops.OpOverload, *inputs):
    """operator(*inputs); where nobody looks on (no torch.compile, no mode such as selective checkpointing's, no torch.func, no subclass of
    tensors) past the dispatcher, which would take 20 to 40 us to bring a dozen inputs back to Python."""
    looked_on = torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() > 0 or _C._functorch.peek_interpreter_stack() is not None
    if looked_on or not PLAIN.issuperset(map(type, inputs)):
        return operator(*inputs)
    return _eager[operator](*inputs)


def differentiable(operator: torch._ops.OpOverload, save_for_backward: Callable, differentiate: Callable) -> None:
    """Gives an operator gradients, once differentiable.

    Args:
        save_for_backward: of (ctx, inputs, outputs). PyTorch leaves out the last inputs where they are the schema's defaults.
        differentiate: of (ctx, *gradients of the outputs); returns those of all inputs of the schema, None where there is none.
    """

    name = operator.name().removeprefix("recipe::")
    function = _eager[operator]

    def recorded(compute):
        """compute(keyset, *inputs), recorded by autograd where an input needs a gradient."""

        def forward(ctx, keyset, *inputs):
            outputs = compute(keyset, *inputs)
            save_for_backward(ctx, inputs, outputs)
            return outputs

        def backward(ctx, *gradients):
            return None, *differentiate(ctx, *gradients)[: len(ctx.needs_input_grad) - 1]

        methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        node = type(name, (torch.autograd.Function,), methods)

        def record(keyset, *inputs):
            return (node.apply if torch.is_grad_enabled() and _C._any_requires_grad(*inputs) else compute)(keyset, *inputs)

        return record

    def redispatch(keyset, *inputs):
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *inputs)

    LIBRARY.impl(name, recorded(redispatch), "Autograd", with_keyset=True)
    _eager[operator] = partial(recorded(lambda _, *inputs: function(*inputs)), None)


_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}
_calls: dict[tuple, triton.compiler.CompiledKernel] = {}
MOST_CALLS = 4096  # kept: lengths that differ from call to call would fill the memory


def launch(kernel, programs: int, arguments: tuple, key: tuple, options: dict) -> None:
    """kernel[(programs,)](*arguments, **options), found by `key`, all that its compilation depends on, the device included."""
    key = kernel, *key
    if key in _compiled:
        # An address in place of a tensor: for each tensor Triton's launcher asks the driver whether a GPU can read it.
        _compiled[key][(programs, 1, 1)](*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))
    else:
        _compiled[key] = kernel[(programs, 1, 1)](*arguments, **options)


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
    # By the numbers themselves, and not by what of them Triton compiles for (their width, whether 16 divides them, whether they are 1):
    # that takes longer to find out than all else here, and is left to Triton, once for each shape.
    key = kernel, torch.cuda.current_device(), *numbers, *constants, *options.values(), *(
        None if x is None else (x.dtype, address % 16 == 0) for x, address in zip(tensors, addresses)
    )  # fmt: skip
    if key in _calls:
        _calls[key][(programs, 1, 1)](*addresses, *numbers, *constants)
        return
    if len(_calls) == MOST_CALLS:
        _calls.clear()
    _calls[key] = kernel[(programs, 1, 1)](*tensors, *numbers, *constants, **options)
