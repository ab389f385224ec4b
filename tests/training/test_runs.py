"""Reading runs back, and what is said of each."""

import math

import pytest

from tests.recorded_runs import description, recorded, rows, write_run
from training.runs import EmptyRun, describe, differing, name_apart, read_runs, summarize
from training.tracking import to_json


def read(path):
    (run,) = read_runs(path)
    return run


def test_the_summary_of_a_run(tmp_path):
    summary = summarize(read(write_run(tmp_path / "run")), target=4.5)
    assert (summary.steps, summary.tokens, summary.final_val_loss, summary.best_val_loss) == (40, 40_000, 3.0, 3.0)
    assert summary.final_val_bits_per_byte == 1.5 and summary.peak_memory_bytes == 9 * 2**30
    # Evaluations at steps 10, 20, 30, 40 find 6, 5, 4, 3.
    assert (summary.tokens_to_target, summary.seconds_to_target) == (30_000, 30 * 36)
    # The median of 1006 to 1040; the first five steps do not count.
    assert summary.median_tokens_per_second_per_gpu == 1023 and summary.median_step_seconds == 1.0
    assert (summary.median_mfu, summary.median_hfu) == (0.4, 0.5)
    assert (summary.skipped_steps, summary.resumed) == (0, 0)


def test_a_target_that_is_met_exactly_counts_and_one_that_is_missed_does_not(tmp_path):
    run = read(write_run(tmp_path / "run"))
    assert summarize(run, target=3.0).tokens_to_target == 40_000
    assert summarize(run, target=2.9).tokens_to_target is None


def test_the_best_loss_need_not_be_the_last(tmp_path):
    metrics = rows()
    metrics[-1]["val_loss"] = 9.0
    summary = summarize(read(write_run(tmp_path / "run", metrics=metrics)), target=None)
    assert (summary.final_val_loss, summary.best_val_loss, summary.tokens_to_target) == (9.0, 4.0, None)


def test_a_run_too_short_to_judge_its_speed_has_none(tmp_path):
    summary = summarize(read(write_run(tmp_path / "run", metrics=rows(4))), target=None)
    assert summary.median_tokens_per_second_per_gpu is None and summary.final_val_loss is None


def test_skipped_steps_and_resumptions_are_counted(tmp_path):
    metrics = rows()
    for row in metrics[20:]:
        row["skipped_steps"] = 2
    metrics[18] |= {"loss": math.nan, "skipped": True}
    metrics[19] |= {"loss": math.inf, "skipped": True}
    run = read(write_run(tmp_path / "run", metrics=metrics, starts=[{"step": 0}, {"step": 10}, {"step": 20}]))
    summary = summarize(run, target=None)
    assert (summary.skipped_steps, summary.resumed) == (2, 2)
    assert run.notes == ["the loss of 2 of 40 steps is not finite and is not drawn"]


def test_a_run_that_is_being_written_is_read_as_far_as_it_goes(tmp_path):
    folder = write_run(tmp_path / "run", metrics=rows(25))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')
    run = read(folder)
    assert len(run.rows) == 25
    assert run.notes == ["the last line was cut off and is left out", "unfinished, still running or stopped: step 25 of 40"]


