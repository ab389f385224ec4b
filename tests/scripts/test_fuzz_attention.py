"""scripts/fuzz_attention.py: cases follow from their seed, signatures fix what Triton compiles for, mistakes are caught and reported."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import kernels.attention as front
from kernels.attention.reference import tiled
from scripts import fuzz_attention
from scripts.fuzz_attention import LIMITS, ROOT, TILES, Plan, check, check_apart, given, main

PLAN = Plan(seed=1, signatures=150, backends=("tiled",), device="cpu")


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """In this process: it draws the CPU's cases, on any machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_case_follows_from_seed_and_number_alone():
    assert PLAN.case(7) == PLAN.case(7) != replace(PLAN, seed=2).case(7)
    first, second = (given(PLAN.case(7), 0, "cpu") for _ in range(2))
    assert all(torch.equal(x, second.leaves[name]) for name, x in first.leaves.items()) and torch.equal(first.dout, second.dout)
    assert not torch.equal(first.dout, given(PLAN.case(7), 1, "cpu").dout)


def compiled_for(case) -> tuple:
    """What Triton 3.6 looks at in the arguments: whether integers are 1 or multiples of 16, pointers too; our divisions by tiles."""
    tensors = given(case, 0, "cpu")
    strides = [stride for x in (*tensors.leaves.values(), tensors.dout) for stride in x.stride()[:3]]
    pointers = [x.data_ptr() % 16 == 0 for x in (*tensors.leaves.values(), tensors.dout)]
    lengths = [(n == 1, *(n % tile == 0 for tile in TILES)) for n in (case.seq_q, case.seq_k)]
    return tuple(tensors.leaves), [(n == 1, n % 16 == 0) for n in strides], pointers, lengths


def test_the_cases_of_a_signature_need_the_same_kernels(monkeypatch):
    monkeypatch.setitem(LIMITS, "cpu", LIMITS["cuda"]._replace(scores=2**18))
    plan = replace(PLAN, seed=int.from_bytes(os.urandom(4), "little"), signatures=20)
    first = {}
    for number in range(400):
        case = plan.case(number)
        assert compiled_for(case) == first.setdefault(number % 20, compiled_for(case)), plan.command(number)
        left, right = (case.window - 1, None) if isinstance(case.window, int) else case.window or (None, None)
        assert left is None or left < case.seq_k - 1, "hides nothing"
        assert right is None or 0 < right < case.seq_q - 1, "causal, or hides nothing"
        assert (left is not None, right is not None) == tuple(end in (case.signature.window or "") for end in ("left", "right"))
        assert case.documents is None or all(sum(row) == case.seq_q == case.seq_k for row in case.documents)
        assert case.batch == 1 or case.batch * case.signature.heads * case.seq_q * case.seq_k <= 2**18


def test_a_signature_draws_boundary_lengths_and_lengths_that_differ():
    cases = [PLAN.case(number) for number in range(600)]
    lengths = {case.seq_q for case in cases}
    assert {1, 15, 16, 17, 31, 32, 33} <= lengths
    assert any(case.seq_q > case.seq_k and case.signature.causal for case in cases), "rows that see nothing"
    assert any(case.seq_q < case.seq_k for case in cases)


def wrong(**replaced):
    """`tiled`, given other rules than it was asked for."""
    return lambda q, k, v, *, rules, **rest: tiled(q, k, v, rules=rules._replace(**{n: f(rules) for n, f in replaced.items()}), **rest)


