"""The Hopper kernel: what it compiles to, without a GPU; its results, races and deadlocks on one."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from comparison import Case, check, fresh_seed, run
from test_triton import outputs, start
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.attention import attention
from kernels.attention.tuning import hopper_tile

HERE = Path(__file__).parent
SHARED_MEMORY = 228 * 1024  # of a multiprocessor; each program takes 1 KB beside what it asks for
HARDWARE_BARRIERS = 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Every tile of the table, with the masks that it can be given: none, the diagonal, a diagonal across tiles, the end of the keys; and
    those that scripts/trace_attention.py traces."""
    cases = [
        *("bfloat16,64,causal,1024,1024", "float16,64,causal,300,1000", "bfloat16,64,causal,4096,4096"),
        *("bfloat16,64,full,4096,4096", "float16,64,full,1000,1000"),
        *("bfloat16,128,causal,512,512", "float16,128,causal,4096,4096", "bfloat16,128,causal,300,1000"),
        *("bfloat16,128,full,4096,4096", "bfloat16,128,full,1000,1000"),
        *(f"bfloat16,{head_dim},{mask},4096,4096,traced" for head_dim in (64, 128) for mask in ("causal", "full")),
    ]
    text = outputs(start([str(HERE / "compile_hopper.py"), *cases], tmp_path_factory.mktemp("triton"), interpret=False))[0]
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == cases
    return rows


def test_nothing_is_spilled(compiled):
    assert not [row for row in compiled if row["stack"] or row["spills"]]


def test_the_warpgroups_exchange_registers_as_the_table_says(compiled):
    for row in compiled:
        tile = hopper_tile(**tile_arguments(row["case"]))
        computing, at_start = tile.registers(24)
        assert {24, computing} <= set(row["set_registers"]), row["case"]
        assert 128 * (24 + tile.warpgroups * computing) <= 128 * (tile.warpgroups + 1) * at_start <= 65536 // tile.programs


def test_programs_fit_into_shared_memory_and_the_hardwares_barriers(compiled):
    for row in compiled:
        tile = row["tile"]
        assert tile["programs"] * (row["shared"] + 1024) <= SHARED_MEMORY, row["case"]
        assert 5 + 2 * tile["stages"] + 2 + tile["warpgroups"] * tile["turns"] <= HARDWARE_BARRIERS, row["case"]


