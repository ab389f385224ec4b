"""Attention on a GPU: sizes, dtypes and backends that the CPU tests cannot reach. Few compiled variants: each costs seconds."""

import gc

import pytest
import torch
from comparison import Case, check, check_dynamic_shapes, fresh_seed, run

from kernels.attention import BACKENDS, attention, attention_packed, choose, unsupported

pytestmark = pytest.mark.gpu

HALVES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [16, 40, 64, 80, 96, 128, 192, 256]


def gpu_case(seq_q, seq_k, **options) -> Case:
    return Case(seq_q, seq_k, device="cuda", **{"dtype": torch.bfloat16, "heads": 4, "kv_heads": 2, "head_dim": 64, **options})


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    check("triton", gpu_case(1000, 1000, head_dim=head_dim), with_lse=True)
    check("triton", gpu_case(1000, 1000, head_dim=head_dim, dtype=torch.float16), with_lse=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq", [1, 17, 128, 1000, 2048])
def test_lengths(seq, causal):
    check("triton", gpu_case(seq, seq, batch=2, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 1000), (300, 1000), (1000, 300)])
def test_unequal_lengths_and_rows_that_see_nothing(seq_q, seq_k, causal):
    check("triton", gpu_case(seq_q, seq_k, causal=causal), with_lse=True)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_follow_torchs_setting(monkeypatch, head_dim, precision):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    options = {"read": cut_to_tf32} if precision == "tf32" else {}
    check("triton", gpu_case(500, 500, head_dim=head_dim, dtype=torch.float32), **options)


