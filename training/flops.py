"""FLOPs a token costs and the peak FLOP/s of the GPU: the two numbers behind MFU and HFU.

    MFU = model_flops_per_token    * tokens_per_second_per_gpu / peak_flops
    HFU = hardware_flops_per_token * tokens_per_second_per_gpu / peak_flops

MFU counts what the model's mathematics needs, HFU also what activation checkpointing computes twice (PaLM, arXiv:2204.02311,
appendix B). A multiply-add is two FLOPs. What the causal mask skips counts as computed, so that figures compare with published ones, and
so do pairs of tokens of different documents (attention.document_mask), whose number the data decides: skipping either raises MFU. With
``causal_discount`` only pairs that the causal mask shows count, about half of them.
"""

import re
from typing import Literal


def model_flops_per_token(
    *, matmul_parameters: int, layers: int, attention_width: int, sequence_length: int, window: int | None = None, causal_discount: bool = False
) -> int:
    """FLOPs of one forward and backward pass, per token: 6 N + 12 L (H Q) S (PaLM, appendix B), with a window less of S.

    matmul_parameters: N, the parameters that multiply every token. A learned position table is left out, and so is the input
        embedding unless it is tied to the output projection.
    attention_width: query heads * head_dim (H Q).
    sequence_length: S, in tokens.
    window: keys that a query sees, its own the last; None: all before it. See `attention_pairs`.
    causal_discount: count the visible pairs alone.
    """
    pairs = attention_pairs(sequence_length, window)
    if causal_discount:
        pairs = (pairs + sequence_length) // 2
    return 6 * matmul_parameters + 12 * layers * attention_width * pairs // sequence_length


def attention_pairs(sequence_length: int, window: int | None = None) -> int:
    """Pairs of query and key that attention's FLOPs are counted by: S^2, or those less than `window` positions apart.

    On both sides of the diagonal, as the S^2 of PaLM's formula: one side is what the causal mask skips. Exactly 2 V - S, where V pairs
    are visible.
    """
    beyond = 0 if window is None else max(0, sequence_length - window)
    return sequence_length**2 - beyond * (beyond + 1)


def hardware_flops_per_token(
    *,
    matmul_parameters: int,
    recomputed_parameters: int,
    recomputed_layers: int,
    layers: int,
    attention_width: int,
    sequence_length: int,
    window: int | None = None,
) -> int:
    """`model_flops_per_token` plus what activation checkpointing computes again; the arguments that they share mean the same.

    2 FLOPs a recomputed parameter, and 4 (H Q) S a recomputed layer of attention, with a window less of S. The output projection is not
    recomputed. What a fused attention backward recomputes inside the kernel is not counted.

    recomputed_parameters: the part of matmul_parameters that checkpointed blocks multiply again.
    recomputed_layers: those whose attention is computed again. See `model.gpt.count_recomputed` for both.
    """
    flops = model_flops_per_token(
        matmul_parameters=matmul_parameters, layers=layers, attention_width=attention_width, sequence_length=sequence_length, window=window
    )
    attention = 4 * recomputed_layers * attention_width * attention_pairs(sequence_length, window) // sequence_length
    return flops + 2 * recomputed_parameters + attention


# Device name as the CUDA driver reports it, without "NVIDIA" and "GeForce" -> dense TFLOP/s in (bf16, fp32), and NVIDIA's document
# that says so. bf16, and fp16 alike: tensor cores accumulating in fp32; a document that gives the sparse figure alone is halved. fp32: CUDA cores, no TF32.
# The pattern must match the whole name: laptop, "D", "SUPER" and MIG variants are other, slower devices.
_PEAK_TFLOPS = (
    (r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe", 312, 19.5, "A100 Tensor Core GPU datasheet"),
    (r"A30", 165, 10.3, "A30 Tensor Core GPU datasheet"),
    (r"A10", 125, 31.2, "A10 Tensor Core GPU datasheet"),
    (r"A10G", 70, 35, "A10G datasheet"),
    (r"A40", 149.7, 37.4, "A40 datasheet"),
    (r"RTX A6000", 154.8, 38.7, "Ampere GA102 architecture whitepaper, RTX A6000"),
    (r"RTX 3090", 71, 35.6, "Ampere GA102 architecture whitepaper, RTX 3090"),
    (r"L4", 121, 30.3, "L4 Tensor Core GPU datasheet (bf16 242 sparse)"),
    (r"L40", 181, 90.5, "L40 datasheet"),
    (r"L40S", 362, 91.6, "L40S datasheet"),
    (r"RTX 6000 Ada Generation", 364.2, 91.1, "RTX 6000 Ada Generation datasheet (fp8 1457 sparse, bf16 a quarter)"),
    (r"RTX 4090", 165.2, 82.6, "Ada GPU architecture whitepaper, RTX 4090"),
    (r"RTX 5090", 209.5, 104.8, "RTX Blackwell GPU architecture whitepaper, RTX 5090"),
    (r"H100 80GB HBM3", 989, 67, "H100 Tensor Core GPU datasheet, SXM (bf16 1979 sparse)"),
    (r"H100 PCIe", 756, 51, "H100 Tensor Core GPU datasheet, PCIe (bf16 1513 sparse)"),
    (r"H100 NVL", 835, 60, "H100 Tensor Core GPU datasheet, NVL (bf16 1671 sparse)"),
    (r"H200", 989, 67, "H200 Tensor Core GPU datasheet, SXM (bf16 1979 sparse)"),
    (r"H200 NVL", 835, 60, "H200 Tensor Core GPU datasheet, NVL (bf16 1671 sparse)"),
    (r"GH200 (120|480)GB|GH200 144G HBM3e", 989, 67, "GH200 Grace Hopper Superchip datasheet (bf16 1979 sparse)"),
    (r"B200", 2250, 75, "Blackwell datasheet, HGX B200 (bf16 4500 sparse)"),
    (r"GB200", 2500, 80, "Blackwell datasheet, GB200 NVL72 (bf16 5000 sparse)"),
)


# Device name, as above -> compute capability; NVIDIA's list of CUDA GPUs.
_CAPABILITIES = (
    (r"A100.*|A30", (8, 0)),
    (r"A10|A10G|A40|RTX A6000|RTX 3090", (8, 6)),
    (r"L4|L40|L40S|RTX 6000 Ada Generation|RTX 4090", (8, 9)),
    (r"G?H[12]00.*", (9, 0)),
    (r"G?B200", (10, 0)),
    (r"RTX 5090", (12, 0)),
)


def known_gpus() -> list[str]:
    """Patterns of the device names whose peak is known."""
    return [pattern for pattern, *_ in _PEAK_TFLOPS]


def compute_capability(device_name: str) -> tuple[int, int] | None:
    """Compute capability of a device whose peak is known; None for others."""
    if peak_flops(device_name, "fp32") is None:
        return None
    return next(capability for pattern, capability in _CAPABILITIES if re.fullmatch(pattern, _plain(device_name)))


def _plain(device_name: str) -> str:
    return re.sub(r"^GeForce ", "", re.sub(r"^NVIDIA ", "", device_name.strip()))


def peak_flops(device_name: str, precision: Literal["bf16", "fp16", "fp32"]) -> float | None:
    """Dense peak in FLOP/s of one GPU; None for a CPU or a device the table does not know: MFU is then null, never guessed.

    device_name: as `torch.cuda.get_device_name()` gives it.
    """
    name = _plain(device_name)
    for pattern, bf16, fp32, _source in _PEAK_TFLOPS:
        if re.fullmatch(pattern, name):
            return {"bf16": bf16, "fp16": bf16, "fp32": fp32}[precision] * 1e12
    return None
