"""What ``checkpoint_worker.py`` goes through and ``test_checkpoints.py`` expects of it: everything on CPUs, on GPUs what only they can show.

A layout is named by its mode, which sets precision and the place of optimizer states, and its ZeRO stage: "bf16-3".
"""

import itertools
from typing import NamedTuple

MODES = {
    "fp32": ["train.precision=fp32"], "bf16": ["train.precision=bf16"], "fp16": ["train.precision=fp16", "train.loss_scale_window=2"],
    "offload": ["train.precision=bf16", "zero.offload_optimizer=cpu"], "states": ["train.precision=bf16", "train.bf16_states=true"],
}  # fmt: skip


class Grid(NamedTuple):
    layouts: list[str]  # saved, and resumed in the same layout; with fp32-2, whose checkpoint other parts read
    conversions: list[tuple[str, str]]  # from those layouts; with each source into its own, which the others are compared with
    muon_layouts: list[str]  # with fp32-2 again
    muon_conversions: list[tuple[str, str]]
    not_finite: list[str]
    stages: list[int]  # that start from the weights, and train as, a model without DeepSpeed, in fp32


STAGE_AND_PRECISION = [f"{mode}-{stage}" for stage, mode in itertools.product(range(4), ("fp32", "bf16"))]
OTHER_MODES = [f"{mode}-{stage}" for stage, mode in itertools.product((2, 3), ("fp16", "offload", "states"))]
CPU_GRID = Grid(
    layouts=[*STAGE_AND_PRECISION, *OTHER_MODES],
    conversions=[
        *((before, after) for before, after in itertools.product(STAGE_AND_PRECISION, repeat=2) if before[:4] == after[:4] or before[-1] == after[-1]),
        *((layout, layout) for layout in OTHER_MODES),
        ("bf16-0", "offload-3"), ("bf16-1", "offload-1"), ("bf16-2", "offload-2"), ("offload-2", "bf16-3"), ("offload-2", "offload-3"),
        ("offload-3", "bf16-0"), ("offload-3", "fp16-2"), ("bf16-3", "fp16-3"), ("fp16-2", "bf16-1"), ("fp16-2", "fp16-3"), ("fp16-3", "fp32-2"),
        ("bf16-3", "states-3"), ("states-2", "states-3"), ("states-2", "bf16-2"), ("states-3", "offload-2"),
    ],
    muon_layouts=["fp32-0", "fp32-2", "fp32-3", "bf16-0", "bf16-1", "fp16-3", "states-2"],
    muon_conversions=[("fp32-0", "fp32-3"), ("fp32-3", "fp32-2"), ("fp32-2", "fp32-0"), ("bf16-1", "bf16-3"), ("bf16-0", "bf16-1"),
                      ("fp16-3", "fp16-2"), ("states-2", "states-3")],
    not_finite=[*STAGE_AND_PRECISION, *OTHER_MODES],
    stages=[0, 1, 2, 3],
)  # fmt: skip
# An engine takes a second or two of GPU time, nearly all of it the CPU's; and it is the CPU that converts layouts, whatever they were saved on.
GPU_GRID = Grid(
    layouts=["fp32-0", "fp32-2", "bf16-3", "fp16-2", "offload-3", "states-2"],
    conversions=[
        *((layout, layout) for layout in ("fp32-0", "bf16-3", "fp16-2", "offload-3")),
        ("fp32-0", "fp32-3"), ("bf16-3", "offload-3"), ("offload-3", "bf16-0"), ("fp16-2", "bf16-1"), ("bf16-3", "states-3"),
    ],
    muon_layouts=["fp32-2", "fp16-3"],
    muon_conversions=[("fp16-3", "fp16-2")],
    not_finite=["fp16-2", "offload-3"],
    stages=[0, 3],
)  # fmt: skip
