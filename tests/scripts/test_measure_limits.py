"""The search for limits, and what is written, told and drawn of it; training itself is replaced by a memory of so many bytes."""

import json

import pytest
import torch

from scripts import measure_limits
from training.memory import estimate

TINY = ["model.layers=1", "model.hidden_size=32", "model.heads=2", "model.vocab_size=264"]
MEMORY = 2**31


@pytest.mark.parametrize("true", [3, 610, 950, 1000, 1049, 2000])
def test_the_search_ends_within_a_stride_of_the_limit(true):
    found, bounded = measure_limits.search(lambda n: n <= true, 1000, 1, 3000)
    assert found <= true < found * measure_limits.STRIDE + 1 and not bounded


def test_the_search_ends_where_time_does():
    assert measure_limits.search(lambda n: True, 1000, 8, 1502) == (1496, True)
    assert measure_limits.search(lambda n: False, 1000, 8, 3000) == (0, False)


@pytest.fixture
def trained(monkeypatch):
    """Every configuration that was trained; one that needs more than is there fails as on a GPU."""
    seen = []

    def train(config, *, steps, first=None):
        seen.append((config, steps, first))
        needed = 1.1 * estimate(config, 1).peak.bytes  # more than is predicted
        if needed > MEMORY:
            raise (torch.OutOfMemoryError if len(seen) % 2 else RuntimeError)("CUDA out of memory.")
        return {"step_seconds": [9.0, 1.0 + config.train.checkpoint_offload, 1.0], "measured_bytes": int(needed)}

    monkeypatch.setattr(measure_limits, "train", train)
    monkeypatch.setattr(measure_limits, "join_process_group", lambda: None)
    monkeypatch.setattr(measure_limits, "let_go_of_all", lambda: None)
    monkeypatch.setattr(measure_limits, "total_memory", lambda config: MEMORY)
    return seen


def test_limits_are_found_written_told_and_drawn(trained, tmp_path, capsys):
    out = tmp_path / "limits.json"
    lengths = ["--lengths", "512", "131072", "--offload-lengths", "1024"]
    assert measure_limits.main(["--out", str(out), *lengths, "--longest", "1e9", "--override", *TINY]) == 0
    result = json.loads(out.read_text())
    for part, key, unit in (("batch", "micro_batch", 1), ("sequence", "sequence_length", 1024)):
        eager, ours = result[part]
        for row in (eager, ours):
            failed = min(each[key] for each in row["tries"] if not each["fits"])
            assert row["largest"] < failed <= row["largest"] * measure_limits.STRIDE + unit and not row["bounded_by_time"]
            assert failed <= row["predicted"]
        assert eager["at_largest"][key] == eager["largest"] and eager["at_largest"]["measured_bytes"] <= MEMORY
        assert eager["backend"] == "eager" and ours["backend"] == "sdpa" and ours["largest"] > 3 * eager["largest"]
    long = [(config.attention.backend, first) for config, steps, first in trained if steps == 2 and config.model.sequence_length > 2048]
    assert set(long) == {("eager", 2048), ("sdpa", 2048)}, "the optimizer's states are there before the long step"
    short_eager, short, long_eager, long = result["speed"]
    assert short["tokens_per_second"] == 32768 and short["micro_batch"] == 64 and long["sequence_length"] == 131072 and not long_eager["fits"]
    told = capsys.readouterr().out
    assert "times eager's" in told and "speed at 131,072: eager does not fit" in told and "offload at 1,024: kept 1,024 tokens/s" in told
    assert "costs 33.3%" in told
    assert all(not config.train.compile and config.train.activation_checkpointing == "full" for config, *_ in trained)
    for part in ("speed", "sequence"):
        (tmp_path / f"{part}.json").write_text(json.dumps({"command": "", part: result[part]}))
    picture = tmp_path / "limits.png"
    assert measure_limits.main(["--plot", str(tmp_path / "speed.json"), str(tmp_path / "sequence.json"), "--out", str(picture)]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert picture.read_bytes().startswith(b"\x89PNG") and drawn and set(drawn) < set(told.splitlines())


def test_no_step_is_tried_that_takes_too_long(trained, tmp_path):
    out = tmp_path / "limits.json"
    assert measure_limits.main(["--out", str(out), "--parts", "sequence", "--longest", "1e-4", "--override", *TINY]) == 0
    eager, ours = json.loads(out.read_text())["sequence"]
    assert ours["bounded_by_time"] and ours["largest"] < ours["predicted"] / 2 and len(ours["tries"]) == 1 and not eager["bounded_by_time"]


def test_what_failed_is_noted_and_tried_again_by_a_start_that_goes_on_behind_the_rest(trained, monkeypatch, tmp_path, capsys):
    out, asked = tmp_path / "limits.json", ["--parts", "speed", "batch", "--lengths", "512", "1024", "--override", *TINY]
    train = measure_limits.train

    def broken(config, **options):
        if config.attention.backend == "eager" and config.model.sequence_length in (512, 2048):
            raise TypeError("of this kernel")
        return train(config, **options)

    monkeypatch.setattr(measure_limits, "train", broken)
    assert measure_limits.main(["--out", str(out), *asked]) == 1
    told = capsys.readouterr().out
    assert "speed at 512: eager failed: TypeError: of this kernel, sdpa " in told and "batch: eager failed: TypeError: of this kernel" in told
    first = json.loads(out.read_text())
    assert ["fault" in row for row in first["speed"]] == [True, False, False, False] and ["fault" in row for row in first["batch"]] == [True, False]
    monkeypatch.setattr(measure_limits, "train", train)
    trained.clear()
    assert measure_limits.main(["--out", str(out), *asked]) == 0
    assert {(config.attention.backend, config.model.sequence_length) for config, *_ in trained} == {("eager", 512), ("eager", 2048)}
    second = json.loads(out.read_text())
    assert second["speed"][:3] == first["speed"][1:] and second["batch"][0] == first["batch"][1]
    assert "speed at 512: eager 32,768 tokens/s" in capsys.readouterr().out
    trained.clear()
    assert measure_limits.main(["--out", str(out), "--parts", "batch", "--override", *TINY]) == 0
    assert not trained and json.loads(out.read_text())["speed"] == second["speed"], "a part that is not asked for stays"


def test_mistakes_are_told(trained, monkeypatch, tmp_path, capsys):
    out = tmp_path / "limits.json"
    assert measure_limits.main(["--out", str(out), "--parts", "speed", "--override", "model.layer=1"]) == 2
    assert "nearest valid one is model.layers" in capsys.readouterr().err
    assert measure_limits.main(["--out", str(out), "--parts", "speed", "--lengths", "512", "--override", *TINY]) == 0
    assert measure_limits.main(["--out", str(out), "--parts", "speed", "--lengths", "512"]) == 2
    assert "was measured with override ['model.layers=1'" in capsys.readouterr().err
    assert measure_limits.main(["--plot", str(tmp_path / "none.json"), "--out", str(tmp_path / "limits.png")]) == 2
    monkeypatch.setattr("training.metering.peak_flops", lambda device, precision: None)
    assert measure_limits.main(["--out", str(tmp_path / "batch.json"), "--parts", "batch", "--override", *TINY]) == 2
    assert "--longest: the peak FLOP/s of H200 are not known; add it" in capsys.readouterr().err
    for wrong in (["--plot", str(out)], ["--steps", "1"], ["--lengths", "0"]):
        with pytest.raises(SystemExit):
            measure_limits.main(wrong)
