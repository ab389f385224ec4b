"""scripts/tune_attention.py, as far as it goes without a GPU: which tiles it tries, how it decides, what it prints."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import product

import pytest
import torch

from kernels.attention import tuning
from kernels.attention.tuning import HEAD_DIMS, PASSES, SHARED_MEMORY_LIMIT, Tile
from scripts.tune_attention import DTYPES, ROOT, Candidate, Row, candidates, choose, compiled_by, line, main, registers
from scripts.tune_attention import shared_memory, table

ROWS = [Row(which, dtype, d) for which, dtype, d in product(PASSES, DTYPES, HEAD_DIMS)]
SCORE_ROWS = [Row(which, "half", d, True) for which, d in product(PASSES, HEAD_DIMS)]


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT)
def test_candidates_are_the_present_tile_and_others_that_may_fit(arch):
    for row in (*ROWS, *SCORE_ROWS):
        present, *others = tried = candidates(row, arch, 32)
        assert present == row.present(arch) and len(others) > 8 and len(set(tried)) == len(tried) <= 32, row
        assert all(shared_memory(row, tile) <= SHARED_MEMORY_LIMIT[arch] and registers(row, tile) < 255 for tile in tried), row
        assert {tile._replace(stages=3) for tile in tried} > {present._replace(stages=3)}, "not only stages"


def test_the_nearest_candidates_hold_what_is_worth_trying_on_hopper():
    tried = {which: candidates(Row(which, "half", 128), "sm_90", 32) for which in ("dkdv", "dq")}
    assert {(32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 8, 3)} <= {*tried["dkdv"]}
    assert {(128, 32, 8, 2), (128, 32, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3)} <= {*tried["dq"]}


def outcome(row: Row, best: Tile) -> dict:
    return {**row._asdict(), "best": best}


def test_the_table_is_printed_as_it_stands_in_the_source():
    source = (ROOT / "kernels/attention/tuning.py").read_text()
    for arch in ("sm_80", "sm_86", "sm_90"):
        lines = table(arch, [outcome(row, row.present(arch)) for row in ROWS])
        assert lines[0] == f'_HALF["{arch}"]' and lines[4] == "_FLOAT32" and len(lines) == 8
        assert all(text.strip() in source for text in (*lines[1:4], *lines[5:]))


def test_the_table_holds_what_was_found():
    tile = Tile(16, 32, 4, 2)
    plain, with_score_features = Row("dkdv", "half", 64), Row("dkdv", "half", 64, True)
    present = Row("dkdv", "half", 128).present("sm_90")
    lines = table("sm_90", [outcome(plain, tile)])
    assert lines[0] == '_HALF["sm_90"]' and f"{{16: Tile{tuple(tile)}, 64: Tile{tuple(tile)}, 128: Tile{tuple(present)}," in lines[1]
    lines = table("sm_90", [outcome(with_score_features, tile)])
    assert lines[0] == '_HALF_WITH_SCORE_FEATURES["sm_90"]' and f"16: Tile{tuple(tile)}, 64: Tile{tuple(tile)}" in lines[1]
    lines = table("sm_90", [outcome(with_score_features, plain.present("sm_90"))])
    assert "64: " not in lines[1], "only what differs"
    bounded = Row("dkdv", "half", 128, False, True)
    lines = table("sm_90", [outcome(bounded, bounded.present("sm_90"))])
    assert lines[0] == '_HALF_BOUNDED["sm_90"]' and "128: Tile(" in lines[1]
    assert lines[1].strip(" ,") in (ROOT / "kernels/attention/tuning.py").read_text()


def candidate(*milliseconds: float, tile=(16, 16, 4, 2)) -> Candidate:
    made = Candidate(Tile(*tile))
    made.times = {f"problem {i}": [x, x, 9.0] for i, x in enumerate(milliseconds)}
    return made


def test_the_fastest_is_chosen_if_it_is_clearly_faster_and_nowhere_slower():
    present = candidate(1.0, 2.0)
    faster, fastest = candidate(0.9, 1.8), candidate(0.8, 1.7)
    assert choose([present, faster, fastest]) is fastest
    assert choose([present, candidate(0.99, 1.98)]) is present
    assert choose([present, candidate(0.5, 2.2), faster]) is faster
    assert fastest.gain(present) == pytest.approx((1 / 0.8 * 2 / 1.7) ** 0.5)
    assert faster.speed_up(present, "problem 1") == pytest.approx(1 / 0.9)


def test_what_is_not_compiled_in_time_is_left_out_but_for_the_present_tile():
    tiles = [Tile(i, 16, 4, 2) for i in range(6)]
    running, done, failed, died, waiting, late = (Future() for _ in tiles)
    for future in (running, late):
        future.set_running_or_notify_cancel()
    done.set_result(None)
    failed.set_result("CompilationError: too large")
    died.set_exception(BrokenProcessPool("a process died"))
    outcome = compiled_by(time.monotonic(), dict(zip(tiles, (running, done, failed, died, waiting, late))))
    assert outcome == dict(zip(tiles, (None, None, "CompilationError: too large", "a process died"))) and waiting.cancelled()


INTERPRETED = """
import json
from scripts import tune_attention as t
from scripts.tune_attention import Row, Tile

