"""Compiles the attention kernels for GPUs that need not be present, as `attention` would launch them, and prints one JSON line for each.

    python tests/kernels/compile_kernels.py sm_90,bfloat16,64,causal,even sm_80,float16,128,causal,odd,window,softcap ...

A program of its own: it needs Triton without TRITON_INTERPRET. A case is architecture, dtype (float32 computes exact products, tfloat32
the same tensors with TF32 products), head_dim (40/24: of q and k 40, of v 24), causal or full, lengths that are even (multiples of the
tile) or odd, and any features.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import tuning
from kernels.attention.triton_backward import ROWS_PER_PROGRAM, dkdv_kernel, dq_kernel, row_kernel
from kernels.attention.triton_forward import forward_kernel, widths

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "sinks")
POINTERS = {"lse": "fp32", "lse_log2": "fp32", "padded_lse": "fp32", "delta": "fp32", "dlse": "fp32", "alibi_slopes": "fp32"}
POINTERS |= {"doc_start": "i32", "doc_end": "i32", "dropout_seed": "i64"}
FLOATS = ("scale", "scale_log2", "softcap_log2", "log2_e")
FEATURES = {
    "window": ["window_left"],
    "documents": ["doc_start", "doc_end"],
    "softcap": ["softcap_log2"],
    "alibi": ["alibi_slopes"],
    "sinks": ["sinks"],
    "dropout": ["dropout_seed", "dropout_threshold"],
}
SCORE_FEATURES = {"softcap", "alibi", "dropout"}
BOUNDS = {"window", "documents"}
OPTIONAL = {"window_right", *(name for names in FEATURES.values() for name in names)}


def compile_kernel(kernel, arch: str, dtype: torch.dtype, constants: dict, warps: int, stages: int):
    """Pointers and strides divisible by 16, as aligned tensors give, from head to head only where head_dims are; lengths where even."""
    aligned_heads = all(constants.get(name, 16) % 16 == 0 for name in ("HEAD_DIM", "VALUE_DIM"))
    strides = ("_batch", "_row", "_head") if aligned_heads else ("_batch", "_row")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name in TENSORS or name in POINTERS
        element = POINTERS.get(name, TYPES[dtype]) if pointer else "fp32" if name in FLOATS else "i32"
        signature[name] = f"*{element}" if pointer else element
        if pointer or name.endswith(strides) or (name.startswith("seq") and constants.get("EVEN_M")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {name: value for name, value in constants.items() if name in signature}, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True))


def compile_all(arch: str, dtype: torch.dtype, precision: str, width: tuple, causal: bool, even: bool, features=(), tiles=None):
    """Yields (pass, tile, compiled kernel) for the three kernels that have tiles. width: see `widths`."""
    common = dict(zip(("HEAD_DIM", "BLOCK_D", "VALUE_DIM", "BLOCK_V"), width))
    common |= dict.fromkeys(OPTIONAL - {name for feature in features for name in FEATURES[feature]})
    for which, kernel in (("forward", forward_kernel), ("dkdv", dkdv_kernel), ("dq", dq_kernel)):
        kinds = not SCORE_FEATURES.isdisjoint(features), not BOUNDS.isdisjoint(features)
        tile = (tiles or {}).get(which) or tuning.tile_for(arch, which, dtype, max(width[::2]), *kinds)
        constants = common | dict(BLOCK_M=tile.queries, BLOCK_N=tile.keys, GROUP=1, CAUSAL=causal, PRECISION=precision)
        constants |= dict(EVEN_M=even, EVEN_N=even)
        yield which, tile, compile_kernel(kernel, arch, dtype, constants, tile.warps, tile.stages)


@cache
def compile_rows(arch: str, block_v: int):
    constants = dict(VALUE_DIM=block_v, BLOCK_V=block_v, BLOCK_M=ROWS_PER_PROGRAM, dlse=None, states=None)
    return compile_kernel(row_kernel, arch, torch.bfloat16, constants, 4, 3)


def read_before_written(sass: str) -> list[str]:
    """Hopper's instructions that read a uniform register which none above them has written; without matrix products, which name a register
    of four and do not always read it."""
    written, found = set(), []
    for opcode, operands in re.findall(r"^ +/\*[0-9a-f]{4,}\*/ +(?:@\S+ +)?([A-Z]\S*) +([^;]*) ;", sass, re.MULTILINE):
        target = re.match(r"(?:U?P[T0-7], )*UR(\d+)\b", operands) if re.match("U|S2UR|R2UR|VOTEU|REDUX", opcode) else None
        sources = re.sub(r"gdesc\[\w+\]", "", operands[target.end() if target else 0 :])
        if not set(map(int, re.findall(r"\bUR(\d+)", sources))) <= written:
            found.append(f"{opcode} {operands}")
        if target:
            written |= {int(target[1])} | ({int(target[1]) + 1} if ".64" in opcode or "WIDE" in opcode else set())
    return found


def resources(compiled) -> dict:
    """Registers and bytes of local memory (spills) a thread, bytes of shared memory a block; on Hopper also matrix products and waits, and
    what no right machine code has: registers read before they are written."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([CUOBJDUMP, f"--dump-{what}", file.name], capture_output=True, text=True, check=True).stdout

        usage, hopper = dump("resource-usage"), compiled.metadata.target.arch == 90
        sass = dump("sass") if hopper else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    used = dict(registers=int(registers), stack=int(stack), shared=compiled.metadata.shared)
    waits = sass.count("WARPGROUP.DEPBAR")
    return used | (dict(wgmma=sass.count("HGMMA"), wgmma_waits=waits, read_before_written=read_before_written(sass)) if hopper else {})


if __name__ == "__main__":
    for case in sys.argv[1:]:
        arch, dtype, head_dim, causal, even, *features = case.split(",")
        precision = "ieee" if dtype == "float32" else "tf32"
        dtype = getattr(torch, dtype.replace("tfloat", "float"))
        width = widths(*map(int, (head_dim.split("/") * 2)[:2]))
        rows = compile_rows(arch, width[3])  # neither dtype nor lengths change much in it
        print(json.dumps(dict(case=case, which="rows", tile=None, **resources(rows))), flush=True)
        for which, tile, compiled in compile_all(arch, dtype, precision, width, causal == "causal", even == "even", features):
            print(json.dumps(dict(case=case, which=which, tile=tile, **resources(compiled))), flush=True)
