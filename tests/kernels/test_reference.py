"""The specification itself: `eager` against the definition row by row, `tiled` and `sdpa` against `eager`."""

import itertools
import math

import pytest
import torch
from comparison import DROPOUT_SEED, Case, check, check_scores_far_from_zero, fresh_seed, run
from torch.utils.checkpoint import checkpoint

from kernels.attention import _IMPLEMENTATIONS, alibi_slopes, attention, attention_packed
from kernels.attention.dropout import keep_mask
from kernels.attention.masks import document_bounds
from kernels.attention.reference import tiled

LENGTHS = [(1, 1), (5, 5), (129, 129), (300, 257), (127, 260), (3, 0)]


FEATURES = {
    "window": dict(window=(3, 1), causal=False),
    "a number of keys": dict(window=3),
    "window without a left end": dict(window=(None, 2), causal=False),
    "documents": dict(seq_q=7, seq_k=7, documents=(1, 4, 2), batch=2),
    "documents by cu_seqlens": dict(seq_q=7, seq_k=7, documents=(3, 4), as_cu_seqlens=True, causal=False),
    "alibi": dict(alibi=True, heads=6),
    "softcap": dict(softcap=0.7),
    "sinks": dict(sinks=True),
    "dropout": dict(dropout_p=0.4, batch=2),
    "value_head_dim": dict(value_head_dim=5),
    "nothing to see, and a sink": dict(seq_q=7, seq_k=3, sinks=True),
    "all": dict(
        seq_q=9, seq_k=9, batch=2, window=5, documents=(6, 3), alibi=True, softcap=0.9, sinks=True, dropout_p=0.3, value_head_dim=2
    ),
}  # fmt: skip
features = pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)


def by_definition(case, q, k, v):
    """One score at a time, as the docstring of `attention` says it."""
    (batch, seq_q, heads, _), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    offset, options = seq_k - seq_q, case.features(torch.float64)
    left, right = case.window if isinstance(case.window, tuple) else (case.window and case.window - 1, 0 if case.window else None)
    documents = options.get("document_ids")
    if "cu_seqlens" in options:
        documents = torch.arange(len(case.documents)).repeat_interleave(options["cu_seqlens"].diff())[None]
    if case.dropout_p:
        torch.manual_seed(DROPOUT_SEED)
        keep = keep_mask(torch.randint(2**63 - 1, (2,)), case.dropout_p, batch, heads, range(seq_q), range(seq_k))
    out, lse = q.new_zeros(batch, seq_q, heads, v.shape[3]), torch.full((batch, heads, seq_q), -torch.inf, dtype=q.dtype)
    for b, h, i in itertools.product(range(batch), range(heads), range(seq_q)):
        scores, values, position, kv_head = [], [], i + offset, h // (heads // kv_heads)
        for j in range(seq_k):
            if case.causal and j > position or left is not None and j < position - left or right is not None and j > position + right:
                continue
            if documents is not None and documents[b, i] != documents[b, j]:
                continue
            score = (case.scale or case.head_dim**-0.5) * float(q[b, i, h] @ k[b, j, kv_head])
            if case.softcap:
                score = case.softcap * math.tanh(score / case.softcap)
            if case.alibi:
                score -= float(options["alibi_slopes"][h]) * abs(position - j)
            scores.append(score)
            values.append(v[b, j, kv_head] * (float(keep[b, h, i, j]) / (1 - case.dropout_p) if case.dropout_p else 1))
        total = sum(map(math.exp, scores)) + (math.exp(options["sinks"][h].item()) if case.sinks else 0)
        if total:
            lse[b, h, i] = math.log(total)
        for score, value in zip(scores, values):
            out[b, i, h] += math.exp(score) / total * value
    return out, lse


@pytest.mark.parametrize("seq_q, seq_k, causal", [(1, 1, True), (6, 6, True), (6, 6, False), (4, 7, True), (7, 4, True), (7, 4, False)])
def test_eager_is_the_definition(seq_q, seq_k, causal):
    check_definition(Case(seq_q, seq_k, heads=4, kv_heads=2, batch=2, causal=causal, scale=0.3, dtype=torch.float64))


@features
def test_eager_is_the_definition_of_every_feature(feature):
    check_definition(Case(**{"seq_q": 4, "seq_k": 7, "kv_heads": 1, "head_dim": 4, "dtype": torch.float64} | feature))


def check_definition(case):
    q, k, v, *_ = case.tensors(fresh_seed())
    torch.manual_seed(DROPOUT_SEED)
    out, lse = attention(q, k, v, **case.features(torch.float64), backend="eager", return_lse=True)
    expected_out, expected_lse = by_definition(case, q, k, v)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@features
