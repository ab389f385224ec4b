"""The table of capabilities: what is refused and how, what "auto" chooses, and that the table does not promise what the code cannot do."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import Case, check_dynamic_shapes, fresh_seed, run

from kernels.attention import BACKENDS, attention, choose, unsupported

ROOT = Path(__file__).parents[2]
H100 = dict(device_type="cuda", dtype=torch.bfloat16, head_dim=64, compute_capability=(9, 0))
CPU = dict(device_type="cpu", dtype=torch.float32, head_dim=64)


@pytest.fixture(autouse=True)
def tested_triton(monkeypatch):
    monkeypatch.setattr("kernels.attention.backends.TRITON_VERSION", "3.6.0")


def test_auto_takes_our_kernels_on_ampere_and_newer_and_pytorchs_elsewhere():
    assert choose(**H100)[0] == "hopper"
    for asked, reason in (
        (dict(compute_capability=(8, 0)), "hopper needs compute capability 9.0, and this GPU has 8.0"),
        (dict(compute_capability=(10, 0)), "hopper needs compute capability 9.0, and this GPU has 10.0"),
        (dict(compute_capability=None), "hopper needs a GPU that is known"),
        (dict(head_dim=96), "hopper needs head_dim from 64 to 128, a multiple of 64, not 96"),
        (dict(dtype=torch.float32), "hopper needs float16 or bfloat16, not float32"),
    ):
        assert choose(**H100 | asked) == ("triton", f"our portable kernel, because {reason}")
    assert choose(**CPU)[0] == "sdpa"
    for asked in (dict(compute_capability=(7, 5)), dict(head_dim=512), dict(dtype=torch.float64)):
        backend, why = choose(**H100 | asked)
        assert backend == "sdpa" and unsupported("triton", **H100 | asked).split(";")[0] in why


def test_auto_takes_a_backend_that_returns_the_log_sum_exp_when_that_is_asked():
    assert choose(**CPU, return_lse=True)[0] == "tiled"
    assert choose(**H100, return_lse=True)[0] == "hopper"
    assert choose(**H100 | dict(head_dim=80), return_lse=True)[0] == "triton"


def test_hopper_is_refused_with_a_triton_that_it_was_not_tested_with(monkeypatch):
    monkeypatch.setattr("kernels.attention.backends.TRITON_VERSION", "3.9.0")
    assert choose(**H100) == ("triton", "our portable kernel, because hopper needs triton 3.6.0, and 3.9.0 is installed")
    reason = unsupported("hopper", **H100)
    assert reason == "attention.backend=hopper needs triton 3.6.0, and 3.9.0 is installed; use triton or sdpa"


@pytest.mark.parametrize(
    "backend, asked, reason",
    [
        ("sdpa_flash", H100 | dict(dtype=torch.float32), "sdpa_flash needs float16 or bfloat16, not float32; use triton or sdpa"),
        ("sdpa_flash", CPU, "attention.backend=sdpa_flash runs on cuda, not on cpu; use sdpa or tiled"),
        ("sdpa_flash", H100 | dict(compute_capability=(8, 9), head_dim=224), "no gradients for head_dim 224 on"),
        ("sdpa_cudnn", H100 | dict(head_dim=256), "needs head_dim from 8 to 128, a multiple of 8, not 256"),
        ("sdpa_cudnn", H100 | dict(unequal_causal=True), "needs queries and keys of the same length when causal"),
        ("sdpa_efficient", H100 | dict(grouped=True), "needs as many key heads as query heads"),
        ("sdpa", CPU | dict(return_lse=True), "attention.backend=sdpa does not return the log-sum-exp; use tiled or eager"),
        ("triton", H100 | dict(head_dim=8), "needs head_dim from 16 to 256, not 8; use sdpa or tiled"),
        ("triton", H100 | dict(compute_capability=(7, 5)), "needs compute capability 8.0, and this GPU has 7.5; use sdpa or tiled"),
        ("triton", CPU, "TRITON_INTERPRET=1"),
        ("hopper", CPU, "attention.backend=hopper runs on cuda, not on cpu; use sdpa or tiled"),
        ("hopper", H100 | dict(compute_capability=(12, 0)), "needs compute capability 9.0, and this GPU has 12.0; use triton or sdpa"),
        ("flash", CPU, "attention.backend=flash is not known; choose one of auto, eager, tiled, sdpa"),
    ],
)
def test_a_refusal_names_the_reason_and_the_remedy(backend, asked, reason):
    assert reason in unsupported(backend, **asked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_on_a_recent_gpu_is_within_reach_of_every_backend(backend):
    assert unsupported(backend, **H100) is None and unsupported("auto", **H100) is None


def test_pytorchs_flash_kernel_has_gradients_for_the_other_head_dims():
    for capability, head_dim in (((8, 9), 192), ((8, 9), 256), ((12, 0), 256), ((9, 0), 224)):
        assert unsupported("sdpa_flash", **H100 | dict(compute_capability=capability, head_dim=head_dim)) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_refuses_what_the_table_refuses_and_computes_the_rest(backend):
    q = torch.randn(1, 4, 2, 64)
    for return_lse in (False, True):
        if reason := unsupported(backend, **CPU, return_lse=return_lse):
            with pytest.raises(ValueError) as refusal:
                attention(q, q, q, backend=backend, return_lse=return_lse)
            assert str(refusal.value) == reason
        else:
            out = attention(q, q, q, backend=backend, return_lse=return_lse)
            assert (out[0] if return_lse else out).shape == q.shape


@pytest.mark.parametrize(
    "shapes, message",
    [
        (([4, 2, 16],) * 3, "batch, seq, heads, head_dim"),
        (([1, 4, 2, 16], [1, 4, 2, 8], [1, 4, 2, 8]), "agree in batch and head_dim"),
        (([1, 4, 2, 16], [2, 4, 2, 16], [2, 4, 2, 16]), "agree in batch and head_dim"),
        (([1, 4, 2, 16], [1, 4, 2, 16], [1, 5, 2, 16]), "k and v in all dimensions"),
        (([1, 4, 3, 16], [1, 4, 2, 16], [1, 4, 2, 16]), "multiple of the number of key heads"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes))


def test_a_head_dim_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"head_dim must be above 0, got q \[1, 4, 2, 0\]"):
        attention(*(torch.zeros(1, 4, 2, 0) for _ in "qkv"))


def test_mixed_dtypes_and_a_scale_of_zero_or_infinity_are_refused():
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="share dtype and device, got torch.float32"):
        attention(q, q.half(), q)
    with pytest.raises(ValueError, match="scale must be above 0"):
        attention(q, q, q, scale=0.0)
    with pytest.raises(ValueError, match="scale must be above 0 and finite, got inf"):
        attention(q, q, q, scale=math.inf)


@pytest.mark.parametrize("backend", ["eager", "tiled", "sdpa"])
def test_autocast_does_not_change_the_result(backend):
    tensors = Case(20, 20).tensors(fresh_seed())[:4]
    expected = run(backend, Case(20, 20), *tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*tensors[:3], backend=backend)
    assert torch.equal(out, expected["out"])


def test_compiles_with_dynamic_shapes():
    check_dynamic_shapes("sdpa", Case(18, 18), compiler="aot_eager")


def test_compiles_under_autocast():
    q, k, v, *_ = Case(18, 18).tensors(fresh_seed())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v))


def test_triton_is_interpreted_where_triton_says_so():
    program = """if True:
        import importlib, os
        from kernels.attention import backends
        from triton import knobs
        for value in ("1", "true", "ON", "Yes", "y", "0", "", "2"):
            os.environ["TRITON_INTERPRET"] = value
            assert importlib.reload(backends).INTERPRETED == knobs.runtime.interpret, value
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_interpreter_is_never_chosen_and_takes_no_bfloat16_on_any_device(monkeypatch):
    monkeypatch.setattr("kernels.attention.backends.INTERPRETED", True)
    assert "wrong in bfloat16 under TRITON_INTERPRET" in unsupported("triton", **H100)
    assert "hopper cannot run under TRITON_INTERPRET=1" in unsupported("hopper", **H100)
    assert unsupported("triton", **H100 | dict(dtype=torch.float16)) is None
    backend, why = choose(**H100 | dict(dtype=torch.float16))
    assert backend == "sdpa" and "TRITON_INTERPRET" in why


def test_triton_is_not_imported_before_it_is_used():
    program = """if True:
        import sys, torch
        from kernels.attention import attention
        x = torch.zeros(1, 2, 1, 16)
        attention(x, x, x)
        assert not {"kernels.attention.triton_forward", "kernels.attention.hopper_forward"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("kernels.attention.backends.TRITON_INSTALLED", False)
    assert "needs the package triton, which is not installed; use sdpa or tiled" in unsupported("triton", **H100)
    assert "needs the package triton, which is not installed; use sdpa or tiled" in unsupported("hopper", **H100)
    assert choose(**H100)[0] == "sdpa"