def test_a_run_without_an_evaluation_says_so(tmp_path):
    assert "no validation loss measured yet" in read(write_run(tmp_path / "run", metrics=rows(9))).notes


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "tok'])
def test_a_run_that_has_not_begun_is_no_damage(tmp_path, content):
    folder = write_run(tmp_path / "run", metrics=[])
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(EmptyRun, match=r"run: no step recorded yet in metrics\.jsonl"):
        read_runs(folder)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("moved")), "no such run folder or JSON file"),
        (lambda folder: (folder / "run.json").unlink(), "holds no run.json"),
        (write("run.json", '{"run_name": '), "run.json is damaged"),
        (write("run.json", "[]"), "run.json is damaged"),
        (write("run.json", '{"run_name": "a"}'), "run.json is damaged"),
        (write("run.json", '{"run_name": "a", "config": {"run": 1}}'), "run.json is damaged"),
        (write("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n'), "line 2 is damaged"),
        (write("metrics.jsonl", '{"step": 1, "loss": 2.0}\n'), "step 1: no 'tokens'"),
        (write("metrics.jsonl", '{"step": 1, "tokens": 2}\n'), "step 1: no 'loss'"),
        (write("metrics.jsonl", '{"step": 1, "tokens": 1, "loss": "high"}\n'), "'loss' is 'high', which is not a number"),
        (write("metrics.jsonl", '{"step": 1, "tokens": 1, "loss": 1, "val_loss": []}\n'), "'val_loss' is []"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    folder = write_run(tmp_path / "run")
    damage(folder)
    with pytest.raises(ValueError) as raised:
        read_runs(folder)
    assert str(raised.value).startswith(str(tmp_path)) and message in str(raised.value)


def test_json_brings_everything_back(tmp_path):
    metrics = rows()
    metrics[3]["loss"], metrics[9]["val_loss"], metrics[5]["grad_norm"] = math.nan, math.inf, None
    first = read(write_run(tmp_path / "run", metrics=metrics, starts=[{}, {}]))
    path = tmp_path / "runs.json"
    path.write_text(to_json({"runs": [describe(first, summarize(first, target=3.5))]}))
    again = read(path)
    assert (again.name, again.notes, again.facts()) == (first.name, first.notes, first.facts())
    assert str(summarize(again, target=3.5)) == str(summarize(first, target=3.5))
    assert str(again.column("loss")) == str(first.column("loss")) and "deepspeed_config" not in again.info


def test_a_list_of_runs_without_step_flops_and_time_is_read(tmp_path):
    described = description("old") | {
        "steps": {"loss": [5.0, "NaN"], "tokens": [10, 20]},
        "validation": [{"step": 2, "tokens": 20, "val_loss": 4.0, "val_bits_per_byte": 2.0}],
    }
    path = tmp_path / "runs.json"
    path.write_text(to_json([described]))
    run = read(path)
    assert [row["step"] for row in run.rows] == [1, 2] and math.isnan(run.rows[1]["loss"])
    summary = summarize(run, target=4.0)
    assert (summary.tokens_to_target, summary.seconds_to_target, summary.median_mfu) == (20, None, None)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"runs": {}}',
        '[{"run_name": "a", "config": {}}]',
        '[{"run_name": "a", "config": {}, "validation": [], "steps": {"loss": [1, 2], "tokens": [1]}}]',
    ],
)
def test_a_json_file_that_holds_no_runs_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="other.json"):
        read_runs(path)


def test_only_what_matters_and_differs_is_told():
    runs = [
        recorded("a", 1, settings={"run.output_dir": "here", "data.corpus": "data/a", "tracking.tags": ["x"]}),
        recorded("b", 2, settings={"attention.backend": "sdpa", "model.dropout": 0.1}, world_size=4),
    ]
    assert differing(runs) == {
        "run.seed": [1, 2],
        "attention.backend": ["triton", "sdpa"],
        "model.dropout": [None, 0.1],
        "world_size": [2, 4],
    }
    runs[1].info["corpus_sha256"] = "def"
    runs[1].info["environment"] = {"git_sha": "c0ffee", "git_dirty": True, "packages": {"torch": "2.13.0"}}
    found = differing(runs)
    assert found["data.corpus"] == ["data/a", "data/x"] and found["corpus"] == ["abc", "def"]
    assert found["git_sha"] == ["c0ffee", "c0ffee and changes"] and found["packages.torch"] == ["2.11.0", "2.13.0"]


def test_runs_of_the_same_name_are_told_apart():
    runs = [recorded("same"), recorded("same"), recorded("same"), recorded("other")]
    runs[0].source = "elsewhere"
    name_apart(runs)
    assert [run.name for run in runs] == ["same [elsewhere]", "same [runs/same] #2", "same [runs/same] #3", "other"]
