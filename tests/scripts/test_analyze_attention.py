"""Attention's memory and traffic: formulas against allocations followed, an H200's peaks and the masks themselves; and the page of them."""

import json
from types import SimpleNamespace

import pytest
import torch

from kernels.attention import attention
from kernels.attention.tuning import SHARED_MEMORY_LIMIT
from scripts.analyze_attention import (
    GPUS,
    LENGTHS,
    ROOT,
    Case,
    fit,
    gpu_here,
    flash_memory,
    flash_traffic,
    filled,
    forward_tiles,
    keys_read,
    longest,
    measure,
    standard_memory,
    tables,
)
from tests.allocations import Allocations
from training.flops import peak_flops


@pytest.mark.parametrize("seq, batch", [(64, 2), (256, 2), (256, 1)])
def test_standard_attention_holds_what_the_formula_says(seq, batch):
    case = Case(seq, head_dim=32, heads=3, batch=batch)
    expected = {which: sum(parts.values()) for which, parts in standard_memory(case).items()}
    with Allocations() as followed:
        qkv = [torch.randn(batch, seq, 3, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        followed.phase = "forward"
        out = attention(*qkv, backend="eager")
        kept, dout = followed.alive, torch.randn_like(out)
        followed.phase = "backward"
        out.backward(dout)
    assert kept == pytest.approx(expected["kept"], rel=0.001)
    assert followed.peaks["forward"] == pytest.approx(expected["forward"], rel=0.001)
    assert followed.peaks["backward"] == pytest.approx(expected["backward"], rel=0.001)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_our_kernels_took_what_the_formula_says_on_an_h200(head_dim):
    rows = json.loads((ROOT / f"docs/results/benchmark_attention-h200-{head_dim}.json").read_text())["rows"]
    compared = 0
    for row in rows:
        case = Case(row["seq"], head_dim, row["heads"], row["batch"])
        for backend in ("hopper", "triton"):
            memory = flash_memory(case, backend)
            if row["pass"] != "both":
                there_before = case.tensor * (3 if row["pass"] == "forward" else 4)
                assert sum(memory[row["pass"]].values()) - there_before == pytest.approx(row["measured"][backend]["peak_bytes"], rel=0.001)
                compared += 1
    assert compared == 48


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("seq", [512, 640, 4096])
def test_tiles_of_keys_are_those_that_the_mask_shows(backend, seq):
    case = Case(seq)
    tiles = forward_tiles(backend, case)
    visible = torch.ones(seq, seq, dtype=torch.bool).tril()
    shown = sum(bool(tile.any()) for rows in visible.split(tiles.queries) for tile in rows.split(tiles.keys, dim=1))
    assert keys_read(case, tiles) == shown
    read = flash_traffic(case, tiles)["L2 to multiprocessors"]
    assert read == case.heads * 2 * 128 * (seq + 2 * shown * tiles.keys)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_fit_on_the_chip(head_dim):
    for seq in LENGTHS:
        for backend in ("hopper", "triton"):
            assert forward_tiles(backend, Case(seq, head_dim)).shared <= SHARED_MEMORY_LIMIT["sm_90"]


def test_fits_find_both_terms():
    a, b = fit([(n, 14 * n * n + 1792 * n) for n in LENGTHS])
    assert (a, b) == (pytest.approx(14), pytest.approx(1792))
    assert fit([(n, 1028 * n) for n in LENGTHS]) == (pytest.approx(0, abs=1e-9), pytest.approx(1028))


def test_the_longest_that_fits():
    assert longest(2 * 1000**2, lambda n: 2 * n * n) == 960
    assert longest(100, lambda n: 2 * n * n) == 0


def test_every_gpu_has_a_peak_and_levels_that_grow():
    for gpu in GPUS:
        assert peak_flops(gpu.name, "bf16")
        levels = list(gpu.levels.values())
        assert levels[-1].capacity > 100 * levels[-2].capacity > 100 * levels[-3].capacity / 2
        known = [level.bandwidth for level in levels if level.bandwidth]
        assert known == sorted(known, reverse=True)
        latencies = [level.latency for level in levels if level.latency is not None]
        assert len(latencies) >= 3 and latencies == sorted(latencies)


def test_the_gpu_at_hand_is_asked_in_the_units_of_the_table(monkeypatch):
    h100 = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", multi_processor_count=132, regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=228 * 1024,
        L2_cache_size=50 * 2**20, total_memory=79 * 2**30, clock_rate=1_755_000, memory_clock_rate=2_619_000, memory_bus_width=5120,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    levels, here = next(gpu for gpu in GPUS if gpu.name == "H100 80GB HBM3").levels, gpu_here()
    for key, level in (("registers", "registers"), ("shared_memory", "shared memory"), ("l2", "L2")):
        assert here[key] == levels[level].capacity
    assert here["shared_memory_bandwidth"] == levels["shared memory"].bandwidth
    assert here["dram_bandwidth"] == pytest.approx(levels["DRAM"].bandwidth, rel=0.01)


def test_the_page_shows_what_the_program_says():
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert filled(page, tables(128)) == page, "python scripts/analyze_attention.py --docs docs/memory.md"


def test_a_page_without_a_place_for_a_table_is_refused():
    with pytest.raises(ValueError, match="table: memory"):
        filled("nothing here", {"memory": "| x |"})


def test_peaks_are_written_before_a_profiler_may_hang_and_what_failed_is_said(monkeypatch, tmp_path, capsys):
    """On a stand-in for a GPU of 80 GiB, whose allocator keeps what a row needed until it is told otherwise."""
    out, kept = tmp_path / "measured.json", [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 2**30 - kept[0], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.__setitem__(0, 0))

    def peaks(case, backend):
        if backend == "triton":
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")
        formula = standard_memory(case) if backend == "eager" else flash_memory(case, backend)
        kept[0] = sum(formula["forward"].values())
        return {which: sum(formula[which].values()) for which in ("forward", "backward")}

    def counters(head_dim):
        assert len(json.loads(out.read_text())["rows"]) == 3 * len(LENGTHS)
        return "not available: for this test"

    monkeypatch.setattr("scripts.analyze_attention.peaks", peaks)
    monkeypatch.setattr("scripts.analyze_attention.counters", counters)
    measure(128, out)
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    assert result["counters"] == "not available: for this test"
    assert [row["seq"] for row in result["rows"] if row["backend"] == "eager" and "measured" in row] == LENGTHS[:6]
    assert "| eager | forward | 16,384 | 60.8 GB | 60.8 GB | +0.00% |" in told
    assert "| triton | backward | 512 | 16.9 MB | OutOfMemoryError: CUDA out of memory. | - |" in told
