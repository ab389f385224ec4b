"""scripts/estimate_memory.py: what it prints, and the rows it is to measure, a mode that tests/training/test_memory.py runs."""

import json
import re
import sys

import pytest
import torch

from scripts import estimate_memory
from training.config import load_config
from training.memory import GIB, capacity, estimate


def test_a_budget_of_tokens_becomes_hours(capsys):
    arguments = [
        "--config",
        "configs/gpt-1.3b.yaml",
        "--gpus",
        "8",
        "--gpu-name",
        "H100 80GB HBM3",
        "--mfu",
        "0.5",
        "train.activation_checkpointing=none",
    ]
    assert estimate_memory.main([*arguments, "--tokens", "26e9"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"memory", "fits", "less", "time", "loss", "optimizer"} <= lines.keys()
    hours = 26e9 * 9_077_710_848 / (8 * 0.5 * 989e12) / 3600
    assert (
        "26,000,000,000 tokens" in lines["time"]
        and f"{hours:.3g} hours, {8 * hours:.3g} GPU hours" in lines["time"]
        and "(1.00 times" in lines["time"]
    )
    config = load_config("configs/gpt-1.3b.yaml", ["train.activation_checkpointing=none"], world_size=8, assumed_gpu=(9, 0))[0]
    assert lines["loss"].endswith(f"{estimate(config, 8).peak.bytes / GIB:.2f}")


def test_a_faulty_configuration_and_an_unknown_gpu_are_told(capsys):
    assert estimate_memory.main(["--config", "configs/gpt-1.3b.yaml", "model.layer=3"]) == 2
    assert "nearest valid one is model.layers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        estimate_memory.main(["--config", "configs/gpt-1.3b.yaml", "--gpu-name", "H900"])
    assert "its peak is not known" in capsys.readouterr().err
    for wrong, told in (
        (["--measure"], "--measure needs a GPU"),
        (["--table", "x", "--part", "3/2"], "--part 3/2: not the Kth of every N rows"),
        (["--config", "configs/gpt-1.3b.yaml", "--tokens", "nan"], "--tokens above 0"),
    ):
        with pytest.raises(SystemExit):
            estimate_memory.main(wrong)
        assert told in capsys.readouterr().err
    assert estimate_memory.main(["--table", "docs/memory.md"]) == 2
    assert "--table: not what --measure writes: " in capsys.readouterr().err


def test_the_rows_to_measure_cover_what_the_prediction_depends_on_and_fit():
    seen = []
    for world, rows in estimate_memory.ROWS.items():
        for name, micro, *settings in rows:
            batch = [f"train.micro_batch_size={micro}", "train.gradient_accumulation_steps=1", "train.global_batch_size=null"]
            settings = ["train.compile=false", *batch, *settings]
            config = load_config(f"configs/{name}.yaml", settings, world_size=world, assumed_gpu=(9, 0))[0]
            assert estimate(config, world).peak.bytes < capacity("H200") / 2
            seen.append(config)
    assert len(seen) >= 24 and len(estimate_memory.ROWS) == 2
    for section, key, least in (
        ("train", "activation_checkpointing", 5),
        ("train", "precision", 3),
        ("train", "micro_batch_size", 5),
        ("zero", "stage", 4),
        ("zero", "offload_optimizer", 2),
        ("zero", "offload_parameters", 2),
        ("attention", "backend", 4),
        ("model", "layers", 4),
        ("train", "compile", 2),
        ("zero", "reuse_distance", 2),
    ):
        assert len({getattr(getattr(config, section), key) for config in seen}) >= least, key


def test_the_table_has_prediction_measurement_and_what_was_left_out(tmp_path, capsys):
    row = {"config": "gpt2-124m", "micro_batch": 16, "settings": ["zero.stage=2"], "gpus": 2, "predicted_bytes": 5 * GIB, "moment": "loss"}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [row | {"measured_bytes": 4 * GIB}, row | {"left_out": "it\nfailed"}]}))
    assert estimate_memory.main(["--table", str(file)]) == 0
    measured, left_out = capsys.readouterr().out.splitlines()[2:]
    assert re.sub(r" +", " ", measured) == "| `gpt2-124m` 16, `zero.stage=2` | 2 | 5.00 | loss | 4.00 | +25.0% |"
    assert "left out: it failed" in left_out


def test_a_start_that_goes_on_measures_what_is_missing(monkeypatch, tmp_path, capsys):
    """Of two processes, on a stand-in for a GPU; one row fails at first."""
    out, tried, fails, codes = tmp_path / "rows.json", [], [True], []
    rows = (("gpt2-124m", 1), ("gpt2-124m", 2, "zero.stage=2"), ("gpt2-124m", 4))

    def measured_row(name, micro, settings, world):
        tried.append(micro)
        row = {"config": name, "micro_batch": micro, "settings": settings, "gpus": world, "seconds": 1.0, "predicted_bytes": GIB, "moment": "loss"}
        return row | ({"left_out": "it failed", "failed": True} if micro == 2 and fails[0] else {"measured_bytes": GIB})

    monkeypatch.setattr(estimate_memory, "ROWS", {2: rows})
    monkeypatch.setattr(estimate_memory, "measured_row", measured_row)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    for name, stand_in in (("join_process_group", lambda: None), ("gather", lambda x: [x, x]), ("from_first_rank", lambda work: work()), ("end_process", codes.append)):
        monkeypatch.setattr(f"training.distributed.{name}", stand_in)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("training.tracking.collect_environment", lambda: {"git_sha": "a", "gpu_name": "A GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = ["--measure", "--out", str(out)]
    estimate_memory.main(command)
    assert tried == [1, 2, 4]
    fails[0] = False
    estimate_memory.main(command)
    assert tried == [1, 2, 4, 2] and codes == [1, 0]
    assert [row["micro_batch"] for row in json.loads(out.read_text())["rows"]] == [1, 4, 2]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another")
    monkeypatch.setattr("training.distributed._exit_at_once", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        estimate_memory.main(command)
    assert "was measured with gpu_name A GPU, and this is Another; remove it" in capsys.readouterr().err
