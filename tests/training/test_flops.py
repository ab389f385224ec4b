import pytest

from training.flops import attention_pairs, compute_capability, hardware_flops_per_token, known_gpus, model_flops_per_token, peak_flops

# GPT-2 124M at 1024 tokens, by hand. Parameters that multiply every token: 12 blocks of 12 * 768^2 weights, 13 * 768 biases and norm
# entries, the final norm (2 * 768), and the tied embedding padded to 50304 rows.
BLOCKS = 12 * (12 * 768**2 + 13 * 768)
GPT2 = {"matmul_parameters": BLOCKS + 2 * 768 + 50304 * 768, "layers": 12, "attention_width": 768, "sequence_length": 1024}


def test_gpt2_124m_by_hand():
    assert GPT2["matmul_parameters"] == 123_689_472
    assert model_flops_per_token(**GPT2) == 6 * 123_689_472 + 113_246_208 == 855_383_040


def test_mfu_of_a_known_speed():
    # 570,000 tokens/s on a GPU of 989 TFLOP/s: 570e3 * 855.38304e6 = 487.568e12.
    mfu = 570e3 * model_flops_per_token(**GPT2) / peak_flops("NVIDIA H200", "bf16")
    assert mfu == pytest.approx(0.49299, abs=1e-5)


def test_full_checkpointing_adds_one_forward_of_the_blocks():
    plain = hardware_flops_per_token(**GPT2, recomputed_parameters=0, recomputed_layers=0)
    full = hardware_flops_per_token(**GPT2, recomputed_parameters=BLOCKS, recomputed_layers=12)
    assert plain == model_flops_per_token(**GPT2)
    # Blocks: 85,054,464 parameters twice, and a third of the attention term.
    assert full - plain == 2 * 85_054_464 + 113_246_208 // 3


@pytest.mark.parametrize("window", [None, 1, 2, 7, 15, 16, 40])
def test_a_window_leaves_the_pairs_less_than_it_apart(window):
    assert attention_pairs(16, window) == sum(abs(query - key) < (window or 16) for query in range(16) for key in range(16))
    visible = sum(0 <= query - key < (window or 16) for query in range(16) for key in range(16))
    assert attention_pairs(16, window) == 2 * visible - 16


def test_the_causal_discount_counts_visible_pairs_alone():
    # 1024 * 1025 / 2 pairs are visible, 512.5 a token, of the 1024 that count otherwise.
    assert model_flops_per_token(**GPT2) - model_flops_per_token(**GPT2, causal_discount=True) == 12 * 12 * 768 * (1024 - 512.5)
    # 256 keys: 256 * 1024 less the 255 * 256 / 2 that the first queries lack.
    visible = 256 * 1024 - 255 * 128
    assert model_flops_per_token(**GPT2, window=256, causal_discount=True) == 6 * 123_689_472 + 12 * 12 * 768 * visible // 1024


def test_flops_fall_with_the_window():
    # 1,024 positions, 256 keys: 1024^2 - 768 * 769 = 457,984 pairs, 447.25 a token.
    fall = 12 * 768 * (1024 - 447.25)
    assert model_flops_per_token(**GPT2) - model_flops_per_token(**GPT2, window=256) == 12 * fall
    full = {**GPT2, "recomputed_parameters": BLOCKS, "recomputed_layers": 12}
    assert hardware_flops_per_token(**full) - hardware_flops_per_token(**full, window=256) == 16 * fall


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
    ],
)
def test_peak_by_device_name(name, bf16, fp32):
    assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == pytest.approx(bf16)
    assert peak_flops(name, "fp32") == pytest.approx(fp32)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "AMD EPYC 9654",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    ],
)
def test_peak_is_never_guessed(name):
    assert peak_flops(name, "bf16") is None
    assert compute_capability(name) is None


@pytest.mark.parametrize("name, capability", [
    ("NVIDIA A100-SXM4-80GB", (8, 0)), ("NVIDIA A30", (8, 0)), ("NVIDIA A10G", (8, 6)), ("NVIDIA GeForce RTX 3090", (8, 6)), ("NVIDIA L40S", (8, 9)),
    ("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA H200", (9, 0)), ("NVIDIA GH200 480GB", (9, 0)), ("NVIDIA B200", (10, 0)), ("NVIDIA GeForce RTX 5090", (12, 0))])
def test_compute_capability_by_device_name(name, capability):
    assert compute_capability(name) == capability


@pytest.mark.parametrize("alternatives", known_gpus())
def test_every_device_whose_peak_is_known_has_a_capability(alternatives):
    for name in ("A100-SXM4-40GB", "A100 80GB PCIe", "GH200 480GB", "GH200 144G HBM3e") if "|" in alternatives else (alternatives,):
        assert compute_capability(name)
