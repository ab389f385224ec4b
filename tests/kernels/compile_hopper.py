"""Compiles the Hopper kernel for a GPU that need not be present, as `attention` would launch it, and prints one JSON line for each case.

    python tests/kernels/compile_hopper.py bfloat16,64,causal,4096,4096 bfloat16,128,full,4096,4096,traced float16,64,full,100,100,backward ...

A program of its own: it needs Triton without TRITON_INTERPRET. A case is dtype, head_dim, causal or full, seq_q, seq_k, and traced for the
kernel that scripts/trace_attention.py launches, backward for that of the other pass (without grouped heads), grouped for it with them.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from compile_kernels import CUOBJDUMP, TYPES
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.attention import hopper_backward
from kernels.attention.hopper_forward import QUERIES, compile_options, constants, forward_kernel
from kernels.attention.hopper_shared import shared_layout
from kernels.attention.tuning import hopper_tile

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")


def compile_case(dtype: torch.dtype, head_dim: int, causal: bool, seq_q: int, seq_k: int, traced: bool):
    tile = hopper_tile(head_dim, causal, seq_q, seq_k)
    names = forward_kernel.arg_names
    constexprs = constants(tile, causal, seq_q, seq_k)._asdict() | ({} if traced else dict(trace=None))

    def descriptor(rows):
        return f"tensordesc<{TYPES[dtype]}[1, 1, {rows}, {head_dim}],{shared_layout(rows, head_dim, dtype)!r}>"

    queries, keys = descriptor(QUERIES.value), descriptor(tile.keys)
    signature = dict(q_desc=queries, k_desc=keys, v_desc=keys, out_desc=queries, lse="*fp32", counter="*i32", scale_log2="fp32")
    signature |= dict(trace="*i64") if traced else {}
    signature = {name: signature.get(name, "constexpr" if name in constexprs else "i32") for name in names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = GluonASTSource(forward_kernel, signature, constexprs, attributes)
    return tile, triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compile_options(tile))


def compile_backward(dtype: torch.dtype, head_dim: int, causal: bool, seq_k: int, group: int):
    queries = hopper_backward.queries_per_tile(head_dim)

    def descriptor(rows):
        return f"tensordesc<{TYPES[dtype]}[1, 1, {rows}, {head_dim}],{shared_layout(rows, head_dim, dtype)!r}>"

    of_rows = f"tensordesc<fp32[{queries}],{hopper_backward.one_dimensional()!r}>"
    signature = dict.fromkeys(("q_desc", "dout_desc"), descriptor(queries)) | dict.fromkeys(("k_desc", "v_desc"), descriptor(128))
    signature |= dict.fromkeys(("dk_desc", "dv_desc"), descriptor(64)) | dict.fromkeys(("lse_desc", "delta_desc"), of_rows)
    signature |= dict(dq_desc=f"tensordesc<fp32[1, 128, 32],{hopper_backward.dq_layout()!r}>", counter="*i32", states="*i32", kept="*fp32")
    signature |= dict(scale="fp32", scale_log2="fp32", heads_at_once="i32", whole="i32", parts="i32")
    constexprs = hopper_backward.Constants(group, causal, seq_k % 128 != 0)._asdict()
    kernel = hopper_backward.backward_kernel
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, constexprs, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=hopper_backward.OPTIONS)


def innermost_loops(instructions: list[tuple[int, str, str]]) -> list[list[tuple[str, str]]]:
    """The loops, as (opcode, operands), that compute exponentials and have no other such loop inside."""
    index = {address: i for i, (address, _, _) in enumerate(instructions)}
    spans = []
    for i, (address, opcode, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and (start := int(target[1], 16)) < address and start in index:
            if any(opcode.startswith("MUFU.EX2") for _, opcode, _ in instructions[index[start] : i]):
                spans.append((index[start], i))
    innermost = [(a, b) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]
    return [[(opcode, operands) for _, opcode, operands in instructions[a:b]] for a, b in innermost]


def is_clock(opcode: str, operands: str) -> bool:
    return opcode.startswith(("CS2R", "S2R", "S2UR")) and "CLOCK" in operands


def count_spills(instructions) -> int:
    return sum(opcode.startswith(("STL", "LDL")) for opcode, _ in instructions)


def describe_loop(loop: list[tuple[str, str]]) -> dict:
    """Waits for matrix products (how many may stay in flight), the exponentials between a wait that leaves one and the next wait, the order of
    all these and of clock reads, and the barriers that threads wait at."""
    waits, under_product, in_flight, order = [], 0, False, []
    names = {"HGMMA": "product", "MUFU.EX2": "exponential"}
    for opcode, operands in loop:
        order += [name for start, name in names.items() if opcode.startswith(start) and order[-1:] != [name]]
        if is_clock(opcode, operands):
            order.append("clock")
        if opcode.startswith("WARPGROUP.DEPBAR"):
            waits.append(int(operands.split("0x")[1], 16))
            order.append(f"wait{waits[-1]}")
            in_flight = waits[-1] > 0
        under_product += in_flight and opcode.startswith("MUFU.EX2")
    products = sum(opcode.startswith("HGMMA") for opcode, _ in loop)
    exponentials = sum(opcode.startswith("MUFU.EX2") for opcode, _ in loop)
    barriers = sum(opcode.startswith("BAR.SYNC") for opcode, _ in loop)
    return dict(
        products=products, waits=waits, exponentials=exponentials, under_product=under_product, order=order, barriers=barriers,
        spills=count_spills(loop),
    )  # fmt: skip


def describe(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    instructions = [(int(address, 16), opcode, operands) for address, opcode, operands in INSTRUCTION.findall(sass)]
    return dict(
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=count_spills((opcode, operands) for _, opcode, operands in instructions),
        shared=compiled.metadata.shared,
        clocks=sum(is_clock(opcode, operands) for _, opcode, operands in instructions),
        set_registers=sorted({int(n, 16) for n in re.findall(r"USETMAXREG\S* .*?0x([0-9a-f]+)", sass)}),
        loops=[describe_loop(loop) for loop in innermost_loops(instructions)],
    )


if __name__ == "__main__":
    for case in sys.argv[1:]:
        dtype, head_dim, mask, seq_q, seq_k, *kind = case.split(",")
        shape = getattr(torch, dtype), int(head_dim), mask == "causal"
        if kind in (["backward"], ["grouped"]):
            row = describe(compile_backward(*shape, int(seq_k), group=4 if kind == ["grouped"] else 1))
        else:
            tile, compiled = compile_case(*shape, int(seq_q), int(seq_k), kind == ["traced"])
            row = dict(tile=tile._asdict(), **describe(compiled))
        print(json.dumps(dict(case=case, **row)), flush=True)
