"""The Triton kernels without a GPU: run by the interpreter, and compiled for GPU generations that are not there.

Both in processes of their own: TRITON_INTERPRET acts when Triton is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.attention.tuning import HEAD_DIMS, SHARED_MEMORY_LIMIT, generation, tile_for

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start(command: list[str], tmp_path: Path, interpret: bool) -> subprocess.Popen:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen) -> str:
    try:
        text, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


def test_interpreted(tmp_path):
    print(output(start(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")], tmp_path, interpret=True)))


def cases(arch: str) -> list[str]:
    """arch,dtype,head_dim,causal,even: every row of the table for half precision; tails and a head_dim that is no power of two."""
    table = [f"{arch},bfloat16,{head_dim},causal,even" for head_dim in HEAD_DIMS]
    return [*table, f"{arch},float16,80,full,odd"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    exact = [f"sm_86,float32,{head_dim},causal,even" for head_dim in HEAD_DIMS]  # one table for all, so checked where memory is least
    halves = [*cases("sm_80"), *cases("sm_86"), *exact], [*cases("sm_90"), *cases("sm_100")]
    processes = [start([str(HERE / "compile_kernels.py"), *half], tmp_path_factory.mktemp("triton"), interpret=False) for half in halves]
    return [json.loads(line) for process in processes for line in output(process).splitlines() if line.startswith("{")]


def test_every_kernel_compiles_for_every_generation_within_its_shared_memory(compiled):
    assert {(row["case"].split(",")[0], row["which"]) for row in compiled} == {
        (arch, which) for arch in SHARED_MEMORY_LIMIT for which in ("rows", "forward", "dkdv", "dq")
    }
    too_large = [row for row in compiled if row["shared"] > SHARED_MEMORY_LIMIT[row["case"].split(",")[0]]]
    assert not too_large


def test_registers_suffice_at_the_common_head_dims(compiled):
    """A few spilled registers are tolerable, loops that live in local memory are not."""
    spilling = [row for row in compiled if row["stack"] > 256]
    assert not spilling


def test_hopper_keeps_its_matrix_products_in_flight(compiled):
    """ptxas, given a reason, waits for each wgmma before it issues the next one: that halves the speed and nothing else shows it."""
    rows = [row for row in compiled if row["case"].startswith("sm_90") and row["which"] != "rows"]
    assert all(row["wgmma"] > 0 for row in rows if ",16," not in row["case"])
    serialised = [row for row in rows if row["wgmma_waits"] > row["wgmma"] / 2]
    assert not serialised


@pytest.mark.parametrize(
    "compute_capability, name",
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_86"), ((13, 0), "sm_86")],
)
def test_generations(compute_capability, name):
    assert generation(compute_capability) == name


def test_tiles_cover_all_head_dims():
    import torch

    for arch in SHARED_MEMORY_LIMIT:
        for dtype in (torch.float16, torch.float32):
            for head_dim in range(16, 257):
                tile = tile_for(arch, "forward", dtype, head_dim)
                assert min(tile.queries, tile.keys) >= 16