def test_the_exponentials_run_under_a_matrix_product(compiled):
    """In each warpgroup's loop over tiles of keys: no more waits than the source has, and no exponential behind the last of them."""
    for row in compiled:
        tile, head_dim = row["tile"], tile_arguments(row["case"])["head_dim"]
        exponentials = tile["keys"] // 2 + 2  # 64 rows of `keys` over 128 threads, and the rescaling of a thread's two rows
        expected = dict(products=head_dim // 16 + tile["keys"] // 16, exponentials=exponentials)
        expected |= dict(waits=[1, 0], under_product=exponentials) if tile["overlap"] else dict(waits=[0, 0], under_product=0)
        assert sum(expected.items() <= loop.items() for loop in row["loops"]) == tile["warpgroups"], (row["case"], row["loops"])


def test_the_clock_is_read_where_a_trace_says_and_nowhere_without_one(compiled):
    """Of a warpgroup five times in the loop and seven outside it; of the loading warp once an item, and twice for keys and for values: in its
    loop and for the last tile, or for keys, where they are a tile ahead, the first."""
    in_the_loop = "clock product clock product wait1 clock exponential clock wait0 clock".split()
    for row in compiled:
        if not row["case"].endswith("traced"):
            assert row["clocks"] == 0, row["case"]
            continue
        warpgroups = row["tile"]["warpgroups"]
        assert row["clocks"] == 12 * warpgroups + 5, row["case"]
        assert sum(loop["order"] == in_the_loop for loop in row["loops"]) == warpgroups, (row["case"], row["loops"])


@pytest.fixture(scope="module")
def compiled_backward(tmp_path_factory) -> list[dict]:
    cases = [f"bfloat16,{head_dim},{mask},4096,4096,backward" for head_dim in (64, 128) for mask in ("causal", "full")]
    cases += ["float16,64,full,4096,4000,backward", "float16,128,causal,4096,4000,backward", "bfloat16,128,causal,4096,4096,grouped"]
    text = outputs(start([str(HERE / "compile_hopper.py"), *cases], tmp_path_factory.mktemp("triton"), interpret=False))[0]
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == cases
    return rows


def test_the_backward_fits(compiled_backward):
    """Of a thread's 240 registers dK and dV, P and dP take 192, and at head_dim 64, whose tile has twice the queries, the packed P 32 more."""
    from kernels.attention.hopper_backward import DQ_FULL, WARPGROUPS

    assert DQ_FULL.value + WARPGROUPS.value <= HARDWARE_BARRIERS
    for row in compiled_backward:
        assert row["shared"] + 1024 <= SHARED_MEMORY, row["case"]
        assert {24, 240} <= set(row["set_registers"]), row["case"]
        assert not any(loop["spills"] for loop in row["loops"]), (row["case"], row["loops"])


def test_the_backwards_warpgroups_wait_at_three_barriers_a_step(compiled_backward):
    """For dS of the other one, and between the store of a dS and the products that read one, twice, since these come by turns."""
    for row in compiled_backward:
        assert {loop["barriers"] for loop in row["loops"] if loop["waits"] == [1, 1, 1, 0]} == {3}, (row["case"], row["loops"])


def test_the_backwards_exponentials_and_differences_run_under_matrix_products(compiled_backward):
    """The loops of each warpgroup: the exponentials under dP, dS under dV, the store of dQ under dK."""
    order = "product wait1 exponential product wait1 product wait1 wait0".split()
    for row in compiled_backward:
        exponentials = {64: 64, 128: 32}[tile_arguments(row["case"])["head_dim"]]
        expected = dict(products=32, waits=[1, 1, 1, 0], exponentials=exponentials, under_product=exponentials, order=order)
        assert sum(expected.items() <= loop.items() for loop in row["loops"]) >= 2, (row["case"], row["loops"])


def test_items_are_divided_where_programs_would_have_no_work():
    from kernels.attention.hopper_backward import MOST_PARTS, STEPS_AROUND_AN_ITEM, divide

    def steps_until_all_are_done(items, steps):
        return -(-items // 132) * (steps + STEPS_AROUND_AN_ITEM)

    gains = 0
    for items, group, tiles in itertools.product((1, 16, 68, 131, 132, 133, 200, 264, 2048, 4096), (1, 4), (1, 2, 7, 8, 16, 256)):
        whole, parts = divide(items, group * tiles, tiles, 132)
        assert whole == items and parts == 1 or whole % 132 == 0 and items - whole < 132 and 1 < parts <= min(tiles, MOST_PARTS)
        of_parts = steps_until_all_are_done((items - whole) * parts, group * math.ceil(tiles / parts))
        divided, undivided = steps_until_all_are_done(whole, group * tiles) + of_parts, steps_until_all_are_done(items, group * tiles)
        assert divided <= undivided
        gains += divided < undivided
    assert gains > 50
    assert divide(2048, 16, 16, 132) == (1980, 3) and divide(4096, 128, 128, 132) == (4092, 8)


def tile_arguments(case: str) -> dict:
    _, head_dim, mask, seq_q, seq_k = case.split(",")[:5]
    return dict(head_dim=int(head_dim), causal=mask == "causal", seq_q=int(seq_q), seq_k=int(seq_k))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("of_lse", [False, True])
def test_the_gradients_fit_the_inputs(of_lse, deterministic):
    """The autograd formula hands what it has to the backward, ours or Triton's, and takes what that returns: on tensors without data."""
    pytest.importorskip("triton")
    from kernels.attention.hopper_forward import attention_forward

    with FakeTensorMode():
        q = torch.empty(2, 100, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        k, v = torch.empty(2, 2, 300, 2, 64, dtype=torch.bfloat16, requires_grad=True).unbind()
        out, lse = attention_forward(q, k, v, True, 0.125, deterministic)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 4, 100), torch.float32)
        gradients = torch.autograd.grad([out.sum()] + [lse.sum()] * of_lse, (q, k, v))
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (q, k, v)]