def of_grouped_heads(q, k, v, **rest):
    kv_heads = k.shape[2]
    return tiled(q, k.repeat(1, 1, q.shape[2] // kv_heads, 1), v.repeat(1, 1, q.shape[2] // kv_heads, 1), **rest)


def without_gradient_of_the_log_sum_exp(q, k, v, **rest):
    out, lse = tiled(q, k, v, **rest)
    return out, lse.detach() + 0 * out.sum()


def not_causal_in_the_backward_pass(q, k, v, *, rules, **rest):
    right, lse = tiled(q, k, v, rules=rules, **rest)
    other = tiled(q, k, v, rules=rules._replace(right=None), **rest)[0]
    return right.detach() + other - other.detach(), lse


def other_bits_each_time(q, k, v, *, rules, **rest):
    other_bits_each_time.calls += 1
    return tiled(q, k, v, rules=rules._replace(scale=rules.scale * (1 + 1e-6 * other_bits_each_time.calls)), **rest)


other_bits_each_time.calls = 0


def not_a_number_where_nothing_is_seen(q, k, v, *, rules, **rest):
    out, lse = tiled(q, k, v, rules=rules, **rest)
    return out.masked_fill((out == 0).all(-1, keepdim=True), torch.nan), lse


def no_kernel(*_, **__):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    "broken, applies, fault",
    [
        (wrong(scale=lambda rules: rules.scale * 1.02), lambda case: case.seq_k > 16, "error of"),
        (wrong(left=lambda rules: rules.left + 1), lambda case: "left" in (case.signature.window or ""), "error of"),
        (wrong(doc_end=lambda rules: rules.doc_end + 1), lambda case: len((case.documents or [()])[0]) > 1, "error of"),
        (wrong(softcap=lambda rules: rules.softcap * 1.1), lambda case: (case.softcap or 9) < 2, "error of"),
        (wrong(alibi_slopes=lambda rules: -rules.alibi_slopes), lambda case: case.signature.alibi, "error of"),
        (wrong(seed=lambda rules: rules.seed + 1), lambda case: (case.dropout_p or 0) > 0.05, "out is not 0 where nothing is seen"),
        (of_grouped_heads, lambda case: case.signature.heads > case.signature.kv_heads > 1, "error of"),
        (without_gradient_of_the_log_sum_exp, lambda case: case.signature.log_sum_exp and case.seq_k > 16, "error of d"),
        (not_causal_in_the_backward_pass, lambda case: case.signature.causal and case.seq_k > 16, "error of d"),
        (other_bits_each_time, lambda case: case.signature.dtype == "float32" and case.seq_k > 16, "has other bits the second time"),
        (not_a_number_where_nothing_is_seen, lambda case: case.signature.causal and case.seq_q > case.seq_k, "is not finite where"),
        (no_kernel, lambda case: True, "RuntimeError: out of resource: shared memory"),
    ],
)  # fmt: skip
def test_a_broken_implementation_is_caught(monkeypatch, capsys, broken, applies, fault):
    numbers = [number for number in range(2000) if applies(PLAN.case(number))][:5]
    assert numbers and all(not check(PLAN, number)["faults"] for number in numbers)
    monkeypatch.setitem(front._IMPLEMENTATIONS, "tiled", broken)
    caught = [number for number in numbers if any(fault in text for text in check(PLAN, number)["faults"])]
    assert caught, [check(PLAN, number) for number in numbers]
    assert main(["--seed", "1", "--backends", "tiled", "--case", str(caught[0])]) == 1
    assert f"python scripts/fuzz_attention.py --seed 1 --signatures 150 --backends tiled --case {caught[0]}" in capsys.readouterr().out


def test_a_failure_is_reported_with_its_command_and_what_is_not_checked_does_not_pass(monkeypatch, tmp_path, capsys):
    def outcome(number, *faults):
        worst, draws, compiled = {"tiled": {"out": 0.5}}, {"tiled": 1}, ["f.k 1", "f.k 2"]
        return dict(number=number, faults=[*faults], worst=worst, draws=draws, compiled=compiled, seconds=0.1)

    def outcome_of(*outcomes) -> tuple[int, dict]:
        monkeypatch.setattr(fuzz_attention, "check_apart", lambda *_: iter([None, *outcomes]))
        code = main(["--seed", "1", "--cases", "3", "--signatures", "2", "--backends", "tiled", "--out", str(tmp_path / "new/out.json")])
        return code, json.loads((tmp_path / "new/out.json").read_text())

    code, result = outcome_of(outcome(0), outcome(2, "tiled: error of dk"), outcome(1))
    command = "python scripts/fuzz_attention.py --seed 1 --signatures 2 --backends tiled --case 2"
    assert code == 1 and not result["passed"] and command in capsys.readouterr().out
    assert [(failure["command"], failure["faults"]) for failure in result["failures"]] == [(command, ["tiled: error of dk"])]
    assert result["kernels_compiled"] == {"f.k": 2} and [x["cases"] for x in result["of_signatures"]] == [2, 1]
    assert outcome_of(outcome(0), outcome(1), outcome(2))[0] == 0
    code, result = outcome_of(outcome(0), outcome(1))
    assert code == 1 and not result["passed"] and (result["checked"], result["cases"], result["failures"]) == (2, 3, [])


def check_that_dies_and_hangs(number: int) -> dict:
    if number == 1:
        os._exit(3)
    if number == 3:
        time.sleep(600)
    return dict(number=number, faults=[])


def test_a_case_that_kills_or_hangs_its_process_fails_alone(monkeypatch):
    results = (x for x in check_apart(check_that_dies_and_hangs, [[0, 1, 2, 3, 4]], jobs=2) if x is not None)
    faults = {}
    for result in results:
        faults[result["number"]] = result["faults"]
        monkeypatch.setattr(fuzz_attention, "CASE_SECONDS", 2 if result["number"] == 2 else 120)  # of the next: this one hangs
    assert faults == {0: [], 1: ["the process ended with exit code 3"], 2: [], 3: ["not done after 2 s"], 4: []}


def fuzz(tmp_path, *arguments: str, **environment: str) -> dict:
    out = tmp_path / "out.json"
    command = [sys.executable, "scripts/fuzz_attention.py", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert f"seed {result['seed']}" in done.stdout and result["passed"]
    return result


def test_the_triton_kernels_interpreted(tmp_path):
    result = fuzz(tmp_path, "--cases", "8", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result["checked_by_backend"] == {"triton": 8} and result["device"] == "cpu"


@pytest.mark.gpu
def test_our_kernels_on_a_gpu(tmp_path):
    result = fuzz(tmp_path, "--cases", "100", "--signatures", "20", "--jobs", "4")
    assert result["checked_by_backend"]["triton"] == 100 and result["device"] == "cuda"
    kernels = [f"triton_{name}_kernel" for name in ("forward.forward", "backward.dkdv", "backward.dq")]
    assert all(0 < result["kernels_compiled"][kernel] <= 20 for kernel in kernels)


def test_without_a_gpu_it_says_what_would_run(capsys):
    assert main(["--backends", "hopper"]) == 2
    assert capsys.readouterr().err == "fuzz_attention: no GPU here, for hopper (TRITON_INTERPRET=1 runs triton)\n"
