import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from scripts.plot_run import Run, draw, main, moving_average, name_apart
from training.tracking import RunRecorder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_run.py"


def write_run(run_dir: Path, name: str = "a-run", steps: int = 40, corpus: str = "abc") -> Path:
    with RunRecorder(run_dir, info={"corpus_sha256": corpus}, wandb_mode="disabled", wandb_project="p", run_name=name) as run:
        for step in range(1, steps + 1):
            row = {"step": step, "tokens": 1000 * step, "flops": 10**12 * step, "elapsed_seconds": 36.0 * step}
            row |= {"loss": 5.0 / step, "tokens_per_second_per_gpu": 500.0}
            if step % 10 == 0:
                row["val_loss"] = 5.1 / step
            run.record(row)
    return run_dir


def rows(*losses: float) -> list[dict]:
    return [
        {"step": i, "tokens": 10 * i, "elapsed_seconds": 1800.0 * i, "loss": loss, "tokens_per_second_per_gpu": 5.0}
        for i, loss in enumerate(losses, 1)
    ]


def test_draws_a_picture_from_any_directory(tmp_path):
    write_run(tmp_path / "run")
    result = subprocess.run(
        [sys.executable, SCRIPT, "run", "--out", "pictures/loss.png"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "pictures/loss.png\n", "")
    assert matplotlib.image.imread(tmp_path / "pictures" / "loss.png").std() > 0.01


@pytest.mark.parametrize(("x", "last"), [("tokens", 40_000), ("step", 40), ("flops", 40e12), ("hours", 0.4)])
def test_each_x_axis(tmp_path, x, last):
    info = rows_of(write_run(tmp_path / "run"))
    figure = draw([Run("a-run", {}, info)], x, None)
    raw, smooth, validation = figure.axes[0].lines
    assert raw.get_xdata()[-1] == smooth.get_xdata()[-1] == pytest.approx(last)
    assert validation.get_xdata()[-1] == pytest.approx(last) and len(validation.get_xdata()) == 4


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_several_runs_have_a_legend_of_their_names(tmp_path):
    runs = [Run("first", {"corpus_sha256": "a"}, rows(3, 2, 1)), Run("second", {"corpus_sha256": "a"}, rows(4, 3, 2))]
    figure = draw(runs, "tokens", None)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["first", "second", "validation"]
    assert figure.get_suptitle() == "corpus a"


def test_runs_of_the_same_name_are_told_apart_by_directory():
    runs = [Run("same", {}, rows(1)), Run("same", {}, rows(1)), Run("other", {}, rows(1))]
    name_apart(runs, [Path("x"), Path("y"), Path("z")])
    assert [run.name for run in runs] == ["same [x]", "same [y]", "other"]


def test_runs_on_different_corpora_are_marked():
    runs = [Run("first", {"corpus_sha256": "a"}, rows(1)), Run("second", {"corpus_sha256": "b"}, rows(1))]
    assert "not comparable" in draw(runs, "step", None).get_suptitle()


def test_smooth_sets_the_window():
    run = Run("a-run", {}, rows(3, 0, 3, 0, 3))
    assert list(draw([run], "step", 3).axes[0].lines[1].get_ydata()) == [3, 2, 1, 2, 3]
    assert list(draw([run], "step", 1).axes[0].lines[1].get_ydata()) == [3, 0, 3, 0, 3]


def test_moving_average_keeps_a_straight_line_and_passes_over_gaps():
    line = np.arange(20.0)
    np.testing.assert_allclose(moving_average(line, 7), line)
    np.testing.assert_allclose(moving_average(np.array([1.0, math.nan, 3.0]), 3), [1, 2, 3])
    assert np.isnan(moving_average(np.array([math.nan]), 3)).all()


def test_losses_that_are_not_finite_are_counted_not_drawn(capsys):
    figure = draw([Run("a-run", {}, rows(3, math.nan, math.inf, 1))], "step", None)
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, True, False]
    assert "2 of 4 steps is not finite" in capsys.readouterr().err


def test_a_last_line_cut_off_is_tolerated_and_said(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert main([str(run_dir), "--out", str(tmp_path / "loss.png")]) == 0
    assert "last line was cut off" in capsys.readouterr().err
    assert (tmp_path / "loss.png").stat().st_size > 0


def remove(name):
    return lambda run_dir: (run_dir / name).unlink()


def write(name, text):
    return lambda run_dir: (run_dir / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run_dir: run_dir.rename(run_dir.with_name("moved")), "no such run directory"),
        (remove("run.json"), "holds no run.json"),
        (remove("metrics.jsonl"), "holds no metrics.jsonl"),
        (write("run.json", '{"run_name": '), "run.json is damaged"),
        (write("run.json", "[]"), "run.json is damaged"),
        (write("metrics.jsonl", ""), "is empty"),
        (write("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n'), "line 2 is damaged"),
        (write("metrics.jsonl", '{"step": 1, "loss": 2.0}\n'), "no 'tokens'"),
        (write("metrics.jsonl", '{"step": 0, "loss": 2.0}\n'), "no 'tokens'"),
        (write("metrics.jsonl", '{"step": 1, "tokens": 1, "loss": "high"}\n'), "not a number"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line_and_exit_code_2(tmp_path, capsys, damage, message):
    run_dir = write_run(tmp_path / "run")
    damage(run_dir)
    assert main([str(run_dir), "--out", str(tmp_path / "loss.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "loss.png").exists()


def test_an_unknown_picture_format_is_refused(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    assert main([str(run_dir), "--out", str(tmp_path / "loss.docx")]) == 2
    assert "docx" in capsys.readouterr().err


def test_smooth_below_one_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--out", "loss.png", "--smooth", "0"])
    assert stopped.value.code == 2 and "--smooth 0" in capsys.readouterr().err