NOT_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(NOT_HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")(test))


def check_forward(case: Case, tensors=None) -> None:
    """Output and log-sum-exp against float64: at most twice the error of plain PyTorch in this dtype; what sees nothing gives 0, -inf."""
    q, k, v = (case.tensors(fresh_seed()) if tensors is None else tensors)[:3]
    options = dict(causal=case.causal, scale=case.scale, return_lse=True)
    with torch.no_grad():
        out, lse = attention(q, k, v, backend="hopper", **options)
        beside, _ = attention(q, k, v, backend="eager", **options)
        exact, exact_lse = attention(*(x.double() for x in (q, k, v)), backend="eager", **options)
    assert (out.shape, out.dtype, lse.dtype) == (exact.shape, q.dtype, torch.float32)
    assert torch.equal(lse.isfinite(), exact_lse.isfinite()) and torch.equal(lse[~lse.isfinite()].double(), exact_lse[~lse.isfinite()])
    assert (out.transpose(1, 2)[~lse.isfinite()] == 0).all()
    error, error_beside = ((x.double() - exact).abs().amax().item() for x in (out, beside))
    eps = torch.finfo(q.dtype).eps
    assert error <= 2 * error_beside + exact.abs().amax().item() * eps / 4 + 1e-5, f"{case}: {error:.3g}, beside {error_beside:.3g}"
    lse_error = (lse - exact_lse)[lse.isfinite()].abs()
    assert not lse_error.numel() or lse_error.amax() <= 2e-5, f"{case}: log-sum-exp {lse_error.amax():.3g}"


def gpu_case(seq_q, seq_k, **options) -> Case:
    return Case(seq_q, seq_k, device="cuda", **{"dtype": torch.bfloat16, "heads": 4, "kv_heads": 2, "head_dim": 64, "batch": 2, **options})


LENGTHS = [(1, 1), (17, 17), (64, 64), (129, 129), (512, 512), (1000, 1000), (2500, 2500), (1, 1000), (300, 1000), (1000, 300), (192, 2304)]


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(head_dim, causal, dtype):
    for seq_q, seq_k in LENGTHS:
        check_forward(gpu_case(seq_q, seq_k, head_dim=head_dim, causal=causal, dtype=dtype))


@gpu
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (6, 1)])
def test_grouped_and_multi_query_heads(heads, kv_heads):
    for head_dim in (64, 128):
        check_forward(gpu_case(700, 700, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=0.3))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(head_dim, causal, dtype):
    for seq_q, seq_k in LENGTHS:
        check("hopper", gpu_case(seq_q, seq_k, head_dim=head_dim, causal=causal, dtype=dtype), with_lse=True)
    check("hopper", gpu_case(700, 700, head_dim=head_dim, causal=causal, dtype=dtype))


@gpu
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (6, 1)])
def test_gradients_of_grouped_and_multi_query_heads(heads, kv_heads):
    for head_dim, causal in itertools.product((64, 128), (True, False)):
        check("hopper", gpu_case(700, 600, heads=heads, kv_heads=kv_heads, head_dim=head_dim, causal=causal, scale=0.3), with_lse=True)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_where_the_last_items_are_divided(head_dim):
    """264 whole ones, two for each of an H100's or H200's multiprocessors, and 24 in parts."""
    check("hopper", gpu_case(1000, 1000, batch=9, heads=8, kv_heads=4, head_dim=head_dim, causal=False), with_lse=True)


