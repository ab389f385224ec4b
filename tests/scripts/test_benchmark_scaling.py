"""scripts/benchmark_scaling.py: what each run is asked for, and what it makes of them; the runs are those of test_benchmark_training.py."""

import json

import pytest

from scripts import benchmark_scaling, benchmark_training

SPEEDS = {"ours": {1: 100.0, 2: 98.0, 4: 91.0}, "fsdp2_compile": {1: 80.0, 2: 78.4}}


def measured(case: str, contender: str, options, folder) -> dict:
    """In the place of benchmark_training.run_contender: no processes, but speeds as above, and none where there is none."""
    config = benchmark_training.case_config(case, options.gpus, benchmark_training.candidates(case, options)[0])
    row = {"config": case, "contender": contender}
    if options.gpus not in SPEEDS[contender]:
        return row | {"left_out": "out of memory: it is too much", "trials": []}
    train = config.train
    return row | {
        "micro_batch": train.micro_batch_size, "accumulation": train.gradient_accumulation_steps, "global_batch": train.global_batch_size,
        "step_ms": 5.0, "tokens_per_second_per_gpu": SPEEDS[contender][options.gpus], "mfu": None, "mfu_causal": None, "hfu": None,
        "of_matmul": 0.5, "allocated_gb": 1.0, "reserved_gb": None, "gathered": "", "made_of": "", "reduce_dtype": "fp32", "trials": [],
    }  # fmt: skip


def test_each_gpu_keeps_its_work_and_is_held_against_the_fewest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training, "run_contender", measured)
    monkeypatch.setattr(benchmark_training, "profile_contender", lambda *_: {"left_out": "profile: no GPU"})
    out = tmp_path / "scaling.json"
    case = "gpt2-124m,train.global_batch_size=8"
    code = benchmark_scaling.main(["--configs", case, "--gpus", "4", "1", "2", "--device", "cpu", "--contenders", *SPEEDS, "--profile", "ours", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert code == 0 and [(row["gpus"], row["contender"]) for row in rows] == [(n, name) for n in (1, 2, 4) for name in SPEEDS]
    assert all(row["config"] == case and row["global_batch"] == 8 * row["gpus"] for row in rows if "step_ms" in row)
    found = [row["efficiency"] for row in rows]
    assert found[:5] == pytest.approx([1.0, 1.0, 0.98, 0.98, 0.91]) and found[5] is None
    printed = capsys.readouterr().out.split(f"{case} a GPU, ")[-1]
    assert "| ours | 4 | 8 x 1 | 5.0 | 91 |  | 0.910 |" in printed and "| 1.250 |" in printed
    assert "fsdp2_compile, 4 GPUs: left out: out of memory: it is too much" in printed
    assert out.with_suffix(".png").stat().st_size > 5000


def test_what_cannot_be_run_is_said_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training, "run_contender", lambda *_: pytest.fail("a run began"))
    for wrong, said in ((["--contenders", "nobody"], "no such contender"), (["--configs", "gpt2-124m,train.precision=fp16"], "train.precision is fp16")):
        with pytest.raises(SystemExit):
            benchmark_scaling.main(["--configs", "gpt2-124m", "--gpus", "1", "2", "--device", "cpu", "--out", str(tmp_path / "out.json"), *wrong])
        assert said in capsys.readouterr().err
