import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from scripts.compare_runs import COLORS, draw, main, make_report, moving_average, page, terminal_text
from tests.recorded_runs import recorded, rows, write_run
from training.runs import read_runs

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_runs.py"
PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "results" / "curves.json"


def report(*runs, target=None):
    return make_report(list(runs), target=target, baseline=None, by=[])


def two_backends():
    """Three seeds of triton, three of sdpa, which is better."""
    return [
        recorded(f"{backend}-{seed}", seed, final=final + seed / 100, settings={"attention.backend": backend})
        for backend, final in (("triton", 3.0), ("sdpa", 2.5))
        for seed in (1, 2, 3)
    ]


def test_one_run_from_any_directory(tmp_path):
    write_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, SCRIPT, "run", "--png", "pictures/loss.png"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert matplotlib.image.imread(tmp_path / "pictures" / "loss.png").std() > 0.01
    assert done.stdout.startswith("| run | steps | tokens | val loss |") and "verdict" not in done.stdout.lower()


def test_the_tables():
    runs = [recorded("one"), recorded("two", 2, final=2.5, settings={"attention.backend": "sdpa"}, starts=[{}, {}])]
    for row in runs[1].rows:
        row["skipped_steps"] = 3
    text = terminal_text(report(*runs))
    assert text.startswith(
        "| run | seed | backend |\n"
        "|-----|-----:|--------:|\n"
        "| one |    1 |  triton |\n"
        "| two |    2 |    sdpa |\n\n"
        "| run | steps | tokens | val loss |   best | bits/byte | tokens to 3.0000 "
        "| time to 3.0000 | tokens/s/GPU |   MFU |   HFU | peak GiB | skipped | resumed |\n"
    )
    # The second run is at 5.5, 4.5, 3.5, 2.5 at its evaluations.
    assert (
        "| one |    40 | 40,000 |   3.0000 | 3.0000 |    1.5000 |           40,000 "
        "|        0:24:00 |        1,023 | 40.0% | 50.0% |      9.0 |       - |       - |"
        in text
    )
    assert (
        "| two |    40 | 40,000 |   2.5000 | 2.5000 |    1.2500 |           40,000 "
        "|        0:24:00 |        1,023 | 40.0% | 50.0% |      9.0 |       3 |       1 |"
        in text
    )


def test_a_target_of_ones_own():
    text = terminal_text(report(recorded("one"), recorded("two", final=2.5), target=3.5))
    assert (
        "tokens to 3.5000" in text
        and re.search(r"\| two .*\| +30,000 \| +0:18:00 \|", text)
        and re.search(r"\| one .*\| +40,000 \| +0:24:00 \|", text)
    )
    assert re.search(r"\| one .*\| +- \| +- \| +1,023", terminal_text(report(recorded("one"), recorded("two", final=2.5), target=2.7)))


def test_what_no_run_has_is_no_column():
    (run, *_) = read_runs(PUBLISHED)
    text = terminal_text(report(run))
    assert "MFU" in text and "HFU" not in text and "time to" not in text and "skipped" not in text


