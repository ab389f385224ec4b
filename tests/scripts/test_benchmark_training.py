"""scripts/benchmark_training.py, training_peers.py and training_profile.py on CPU processes: what they count, search, and leave out."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from model.gpt import GPT
from scripts import benchmark_training as benchmark
from scripts.training_profile import PROFILED, common, length, report, summarise, union
from scripts.training_peers import CONTENDERS, Refused, cross_entropy, huggingface_model, set_learning_rate, theory_gb
from training.engine import build_optimizer
from training.metering import Meter

WORKER = Path(__file__).with_name("benchmark_training_worker.py")
TINY = """
model: {layers: 2, hidden_size: 32, heads: 2, vocab_size: 264, sequence_length: 32}
train: {global_batch_size: 8, precision: fp32}
optimizer: {warmup_steps: 0, lr: 1e-2}
"""
LLAMA = ["model.positions=rope", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.kv_heads=1"]


@pytest.fixture
def tiny(tmp_path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(f"base: {benchmark.ROOT / 'configs/base.yaml'}{TINY}")
    return file


def run(tmp_path, *arguments) -> tuple[int, dict]:
    out = tmp_path / "result.json"
    code = benchmark.main([*"--device cpu --steps 3 --warmup 2 --limit 100 --out".split(), str(out), *map(str, arguments)])
    return code, json.loads(out.read_text())


def plain_losses(case: str, steps: int, monkeypatch) -> list[float]:
    """Of two ranks' global batch, trained on by one process of plain PyTorch."""
    config = benchmark.case_config(case, 2, 4)
    batches = []
    for rank in range(2):
        monkeypatch.setattr(benchmark.dist, "get_rank", lambda rank=rank: rank)
        batches += benchmark.random_batches(config)
    tokens, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, config.attention)
    optimizer, losses = build_optimizer(model, config), []
    for step in range(steps):
        set_learning_rate(optimizer, step, config)
        loss = cross_entropy(model(tokens), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- whole ----------------------------------------------------------------------------------------------------------


def test_contenders_train_the_same_model_on_the_same_batch(tmp_path, tiny, capsys, monkeypatch):
    """Two processes each: from the same weights and tokens, with every micro batch, they come to the loss of plain PyTorch."""
    asked = ["--configs", tiny, "--gpus", 2, "--contenders", "ours", "ours_sharded", "fsdp2_compile", "--profile", "fsdp2_compile"]
    code, result = run(tmp_path, *asked)
    rows = {row["contender"]: row for row in result["rows"]}
    losses = plain_losses(str(tiny), 5, monkeypatch)
    assert code == 0 and list(rows) == ["ours", "ours_sharded", "fsdp2_compile"] and losses[4] < losses[0] - 0.3
    for row in rows.values():
        assert {trial["micro_batch"] for trial in row["trials"]} >= {4, 2}
        for trial in row["trials"]:
            assert trial["micro_batch"] * trial["accumulation"] * 2 == trial["global_batch"] == 8
            assert len(trial["all_step_ms"]) == 3 and trial["reduce_dtype"] == "fp32" and trial["parameters"] == rows["ours"]["parameters"]
            assert [trial["first_loss"], trial["last_loss"]] == pytest.approx([losses[0], losses[4]], abs=1e-4)
        assert row["tokens_per_second_per_gpu"] == max(trial["tokens_per_second_per_gpu"] for trial in row["trials"])
    assert rows["ours"]["gathered"].startswith("0.0%") and rows["ours_sharded"]["gathered"].startswith("100.0%")
    for row in rows.values():
        assert row["theory_gb"]["sums"] == pytest.approx(4e-9 * row["parameters"] * row["accumulation"])
    assert rows["fsdp2_compile"]["profile"]["theory_gb"] == rows["fsdp2_compile"]["theory_gb"]
    assert "nothing compiled on a CPU" in rows["fsdp2_compile"]["made_of"] and "again" in rows["fsdp2_compile"]["gathered"]
    ratio = result["summary"][str(tiny)]["fsdp2_compile"]
    assert ratio == rows["ours"]["tokens_per_second_per_gpu"] / rows["fsdp2_compile"]["tokens_per_second_per_gpu"]
    profile = rows["fsdp2_compile"]["profile"]
    with gzip.open(tmp_path / profile["trace"], "rt") as trace:
        assert sum(each.get("name") == PROFILED for each in json.load(trace)["traceEvents"]) == 1
    assert profile["steps"] == 3 and profile["device_busy_share"] is None and profile["host_working_ms"] > 0
    printed = capsys.readouterr().out
    assert re.search(r"\| ours \| \d x \d \| ", printed) and f"| {ratio:.3f} |" in printed


def test_what_fails_is_left_out_and_the_rest_goes_on(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    case = f"{tiny},model.positions=alibi"  # which PyTorch's attention has not
    code, result = run(tmp_path, "--configs", case, "--gpus", 1, "--contenders", "zero3_stock", "huggingface_zero3", "--micro-batches", 8)
    stock, huggingface = result["rows"]
    assert code == 1 and stock["failed"] and "attention.backend=sdpa has no ALiBi" in stock["left_out"]
    assert huggingface == {"config": case, "contender": "huggingface_zero3", "left_out": "the package transformers is not installed"}


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender, dialect, scenario, starts", [
    ("fsdp2_compile", LLAMA, {"fits": 2, "ranks": [0, 1], "leaks": False}, 1),  # all ranks find out, and go on
    ("zero3_stock", [], {"fits": 2, "ranks": [1], "leaks": True}, 3),  # rank 0 is stuck in a collective; then memory is left in use
])
def test_a_micro_batch_out_of_memory_does_not_end_the_search(tmp_path, tiny, monkeypatch, contender, dialect, scenario, starts):
    monkeypatch.setenv("SCENARIO", json.dumps(scenario))
    monkeypatch.setattr(benchmark, "__file__", str(WORKER))
    launched, launch = [], benchmark.launch
    monkeypatch.setattr(benchmark, "launch", lambda *arguments: launched.append(launch(*arguments)) or launched[-1])
    case = ",".join([str(tiny), *dialect])
    options = benchmark.parse(["--configs", case, "--gpus", "2", "--device", "cpu", "--steps", "1", "--warmup", "1"])
    row = benchmark.run_contender(case, contender, options, tmp_path)
    assert len(launched) == starts and [trial["micro_batch"] for trial in row["trials"]] == [4, 2, 1]
    for trial in row["trials"]:
        fits = trial["micro_batch"] <= scenario["fits"]
        assert ("step_ms" in trial) == fits and ("out of memory" in trial.get("left_out", "")) != fits
    assert row["micro_batch"] <= scenario["fits"] and "failed" not in row
    for log in tmp_path.glob("*.log"):
        held = [int(number) for number in re.findall(r"^held (\d+)$", log.read_text(), re.MULTILINE)]
        assert max(held) < held[0] + 1000, "a micro batch's tensors are gone before the next"
    assert [row["first_loss"], row["last_loss"]] == pytest.approx(plain_losses(case, 2, monkeypatch), abs=1e-4)


