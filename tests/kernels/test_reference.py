"""The specification itself: `eager` against the definition row by row, `tiled` and `sdpa` against `eager`."""

import math

import pytest
import torch
from comparison import Case, check, check_scores_far_from_zero, fresh_seed

from kernels.attention import _IMPLEMENTATIONS, attention
from kernels.attention.reference import tiled

LENGTHS = [(1, 1), (5, 5), (129, 129), (300, 257), (127, 260), (3, 0)]


def by_definition(q, k, v, causal, scale):
    """One query at a time, over the keys it may see."""
    (batch, seq_q, heads, _), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    out, lse = torch.zeros_like(q), torch.full((batch, heads, seq_q), -torch.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(seq_q):
                seen = i + seq_k - seq_q + 1 if causal else seq_k
                if seen > 0:
                    kv_head = h // (heads // kv_heads)
                    scores = scale * k[b, :seen, kv_head] @ q[b, i, h]
                    lse[b, h, i] = math.log(sum(math.exp(s) for s in scores.tolist()))
                    out[b, i, h] = torch.exp(scores - lse[b, h, i]) @ v[b, :seen, kv_head]
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 1), (6, 6), (4, 7), (7, 4)])
def test_eager_is_the_definition(seq_q, seq_k, causal):
    q, k, v, _, _ = Case(seq_q, seq_k, heads=4, kv_heads=2, batch=2, dtype=torch.float64).tensors(fresh_seed())
    out, lse = attention(q, k, v, causal=causal, scale=0.3, backend="eager", return_lse=True)
    expected_out, expected_lse = by_definition(q, k, v, causal, 0.3)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
@pytest.mark.parametrize("seq_q, seq_k", LENGTHS)
def test_backend_against_float64(backend, seq_q, seq_k, dtype, causal):
    case = Case(seq_q, seq_k, heads=4, kv_heads=2, head_dim=40, causal=causal, dtype=dtype)
    # PyTorch's own kernel is here for what we pass it; over a few rows its CPU version can be 4 times less exact than plain PyTorch.
    check(backend, case, with_lse=backend == "tiled", times=8 if backend == "sdpa" else 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k", [(5, 5), (3, 6), (6, 3)])
def test_gradients_of_tiled_are_those_of_the_function(monkeypatch, seq_q, seq_k, causal):
    monkeypatch.setattr("kernels.attention.reference.TILE", 2)  # several tiles of each kind in a few rows
    case = Case(seq_q, seq_k, heads=2, kv_heads=1, head_dim=3, causal=causal, dtype=torch.float64)
    *inputs, _, _ = case.tensors(fresh_seed())

    def tiled(q, k, v):
        out, lse = attention(q, k, v, causal=causal, backend="tiled", return_lse=True)
        return out, lse[..., max(0, seq_q - seq_k) if causal else 0 :]  # finite rows: differences of -inf are no number

    assert torch.autograd.gradcheck(tiled, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("backend", ["eager", "tiled", "sdpa"])
def test_slices_of_a_packed_projection(backend):
    batch, seq, heads, kv_heads, head_dim = 2, 33, 4, 2, 16
    packed = torch.randn(batch, seq, heads + 2 * kv_heads, head_dim, dtype=torch.float64, requires_grad=True)
    slices = packed.split([heads, kv_heads, kv_heads], dim=2)
    dout = torch.randn(batch, seq, heads, head_dim, dtype=torch.float64)
    strided, dense = (attention(*x, backend=backend) for x in (slices, [x.contiguous() for x in slices]))
    torch.testing.assert_close(strided, dense)
    torch.testing.assert_close(*(torch.autograd.grad(x, packed, dout)[0] for x in (strided, dense)))
    assert torch.autograd.grad(attention(*slices, backend=backend), packed, dout)[0].abs().sum(dim=(0, 1, 3)).all()


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_scores_far_from_zero_do_not_overflow(backend):
    check_scores_far_from_zero(backend)


def test_the_check_tells_minus_infinity_from_nan_and_half_precision_from_single(monkeypatch):
    case = Case(5, 3, dtype=torch.float16)
    check("tiled", case, with_lse=True)
    for corrupt in (lambda lse: lse.masked_fill(lse == -torch.inf, torch.nan), lambda lse: lse + 0.001):

        def wrong(*arguments, **options):
            out, lse = tiled(*arguments, **options)
            return out, corrupt(lse)

        monkeypatch.setitem(_IMPLEMENTATIONS, "tiled", wrong)
        with pytest.raises(AssertionError, match="lse"):
            check("tiled", case, with_lse=True)
