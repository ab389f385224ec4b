"""The table of capabilities: what is refused and how, what "auto" chooses, and that the table does not promise what the code cannot do."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import Case, check, check_dynamic_shapes, fresh_seed, run

from kernels.attention import BACKENDS, attention, choose, unsupported
from kernels.attention import flex as flex_backend
from kernels.attention.__main__ import table
from kernels.attention.backends import FEATURES, FLASH_ATTN
from kernels.attention.masks import Rules, document_bounds

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
def test_half_precision_on_a_recent_gpu_is_within_reach_of_every_backend(monkeypatch, backend):
    monkeypatch.setattr("kernels.attention.backends.FLASH_ATTN_VERSION", 2)
    assert unsupported(backend, **H100) is None and unsupported("auto", **H100) is None


def test_the_library_flash_attn_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("kernels.attention.backends.FLASH_ATTN_VERSION", None)
    needed = "needs one of the packages flash-attn-4, flash_attn_3, flash-attn, and none is installed (pip install flash-attn)"
    assert unsupported("flash_attn", **H100) == f"attention.backend=flash_attn {needed}; use triton or sdpa"


# A case for every feature of the table; `run` and `check` compare the output, all gradients and, with it, the log-sum-exp.
CELLS = {
    "grouped": dict(kv_heads=1),
    "unequal_causal": dict(seq_q=20, seq_k=37),
    "value_head_dim": dict(value_head_dim=32),
    "window": dict(window=(9, 4), causal=False),
    "document_ids": dict(documents=(20, 5, 15), batch=2),
    "cu_seqlens": dict(documents=(20, 5, 15), as_cu_seqlens=True),
    "alibi": dict(alibi=True),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=True),
    "dropout": dict(dropout_p=0.3),
    "return_lse": {},
    "deterministic": dict(deterministic=True),
}


def check_cell(backend: str, feature: str, device: str, dtype: torch.dtype) -> None:
    """What the table says about this backend and feature is so: it computes the function, or refuses, and says which backend can."""
    case = Case(**dict(seq_q=40, seq_k=40, head_dim=64, device=device, dtype=dtype) | CELLS[feature])
    with_lse = feature == "return_lse"
    if feature in BACKENDS[backend].features:
        check(backend, case, with_lse=with_lse)
        if feature == "deterministic":
            tensors = case.tensors(fresh_seed())[:4]
            first, second = (run(backend, case, *tensors) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
    else:
        with pytest.raises(ValueError, match=f"attention.backend={backend} .*; use (triton|sdpa|flex|tiled)"):
            run(backend, case, *case.tensors(fresh_seed())[: 5 if with_lse else 4])


def test_every_feature_of_the_table_has_a_case():
    assert CELLS.keys() == FEATURES.keys()


@pytest.mark.parametrize("feature", CELLS)
@pytest.mark.parametrize("backend", [name for name, can in BACKENDS.items() if "cpu" in can.devices])
def test_every_cell_of_the_table_on_the_cpu(backend, feature):
    check_cell(backend, feature, "cpu", torch.float32)


def test_every_cell_of_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "on_the_cpu and triton"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and f"{len(CELLS)} passed" in result.stdout, result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("feature", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cell_of_the_table_on_a_gpu(backend, feature):
    asked = H100 | dict(compute_capability=torch.cuda.get_device_capability())
    if reason := unsupported(backend, **asked):  # this GPU, or what is installed here
        with pytest.raises(ValueError) as refusal:
            attention(*torch.zeros(3, 1, 4, 2, 64, device="cuda", dtype=torch.bfloat16), backend=backend)
        assert str(refusal.value) == reason
    else:
        check_cell(backend, feature, "cuda", torch.bfloat16)


@pytest.mark.parametrize("feature", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cell_of_the_table_decides_what_is_refused(monkeypatch, backend, feature):
    monkeypatch.setattr("kernels.attention.backends.FLASH_ATTN_VERSION", 2)
    monkeypatch.setitem(BACKENDS, "flash_attn", FLASH_ATTN[2])
    asked = {"value_head_dim": 128} if feature == "value_head_dim" else {feature: True}
    reason = unsupported(backend, **H100, **asked)
    if feature in BACKENDS[backend].features:
        assert reason is None
    else:
        assert reason.startswith(f"attention.backend={backend} {FEATURES[feature][1]}; use triton or ")
    assert choose(**H100, **asked)[0] == ("hopper" if feature in BACKENDS["hopper"].features else "triton")


def test_the_table_is_printed_with_a_column_a_backend_and_a_row_a_feature():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table().splitlines()]
    assert {name for name in lines[0] if name} == BACKENDS.keys() - {"flash_attn"} | {f"flash_attn {n}" for n in FLASH_ATTN}
    rows = {line[0]: dict(zip(lines[0], line)) for line in lines}
    assert rows["dropout"]["triton"] == "yes" and rows["dropout"]["flex"] == "" and rows["ALiBi"]["flash_attn 2"] == "yes"
    assert rows["head_dim"]["hopper"] == "64, 128" and rows["head_dim"]["sdpa_cudnn"] == "8 to 128, multiples of 8"
    assert len(lines) == 6 + len(FEATURES)


def test_the_readme_shows_the_table():
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8"), "put what python -m kernels.attention prints into the README"


def test_python_m_prints_the_table_and_what_auto_chooses_here():
    printed = subprocess.run([sys.executable, "-m", "kernels.attention"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.startswith(table()) and "auto, bf16, head_dim 64: " in printed


@pytest.mark.parametrize("feature", [name for name in CELLS if name not in ("dropout", "return_lse", "deterministic")])
def test_rules_for_flex_attention_give_the_function(monkeypatch, feature):
    """On the CPU FlexAttention has no gradients: its output and log-sum-exp, uncompiled."""
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["eager"])
    case = Case(**dict(seq_q=40, seq_k=40, head_dim=16, heads=2) | CELLS[feature])
    q, k, v, *_ = case.tensors(fresh_seed())
    with torch.no_grad():
        results = [attention(q, k, v, **case.features(), backend=backend, return_lse=True) for backend in ("flex", "eager")]
    torch.testing.assert_close(*results)


def test_flex_attentions_block_masks_are_kept():
    rules = Rules(1.0, 0, right=0)
    assert flex_backend._block_mask(rules, 1, 256, 256, torch.device("cpu")) is flex_backend._block_mask(rules, 1, 256, 256, torch.device("cpu"))
    ids = torch.arange(256, dtype=torch.int32)[None] // 100
    masks = []
    for given in (ids, ids, ids.clone()):
        rules = Rules(1.0, 0, None, 0, *document_bounds(given, None, 256))
        masks.append(flex_backend._block_mask(rules, 1, 256, 256, torch.device("cpu")))
    assert masks[0] is masks[1] and masks[0] is not masks[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=0), "a window of 0 keys sees nothing"),
        (dict(window=(-1, 0)), "each 0 or more, or None without an end, got"),
        (dict(softcap=0.0), "softcap must be above 0 and finite, got 0.0"),
        (dict(dropout_p=1.0), "dropout_p must be from 0 to below 1, got 1.0"),
        (dict(sinks=torch.zeros(3)), r"sinks must be one floating-point number a query head, \[2\] on cpu, got float32 \[3\]"),
        (dict(alibi_slopes=torch.zeros(3)), r"alibi_slopes must be float32 \[2\] or \[1, 2\] on cpu, got float32 \[3\]"),
        (dict(alibi_slopes=torch.zeros(2, requires_grad=True)), "alibi_slopes get no gradient"),
        (dict(document_ids=torch.zeros(1, 4)), r"document_ids must be int32 \[1, 4\] on cpu, got float32"),
        (dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)), r"cu_seqlens must rise from 0 to seq 4, got \[0, 3\]"),
        (dict(cu_seqlens=torch.tensor([0, 4])), r"cu_seqlens must be int32 .* got int64 \[2\] on cpu and batch 1"),
        (
            dict(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), document_ids=torch.zeros(1, 4, dtype=torch.int32)),
            "document_ids and cu_seqlens say the same thing",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    q = torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, **options)


def test_documents_need_as_many_queries_as_keys():
    q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 5, 2, 16)
    with pytest.raises(ValueError, match="documents need as many queries as keys, got 4 and 5"):
        attention(q, k, k, document_ids=torch.zeros(1, 4, dtype=torch.int32))


def test_compiles_with_every_feature_and_no_graph_break():
    case = Case(24, 24, window=9, documents=(10, 14), alibi=True, softcap=2.0, sinks=True)
    q, k, v, *_ = case.tensors(fresh_seed())
    options = case.features()

    def attend(q, k, v, ids, slopes, sinks):
        features = dict(document_ids=ids, alibi_slopes=slopes, sinks=sinks)
        return attention(q, k, v, window=9, softcap=2.0, backend="tiled", **features)

    tensors = q, k, v, options["document_ids"], options["alibi_slopes"], options["sinks"]
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors), attend(*tensors))


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
        (([1, 4, 2, 16], [1, 4, 2, 16], [1, 5, 2, 16]), "k and v in all dimensions but the last"),
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