@pytest.mark.parametrize("crashes, launches, found", [({8}, 2, [4, 2]), ({8, 4}, 2, []), ({8, 2}, 2, [4]), ({4}, 2, [8, 2])])
def test_a_micro_batch_that_crashes_is_passed_over_and_two_in_a_row_end_the_search(tmp_path, monkeypatch, crashes, launches, found):
    launched = []

    def launch(asked: dict, folder: Path, name: str) -> str | None:
        file = Path(asked["trials"])
        trials = json.loads(file.read_text())["trials"]
        launched.append(name)
        for micro_batch in asked["candidates"][len(trials) :]:
            trials.append({"micro_batch": micro_batch} | ({} if micro_batch in crashes else {"step_ms": 1.0, "tokens_per_second_per_gpu": 1.0 / micro_batch}))
            file.write_text(json.dumps({"trials": trials, "complete": False}))
            if micro_batch in crashes:
                return "RuntimeError: CUDA error: an illegal memory access was encountered"
        file.write_text(json.dumps({"trials": trials, "complete": True}))
        return None

    monkeypatch.setattr(benchmark, "launch", launch)
    asked = {"case": "a", "contender": "ours", "candidates": [8, 4, 2], "profile": None}
    trials, reason = benchmark.launch_until_done(asked, tmp_path)
    assert len(launched) == launches and [trial["micro_batch"] for trial in trials if "step_ms" in trial] == found
    row = benchmark.best_row(trials, reason)
    assert row["failed"] and "illegal memory access" in row["search_broke_off" if found else "left_out"]
    assert row.get("micro_batch") == (min(found) if found else None)


