"""scripts/benchmark_attention.py and plot_attention.py: whole, small and on the CPU; what they count, compare, leave out and draw."""

import json
import math
from functools import partial

import matplotlib.image
import pytest
import torch

from kernels.attention import attention
from kernels.attention.masks import Rules, document_bounds, visible
from scripts import benchmark_attention as benchmark
from scripts import plot_attention as plot
from scripts.benchmark_attention import flops, main, mask, mask_arguments, measure, relative_errors, visible_pairs

SMALL = "--device cpu --tokens 128 --hidden 32 --head-dims 16 --seqs 64 128 --rounds 2".split()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(benchmark, "ROUND_MILLISECONDS", 0)
    monkeypatch.setitem(benchmark.CEILING, "cpu", 64)


def run(tmp_path, *arguments) -> tuple[int, dict]:
    out = tmp_path / "new" / "times.json"
    return main([*SMALL, "--out", str(out), *arguments]), json.loads(out.read_text())


def case(name: str, seq=64, batch=2, **shape) -> dict:
    return dict(series=name, seq=seq, batch=batch, heads=2, kv_heads=2, head_dim=16) | shape | mask(name)


# --- whole ----------------------------------------------------------------------------------------------------------


def test_a_laptop_times_what_it_can_and_says_what_it_leaves_out(tmp_path, capsys):
    code, result = run(tmp_path, "--masks", "full", "documents=32", "--backends", "eager", "tiled", "sdpa", "hopper", "--groups", "1", "2")
    assert code == 0 and len(result["rows"]) == 2 * 2 * 2 * 3  # groups, masks, lengths, passes
    for row in result["rows"]:
        packed = row["documents"] is not None
        assert row["batch"] * row["seq"] == 128 and row["heads"] * row["head_dim"] == 32
        assert row["measured"].keys() == {"eager", "tiled"} | ({"sdpa"} if not packed else set())
        assert row["left_out"]["hopper"] == "attention.backend=hopper runs on cuda, not on cpu"
        if packed:
            form = "cu_seqlens" if row["batch"] == 1 else "document_ids"
            assert row["left_out"]["sdpa"] == f"attention.backend=sdpa has no documents given by {form}"
        for one in row["measured"].values():
            assert one["milliseconds"] == sum(one["rounds"]) / 2 > 0 and one["peak_bytes"] is None
            assert one["speedup"] == row["measured"]["eager"]["milliseconds"] / one["milliseconds"]
            assert math.isclose(one["tflops"], flops(row, row["pass"], False) / one["milliseconds"] / 1e9)
        gradients = {"forward": {"out"}, "backward": {"dq", "dk", "dv"}, "both": set()}[row["pass"]]
        assert set().union(*row["errors"].values()) == gradients and all(0 < x < 1e-5 for e in row["errors"].values() for x in e.values())
    printed = capsys.readouterr().out
    assert "backward: times as fast as eager" in printed and "peak MiB" not in printed
    assert "sdpa is not in 6 of 24 rows (forward, head_dim 16, heads 2/2, documents=32, seq 64; ...): attention.backend=sdpa" in printed

    file = tmp_path / "new" / "times.json"
    assert plot.main([str(file), "--out", str(tmp_path / "pictures")]) == 0
    assert printed.split("\n\nwritten to")[0].endswith(capsys.readouterr().out.split("\nwritten to")[0])
    expected = {f"times-{which}-{name}.png" for which in benchmark.PASSES for name in ("time", "speedup", "tflops")}
    pictures = list((tmp_path / "pictures").iterdir())
    assert {picture.name for picture in pictures} == expected and all(matplotlib.image.imread(p).std() > 0.01 for p in pictures)


def test_the_module_computes_what_multihead_attention_does(tmp_path):
    asked = ["--module", "--batch", "1", "--passes", "forward", "backward", "--masks", "causal", "window=16", "--backends", "tiled", "sdpa"]
    code, result = run(tmp_path, *asked)
    assert code == 0 and result["baseline"] == "mha" and {row["batch"] for row in result["rows"]} == {1}
    for row in result["rows"]:
        expected = {"mha", "mha_without_weights", "tiled"} | ({"sdpa"} if row["window"] is None else set())
        assert row["measured"].keys() == row["errors"].keys() == expected
        assert all(error < 1e-5 for errors in row["errors"].values() for error in errors.values())
    assert {"dx", "din_proj_weight", "din_proj_bias", "dout_proj.weight", "dout_proj.bias"} == result["rows"][1]["errors"]["mha"].keys()


@pytest.mark.gpu
def test_a_gpu_measures_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "HOST_CALLS", 5)
    asked = "--device cuda --tokens 4096 --hidden 256 --head-dims 64 --seqs 1024 2048 4096 --masks causal"
    code, result = run(tmp_path, *asked.split(), "--backends", "eager", "triton", "sdpa", "flex")
    assert code == 0 and result["host_left_out"] == {}
    for row in result["rows"]:
        assert row["left_out"] == {} and all(one["peak_bytes"] > 0 and one["tflops"] > 0 for one in row["measured"].values())
        assert all(0 < error < 0.02 for errors in row["errors"].values() for error in errors.values())
    for which, host in result["host_microseconds"].items():
        assert host.keys() == {"eager", "triton", "sdpa", "flex"} and result["products_before_each_call"][which] >= 1
        grows = {name: figures["memory_grows_as_length_to_the"] for name, figures in result["summary"][which].items()}
        assert 0.9 < grows["triton"] < 1.1 and grows["eager"] > 1.5
        assert result["summary"][which]["triton"]["speed_over_flex"]["count"] == 3


