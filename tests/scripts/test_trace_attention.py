"""The shares computed from a trace, on intervals made by hand; its picture, from a made-up run of two warpgroups."""

import json
import struct
import sys

import pytest
import torch

from scripts import trace_attention
from scripts.trace_attention import PRODUCTS, at_peak_rate, by_event, main, overlap, pieces, report, spans, union, windows

EVENTS = ["scores issued", "scores ready", "softmax done", "output issued", "output ready"]


def trace_of(clocks: dict, keys: int = 64, head_dim: int = 64) -> dict:
    """A product of 64 queries, 64 keys and head_dim 64 takes 128 cycles at peak rate."""
    return dict(
        case=dict(head_dim=head_dim, causal=False, seq=4096),
        tile=dict(warpgroups=len(clocks.keys() - {"load"}), keys=keys),
        program=7,
        milliseconds=dict(plain=1.0, traced=1.05),
        at_least_of_all_programs=[0.3, 0.4],
        clocks=clocks,
    )


def tiles(*rows) -> dict:
    return dict(zip(EVENTS, map(list, zip(*rows))))


def test_waiting_for_every_product_overlaps_nothing():
    trace = trace_of({"warpgroup 0": tiles([0, 200, 300, 300, 500], [500, 700, 800, 800, 1000])})
    assert overlap(trace) == dict(at_most=0.0, at_least=0.0, matrix_units=4 * 128 / 1000)


def test_a_softmax_under_the_output_of_the_tile_before():
    """At peak rate S of tile 1 takes 300 to 428 and O of tile 0 428 to 556, of which tile 1's softmax, from 450 to 650, has 106."""
    trace = trace_of({"warpgroup 0": tiles([0, 200, 300, 310, 650], [300, 450, 650, 650, None])})
    assert [tuple(product[:3]) for product in at_peak_rate(trace)] == [(0, 128, "scores"), (300, 428, "scores"), (428, 556, "output")]
    assert overlap(trace) == dict(at_most=200 / 300, at_least=106 / 300, matrix_units=3 * 128 / 650)


def test_a_softmax_under_the_product_of_another_warpgroup():
    alone = {"warpgroup 0": tiles([0, 130, 230, None, None])}
    assert overlap(trace_of(alone))["at_most"] == 0
    both = alone | {"warpgroup 1": tiles([10, 260, None, None, None])}
    assert overlap(trace_of(both)) == dict(at_most=1.0, at_least=1.0, matrix_units=256 / 260)
    assert [product.partition for product in at_peak_rate(trace_of(both))] == ["warpgroup 0", "warpgroup 1"]


def test_matrix_units_at_peak_rate_idle_where_nothing_is_issued():
    trace = trace_of({"warpgroup 0": tiles([0, 200, 300, 300, 500], [900, 1100, 1200, 1250, 1400])})
    assert [product.start for product in at_peak_rate(trace)] == [0, 300, 900, 1250]


def test_union_and_pieces():
    def span(start, end):
        return trace_attention.Span(start, end, "softmax", "warpgroup 0", 0)

    disjoint = union([span(5, 9), span(0, 3), span(2, 4), span(9, 12), span(20, 21)])
    assert disjoint == [(0, 4), (5, 12), (20, 21)]
    assert pieces(span(3, 8), disjoint) == [(3, 4), (5, 8)] and pieces(span(12, 20), disjoint) == []


def test_events_of_a_program():
    """Clocks count from the program's first; 0 is what did not happen; the last tile's place holds later ones and is left out."""
    pytest.importorskip("triton")
    from kernels.attention.hopper_forward import EVENTS as names

    def tile(**clocks):
        return [clocks.get(name.replace(" ", "_"), 0) for name in names]

    first = tile(item_taken=1030, scores_issued=1050, scores_ready=1100)
    warpgroup = [first, tile(scores_issued=1200, scores_ready=1300), tile(scores_issued=9999)]
    load = [tile(item_taken=1000, keys_requested=1010), tile(keys_requested=1020), tile()]
    assert by_event([warpgroup, load]) == {
        "warpgroup 0": {"item taken": [30, None], "scores issued": [50, 200], "scores ready": [100, 300]},
        "load": {"item taken": [0, None], "keys requested": [10, 20]},
    }


