"""The Triton kernels without a GPU: run by the interpreter, and compiled for GPU generations that are not there.

Both in processes of their own: TRITON_INTERPRET acts when Triton is imported.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.attention.tuning import HEAD_DIMS, PASSES, SHARED_MEMORY_LIMIT, generation, tile_for

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EVERY_FEATURE = "window,documents,softcap,alibi,sinks,dropout"


# Where scripts/test.sh puts versions of Triton beside the installed one.
OTHER_TRITONS = sorted(Path(sys.prefix).glob("triton-*"))


def start(command: list[str], tmp_path: Path, interpret: bool, triton: Path | None = None) -> subprocess.Popen:
    """triton: the folder of another version than the installed one."""
    path = os.pathsep.join(map(str, (ROOT, triton) if triton else (ROOT,)))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *command]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outputs(*processes: subprocess.Popen, seconds: float = 400) -> list[str]:
    """What each of them printed; one that fails, or is not done in time, fails the test with what it printed. None outlives this call."""
    texts = []
    try:
        for process in processes:
            try:
                text, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                text = process.communicate()[0] + f"(killed after {seconds} s)"
            assert process.returncode == 0, text
            texts.append(text)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return texts


def test_processes_end_with_the_first_that_hangs_and_its_output_is_shown(tmp_path):
    hang = ["-c", "import time; print('so far', flush=True); time.sleep(60)"]
    processes = [start(hang, tmp_path, interpret=False) for _ in range(2)]
    with pytest.raises(AssertionError, match="so far"):
        outputs(*processes, seconds=2)
    assert all(process.returncode is not None for process in processes)


def interpreted(*options: str) -> list[str]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py"), *options]


def test_interpreted(tmp_path):
    print(*outputs(start(interpreted(), tmp_path, interpret=True)))


@pytest.mark.parametrize("triton", OTHER_TRITONS, ids=lambda folder: folder.name)
def test_other_versions_of_triton(tmp_path, triton):
    version = start(["-c", "import triton; print('triton-' + triton.__version__)"], tmp_path, False, triton)
    assert outputs(version)[0].strip() == triton.name
    compiled = [f"sm_80,bfloat16,64,causal,odd,{EVERY_FEATURE}", "sm_90,bfloat16,128,causal,even", "sm_100,bfloat16,64,causal,even"]
    processes = (
        start([str(HERE / "compile_kernels.py"), *compiled], tmp_path, False, triton),
        start(interpreted("-k", "features or windows or packed"), tmp_path, True, triton),
    )
    rows = [json.loads(line) for line in outputs(*processes)[0].splitlines() if line.startswith("{")]
    assert len(rows) == 4 * len(compiled)
    assert all(row["stack"] <= SPILLED_BYTES for row in rows)


def cases(arch: str) -> list[str]:
    """Every row of the half-precision table (that of 16 is that of 64), and tails with a head_dim that is no power of two; and with every
    feature at once, which is the most that a kernel can need, all of Hopper's rows and those that others replace for it.

    sm_100 shares sm_90's tiles: a few, to see that they compile there.
    """
    of_its_own = [f"{arch},float16,40/24,causal,odd", f"{arch},bfloat16,128,causal,odd,window"] if arch == "sm_90" else []  # see `widths`
    featured = {"sm_80": (128,), "sm_86": (64,), "sm_90": (64, 128, 256), "sm_100": (64,)}[arch]
    plain = (64, 256) if arch == "sm_100" else (64, 128, 256)
    rows = [f"{arch},bfloat16,{head_dim},causal,even" for head_dim in plain]
    rows += [f"{arch},bfloat16,{head_dim},causal,odd,{EVERY_FEATURE}" for head_dim in featured]
    return rows if arch == "sm_100" else [*rows, f"{arch},float16,80,full,odd", *of_its_own]


# Bytes of local memory a thread that ptxas may use, whose spills lie outside the loops or are rare there; and where it is more, why.
SPILLED_BYTES = 128
NAMED_SPILLS = {("sm_90", "256", "dkdv"): 400}  # dK and dV hold half of the registers, and tiles of fewer keys have no wgmma


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    # The float32 table is one for all generations, so it is checked where shared memory is least; exact products compile slowly.
    float32 = [*(f"sm_86,tfloat32,{head_dim},causal,even" for head_dim in HEAD_DIMS), "sm_86,float32,64,causal,even"]
    halves = [*cases("sm_80"), *cases("sm_86"), *float32], [*cases("sm_90"), *cases("sm_100")]
    processes = [start([str(HERE / "compile_kernels.py"), *half], tmp_path_factory.mktemp("triton"), interpret=False) for half in halves]
    return [json.loads(line) for text in outputs(*processes) for line in text.splitlines() if line.startswith("{")]


def test_every_kernel_compiles_for_every_generation_within_its_shared_memory(compiled):
    assert {(row["case"].split(",")[0], row["which"]) for row in compiled} == {
        (arch, which) for arch in SHARED_MEMORY_LIMIT for which in ("rows", "forward", "dkdv", "dq")
    }
    too_large = [row for row in compiled if row["shared"] > SHARED_MEMORY_LIMIT[row["case"].split(",")[0]]]
    assert not too_large


def test_half_precision_fits_into_registers(compiled):
    halves = [row | dict(key=(*row["case"].split(",")[0:3:2], row["which"])) for row in compiled if "float32" not in row["case"]]
    spilling = [row for row in halves if row["stack"] > NAMED_SPILLS.get(row["key"], SPILLED_BYTES)]
    assert not spilling


def test_hopper_keeps_its_matrix_products_in_flight(compiled):
    """ptxas, given a reason, waits for each wgmma before it issues the next: slow, and nothing else shows it."""
    rows = [row for row in compiled if row["case"].startswith("sm_90") and EVERY_FEATURE not in row["case"] and row["which"] != "rows"]
    assert all(row["wgmma"] > 0 for row in rows)
    serialised = [row for row in rows if row["wgmma_waits"] > row["wgmma"] / 2]
    assert not serialised


def test_hopper_reads_no_register_before_it_is_written(compiled):
    """ptxas does err: the address of an operand of a matrix product was then whatever the register held."""
    rows = [row for row in compiled if row["case"].startswith("sm_90")]  # other generations load constants by other instructions
    assert not [(row["case"], row["which"], row["read_before_written"]) for row in rows if row["read_before_written"]]


@pytest.mark.parametrize(
    "compute_capability, name",
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_86")],
)
def test_generations(compute_capability, name):
    assert generation(compute_capability) == name


def test_tiles_cover_all_head_dims():
    for arch in SHARED_MEMORY_LIMIT:
        for dtype in (torch.float16, torch.float32):
            for head_dim in range(16, 257):
                for which, *kind in itertools.product(PASSES, (False, True), (False, True)):
                    tile = tile_for(arch, which, dtype, head_dim, *kind)
                    assert min(tile.queries, tile.keys) >= 16, "the least that tl.dot takes"
        for which, *kind in itertools.product(PASSES, (False, True), (False, True)):
            rows = [tile_for(arch, which, torch.float16, head_dim, *kind) for head_dim in (16, 64)]
            assert rows[0] == rows[1], "compile both: `cases` leaves out 16"
