"""The Triton kernels on the CPU under Triton's interpreter; run by test_triton.py in a process that has TRITON_INTERPRET=1 from its start.

float16 and float32 only: the interpreter's bfloat16 products are wrong. Its tile is 32 queries by 16 keys, unless a test says so.
"""

import pytest
import torch
from comparison import Case, check, check_dynamic_shapes, check_scores_far_from_zero, fresh_seed

from kernels.attention import attention, choose, unsupported
from kernels.attention.triton_backward import attention_backward
from kernels.attention.triton_forward import attention_forward
from kernels.attention.tuning import Tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 1), (17, 17), (64, 64), (77, 77), (40, 70), (75, 50), (1, 45), (5, 0)])
def test_lengths(seq_q, seq_k, causal, dtype):
    check("triton", Case(seq_q, seq_k, heads=2, kv_heads=1, causal=causal, dtype=dtype), with_lse=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k", [(64, 64), (77, 77), (40, 70), (75, 50)])
def test_lengths_with_tiles_of_more_keys_than_queries(monkeypatch, seq_q, seq_k, causal):
    monkeypatch.setattr("kernels.attention.tuning._INTERPRETER", Tile(16, 32, 4, 1))
    check("triton", Case(seq_q, seq_k, heads=2, kv_heads=1, causal=causal), with_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128, 256])
def test_head_dims(head_dim, dtype):
    check("triton", Case(49, 49, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (3, 1)])
def test_grouped_and_multi_query_heads(heads, kv_heads):
    check("triton", Case(33, 33, heads=heads, kv_heads=kv_heads, batch=2, head_dim=24, scale=0.5))


def packed_case(seq, dtype=torch.float32):
    """q, k and v as slices of one projection: rows lie heads * head_dim apart from what a dense tensor would say."""
    case = Case(seq, seq, heads=2, kv_heads=1, batch=2, dtype=dtype)
    *_, dout, dlse = case.tensors(fresh_seed())
    packed = torch.randn(2, seq, 4, 16).to(dtype)
    return case, (*packed.split([2, 1, 1], dim=2), dout, dlse)


def test_slices_of_a_packed_projection():
    case, tensors = packed_case(37)
    check("triton", case, tensors=tensors)


def test_strides_of_each_tensor_its_own():
    case = Case(35, 35, heads=2, kv_heads=2, batch=2)
    q, k, v, dout, dlse = case.tensors(fresh_seed())
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    last_not_dense = v.transpose(1, 3).contiguous().transpose(1, 3)
    broadcast_rows = dout[:1, :1].expand_as(dout)
    check("triton", case, tensors=(q[:1].expand_as(q), transposed, last_not_dense, broadcast_rows, dlse))
    check("triton", case, tensors=(q, k[:, :, :1].expand_as(k), v[:1].expand_as(v), dout, dlse))


def test_only_the_log_sum_exp_carries_a_gradient():
    q, k, v, _, dlse = Case(20, 20).tensors(fresh_seed())
    gradients = {}
    for backend in ("triton", "eager"):
        inputs = [x.detach().requires_grad_() for x in (q, k)]
        gradients[backend] = torch.autograd.grad(attention(*inputs, v, backend=backend, return_lse=True)[1], inputs, dlse)
    torch.testing.assert_close(gradients["triton"], gradients["eager"], rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_hands_on_no_gradient_that_is_no_number():
    """logaddexp, which merges attention over two sets of keys, has the gradient NaN where neither set has a key that the query sees."""
    q, k, v, _, dlse = Case(5, 3).tensors(fresh_seed())
    gradients = {}
    for backend in ("triton", "tiled", "eager"):
        inputs = [x.detach().requires_grad_() for x in (q, k)]
        lse = attention(*inputs, v, backend=backend, return_lse=True)[1]
        gradients[backend] = torch.autograd.grad(torch.logaddexp(lse, lse.detach()), inputs, dlse)
    torch.testing.assert_close(gradients["triton"], gradients["eager"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients["tiled"], gradients["eager"], rtol=1e-5, atol=1e-5)


def test_scores_far_from_zero_do_not_overflow():
    check_scores_far_from_zero("triton")


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    case = Case(18, 20, heads=2, kv_heads=1)
    q, k, v, dout, dlse = packed_case(18)[1] if packed else case.tensors(fresh_seed())
    out, lse = attention_forward(q, k, v, True, 0.25)
    of_strides = ("test_schema", "test_faketensor")
    tests = dict(test_utils=of_strides) if packed else {}
    torch.library.opcheck(attention_forward, tuple(x.detach().requires_grad_() for x in (q, k, v)) + (True, 0.25), **tests)
    for gradient in (dlse, None):
        arguments = (dout, gradient, q, k, v, out, lse, True, 0.25)
        torch.library.opcheck(attention_backward, arguments, test_utils=of_strides)


def test_compiles_without_a_graph_break():
    case = Case(18, 18, heads=2, kv_heads=1)
    q, k, v, dout, _ = case.tensors(fresh_seed())
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def doubled(q, k, v):
        return 2 * attention(q, k, v, backend="triton")

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    expected = doubled(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs, dout), torch.autograd.grad(expected, inputs, dout))


def test_compiles_with_dynamic_shapes():
    check_dynamic_shapes("triton", Case(18, 18), compiler="aot_eager")


def test_bfloat16_is_refused_and_auto_still_means_pytorchs_kernel():
    asked = dict(device_type="cpu", head_dim=64)
    assert unsupported("triton", **asked, dtype=torch.float32) is None
    assert "wrong in bfloat16 under TRITON_INTERPRET=1" in unsupported("triton", **asked, dtype=torch.bfloat16)
    assert choose(**asked, dtype=torch.float32)[0] == "sdpa"