def made_up(items: int = 3, tiles_of_item: int = 6) -> dict:
    """Two warpgroups as the kernel runs: products one after the other, 10% slower than at peak rate; softmaxes of 600 cycles under them."""
    product, softmax = 563, 600
    clocks = {f"warpgroup {i}": {name: [] for name in ["item taken", *EVENTS, "item stored"]} for i in range(2)}
    free = 0  # when the matrix units are next

    def issue(when):
        nonlocal free
        free = max(free, when) + product
        return free

    now = dict(zip(clocks, (100, 700)))
    for tile in range(items * tiles_of_item):
        for name, events in clocks.items():
            first, last = tile % tiles_of_item == 0, tile % tiles_of_item == tiles_of_item - 1
            events["item taken"].append(now[name] if first else None)
            events["scores issued"].append(now[name] + 10)
            ready = issue(now[name] + 10)
            if not first:
                events["output issued"].append(now[name] + 40)
                output = issue(now[name] + 40)
            events["scores ready"].append(ready)
            events["softmax done"].append(ready + softmax)
            now[name] = ready + softmax + 20
            if not first:
                now[name] = max(now[name], output)
                events["output ready"].append(now[name])
            if last:
                events["output issued"].append(now[name] + 30)
                now[name] = issue(now[name] + 30)
                events["output ready"].append(now[name])
            events["item stored"].append((now := now | {name: now[name] + 400})[name] if last else None)
    requested = [max(0, clock - 900) for clock in clocks["warpgroup 0"]["scores issued"]]
    clocks["load"] = {"keys requested": requested, "values requested": [clock + 100 for clock in requested]}
    return trace_of(clocks, keys=128, head_dim=128)


def test_at_least_is_no_more_than_at_most_and_ends_before_the_waits():
    trace = made_up()
    shares = overlap(trace)
    assert 0.5 < shares["at_least"] < shares["at_most"] <= 1
    waits = {(span.partition, span.kind, span.tile): span.end for span in spans(trace, *PRODUCTS)}
    assert len(waits) == 2 * 2 * 18
    assert all(product.end <= waits[product.partition, product.kind, product.tile] for product in at_peak_rate(trace))


def test_the_windows_lie_in_an_item_and_about_the_border_of_two():
    trace = made_up(items=3, tiles_of_item=8)
    events = trace["clocks"]["warpgroup 0"]
    middle, border = windows(trace).values()
    assert events["item taken"][8] < middle[0] < middle[1] < events["item stored"][15]
    assert border[0] < events["item stored"][15] <= events["item taken"][16] < border[1]


def test_a_trace_without_two_items_is_refused():
    with pytest.raises(ValueError, match="--seq"):
        windows(made_up(items=1))


def test_drawn_again_from_its_events(tmp_path, monkeypatch, capsys):
    path = tmp_path / "events.json"
    path.write_text(json.dumps(made_up()))
    monkeypatch.setattr(sys, "argv", ["trace_attention.py", "--from", str(path)])
    assert main() == 0
    png = (tmp_path / "events.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 500
    printed = capsys.readouterr().out
    assert printed.startswith(report(made_up())) and "tracing costs 5.0%" in printed


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["trace_attention.py", "--out", str(tmp_path / "events.json")])
    assert main() == 2
    assert "--from" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("head_dim", ["64", "128"])
def test_recorded_and_drawn(head_dim, monkeypatch, capsys, tmp_path):
    path = tmp_path / "trace/events.json"
    monkeypatch.setattr(sys, "argv", ["trace_attention.py", "--head-dim", head_dim, "--seq", "2048", "--out", str(path)])
    assert main() == 0
    shares = overlap(json.loads(path.read_text()))
    assert 0.2 < shares["at_least"] <= shares["at_most"] <= 1 and shares["matrix_units"] < 1
    assert path.with_suffix(".png").stat().st_size > 20000 and "tracing costs" in capsys.readouterr().out