def test_gradients_of_tiled_and_eager_are_those_of_the_function_with_every_feature(monkeypatch, feature):
    monkeypatch.setattr("kernels.attention.reference.TILE", 3)
    case = Case(**{"seq_q": 4, "seq_k": 7, "kv_heads": 1, "head_dim": 3, "dtype": torch.float64} | feature)
    q, k, v, dout, dlse = case.tensors(fresh_seed())
    tiled, eager = (run(backend, case, q, k, v, dout, dlse.double()) for backend in ("tiled", "eager"))
    torch.testing.assert_close(tiled, eager, rtol=0, atol=1e-12)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    options = case.features(torch.float64)
    sinks = options.pop("sinks", None)

    def outputs(q, k, v, sinks):
        torch.manual_seed(DROPOUT_SEED)
        out, lse = attention(q, k, v, **options, sinks=sinks, backend="tiled", return_lse=True)
        return out, lse[lse.isfinite()]  # differences of -inf are no number

    assert torch.autograd.gradcheck(outputs, (*inputs, sinks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiled_against_float64_with_all_features_over_many_tiles(dtype):
    options = dict(window=(150, 20), documents=(40, 200, 60), alibi=True, softcap=2.0, sinks=True, dropout_p=0.2, value_head_dim=24)
    check("tiled", Case(300, 300, heads=4, kv_heads=2, batch=2, causal=False, dtype=dtype, **options), with_lse=True)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("halves", [(3, 5), (0, 8), (8, 0)])
def test_attention_over_two_sets_of_keys_merges_by_the_log_sum_exp(backend, halves):
    case = Case(8, 8, causal=False, dtype=torch.float64)
    *inputs, dout, dlse = case.tensors(fresh_seed())
    q, k, v = (x.requires_grad_() for x in inputs)
    whole = attention(q, k, v, causal=False, backend=backend, return_lse=True)
    parts = [attention(q, *kv, causal=False, backend=backend, return_lse=True) for kv in zip(k.split(halves, 1), v.split(halves, 1))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * torch.exp(of_part - lse).transpose(1, 2).unsqueeze(-1) for part, of_part in parts)
    torch.testing.assert_close((out, lse), whole, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(outputs, (q, k, v), (dout, dlse.double())) for outputs in ((out, lse), whole))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_dropout_is_the_same_mask_in_a_recomputation_and_another_in_the_next_call():
    q = torch.randn(1, 8, 2, 16, requires_grad=True)

    def attend(q):
        return attention(q, q, q, dropout_p=0.5, backend="tiled")

    torch.manual_seed(1)
    first, second = attend(q), attend(q)
    torch.manual_seed(1)
    again = checkpoint(attend, q, use_reentrant=False)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(out.sum(), q)[0] for out in (first, again)))


def test_dropout_keeps_its_share():
    keep = keep_mask(torch.tensor([5, 7]), 0.3, 2, 3, range(100), range(100))
    assert keep.float().mean(dim=(2, 3)).sub(0.7).abs().max() < 5 * (0.21 / 10_000) ** 0.5


def test_documents_are_runs_of_equal_ids_or_what_lies_between_cu_seqlens():
    ids = torch.tensor([[3, 3, 5, 5, 5, 3], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    start, end = document_bounds(ids, None, 6)
    assert start.tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1]]
    assert end.tolist() == [[2, 2, 5, 5, 5, 6], [1, 6, 6, 6, 6, 6]]
    assert start.dtype == end.dtype == torch.int32
    start, end = document_bounds(None, torch.tensor([0, 2, 2, 6], dtype=torch.int32), 6)
    assert start.tolist() == [[0, 0, 2, 2, 2, 2]] and end.tolist() == [[2, 2, 6, 6, 6, 6]]
    assert document_bounds(ids, None, 6)[0] is document_bounds(ids, None, 6)[0]
    ids[0, 3:] = 7
    assert document_bounds(ids, None, 6)[0][0].tolist() == [0, 0, 2, 3, 3, 3]


def test_alibi_slopes_of_powers_of_two_and_other_numbers_of_heads():
    assert alibi_slopes(8).tolist() == pytest.approx([2.0**-i for i in range(1, 9)])
    assert alibi_slopes(12).tolist() == pytest.approx([2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)])


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
    assert torch.equal(attention_packed(packed, heads=heads, kv_heads=kv_heads, backend=backend), attention(*slices, backend=backend))


def test_a_packed_projection_in_either_form():
    qkv = torch.randn(2, 7, 3, 4, 8)
    expected = attention(*qkv.unbind(2), causal=False, return_lse=True)
    torch.testing.assert_close(attention_packed(qkv, heads=4, causal=False, return_lse=True), expected)
    torch.testing.assert_close(attention_packed(qkv.flatten(2, 3), heads=4, causal=False, return_lse=True), expected)
    with pytest.raises(ValueError, match=r"qkv must be \[batch, seq, 4 \+ 2 \* 2, head_dim\].*got \[2, 7, 3, 4, 8\]"):
        attention_packed(qkv, heads=4, kv_heads=2)


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_scores_far_from_zero_do_not_overflow(backend):
    check_scores_far_from_zero(backend)


def test_the_check_tells_minus_infinity_from_nan_and_half_precision_from_single(monkeypatch):
    case = Case(5, 3, dtype=torch.float16)
    check("tiled", case, with_lse=True)
    for corrupt in (lambda lse: lse.masked_fill(lse == -torch.inf, torch.nan), lambda lse: lse + 0.001):

        def wrong(*arguments, **options):
            out, lse = tiled(*arguments, **options)
            return out, lse if lse.dtype is torch.float64 else corrupt(lse)  # `check` computes in float64 with it, too

        monkeypatch.setitem(_IMPLEMENTATIONS, "tiled", wrong)
        with pytest.raises(AssertionError, match="lse"):
            check("tiled", case, with_lse=True)
