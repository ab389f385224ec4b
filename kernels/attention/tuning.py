"""Tile sizes: a checked-in table, GPU generation x pass x dtype x head_dim. No tuning at run time, so every rank runs the same kernel."""

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    queries: int  # BLOCK_M
    keys: int  # BLOCK_N
    warps: int
    stages: int  # of the software pipeline: tiles in flight from global to shared memory


class HopperTile(NamedTuple):
    """Of the warp-specialised kernels (sm_90a): one warp loads, `warpgroups` of 128 threads compute 64 queries each."""

    warpgroups: int
    keys: int
    stages: int  # tiles of K, and of V, in shared memory
    programs: int  # that share a multiprocessor
    overlap: bool  # the softmax of a tile runs under the matrix products of the one before
    turns: bool  # the warpgroups issue their products in turn
    lazy: bool  # the output is rescaled only where a row's maximum grows by much

    def registers(self, load: int) -> tuple[int, int]:
        """(of a computing thread once the loading warpgroup has shrunk to `load` registers a thread, of every thread at the start)."""
        threads = 128 * (self.warpgroups + 1)
        at_start = 65536 // self.programs // threads // 8 * 8
        return (at_start * threads - 128 * load) // (128 * self.warpgroups) // 8 * 8, at_start


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
        "forward": {16: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 64, 8, 2)},
        "dkdv": {16: Tile(64, 128, 8, 3), 64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 64, 8, 2)},
        "dq": {16: Tile(128, 64, 8, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(128, 32, 8, 2)},
    },
}
_HALF["sm_100"] = _HALF["sm_90"]
# softcap, ALiBi and dropout keep registers of their own through the loop: rows that would spill there, replaced.
_HALF_WITH_SCORE_FEATURES = {
    "sm_80": {
        "forward": {256: Tile(64, 32, 8, 2)},
        "dkdv": {16: Tile(32, 128, 8, 3), 64: Tile(32, 128, 8, 3), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    },
    "sm_86": {"dkdv": {16: Tile(32, 64, 8, 2), 64: Tile(32, 64, 8, 2)}},
    "sm_90": {"dkdv": {128: Tile(32, 128, 8, 3)}},
}
_HALF_WITH_SCORE_FEATURES["sm_100"] = _HALF_WITH_SCORE_FEATURES["sm_90"]
_HALF_BOUNDED = {"sm_90": {"dkdv": {128: Tile(64, 128, 8, 2)}}}  # windows and documents: a third stage would spill
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


def tile(device: torch.device, which: str, dtype: torch.dtype, head_dim: int, score_features: bool, bounded: bool = False) -> Tile:
    """The tile of the pass `which` ("forward", "dkdv" or "dq") on this device; on the CPU, the interpreter's.

    score_features: whether softcap, ALiBi or dropout are asked for; bounded: whether a window or documents are.
    """
    if device.type == "cpu":
        return _INTERPRETER
    return tile_for(generation(compute_capability(device)), which, dtype, head_dim, score_features, bounded)


def tile_for(arch: str, which: str, dtype: torch.dtype, head_dim: int, score_features: bool, bounded: bool = False) -> Tile:
    row = next(row for row in HEAD_DIMS if head_dim <= row)
    if dtype is torch.float32:
        return _FLOAT32[which][row]
    tiles = _HALF[arch][which]
    if bounded:
        tiles = tiles | _HALF_BOUNDED.get(arch, {}).get(which, {})
    if score_features:
        tiles = tiles | _HALF_WITH_SCORE_FEATURES[arch].get(which, {})
    return tiles[row]


def hopper_tile(head_dim: int, causal: bool, seq_q: int, seq_k: int) -> HopperTile:
    """The forward's tile; docs/hopper_forward.md has the measurements behind it."""
    diagonal_crosses_tiles = causal and (seq_k - seq_q) % 64 != 0  # needs a second mask, and registers for it
    if head_dim == 64:
        if causal and (seq_k <= 2048 or diagonal_crosses_tiles):
            return HopperTile(warpgroups=2, keys=64, stages=3, programs=2, overlap=False, turns=False, lazy=False)
        return HopperTile(warpgroups=3, keys=128, stages=3, programs=1, overlap=True, turns=True, lazy=False)
    if causal and seq_k <= 512:
        return HopperTile(warpgroups=2, keys=64, stages=4, programs=1, overlap=True, turns=False, lazy=True)
    return HopperTile(warpgroups=2, keys=128, stages=2, programs=1, overlap=True, turns=False, lazy=True)
