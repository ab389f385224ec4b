"""Checkpoints of every ZeRO stage and precision: exact in their own layout, converted into every other; and steps that are not finite.

On GPUs a few of them: ``checkpoint_grids.py``.
"""

import json
import math

import pytest
import torch

from tests.launching import deepspeed_run
from tests.training.checkpoint_grids import CPU_GRID, GPU_GRID
from training.checkpoints import set_aside
from training.manifest import complete_checkpoints

pytestmark = pytest.mark.xdist_group("checkpoints")  # its launches are shared by its tests

# Largest relative difference of loss and gradient norm: bits in fp32 sums, or what bf16 weights and gradients round.
WITHIN_FP32, WITHIN_BF16_STAGES, ACROSS_PRECISIONS = (1e-6, 2e-6), (2e-5, 5e-4), (1e-4, 2e-3)
BF16_STATES = (5e-4, 2e-2)  # whose weights are rounded to 8 bits in every step


@pytest.fixture(scope="module", params=["two CPU processes", pytest.param("one GPU", marks=pytest.mark.gpu),
                                        pytest.param("all GPUs", marks=pytest.mark.gpu(count=2))])
def seen(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "seen.json"
    processes = {"two CPU processes": 2, "one GPU": 1, "all GPUs": torch.cuda.device_count()}[request.param]
    done = deepspeed_run("tests/training/checkpoint_worker.py", out, processes=processes, gpus="GPU" in request.param)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture
def grid(request):
    return GPU_GRID if "GPU" in request.node.callspec.params["seen"] else CPU_GRID


def names(conversions):
    return {f"{before} {after}" for before, after in conversions}


def test_checkpoints_damaged_at_the_same_step_lie_side_by_side(tmp_path):
    for name in ("damaged", "damaged2", "damaged3"):
        (tmp_path / "step_00000012").mkdir()
        assert set_aside(tmp_path / "step_00000012") == f"step_00000012.{name}" and (tmp_path / f"step_00000012.{name}").is_dir()
    assert complete_checkpoints(tmp_path) == []


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(seen, grid):
    assert seen["same_layout"].keys() == set(grid.layouts)
    for layout, run in seen["same_layout"].items():
        assert run["resumed"]["rows"] == run["whole"], layout
        assert run["resumed"]["hashes"] == run["hashes"] and len(run["hashes"]) >= 2, layout
        # It doubles after two steps without overflow, wherever the run was stopped: saved after three.
        assert [scale for *_, scale in run["whole"]] == ([2048.0, 4096.0, 4096.0] if layout.startswith("fp16") else [None] * 3), layout


def test_layouts_load_into_each_other(seen, grid):
    assert seen["other_layouts"].keys() == names(grid.conversions)
    for conversion, run in seen["other_layouts"].items():
        (source, *_), (target, *_) = layouts = [layout.split("-") for layout in conversion.split()]
        expected = seen["other_layouts"]["-".join(layouts[0]) + " " + "-".join(layouts[0])]["rows"]
        bounds = (BF16_STATES if "states" in (source, target) else WITHIN_FP32 if source == target == "fp32"
                  else WITHIN_BF16_STAGES if source == target or {source, target} == {"bf16", "offload"} else ACROSS_PRECISIONS)
        for found, wanted in zip(run["rows"], expected, strict=True):
            assert found[0] == pytest.approx(wanted[0], rel=bounds[0]) and found[1] == pytest.approx(wanted[1], rel=bounds[1]), conversion
        assert run["adam_steps"] == [6.0], "each parameter group counts its own steps"
        assert run["weight_decays"] == [0.3, 0.0], conversion


def test_muons_checkpoints_resume_bit_for_bit_and_load_into_other_layouts(seen, grid):
    muon = seen["muon"]
    assert muon["same_layout"].keys() == set(grid.muon_layouts) and muon["other_layouts"].keys() == names(grid.muon_conversions)
    for layout, run in muon["same_layout"].items():
        assert run["resumed"]["rows"] == run["whole"] and run["resumed"]["hashes"] == run["hashes"], layout
    for conversion, run in muon["other_layouts"].items():
        expected = muon["same_layout"][conversion.split()[0]]["whole"]
        # bf16 in the orthogonalisation makes much of small differences.
        bounds = WITHIN_FP32 if conversion.startswith("fp32") else ACROSS_PRECISIONS
        for found, wanted in zip(run["rows"], expected, strict=True):
            assert found[0] == pytest.approx(wanted[0], rel=bounds[0]) and found[1] == pytest.approx(wanted[1], rel=bounds[1]), conversion
        assert run["adam_steps"] == [6.0] and run["weight_decays"] == [0.01, 0.3, 0.0], conversion
    assert "does not fit this configuration" in muon["adamw"] and "optimizer.name: muon -> adamw" in muon["adamw"]


def test_a_resumed_run_takes_its_hyperparameters_from_the_configuration(seen):
    assert seen["new_hyperparameters"] == [[0.5, 0.0], [1e-6, 1e-6], 0.25]


def test_other_settings_of_attention_are_told_and_other_positions_refused(seen):
    told = seen["other_settings"]
    prefix = "changed since the checkpoint: attention."
    assert told["same"] == told["older"] == []
    assert told["changed"] == [f"{prefix}document_mask: True -> False", f"{prefix}dropout: 0.1 -> 0.0", f"{prefix}window: 20 -> 12"]
    assert told["older changed"] == [f"{prefix}window: None -> 20"]
    assert "does not fit this configuration" in told["positions"] and "model.positions: learned -> alibi" in told["positions"]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(seen, grid):
    assert seen["not_finite"].keys() == set(grid.not_finite)
    for layout, run in seen["not_finite"].items():
        for rank in run["results"]:
            (loss, norm, applied, overflow), (finite_loss, second_norm, second_applied, second_overflow) = rank
            assert loss == "inf" and not applied and not second_applied, layout
            assert not overflow and second_overflow == layout.startswith("fp16"), "it is the gradients alone that the loss scale can help"
            assert math.isfinite(float(finite_loss)) and not math.isfinite(float(norm)) and not math.isfinite(float(second_norm)), layout
        if layout.startswith("fp16"):
            assert run["scales"] == [1024.0, 512.0]
            assert run["skipped"] == [pytest.approx(row, rel=1e-4) for row in run["undisturbed"]]  # another scale rounds the least numbers otherwise
        else:
            assert run["skipped"] == run["undisturbed"], f"{layout}: the skipped steps left a trace"


def test_every_stage_on_every_device_starts_from_the_same_weights(seen, grid):
    assert seen["initial_weights"] == {str(stage): True for stage in grid.stages}


def test_one_process_alone_reads_the_weights_of_every_layout(seen, grid):
    for layout, run in (seen["same_layout"] | seen["muon"]["same_layout"]).items():
        assert run["read_alone"], layout


def test_every_stage_starts_from_weights_that_come_from_elsewhere(seen, grid):
    told = seen["elsewhere"].pop("broken")
    assert seen["elsewhere"] == {str(stage): True for stage in grid.stages}
    assert "does not hold the weights that its config.json tells of: weights missing: transformer.wte.weight; unexpected: none" in told


def test_a_model_of_transformers_resumes_bit_for_bit_and_loads_into_another_layout(seen):
    run, other = (seen["of_transformers"][key] for key in ("same_layout", "bf16-1"))
    assert run["resumed"]["rows"] == run["whole"] and run["resumed"]["hashes"] == run["hashes"] and run["read_alone"]
    for found, wanted in zip(other["rows"], run["whole"], strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=WITHIN_BF16_STAGES[0]) and found[1] == pytest.approx(wanted[1], rel=WITHIN_BF16_STAGES[1])
    assert other["adam_steps"] == [6.0] and other["weight_decays"] == [0.3, 0.0]


def test_every_stage_trains_as_plain_pytorch_on_a_cpu(seen, grid):
    plain = seen["plain"]["plain"]
    assert seen["plain"]["stages"].keys() == {str(stage) for stage in grid.stages}
    for stage, run in seen["plain"]["stages"].items():
        assert run["losses"] == pytest.approx(plain["losses"], rel=1e-5), stage
        assert run["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-4), stage
