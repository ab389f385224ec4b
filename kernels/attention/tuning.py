"""Tile sizes: a checked-in table, GPU generation x pass x dtype x head_dim. No tuning at run time, so every rank runs the same kernel."""

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    queries: int  # BLOCK_M
    keys: int  # BLOCK_N
    warps: int
    stages: int  # of the software pipeline: tiles in flight from global to shared memory


# The table's rows are head_dim rounded up to a row that exists. A generation's limit of shared memory per block (163 KB on sm_80, 99 KB on
# sm_86, 227 KB on sm_90 and sm_100) bounds stages * tiles; float32 tiles are small because exact float32 products run on the FMA units.
_FLOAT32 = {
    "forward": {16: Tile(64, 32, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 32, 8, 2)},
    "dkdv": {16: Tile(32, 32, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 1)},
    "dq": {16: Tile(32, 32, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 1)},
}
_HALF = {
    "sm_80": {
        "forward": {16: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)},
        "dkdv": {16: Tile(64, 128, 8, 3), 64: Tile(64, 128, 8, 3), 128: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 1)},
        "dq": {16: Tile(128, 64, 8, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    },
    "sm_86": {
        "forward": {16: Tile(128, 64, 4, 2), 64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 16, 4, 2)},
        "dkdv": {16: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 4, 1)},
        "dq": {16: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 4, 1)},
    },
    "sm_90": {
        "forward": {16: Tile(128, 64, 8, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
        "dkdv": {16: Tile(64, 128, 8, 3), 64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
        "dq": {16: Tile(128, 64, 8, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    },
}
_HALF["sm_100"] = _HALF["sm_90"]
_INTERPRETER = Tile(32, 16, 4, 1)  # small and unequal: a few dozen rows already have diagonal, full and tail tiles

SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
PASSES = ("forward", "dkdv", "dq")
HEAD_DIMS = (16, 64, 128, 256)


def generation(compute_capability: tuple[int, int]) -> str:
    """The table's name for a GPU; those it does not know get the entries that need the least shared memory (99 KB)."""
    major, minor = compute_capability
    if major == 8:
        return "sm_86" if minor in (6, 9) else "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


def read_compute_capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)  # torch.compile folds this call, and not get_device_capability
    return properties.major, properties.minor


compute_capability = cache(read_compute_capability)


def tile(device: torch.device, which: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of the pass `which` ("forward", "dkdv" or "dq") on this device; on the CPU, the interpreter's."""
    if device.type == "cpu":
        return _INTERPRETER
    return tile_for(generation(compute_capability(device)), which, dtype, head_dim)


def tile_for(arch: str, which: str, dtype: torch.dtype, head_dim: int) -> Tile:
    rows = (_FLOAT32 if dtype is torch.float32 else _HALF[arch])[which]
    return rows[next(row for row in HEAD_DIMS if head_dim <= row)]