def test_the_published_runs_can_be_compared_again(tmp_path):
    assert (
        main([str(PUBLISHED), "--png", str(tmp_path / "a.png"), "--html", str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")])
        == 0
    )
    text = terminal_text(report(*read_runs(PUBLISHED)))
    assert re.search(r"\| sdpa-1gpu .* 2\.8213 \| .* 337,203 \| 29\.2% \| +29\.9 \|", text)
    assert "No verdict: no configuration was run with more than one seed" in text
    assert terminal_text(report(*read_runs(tmp_path / "a.json"))) == text


# --- curves


def test_one_run_is_drawn_with_its_validation_points_and_speed():
    figure = draw(report(recorded("a-run")))
    loss_axes, speed_axes = figure.axes
    raw, smooth, validation = loss_axes.lines
    assert raw.get_xdata()[-1] == smooth.get_xdata()[-1] == 40_000 and list(validation.get_xdata()) == [10_000, 20_000, 30_000, 40_000]
    assert [text.get_text() for text in loss_axes.get_legend().get_texts()] == ["training", "validation"]
    assert speed_axes.lines[0].get_ydata()[-1] == 1040 and figure.get_suptitle() == "a-run (corpus abc)"


def test_several_runs_are_drawn_over_tokens_flops_and_hours():
    figure = draw(report(*two_backends()))
    assert [axes.get_xlabel() for axes in figure.axes] == ["training tokens", "model FLOPs", "hours", "training tokens"]
    assert [axes.lines[0].get_xdata()[-1] for axes in figure.axes[:3]] == pytest.approx([40_000, 40e12, 0.4])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "backend=triton, seed 1" and labels[5] == "backend=sdpa, seed 3" and labels[6] == "validation"


def test_an_axis_that_no_run_has_is_not_drawn():
    assert [axes.get_xlabel() for axes in draw(report(*read_runs(PUBLISHED))).axes] == ["training tokens", "training tokens"]


def test_one_colour_a_configuration_where_there_are_seeds_and_one_a_run_elsewhere():
    styles = report(*two_backends()).styles
    assert [style.color for style in styles] == [COLORS[0]] * 3 + [COLORS[1]] * 3 and len({style.dash for style in styles[:3]}) == 3
    styles = report(*two_backends()[:3]).styles
    assert [(style.label, style.color) for style in styles] == [(f"seed {seed}", COLORS[seed - 1]) for seed in (1, 2, 3)]
    assert [style.label for style in report(recorded("a"), recorded("b")).styles] == ["a", "b"]


def test_runs_on_different_corpora_are_marked():
    marked = report(recorded("first"), recorded("second", corpus_sha256="def"))
    assert "losses are not comparable" in draw(marked).get_suptitle() and "losses are not comparable" in terminal_text(marked)


def test_losses_that_are_not_finite_are_not_drawn():
    run = recorded("a-run")
    run.rows[1]["loss"], run.rows[2]["loss"] = math.nan, math.inf
    assert np.flatnonzero(np.isnan(draw(report(run)).axes[0].lines[0].get_ydata())).tolist() == [1, 2]


def test_moving_average_keeps_a_steep_start_ends_steadily_and_passes_over_gaps():
    line = np.arange(20.0)
    np.testing.assert_allclose(moving_average(line, 7)[:17], line[:17])
    np.testing.assert_allclose(moving_average(np.array([3.0, 0, 3, 0, 3]), 3), [3, 2, 1, 2, 1.5])
    np.testing.assert_allclose(moving_average(np.array([1.0, math.nan, 3.0]), 3), [1, 2, 3])
    assert np.isnan(moving_average(np.array([math.nan]), 3)).all()


# --- the page and the JSON


def test_the_page_holds_all_and_loads_nothing():
    compared = report(*two_backends(), recorded("<script>alert(1)</script>", settings={"attention.backend": "</script>"}))
    text = page(compared)
    assert not re.search(
        r"https?:|//\w|\ssrc=|\shref=|@import|url\(#?[^#)]*\.|fetch\(|XMLHttpRequest|import\(|<link|<iframe", text.split("<script>")[0]
    )
    assert not re.search(r"https?:|\ssrc=|fetch\(|XMLHttpRequest|import\(|import ", text.split("<script>")[1])
    assert "<script>alert" not in text and text.count("</script>") == 2 and not re.search(r"<!--[A-Z]+-->", text)
    assert html.escape(compared.verdict.headline) in text and all(
        html.escape(sentence) in text for sentence in compared.verdict.findings + compared.verdict.basis
    )
    assert all(f"</i>{html.escape(run.name)}</th>" in text for run in compared.runs)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [run["label"] for run in data["runs"]] == [style.label for style in compared.styles]
    assert data["runs"][0]["curve"]["hours"][-1] == 0.4 and data["runs"][0]["validation"]["loss"] == [6.01, 5.01, 4.01, 3.01]
    assert [group["baseline"] for group in data["groups"]] == [True, False, False]


def test_long_runs_are_thinned_to_means_and_gaps_stay_gaps():
    run = recorded("long", steps=4000)
    for row in run.rows[3:6]:
        row["loss"] = math.nan
    curve = json.loads(re.search(r'id="data">(.*?)</script>', page(report(run)))[1])["runs"][0]["curve"]
    assert len(curve["loss"]) == len(curve["tokens"]) == 1334
    assert curve["loss"][0] == pytest.approx(run.rows[1]["loss"], rel=1e-5) and curve["loss"][1] is None and curve["tokens"][0] == 2000


def test_json_is_json_and_keeps_what_was_measured(tmp_path):
    metrics = rows()
    metrics[-1] |= {"loss": math.nan, "val_loss": math.inf}
    folder = write_run(tmp_path / "run", metrics=metrics)
    assert main([str(folder), "--json", str(tmp_path / "out/runs.json")]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "out/runs.json").read_text(), parse_constant=refuse)
    (run,) = record["runs"]
    assert (
        run["median_tokens_per_second_per_gpu"] == 1023 and run["config"]["attention"] == {"backend": "triton"} and run["world_size"] == 2
    )
    assert run["steps"]["loss"][-1] == "NaN" and run["validation"][-1]["val_loss"] == "Infinity" and len(run["steps"]["lr"]) == 40
    assert record["verdict"]["headline"].startswith("No verdict") and record["target"] is None


# --- what can go wrong


def test_every_run_that_cannot_be_read_is_one_line_and_nothing_is_written(tmp_path, capsys):
    write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name) for name in ("good", "none", "empty")] + ["--png", str(tmp_path / "loss.png")]) == 2
    printed = capsys.readouterr()
    first, second = printed.err.splitlines()
    assert first == f"compare_runs: {tmp_path}/none: no such run folder or JSON file of runs" and second.startswith(
        f"compare_runs: {tmp_path}/empty holds no run.json"
    )
    assert printed.out == "" and not (tmp_path / "loss.png").exists()


def test_a_run_that_has_not_begun_is_left_out_and_said(tmp_path, capsys):
    write_run(tmp_path / "good")
    write_run(tmp_path / "begins", metrics=[])
    assert main([str(tmp_path / "good"), str(tmp_path / "begins")]) == 0
    assert capsys.readouterr().err == f"compare_runs: left out: {tmp_path}/begins: no step recorded yet in metrics.jsonl\n"
    assert main([str(tmp_path / "begins")]) == 2
    assert capsys.readouterr().err.endswith("compare_runs: no run is left to compare\n")


def test_a_run_without_one_finite_loss_is_compared_too(tmp_path, capsys):
    lost = [row | {"loss": math.nan} for row in rows(9)]
    paths = [str(write_run(tmp_path / "lost", metrics=lost)), str(write_run(tmp_path / "good"))]
    assert main([*paths, "--png", str(tmp_path / "loss.png"), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr()
    assert "lost: the loss of 9 of 9 steps is not finite and is not drawn" in printed.out and "9 of 40" in printed.out and printed.err == ""


def test_an_unknown_picture_format_and_an_unknown_baseline_are_refused(tmp_path, capsys):
    folder = str(write_run(tmp_path / "run"))
    assert main([folder, "--png", str(tmp_path / "loss.docx")]) == 2 and "docx" in capsys.readouterr().err
    assert main([folder, "--baseline", "other"]) == 2 and "--baseline other" in capsys.readouterr().err