def cut_to_tf32(x):
    """Tensor cores ignore the lower 13 bits of a float32 (PTX ISA, mma with .tf32); cuBLAS rounds before, Triton does not."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (8, 1)])
def test_grouped_and_multi_query_heads(heads, kv_heads):
    check("triton", gpu_case(512, 512, heads=heads, kv_heads=kv_heads, batch=2, head_dim=128))


FEATURES = [
    dict(window=200), dict(window=(300, 100), causal=False), dict(documents=(1, 700, 128, 171)), dict(softcap=2.0), dict(alibi=True),
    dict(sinks=True), dict(dropout_p=0.3), dict(value_head_dim=128),
    dict(window=200, documents=(1, 700, 128, 171), softcap=2.0, alibi=True, sinks=True, dropout_p=0.3),
]  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_features(features, head_dim):
    for dtype in HALVES:
        check("triton", gpu_case(1000, 1000, batch=2, head_dim=head_dim, dtype=dtype, **features), with_lse=True)


@pytest.mark.parametrize("head_dim, value_head_dim, features", [(40, 24, dict(alibi=True, sinks=True)), (72, 24, {}), (24, 40, {})])
def test_narrow_rows_beside_wider_ones(head_dim, value_head_dim, features):
    """Where K and V would lie in shared memory in two ways, at one address; head_dims that are no multiples of 16 keep the loads of K
    from running ahead, which would give it an address of its own."""
    shape = dict(heads=8, kv_heads=2, head_dim=head_dim, value_head_dim=value_head_dim, dtype=torch.float16)
    check("triton", gpu_case(1053, 1053, **shape, **features), with_lse=True)
    check("triton", gpu_case(193, 305, batch=2, **shape, **features), with_lse=True)


@pytest.mark.parametrize("backend, deterministic", [("triton", False), ("hopper", False), ("hopper", True)])
def test_packed_projection_has_one_gradient_and_no_copy(backend, deterministic):
    """Beside qkv: the output, its log-sum-exp, the gradient, and two numbers a row; on hopper the sums of dQ in float32."""
    heads, kv_heads, head_dim, seq = 16, 8, 64, 4096
    qkv = torch.randn(1, seq, heads + 2 * kv_heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(1, seq, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    options = dict(causal=True, backend=backend, deterministic=deterministic)
    asked = dict(device_type="cuda", dtype=qkv.dtype, head_dim=head_dim, compute_capability=torch.cuda.get_device_capability())
    if unsupported(backend, **asked):
        with pytest.raises(ValueError):
            attention_packed(qkv, heads=heads, kv_heads=kv_heads, **options)
        return
    expected = attention(*qkv.split([heads, kv_heads, kv_heads], dim=2), **options)
    (wanted,) = torch.autograd.grad(expected, qkv, dout)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention_packed(qkv, heads=heads, kv_heads=kv_heads, **options)
    (got,) = torch.autograd.grad(out, qkv, dout)
    peak = torch.cuda.max_memory_allocated() - before
    sums = 2 * out.nbytes if backend == "hopper" and not deterministic else 0
    assert torch.equal(out, expected)
    if sums:  # dQ is added up in any order
        assert torch.equal(got[:, :, heads:], wanted[:, :, heads:])
        assert (got - wanted).norm() <= 1e-3 * wanted.norm()
    else:
        assert torch.equal(got, wanted)
    assert peak <= out.nbytes + qkv.nbytes + sums + 3 * 4 * heads * seq + 8192


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("triton", "eager")])
@pytest.mark.parametrize("seq_q, seq_k", [(512, 512), (300, 700), (700, 300)])
def test_every_other_backend_computes_the_same_function(backend, seq_q, seq_k):
    for kv_heads in (4, 2):
        asked = dict(device_type="cuda", dtype=torch.bfloat16, head_dim=64, compute_capability=torch.cuda.get_device_capability())
        asked |= dict(grouped=kv_heads != 4, unequal_causal=seq_q != seq_k)
        case = gpu_case(seq_q, seq_k, kv_heads=kv_heads)
        if unsupported(backend, **asked):
            with pytest.raises(ValueError, match=f"attention.backend={backend} needs"):
                check(backend, case)
        else:
            check(backend, case)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("sdpa_")])
def test_named_kernels_take_strides_and_lengths_that_pytorch_refuses(backend):
    case = gpu_case(512, 512, kv_heads=4)
    q, k, v, dout, dlse = case.tensors(fresh_seed())
    last_not_dense = v.transpose(1, 3).contiguous().transpose(1, 3)
    check(backend, case, tensors=(q, k, last_not_dense, dout, dlse))
    for seq_q, seq_k in ((0, 0), (0, 5), (5, 0)):
        check(backend, gpu_case(seq_q, seq_k, kv_heads=4, causal=False))


@pytest.mark.parametrize("backend", ["eager", "tiled", "sdpa", "triton"])
def test_autocast_does_not_change_the_result(backend):
    q, k, v, *_ = gpu_case(256, 256, dtype=torch.float32).tensors(fresh_seed())
    expected = attention(q, k, v, backend=backend)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, backend=backend), expected)


def test_auto_is_ours_and_a_packed_projection_is_not_copied():
    batch, seq, heads, kv_heads, head_dim = 2, 1024, 8, 2, 128
    packed = torch.randn(batch, seq, heads + 2 * kv_heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    slices = packed.split([heads, kv_heads, kv_heads], dim=2)
    asked = dict(device_type="cuda", dtype=packed.dtype, head_dim=head_dim, compute_capability=torch.cuda.get_device_capability())
    ours = choose(**asked)[0]
    assert ours == ("triton" if unsupported("hopper", **asked) else "hopper")
    dense = [x.detach().contiguous().requires_grad_() for x in slices]
    expected = attention(*dense, backend=ours)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(*slices)
    peak = torch.cuda.max_memory_allocated() - before
    assert torch.equal(out, expected)
    assert peak <= out.nbytes + 4 * batch * heads * seq + 4096
    dout = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, packed, dout)[0], torch.cat(torch.autograd.grad(expected, dense, dout), dim=2))


@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_memory_grows_linearly_with_length(backend):
    def peak(seq):
        q, k, v, dout, _ = gpu_case(seq, seq).tensors(0)
        gc.collect()  # what other tests have left must not be let go of meanwhile
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(backend, gpu_case(seq, seq), q, k, v, dout)
        return torch.cuda.max_memory_allocated() - before

    peak(512)  # cuBLAS takes its workspace with the first product
    assert peak(16384) <= 4.1 * peak(4096)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_bits_every_time(dtype):
    case = gpu_case(2048, 2048, batch=4, dtype=dtype)
    q, k, v, dout, _ = case.tensors(fresh_seed())
    first, second = (run("triton", case, q, k, v, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck():
    from kernels.attention.triton_backward import attention_backward
    from kernels.attention.triton_forward import attention_forward

    q, k, v, dout, dlse = gpu_case(128, 128).tensors(fresh_seed())
    out, lse = attention_forward(q, k, v, True, 0.125)
    torch.library.opcheck(attention_forward, tuple(x.detach().requires_grad_() for x in (q, k, v)) + (True, 0.125))
    torch.library.opcheck(attention_backward, (dout, dlse, q, k, v, out, lse, True, 0.125), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_without_a_graph_break(backend):
    q, k, v, dout, _ = gpu_case(256, 256).tensors(fresh_seed())
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def doubled(q, k, v):
        return 2 * attention(q, k, v, backend=backend)

    compiled = torch.compile(doubled, fullgraph=True)(*inputs)
    expected = doubled(*inputs)
    assert torch.equal(compiled, expected)
    for got, wanted in zip(torch.autograd.grad(compiled, inputs, dout), torch.autograd.grad(expected, inputs, dout)):
        assert torch.equal(got, wanted)


def test_compiles_with_dynamic_shapes():
    check_dynamic_shapes("triton", gpu_case(256, 256))


def test_offsets_beyond_32_bits():
    """Three heads of a tensor with so many that half of the rows lie past 2^31 elements (9 GB)."""
    seq, head_dim = 2048, 64
    many = 2**31 // (seq // 2 * head_dim)
    large = torch.empty(1, seq, many, head_dim, device="cuda", dtype=torch.bfloat16)
    case = gpu_case(seq, seq, heads=1, kv_heads=1, head_dim=head_dim)
    *inputs, dout, dlse = case.tensors(fresh_seed())
    views = []
    for i, x in enumerate(inputs):
        large[:, :, i : i + 1] = x
        views.append(large[:, :, i : i + 1])
    dense, strided = run("triton", case, *inputs, dout), run("triton", case, *views, dout)
    assert all(torch.equal(dense[name], strided[name]) for name in dense)