call = t.Launch.__call__
def wrong_with_64_queries(launch):
    call(launch)
    if 64 in launch.arguments[-8:]:  # a block size, and no head_dim here
        launch.arguments[t_written].zero_()
t.Launch.__call__ = wrong_with_64_queries
t.HIDDEN, t.TOKENS, t.ROUNDS, t.FAR_BEHIND = 32, {"float32": 40}, 1, 100.0
problems = {"causal": t.Problem(True, 40), "bounded": t.Problem(False, 40, True)}
for which, t_written in (("forward", 3), ("dkdv", 6), ("dq", 6)):
    tiles = [Tile(16, 16, 4, 2), Tile(32, 16, 4, 1), Tile(64, 16, 4, 2), Tile(24, 16, 4, 2), Tile(16, 32, 4, 2)]
    refused = dict.fromkeys(tiles) | {tiles[4]: "it did not compile"}
    print(json.dumps(t.tune(Row(which, "float32", 16, which == "dq"), refused, problems, "cpu")))
"""


def test_candidates_are_run_checked_and_timed_by_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(text) for text in done.stdout.splitlines()]
    assert [x["which"] for x in outcomes] == ["forward", "dkdv", "dq"]
    for found in outcomes:
        present, other, wrong, impossible, uncompiled = found["candidates"]
        assert found["present"] == present["tile"] == [16, 16, 4, 2] and found["best"] in (present["tile"], other["tile"])
        for tried in (present, other):
            assert tried["refused"] is None
            assert {name: len(times) for name, times in tried["milliseconds"].items()} == {"causal": 1, "bounded": 1}
        assert wrong["refused"] == "differs from the present tile by 1 on causal"
        assert "power of 2" in impossible["refused"] and uncompiled["refused"] == "it did not compile"
        assert "2 tried, 3 refused" in line(found)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert capsys.readouterr().err == "tune_attention: torch sees no CUDA GPU here\n"


@pytest.mark.gpu
def test_it_tunes_a_row_on_a_gpu(tmp_path):
    out = tmp_path / "out.json"
    row = ["--passes", "dq", "--dtypes", "half", "--head-dims", "64", "--problems", "causal", "--candidates", "3", "--minutes", "2"]
    done = subprocess.run([sys.executable, "scripts/tune_attention.py", *row, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["arch"] == tuning.generation(torch.cuda.get_device_capability()) and not result["left_out"]
    (found,) = result["rows"]
    timed = [x for x in found["candidates"] if x["refused"] is None]
    assert len(timed) > 1 and all(x["milliseconds"] and x["registers"] for x in timed), found
    assert "_HALF[" in done.stdout and '"dq": {16: Tile(' in done.stdout