def test_hugging_face_with_our_attention_is_held_against_hugging_face_with_sdpa():
    def row(contender, speed, memory, case="a"):
        return {"config": case, "contender": contender, "micro_batch": 4, "tokens_per_second_per_gpu": speed, "allocated_gb": memory}

    rows = [row("huggingface_zero3", 100.0, 8.0), row("huggingface_zero3_ours", 125.0, 6.0), row("huggingface_zero3_ours,attention.backend=triton", 50.0, 8.0),
            row("huggingface_zero3_ours", 1.0, 1.0, case="b"), {"config": "b", "contender": "huggingface_zero3", "left_out": "failed"}]  # fmt: skip
    assert benchmark.attention_in_huggingface(rows) == {"a": {
        "huggingface_zero3_ours": {"times_as_fast": 1.25, "times_the_memory": 0.75},
        "huggingface_zero3_ours,attention.backend=triton": {"times_as_fast": 0.5, "times_the_memory": 1.0}}}


def test_the_search_goes_down_to_what_fits_and_on_while_it_is_faster():
    def found(speeds: dict[int, float], fits: int) -> list[int]:
        def attempt(micro: int) -> dict:
            told = {"tokens_per_second_per_gpu": speeds[micro]} if micro <= fits else {"left_out": "out of memory"}
            return {"micro_batch": micro} | told

        return [trial["micro_batch"] for trial in benchmark.search(speeds, attempt)]

    speeds = {1: 10.0, 2: 19.0, 4: 30.0, 8: 29.0, 16: 28.0, 32: 40.0}
    assert found(speeds, fits=16) == [32, 16, 8, 4, 2]
    assert found(speeds, fits=32) == [32, 16]
    assert found(speeds, fits=1) == [32, 16, 8, 4, 2, 1]
    assert found(speeds, fits=0) == [32, 16, 8, 4, 2, 1]


def test_a_row_is_the_fastest_trial_and_says_what_broke_the_search_off():
    none = {"micro_batch": 8, "left_out": "out of memory: of 80 GB"}
    slow = {"micro_batch": 4, "step_ms": 2.0, "tokens_per_second_per_gpu": 1.0}
    fast = {"micro_batch": 2, "step_ms": 1.0, "tokens_per_second_per_gpu": 2.0}
    row = benchmark.best_row([none, slow, fast], None)
    assert row["micro_batch"] == 2 and row["trials"] == [none, slow, fast] and "failed" not in row
    assert benchmark.best_row([none], None) == {"left_out": "out of memory: of 80 GB", "trials": [none]}
    assert benchmark.best_row([slow, {"micro_batch": 2, "left_out": "not done after 9 s"}], "not done after 9 s").items() >= {
        "micro_batch": 4, "search_broke_off": "not done after 9 s", "failed": True}.items()
    assert benchmark.best_row([], "ImportError: no")["failed"]


def test_a_contender_that_hangs_is_ended_at_the_limit(tmp_path, monkeypatch):
    program = tmp_path / "hangs.py"
    program.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(benchmark, "__file__", str(program))
    assert benchmark.launch({"world": 2, "device": "cpu", "limit": 1}, tmp_path, "hangs") == "not done after 1 s"