# --- what is counted ------------------------------------------------------------------------------------------------


MASKS = ["causal", "full", "window=10", "window=100", "documents=20", "full+documents=20", "window=7+documents=20"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_the_visible_pairs_are_those_of_the_mask(name, batch):
    asked = case(name, batch=batch)
    arguments = mask_arguments(asked, "cpu")
    ids, cu_seqlens = arguments.get("document_ids"), arguments.get("cu_seqlens")
    bounds = document_bounds(ids, cu_seqlens, 64) if asked["documents"] else (None, None)
    rules = Rules(1.0, 0, asked["window"] and asked["window"] - 1, 0 if asked["causal"] else None, *bounds)
    seen = visible(rules, range(64), range(64), torch.device("cpu")).expand(batch, 1, 64, 64)
    assert visible_pairs(asked) == seen.sum().item()
    if asked["documents"]:
        assert (ids is None) == (batch == 1) and (bounds[0].diff() > 0).sum() == batch * (64 // 20 - 1)


def test_flops_are_those_of_two_products_a_pair_forward_and_five_backward():
    full = case("full", kv_heads=1)
    products = 2 * 2 * 2 * 64 * 64 * 16  # FLOPs of a product of 64 x 64 scores, 2 sequences, 2 heads
    assert [flops(full, which, False) for which in ("forward", "backward", "both")] == [2 * products, 5 * products, 7 * products]
    assert flops(case("causal"), "forward", False) == 2 * products * 65 / 128
    projections = 4 * 2 * (2 * 64) * 32 * 32  # of 4 projections of 128 tokens
    added = [flops(full, which, True) - flops(full, which, False) for which in ("forward", "backward", "both")]
    assert added == [projections, 2 * projections, 3 * projections]


def test_errors_are_relative_and_gradients_are_not_added_up():
    problem = benchmark.attention_problem(case("causal", kv_heads=1), ["eager", "sdpa"], "cpu")

    def wrong(*inputs):
        return 1.01 * attention(*inputs, backend="eager")

    problem = problem._replace(forwards=problem.forwards | {"wrong": wrong})
    for which, names in (("forward", {"out"}), ("backward", {"dq", "dk", "dv"})):
        errors = relative_errors(problem, which, {})
        assert errors["wrong"] == {name: pytest.approx(0.01, rel=1e-3) for name in names} and max(errors["sdpa"].values()) < 1e-5
        measure(problem, which, ["eager", "wrong"], 1, 0, {})
    assert all(x.grad is None for x in problem.inputs.values())


# --- what is left out -----------------------------------------------------------------------------------------------


def test_a_backend_that_fails_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def failing(error, *inputs, backend, **arguments):
        if backend == "sdpa" and inputs[0].shape[1] == 128:
            raise error
        return attention(*inputs, backend=backend, **arguments)

    for error, reason, code in (
        (torch.OutOfMemoryError("tried to allocate"), "out of memory", 0),
        (RuntimeError("no kernel"), "failed: RuntimeError: no kernel", 1),
    ):
        monkeypatch.setattr(benchmark, "attention", partial(failing, error))
        ended, result = run(tmp_path, "--masks", "full", "--backends", "eager", "sdpa")
        said = f"sdpa is not in 3 of 6 rows (forward, head_dim 16, heads 2/2, full, seq 128; ...): {reason}"
        assert ended == code and said in capsys.readouterr().out
        for row in result["rows"]:
            missing = row["seq"] == 128
            assert row["left_out"] == ({"sdpa": reason} if missing else {})
            assert row["measured"].keys() == ({"eager"} if missing else {"eager", "sdpa"})


def test_a_backend_that_fails_in_a_later_round_is_left_out_too():
    problem, calls = benchmark.attention_problem(case("causal"), ["eager", "sdpa"], "cpu"), []

    def failing(*inputs):
        calls.append(None)
        if len(calls) > 5:
            raise torch.OutOfMemoryError
        return attention(*inputs, backend="sdpa")

    left_out = {}
    measured = measure(problem._replace(forwards=problem.forwards | {"sdpa": failing}), "forward", ["eager", "sdpa"], 2, 0, left_out)
    assert measured.keys() == {"eager"} and len(measured["eager"]["rounds"]) == 2 and left_out == {"sdpa": "out of memory"}


def test_eager_runs_only_where_its_scores_fit(monkeypatch):
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 2**30)
    large = case("causal", seq=16384, batch=1)
    assert benchmark.refusal("eager", large, "cpu") == "its scores take 8.0 GiB, and 1.0 GiB are free"
    assert benchmark.refusal("tiled", large, "cpu") is None and benchmark.refusal("eager", case("causal"), "cpu") is None


@pytest.mark.parametrize(
    "asked, message",
    [
        ("--masks causal window=0", "argument --masks: invalid mask value: 'window=0'"),
        ("--masks full+window=8", "argument --masks: invalid mask value: 'full+window=8'"),
        ("--seqs 100", "--seqs 100 does not divide --tokens 128; change one of them, or say --batch"),
        ("--groups 4", "--head-dims 16 and --groups do not divide --hidden 32"),
        ("--module --masks documents=8", "nn.MultiheadAttention has no --groups, and its one mask no documents"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, capsys, asked, message):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *asked.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


# --- what it comes to -----------------------------------------------------------------------------------------------


def row(seq: int, milliseconds: dict, *, errors=None, peak=None, series="causal", **more) -> dict:
    measured = {
        name: dict(milliseconds=t, rounds=[t], peak_bytes=peak and peak[name], tflops=1 / t, speedup=milliseconds["flex"] / t)
        for name, t in milliseconds.items()
    }
    errors = {name: {"out": x} for name, x in (errors or {}).items()}
    return {"pass": "forward", "series": series, "seq": seq, "batch": 1, "measured": measured, "errors": errors, "left_out": {}} | more


def test_the_summary_compares_ours_with_the_fastest_peer_of_each_case():
    rows = [
        row(1, dict(triton=2.0, hopper=1.0, flex=4.0, sdpa_cudnn=1.0), errors=dict(triton=2e-3, sdpa=1e-3, flash_attn=4e-3)),
        row(2, dict(triton=2.0, flex=2.0, sdpa_cudnn=8.0), errors=dict(triton=3e-3, sdpa=3e-3)),
        row(4, dict(hopper=1.0, flex=4.0)),
    ]
    forward = plot.summarise(rows, {"forward": dict(triton=90.0, flash_attn=60.0)})["forward"]
    expected = {"count": 2, "least": 0.5, "geometric_mean": math.sqrt(0.5), "largest": 1.0}
    assert forward["triton"]["speed_over_best_peer"] == pytest.approx(expected)
    assert forward["triton"]["speed_over_flex"] == pytest.approx(dict(count=2, least=1.0, geometric_mean=math.sqrt(2), largest=2.0))
    assert forward["triton"]["error_over_sdpa"] == pytest.approx(dict(count=2, least=1.0, geometric_mean=math.sqrt(2), largest=2.0))
    assert forward["triton"]["error_over_flash_attn"]["largest"] == 0.5 and forward["triton"]["host_time_over_flash_attn"] == 1.5
    assert forward["hopper"]["speed_over_best_peer"] == pytest.approx(dict(count=2, least=1.0, geometric_mean=2.0, largest=4.0))
    assert forward["hopper"]["error_over_sdpa"] is None and forward["hopper"]["host_time_over_flash_attn"] is None
    assert forward["flex"].keys() == {"memory_grows_as_length_to_the"}


def test_memory_is_fitted_by_a_power_of_the_length():
    def peaks(seq):
        return dict(triton=300 * seq, flex=7 * seq**2)

    times = dict(triton=1.0, flex=1.0)
    rows = [row(seq, times, peak=peaks(seq), series=series) for series in ("a", "b") for seq in (512, 1024, 4096)]
    batches = {512: 8, 1024: 4, 4096: 1}
    as_many_tokens = [row(seq, times, peak={name: n * x for name, x in peaks(seq).items()}, batch=n) for seq, n in batches.items()]
    for chosen in (rows, as_many_tokens):
        forward = plot.summarise(chosen, {})["forward"]
        assert forward["triton"]["memory_grows_as_length_to_the"] == pytest.approx(1)
        assert forward["flex"]["memory_grows_as_length_to_the"] == pytest.approx(2)
    assert plot.summarise(rows[:1], {})["forward"]["triton"]["memory_grows_as_length_to_the"] is None


def test_peak_memory_is_drawn_where_it_was_measured(tmp_path):
    peaks = dict(triton=2**20, flex=2**21)
    rows = [row(seq, dict(triton=1.0, flex=2.0), peak=peaks) for seq in (512, 1024)]
    result = dict(
        environment={"gpu_name": "NVIDIA H200"}, device="cuda", dtype="bfloat16", baseline="eager", rows=rows,
        matmul_ceiling=dict(size=8192, median=771.0), host_microseconds={"forward": {"triton": 90.4}}, host_left_out={"flex": "why"},
        summary=plot.summarise(rows, {}),
    )  # fmt: skip
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result))
    assert plot.main([str(file)]) == 0
    assert matplotlib.image.imread(tmp_path / "gpu-forward-memory.png").std() > 0.01
    text = plot.report(result)
    assert "| causal | 512  | 1      | 2    |" in text and "forward: triton: memory grows as length to the 0.00" in text
    assert "speed over best peer 2.000 (2.000 to 2.000, of 2)" in text and "host microseconds a call: triton 90" in text
    assert "flex has no host time: why" in text and "8192^3: 771 TFLOP/s" in text
