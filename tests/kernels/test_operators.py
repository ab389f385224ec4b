"""kernels/attention/operators.py: which calls share a compiled kernel, and what it is called with; and the operators of Hopper's packed projection.
GPU tests show that they compute."""

import math

import pytest
import torch
import triton

from kernels.attention import operators


class Kernel(triton.JITFunction):
    """Compiles nothing; `compiled` has a list for each time it would have, of the calls that came to it later."""

    __hash__ = object.__hash__

    def __init__(self):
        self.compiled: list[list] = []

    def __eq__(self, other):
        return self is other

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append([(grid, arguments)])
            return Compiled(self.compiled[-1])

        return run


class Compiled:
    def __init__(self, calls: list):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


@pytest.fixture
def launch(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(operators, "_calls", {})

    def launch(*tensors, numbers=(3, 0.5, None), constants=(64,), programs=7, **options) -> list[list]:
        operators.launch_specialised(kernel, programs, tensors, numbers, constants, **options)
        return kernel.compiled

    return launch


def test_the_same_call_has_addresses_in_the_place_of_tensors(launch):
    x, y = torch.zeros(2, 64), torch.ones(2, 64)
    launch(x, None, num_warps=4)
    (calls,) = launch(y, None, num_warps=4, programs=8)
    assert calls == [((7, 1, 1), (x, None, 3, 0.5, None, 64)), ((8, 1, 1), (y.data_ptr(), None, 3, 0.5, None, 64))]


def test_what_triton_may_compile_anew_for_is_another_call(launch):
    x = torch.zeros(2, 64)
    others = {}, dict(numbers=(16, 0.5, None)), dict(numbers=(3, 0.5, 1)), dict(constants=(32,)), dict(num_warps=8), dict(num_warps=4)
    for count, other in enumerate(others, start=1):
        for _ in range(2):
            assert len(launch(x, None, **other)) == count
    for tensors in ((x.bfloat16(), None), (x[:, 1:], None), (x, x), (None, x)):
        count += 1
        for _ in range(2):
            assert len(launch(*tensors)) == count


def test_calls_that_never_come_again_do_not_fill_the_memory(launch):
    x = torch.zeros(4)
    for length in range(operators.MOST_CALLS + 10):
        launch(x, numbers=(length,))
    assert len(operators._calls) == 10


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_gradient_of_a_packed_projection_on_hopper_is_one_tensor(monkeypatch, kv_heads):
    """With a reference in the place of kernels."""
    from kernels.attention import attention, hopper_backward, hopper_forward
    from kernels.attention.hopper_packed import attention_packed_forward

    def forward(q, k, v, causal, scale):
        out, lse = attention(q, k, v, causal=causal, scale=scale, backend="tiled", return_lse=True)
        return out, lse / math.log(2)

    def backward(dout, dlse, q, k, v, out, lse, causal, scale, *places):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            outputs = forward(*inputs, causal, scale)
        gradients = (dout, torch.zeros_like(lse) if dlse is None else dlse)
        for place, gradient in zip(places, torch.autograd.grad(outputs, inputs, gradients), strict=True):
            place.copy_(gradient)

    monkeypatch.setattr(hopper_forward, "launch_forward", forward)
    monkeypatch.setattr(hopper_backward, "launch_backward", backward)
    qkv = torch.randn(2, 9, 2 + 2 * kv_heads, 64, requires_grad=True)
    expected = forward(*qkv.split([2, kv_heads, kv_heads], dim=2), True, 0.25)
    outputs = attention_packed_forward(qkv, 2, kv_heads, True, 0.25)
    gradients = tuple(torch.randn_like(x) for x in outputs)
    for some in (slice(2), slice(1)):  # with and without a gradient of the log-sum-exp
        torch.testing.assert_close(*(torch.autograd.grad(x[some], qkv, gradients[some], retain_graph=True) for x in (outputs, expected)))
    torch.library.opcheck(attention_packed_forward, (qkv, 2, kv_heads, True, 0.25))