@gpu
def test_gradients_the_same_bits_every_time_when_asked():
    for head_dim in (64, 128):
        case = gpu_case(2048, 2048, heads=16, head_dim=head_dim, deterministic=True)
        tensors = case.tensors(fresh_seed())[:4]
        first, second = (run("hopper", case, *tensors) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@gpu
def test_gradients_of_scores_far_from_zero():
    """Keys past the end have the score 0, and exp2(0 - lse) of a row whose scores are all far below it is infinite."""
    case = gpu_case(300, 300)
    q, k, v, dout, _ = case.tensors(fresh_seed())
    k = q[:, :, :2] * -3  # each query against itself: far below 0, where the row has no other key
    check("hopper", case, tensors=(q, k, v, dout, None))


@gpu
def test_scores_far_from_zero_do_not_overflow():
    case = gpu_case(300, 300, dtype=torch.float16, scale=20.0)
    out, lse = attention(*case.tensors(fresh_seed())[:3], scale=case.scale, backend="hopper", return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all() and lse.amax() > 200


@gpu
def test_nothing_to_attend_to():
    for seq_q, seq_k, batch in ((5, 0, 2), (0, 5, 2), (5, 5, 0)):
        case = gpu_case(seq_q, seq_k, batch=batch, causal=False)
        out, lse = attention(*case.tensors(0)[:3], causal=False, backend="hopper", return_lse=True)
        assert out.shape == (batch, seq_q, 4, 64) and (out == 0).all() and (lse == -math.inf).all()


@gpu
def test_strides_of_each_tensor_its_own_in_place():
    case = gpu_case(300, 300, kv_heads=4)
    q, k, v, *_ = case.tensors(fresh_seed())
    packed = torch.stack((q, k, v), dim=2)
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    one_head, one_batch = k[:, :, :1].expand_as(k), v[:1].expand_as(v)
    wide = torch.randn(2, 300, 4, 72, device="cuda", dtype=torch.bfloat16)[..., 8:]
    for tensors in (packed.unbind(dim=2), (wide, transposed, v), (q, one_head, one_batch)):
        check_forward(case, tensors)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention(*tensors, backend="hopper")
        assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 4 * out.shape[0] * out.shape[1] * out.shape[2] + 2048


@gpu
def test_tensors_that_tma_cannot_read_are_copied():
    case = gpu_case(200, 200, kv_heads=4)
    q, k, v, *_ = case.tensors(fresh_seed())
    odd_rows = torch.randn(2, 200, 4, 65, device="cuda", dtype=torch.bfloat16)[..., :64]
    odd_start = torch.randn(k.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view(k.shape)
    last_not_dense = v.transpose(1, 3).contiguous().transpose(1, 3)
    check_forward(case, (odd_rows, odd_start, last_not_dense))


@gpu
def test_opcheck():
    from kernels.attention.hopper_forward import attention_forward

    q, k, v, *_ = gpu_case(128, 128).tensors(fresh_seed())
    torch.library.opcheck(attention_forward, tuple(x.detach().requires_grad_() for x in (q, k, v)) + (True, 0.125))


@gpu
def test_compiles_without_a_graph_break():
    q, k, v, dout, _ = gpu_case(256, 256).tensors(fresh_seed())
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def doubled(q, k, v):
        return 2 * attention(q, k, v, backend="hopper")

    compiled, expected = torch.compile(doubled, fullgraph=True)(*inputs), doubled(*inputs)
    assert torch.equal(compiled, expected)
    (dq, *dkv), (expected_dq, *expected_dkv) = (torch.autograd.grad(out, inputs, dout) for out in (compiled, expected))
    assert all(map(torch.equal, dkv, expected_dkv))
    torch.testing.assert_close(dq, expected_dq)  # added up in any order


@gpu
def test_graphs_replayed_beside_launches_on_the_stream_that_recorded_them():
    """Each launch needs its own counter of work items, also the recorded ones."""
    q, k, v, dout, _ = gpu_case(2048, 2048, heads=16, kv_heads=16).tensors(fresh_seed())
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def both_passes():
        out = attention(*inputs, backend="hopper")
        _, dk, dv = torch.autograd.grad(out, inputs, dout)  # dq is added up in any order
        return out.detach(), dk, dv

    expected = both_passes()
    recording, other = torch.cuda.Stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=recording):
        replayed = both_passes()
    torch.cuda.synchronize()
    for _ in range(20):
        for x in replayed:
            x.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            graph.replay()
        with torch.cuda.stream(recording):
            launched = both_passes()
        torch.cuda.synchronize()
        assert all(map(torch.equal, replayed, expected)) and all(map(torch.equal, launched, expected))


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_a_trace_changes_nothing_and_its_clocks_rise(head_dim, causal):
    from kernels.attention.hopper_forward import EVENTS, launch_forward, new_trace

    q, k, v, *_ = gpu_case(4096, 4096, heads=32, kv_heads=32, head_dim=head_dim).tensors(fresh_seed())
    trace = new_trace(q, k, causal)
    traced, plain = launch_forward(q, k, v, causal, 0.125, trace), launch_forward(q, k, v, causal, 0.125)
    assert torch.equal(traced[0], plain[0]) and torch.equal(traced[1], plain[1])
    events = dict(zip(EVENTS, trace[:, :, :-1].unbind(dim=-1)))  # each [programs, partitions, tiles]
    for name in ("keys requested", "values requested"):
        assert (events[name][:, :-1] == 0).all() and (events[name][:, -1, 0] > 0).all()
    for first, then in itertools.pairwise(("scores issued", "scores ready", "softmax done", "output issued", "output ready")):
        assert torch.equal(events[first] > 0, events[then] > 0)
        assert (events[first] <= events[then]).all()
    for clocks in events["scores issued"][:, :-1].flatten(0, 1):
        issued = clocks[clocks > 0]
        assert len(issued) > 30 and (issued.diff() > 0).all()
    assert (events["scores issued"][:, 0] > events["keys requested"][:, -1])[events["scores issued"][:, 0] > 0].all()


@gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_thousands_of_backward_launches_of_random_shapes_beside_other_work(head_dim, causal):
    """dK and dV have the same bits from launch to launch, dQ, whose sums are made in any order, nearly so."""
    seed = fresh_seed()
    chance = random.Random(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    streams = [torch.cuda.Stream() for _ in range(2)]
    beside = torch.cuda.Stream()
    matrix = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    launches = 0
    while launches < 500:
        kv_heads = chance.randint(1, 3)
        # Half of them have several work items a program, the others one at most.
        batch, longest = (64, 400) if chance.random() < 0.5 else (chance.randint(1, 3), 1500)
        heads = kv_heads * chance.randint(1, 3)
        seq_q = chance.choice([chance.randint(1, 200), chance.randint(1, longest), 64 * chance.randint(1, longest // 64)])
        seq_k = seq_q if chance.random() < 0.5 else chance.randint(1, longest)
        shapes = [(batch, seq_q, heads, head_dim), (batch, seq_k, kv_heads, head_dim), (batch, seq_k, kv_heads, head_dim)]
        inputs = [torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_() for shape in shapes]
        dout = torch.randn(shapes[0], generator=generator, device="cuda").bfloat16()
        exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
        exact = torch.autograd.grad(attention(*exact_inputs, causal=causal, backend="eager"), exact_inputs, dout.float())
        out = attention(*inputs, causal=causal, backend="hopper")
        torch.cuda.synchronize()
        results = []
        for _ in range(5):
            with torch.cuda.stream(beside):
                matrix @ matrix
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(torch.autograd.grad(out, inputs, dout, retain_graph=True))
        torch.cuda.synchronize()
        launches += len(results)
        what = f"{shapes} causal={causal}"
        for got in results:
            for name, x, wanted in zip("qkv", got, exact, strict=True):
                # One key alone has dS = 0, of which dP - delta in float32 leaves some 1e-7 in each number; dK adds up those of all its queries.
                left = max(1e-6, 2e-7 * (seq_q * heads // kv_heads) ** 0.5) if name == "k" else 1e-6
                floor = left * wanted.numel() ** 0.5 if seq_k == 1 else 1e-6
                assert (x - wanted).norm() <= 1e-2 * wanted.norm() + floor, f"d{name} of {what}"
            assert torch.equal(got[1], results[0][1]) and torch.equal(got[2], results[0][2]), what


@gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_thousands_of_launches_of_random_shapes_beside_other_work(head_dim, causal):
    """Races would change bits from launch to launch, deadlocks run into the timeout. Two streams launch at once while a third multiplies
    matrices; every result is compared with the reference, and with that of the same launch made again."""
    seed = fresh_seed()
    chance = random.Random(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    streams = [torch.cuda.Stream() for _ in range(2)]
    beside = torch.cuda.Stream()
    matrix = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def length():
        return chance.choice([chance.randint(1, 200), chance.randint(1, 1200), 64 * chance.randint(1, 24), chance.randint(2049, 2600)])

    launches = 0
    while launches < 750:
        kv_heads = chance.randint(1, 3)
        batch, heads = chance.randint(1, 4), kv_heads * chance.randint(1, 3)
        seq_q = length()
        seq_k = seq_q if chance.random() < 0.5 else length()
        shapes = [(batch, seq_q, heads, head_dim), (batch, seq_k, kv_heads, head_dim), (batch, seq_k, kv_heads, head_dim)]
        q, k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
        exact, exact_lse = attention(*(x.float() for x in (q, k, v)), causal=causal, backend="eager", return_lse=True)
        torch.cuda.synchronize()
        results = []
        for _ in range(5):
            with torch.cuda.stream(beside):
                matrix @ matrix
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(attention(q, k, v, causal=causal, backend="hopper", return_lse=True))
        torch.cuda.synchronize()
        launches += len(results)
        what = f"{shapes} causal={causal}"
        finite = exact_lse.isfinite()
        assert torch.equal(results[0][1].isfinite(), finite), what
        torch.testing.assert_close(results[0][1][finite], exact_lse[finite], rtol=0, atol=2e-5, msg=what)
        assert (results[0][0] - exact).norm() <= 4e-3 * exact.norm(), what
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]), what