@pytest.mark.parametrize("log, reason", [
    ("Traceback (most recent call last):\n  File x\nValueError: no such thing\nsome noise\n", "ValueError: no such thing"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory: torch.OutOfMemoryError: CUDA out of memory. Tried"),
    ("torch.distributed.DistBackendError: NCCL error\nLast error:\nCuda failure 2 'out of memory'\n",
     "out of memory: torch.distributed.DistBackendError: NCCL error"),
    ("scripts.training_peers.Refused: no such model", f"{benchmark.REFUSED}no such model"),
    ("Segmentation fault", "Segmentation fault"),
    ("", "died without a word"),
])  # fmt: skip
def test_the_reason_is_in_the_log(log, reason):
    assert benchmark.what_it_died_of(log) == reason


# --- what is counted ------------------------------------------------------------------------------------------------


def test_speed_by_hand():
    """gpt2-124m on 4 H200, 512 sequences of 1024 in 250 ms: 131,072 tokens a GPU, 524,288 tokens/s/GPU."""
    config = benchmark.case_config("gpt2-124m,train.global_batch_size=512,train.activation_checkpointing=full", 4, 128)
    told = benchmark.speed([260.0, 250.0, 240.0], Meter(config, 4, device_name="NVIDIA H200"), ceiling=700.0)
    assert told["step_ms"] == 250.0 and told["tokens_per_second_per_gpu"] == 524_288
    assert told["mfu"] == pytest.approx(524_288 * 855_383_040 / 989e12)
    assert told["of_matmul"] == pytest.approx(524_288 * 855_383_040 / 700e12)
    assert told["mfu_causal"] == pytest.approx(524_288 * (855_383_040 - 12 * 12 * 768 * (1024 - 512.5)) / 989e12)
    blocks = 85_054_464 - 12 * (4 * 768**2 + 768)  # full checkpointing: all but each block's last product
    assert told["hfu"] == pytest.approx(524_288 * (855_383_040 + 2 * blocks + 113_246_208 // 3) / 989e12)


def test_communication_in_theory_by_hand():
    """Two micro batches of a model of 1e9 elements, 0.2e9 of which stay: 2 bytes for each gather, 4 for each sum."""
    config = benchmark.case_config("gpt2-124m,train.global_batch_size=8", 2, 2)
    assert theory_gb((2 * 800_000_000, 200_000_000, 10**9), config, world=2) == pytest.approx({"gathers": 2 * 3.2 + 0.4, "sums": 8.0})
    assert theory_gb((2 * 800_000_000, 200_000_000, 10**9), config, world=1) == {"gathers": 0.0, "sums": 0.0}


def test_speed_without_a_known_peak_is_no_mfu():
    told = benchmark.speed([100.0], Meter(benchmark.case_config("gpt2-124m", 1), 1, device_name="CPU"), ceiling=1.0)
    assert told["mfu"] is told["mfu_causal"] is told["hfu"] is None and told["tokens_per_second_per_gpu"] == 10 * 128 * 1024


@pytest.mark.parametrize("override, message", [
    ("train.activation_checkpointing=selective", "transformers has no train.activation_checkpointing=selective"),
    ("model.positions=alibi", "neither transformers' GPT-2 nor its Llama is alibi, layernorm, gelu, bias True"),
    ("model.kv_heads=1", "2 heads of 16, 1 of keys")])
def test_what_transformers_has_not_is_refused(tiny, override, message):
    with pytest.raises(Refused, match=message):
        huggingface_model(benchmark.case_config(f"{tiny},{override}", 2, 4))
    assert "failed" not in benchmark.best_row([], f"{benchmark.REFUSED}{message}")
    assert f"{Refused.__module__}.{Refused.__name__}: " == benchmark.REFUSED


def test_the_driver_knows_the_contenders():
    assert benchmark.CONTENDERS == tuple(CONTENDERS)


def test_cases_and_micro_batches(tiny):
    case = f"{tiny},train.global_batch_size=24,optimizer.betas=[0.9, 0.99]"
    options = benchmark.parse(["--configs", case, "--gpus", "2", "--device", "cpu"])
    assert benchmark.candidates(case, options) == [4, 2, 1]
    assert benchmark.case_config(case, 2, 4).train.gradient_accumulation_steps == 3
    assert benchmark.case_config("gpt-1.3b", 2).model.layers == 24


@pytest.mark.parametrize("override, message", [
    ("zero.stage=2", "zero.stage is 2, in which the contenders would differ; use 3"), ("model.dropout=0.1", "model.dropout is 0.1"),
    ("model.layer=2", "unknown key"), ("train.global_batch_size=7", "batch sizes do not multiply out")])
def test_what_cannot_be_compared_is_refused(tiny, capsys, override, message):
    with pytest.raises(SystemExit):
        benchmark.parse(["--configs", f"{tiny},{override}", "--gpus", "2", "--device", "cpu"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("contender, message", [
    ("ours,model.layers=3", "model must be the same for all; change it in --configs"),
    ("ours,train.activation_checkpointing=full", "train.activation_checkpointing must be the same for all"),
    ("ours,zero.reduce_dtype=bf16", "zero.reduce_dtype must be the same"), ("ours,zero.stage=2", "zero.stage is 2"),
    ("ours,zero.reuse=0", "unknown key"), ("theirs", "there is no such contender; there are ours, ours_sharded")])
def test_a_contenders_own_settings_leave_the_task_as_it_is(tiny, capsys, contender, message):
    case = f"{tiny},train.precision=bf16"
    asked = ["--configs", case, "--gpus", "2", "--device", "cpu", "--contenders"]
    options = benchmark.parse([*asked, "ours,zero.reuse_distance=0,train.compile=true", "ours", "--profile", "ours"])
    own = benchmark.case_config(benchmark.own_case(case, options.contenders[0]), 2, 4)
    assert (own.zero.reuse_distance, own.train.compile, own.train.precision) == (0, True, "bf16")
    for wrong, told in ([contender], message), (["ours", "--profile", "zero3_stock"], "--profile zero3_stock: not among --contenders"):
        with pytest.raises(SystemExit):
            benchmark.parse([*asked, *wrong])
        assert told in capsys.readouterr().err


# --- profiles -------------------------------------------------------------------------------------------------------


def event(name: str, begin: float, duration: float, cat: str = "kernel") -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": duration}


def test_intervals():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length([(0, 2), (1, 3)]) == 3 and common([(0, 4), (6, 9)], [(3, 7)]) == 2 and common([(0, 1)], []) == 0


def test_a_profile_by_hand():
    """Two steps in 10 ms: 6 ms of products, 3 ms of NCCL, 2 of them beside a product; a copy of 0.5 ms; the host waits 4 ms in all."""
    events = [
        event(PROFILED, 1000, 10000, "user_annotation"), event(PROFILED, 900, 9000, "gpu_user_annotation"),
        {"ph": "M", "name": "process_name"}, event("gemm", 1000, 4000), event("gemm", 6000, 2000),
        event("ncclDevKernel_AllGather", 4000, 3000)
        | {"args": {"Collective name": "_allgather_base", "In msg nelems": 10**9, "Out msg nelems": 2 * 10**9, "dtype": "BFloat16"}},
        event("Memcpy DtoH", 9000, 500, "gpu_memcpy"), event("warm-up", 0, 500),
        event("cudaLaunchKernel", 1000, 10, "cuda_runtime"),
        event("cudaStreamSynchronize", 5000, 1000, "cuda_runtime"), event("cudaDeviceSynchronize", 8000, 3000, "cuda_runtime"),
        event("aten::mm", 1000, 50, "cpu_op"),
    ]  # fmt: skip
    told = summarise(events, steps=2)
    assert told["wall_ms"] == 5 and told["device_busy_share"] == 0.75  # 1 to 8 and 9 to 9.5 of 10
    # Products from 1 to 5 and 6 to 8, NCCL from 4 to 7: it shares 4 to 5 and 6 to 7.
    assert told["communication_ms"] == 1.5 and told["communication_hidden_share"] == pytest.approx(2 / 3)
    assert told["communicated_gb"] == {"_allgather_base": 2.0} and "_allgather_base 2.000 GB" in report(told)
    assert told["host_waiting_ms"] == 2 and told["host_working_ms"] == 3 and told["launches"] == 1.5
    assert told["top"] == [{"name": "gemm", "ms": 3.0, "calls": 1.0}, {"name": "ncclDevKernel_AllGather", "ms": 1.5, "calls": 0.5}]
    assert "66.7% of it while other kernels run" in report(told) and "75.0%" in report(told)
