"""The Triton kernels on the CPU under Triton's interpreter; run by test_triton.py in a process that has TRITON_INTERPRET=1 from its start.

float16 and float32 only: the interpreter's bfloat16 products are wrong. Its tile is 32 queries by 16 keys, unless a test says so.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from comparison import DROPOUT_SEED, Case, check, check_dynamic_shapes, check_scores_far_from_zero, fresh_seed, run
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels.attention import attention, attention_packed, choose, dropout, triton_forward, triton_packed, unsupported
from kernels.attention.triton_backward import attention_backward
from kernels.attention.triton_forward import attention_forward
from kernels.attention.triton_packed import attention_packed_backward, attention_packed_forward
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


WINDOWS = [(90, 90, 6), (90, 90, (20, 30)), (90, 90, (40, 3)), (60, 100, (11, 9)), (100, 60, (0, None))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k, window", WINDOWS)
def test_windows(seq_q, seq_k, window, causal):
    check("triton", Case(seq_q, seq_k, heads=2, kv_heads=1, causal=causal, window=window), with_lse=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, (9, 30)])
def test_documents(window, causal):
    check("triton", Case(77, 77, kv_heads=1, batch=2, causal=causal, documents=(36, 1, 7, 33), window=window), with_lse=True)


@pytest.mark.parametrize("features", [dict(document_ids=torch.arange(128)[None] // 64), dict(window=32), dict(window=(31, 0))])
def test_tiles_that_no_query_sees_are_not_read(features):
    """Masked by multiplication with 0 they would hand on what is no number. The first 32 keys are out of sight of the last 64 queries."""
    features = {name: x.int() if isinstance(x, torch.Tensor) else x for name, x in features.items()}
    q, k, v, dout, _ = Case(128, 128).tensors(fresh_seed())
    q, k, v = (x.index_fill(1, torch.arange(32), torch.nan).requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, **features, backend="triton")
    assert out[:, 64:].isfinite().all()
    gradients = torch.autograd.grad(out, (q, k, v), dout.index_fill(1, torch.arange(64), 0.0))
    assert all(x[:, 64:].isfinite().all() for x in gradients)


@pytest.mark.parametrize("head_dim, value_head_dim", [(16, 40), (64, 16)])
def test_value_head_dims(head_dim, value_head_dim):
    check("triton", Case(49, 60, head_dim=head_dim, value_head_dim=value_head_dim))


FEATURES = [dict(softcap=2.0), dict(alibi=True), dict(sinks=True), dict(dropout_p=0.4)]
TOGETHER = {name: value for feature in FEATURES for name, value in feature.items()}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("features", [*FEATURES, TOGETHER], ids=[*("-".join(x) for x in FEATURES), "together"])
def test_features(features, causal):
    check("triton", Case(40, 51, heads=2, kv_heads=1, causal=causal, **features), with_lse=True)


def test_features_in_half_precision():
    """Without sinks: two sums over all rows are too few numbers for a comparison of rounding errors."""
    check("triton", Case(40, 51, kv_heads=1, dtype=torch.float16, softcap=2.0, alibi=True, dropout_p=0.4), with_lse=True)


@pytest.mark.parametrize("features", [dict(), dict(sinks=True)])
def test_rows_that_see_nothing_beside_every_feature(features):
    case = Case(40, 20, heads=1, kv_heads=1, softcap=2.0, alibi=True, dropout_p=0.1, window=(9, 0), **features)
    check("triton", case, with_lse=True)
    check("triton", replace(case, seq_q=50, seq_k=50, documents=(20, 30), value_head_dim=24), with_lse=True)


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k, v, dout, _ = Case(20, 12).tensors(fresh_seed())
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with_sinks, without = (attention(*inputs, sinks=x, backend="triton") for x in (sinks, None))
    torch.testing.assert_close(with_sinks, without)
    *gradients, dsinks = torch.autograd.grad(with_sinks, (*inputs, sinks), dout)
    torch.testing.assert_close(gradients, [*torch.autograd.grad(without, inputs, dout)])
    assert torch.equal(dsinks, torch.zeros(2))


def test_the_dropout_mask_does_not_depend_on_tiles(monkeypatch):
    q, k, v, *_ = Case(70, 90, causal=False).tensors(fresh_seed())
    seed = torch.randint(2**63 - 1, (2,))
    masks = []
    for tile in (Tile(32, 16, 4, 1), Tile(16, 64, 4, 1)):
        monkeypatch.setattr("kernels.attention.tuning._INTERPRETER", tile)
        one_key_each = torch.eye(90).expand(1, 2, 90, 90).transpose(1, 2)
        out, _ = attention_forward(q, k, one_key_each, False, 0.25, dropout_p=0.3, dropout_seed=seed)
        masks.append(out.transpose(1, 2) != 0)
    assert torch.equal(*masks)
    assert torch.equal(masks[0], dropout.keep_mask(seed, 0.3, 1, 2, range(70), range(90)))
    assert abs(dropout.keep_mask(seed, 0.3, 2, 2, range(250), range(251)).double().mean() - 0.7) < 0.005  # 5 standard deviations


def test_the_same_bits_every_time():
    case = Case(50, 50, kv_heads=1, **TOGETHER)
    tensors = case.tensors(fresh_seed())
    first, second = (run("triton", case, *tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_packed_projection_and_its_one_gradient(kv_heads):
    *_, dlse = Case(37, 37, batch=2).tensors(fresh_seed())
    dout = torch.randn(2, 37, 2, 16)
    sinks = torch.randn(2, requires_grad=True)
    qkv = torch.randn(2, 37, 2 + 2 * kv_heads, 16, requires_grad=True)
    given = qkv.unflatten(2, (3, 2)) if kv_heads == 2 else qkv
    options = dict(sinks=sinks, window=10, dropout_p=0.2, return_lse=True)
    torch.manual_seed(DROPOUT_SEED)
    outputs = attention_packed(given, heads=2, kv_heads=kv_heads, backend="triton", **options)
    assert outputs[0].grad_fn.name().count("attention_packed_forward")
    q, k, v = qkv.split([2, kv_heads, kv_heads], dim=2)
    torch.manual_seed(DROPOUT_SEED)
    expected = attention(q, k, v, backend="triton", **options)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    gradients = (torch.autograd.grad(x, (qkv, sinks), (dout, dlse)) for x in (outputs, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_opcheck_of_the_packed_projection():
    qkv, dout = torch.randn(1, 18, 4, 16), torch.randn(1, 18, 2, 16)
    out, lse = attention_packed_forward(qkv, 2, 1, True, 0.25)
    torch.library.opcheck(attention_packed_forward, (qkv.requires_grad_(), 2, 1, True, 0.25))
    arguments = (dout, None, qkv.detach(), out, lse, 2, 1, True, 0.25)
    torch.library.opcheck(attention_packed_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def operator_features():
    """Every argument of `Features`, for documents of 8 and 10 positions."""
    start = torch.tensor([0] * 8 + [8] * 10, dtype=torch.int32)[None]
    end = torch.tensor([8] * 8 + [18] * 10, dtype=torch.int32)[None]
    return 7, 2, 2.0, torch.rand(2), torch.randn(2), start, end, 0.3, torch.randint(2**62, (2,))


def test_opcheck_with_every_feature():
    q, k, v, dout, dlse = Case(18, 18, kv_heads=1, value_head_dim=24).tensors(fresh_seed())
    features = operator_features()
    out, lse = attention_forward(q, k, v, False, 0.25, *features)
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    sinks = features[4].clone().requires_grad_()
    torch.library.opcheck(attention_forward, (*inputs, False, 0.25, *features[:4], sinks, *features[5:]))
    arguments = (dout, dlse, q, k, v, out, lse, False, 0.25, *features)
    torch.library.opcheck(attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


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


@pytest.mark.parametrize("packed", [False, True])
def test_selective_checkpointing_keeps_output_and_log_sum_exp_by_op_name(monkeypatch, packed):
    """What it keeps is not computed again: the forward kernel runs once."""
    ops = torch.ops.recipe
    kept = [(ops.attention_packed_forward if packed else ops.attention_forward).default]
    qkv = torch.randn(1, 20, 6, 16, requires_grad=True)
    launches = []
    for module in (triton_forward, triton_packed):
        launch = module.launch_forward
        monkeypatch.setattr(module, "launch_forward", lambda *args, launch=launch: launches.append(1) or launch(*args))

    def block(qkv):
        x = 2 * qkv  # computed again
        options = dict(window=9, dropout_p=0.2, backend="triton")
        return attention_packed(x, heads=2, **options) if packed else attention(*x.split([2, 2, 2], dim=2), **options)

    def gradient(**options):
        torch.manual_seed(DROPOUT_SEED)
        out = checkpoint(block, qkv, use_reentrant=False, **options) if options else block(qkv)
        return torch.autograd.grad(out.square().sum(), qkv)[0]

    expected = gradient()
    launches.clear()
    torch.testing.assert_close(gradient(context_fn=partial(create_selective_checkpoint_contexts, kept)), expected, rtol=0, atol=0)
    assert len(launches) == 1


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


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_the_hopper_backward_leaves_is_finished(head_dim):
    """Its last kernel, which is plain Triton: dQ out of the order of threads, and dK and dV of the divided items, here the last 4 of 12."""
    from kernels.attention.hopper_backward import KEYS, ROWS_ADDED, finish_kernel
    from kernels.attention.triton_backward import ROWS_PER_PROGRAM

    batch, heads, kv_heads, seq, rows, whole, parts = 2, 4, 2, 300, 384, 8, 3
    generator = torch.Generator().manual_seed(fresh_seed())
    sums, kept = torch.randn(batch, heads, rows, head_dim, generator=generator), torch.randn(4, parts, 2, KEYS.value, head_dim, generator=generator)
    dq, dk, dv = (torch.full((batch, seq, n, head_dim), torch.nan) for n in (heads, kv_heads, kv_heads))
    conversions = -(-seq // ROWS_PER_PROGRAM) * batch * heads
    strides = [stride for x in (dq, dk, dv) for stride in x.stride()[:3]]
    finish_kernel[(conversions + 4 * 2 * (KEYS.value // ROWS_ADDED.value),)](
        sums, dq, kept, dk, dv, conversions, heads, seq, rows, 0.5, kv_heads, seq, whole, parts, *strides, head_dim, ROWS_PER_PROGRAM
    )
    # Tiles of 64 rows and columns: [column // 8, row // 16, row % 8, column // 2 % 4, row // 8 % 2, column % 2]
    tiles = sums.view(batch, heads, rows // 64, head_dim // 64, 8, 4, 8, 4, 2, 2)
    ordered = tiles.permute(0, 1, 2, 5, 8, 6, 3, 4, 7, 9).reshape(sums.shape)
    torch.testing.assert_close(dq, 0.5 * ordered[:, :, :seq].transpose(1, 2))
    for of, x in enumerate((dk, dv)):
        by_item = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 384 - seq), value=torch.nan).transpose(1, 2).reshape(12, KEYS.value, head_dim)
        wanted = kept[:, :, of].sum(1)
        for item in range(4):
            there = ~by_item[whole + item].isnan().any(1)
            torch.testing.assert_close(by_item[whole + item][there], wanted[item][there])
            assert there.sum() == min(KEYS.value, seq - (whole + item) % 3 * KEYS.value)
        assert by_item[:whole].isnan().all()
