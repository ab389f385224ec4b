"""ZeRO on two processes: every backend, checkpointing mode, stage and precision trains as plain PyTorch on one process does."""

import json
import math

import pytest

from tests.launching import deepspeed_run


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("zero") / "seen.json"
    done = deepspeed_run("tests/training/zero_worker.py", out, TRITON_INTERPRET="1", TORCHINDUCTOR_CACHE_DIR=str(out.parent / "compiled"))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def assert_same_training(found, expected, relative=2e-6, name=""):
    assert found["losses"] == pytest.approx(expected["losses"], rel=relative), name
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2 * relative), name


def test_every_combination_of_modes_trains_as_plain_pytorch(seen):
    assert len(seen["grid"]) == 7 * 8 + 7 + 8 + 7
    for name, cell in seen["grid"].items():
        expected = seen["plain_two_rows" if "triton" in name else "plain"]
        assert_same_training(cell, expected, relative=2e-6 if name.startswith("fp32") else 1e-3, name=name)
    assert seen["plain"]["losses"][0] != seen["plain"]["losses"][-1]


def test_llama_dialect_trains_as_plain_pytorch(seen):
    assert_same_training(seen["llama"], seen["plain_llama"])


def test_windows_documents_and_alibi_train_as_plain_pytorch(seen):
    for run in seen["features"]:
        assert_same_training(run, seen["plain_features"])


def test_every_layer_is_given_the_same_tensor_of_documents(seen):
    """DeepSpeed's stage 3 hands modules copies of positional tensors; each would be looked through anew."""
    assert seen["documents_of_the_layers"] == [True, True]


def test_loss_is_normalised_by_the_targets_of_the_global_batch(seen):
    """Labels are ignored unevenly, so that a mean over micro batches or ranks would differ, and differs: by far more than training may."""
    assert seen["plain_ignored"]["losses"][0] != pytest.approx(seen["plain"]["losses"][0], rel=1e-5)
    for means in seen["means_of_means"].values():  # of the 2 ranks; of their micro batches; of the rows, which are documents of unequal length
        for step in range(3):
            assert means["losses"][step] != pytest.approx(seen["plain_ignored"]["losses"][step], rel=2e-5)
            assert means["grad_norms"][step] != pytest.approx(seen["plain_ignored"]["grad_norms"][step], rel=1e-2)
    for run in seen["accumulated"].values():
        assert_same_training(run, seen["plain_ignored"])


def test_a_parameter_without_a_part_in_a_loss_counts_with_zeros(seen):
    """On one rank alone, and on all after a step in which it had one: nobody waits for its gradient, and no old one is added."""
    for run in seen["without_a_part"].values():
        assert_same_training(run, seen["without_a_part_plainly"])


def test_sums_of_gradients_are_waited_for_however_late_they_are(seen):
    assert seen["sums_put_off"]["sums"] > 3 * 2
    assert_same_training(seen["sums_put_off"], seen["plain"])


def test_parameters_that_stay_are_gathered_again_when_something_has_let_go_of_them(seen):
    found = seen["let_go_of_between_steps"]
    assert_same_training(found, seen["plain"])
    assert found["hooks"] == 1, "nothing is done around modules but at the model's call"


def test_a_step_asks_the_gpu_for_nothing(seen):
    """The norm is a number that Python has when it is read, and whether the step was taken the GPU alone knows."""
    for asked in seen["asked_in_a_step"]:
        assert asked["within"] == 0 and asked["after"] == asked["read"] > 0


def test_bf16_agrees_over_the_stages_and_with_fp32(seen):
    for stage in "12":
        assert_same_training(seen["bf16"][stage], seen["bf16"]["3"])
    assert_same_training(seen["bf16"]["0"], seen["bf16"]["3"], relative=2e-4)  # DeepSpeed adds gradients up in bf16 at stage 0
    assert_same_training(seen["bf16"]["3"], seen["plain"], relative=1e-3)


def test_long_contexts_train_as_plain_pytorch(seen):
    """Two processes that share sequences, tiles, block inputs in the host's memory, in combinations with backends, stages, features and heads."""
    seen_long = seen["long_contexts"]
    assert sum(map(len, seen_long["cells"].values())) == 15
    for expected, cells in seen_long["cells"].items():
        for name, cell in cells.items():
            assert_same_training(cell, seen_long.get(expected) or seen[expected], name=name)
    assert_same_training(seen_long["bf16"], seen["plain"], relative=1e-3)


def test_muon_trains_as_torchs_muon_and_adamw_do_on_one_process(seen):
    """Grouped queries and SwiGLU: queries, keys and values, and gate and value, are matrices of their own, of other sizes."""
    muon = seen["muon"]
    assert len(muon["fp32"]) == 5
    for run in muon["fp32"].values():
        assert_same_training(run, muon["plain"])
        assert run["furthest"] < 2e-5
    assert_same_training(muon["bf16"]["1"], muon["bf16"]["3"])
    for run in (*muon["bf16"].values(), muon["bf16_states"]):
        assert_same_training(run, muon["plain"], relative=5e-3)
    assert muon["plain"]["losses"][1] != pytest.approx(seen["plain_llama"]["losses"][1], rel=1e-4), "not AdamW's"


def test_compiled_blocks_train_as_plain_pytorch_in_one_graph(seen):
    """Inductor's code, and in the other modes what it is made from; one graph for all layers, and no break in it."""
    compiled = seen["compiled"]
    assert_same_training(compiled["inductor"]["plain"], seen["plain"])
    assert compiled["inductor"]["graphs"]["stats"]["unique_graphs"] == 1 and not compiled["inductor"]["graphs"]["graph_break"]
    assert len(compiled["traced"]) == 8
    for name, cell in compiled["traced"].items():
        assert_same_training(cell, seen["plain"], relative=2e-6 if name.startswith("fp32") else 1e-3, name=name)
    assert_same_training(compiled["llama"], seen["plain_llama"])
    assert_same_training(compiled["features"], seen["plain_features"])


def test_compiled_dropout_is_drawn_again_by_checkpointing(seen):
    assert_same_training(seen["compiled"]["inductor"]["dropout"]["full"], seen["compiled"]["inductor"]["dropout"]["none"])
    plain, by_deepspeed = seen["compiled"]["dropout"]
    assert_same_training(by_deepspeed, plain)
    assert plain["losses"][0] != pytest.approx(seen["plain"]["losses"][0], rel=1e-5)


def test_compiled_blocks_hold_on_to_no_gathered_parameter(seen):
    """Between the forward and the backward pass: ZeRO-3 would shard in vain what a view keeps whole."""
    left = seen["compiled"]["left"]
    assert left["gathered"] == 24 and left["left"] == 0 and left["needs_backward"]


def test_the_loss_scale_falls_until_gradients_fit_and_its_steps_do_not_count_as_going_astray(seen):
    steps, state = seen["loss_scale_search"]["steps"], seen["loss_scale_search"]["state"]
    skipped = [step for step in steps if not step[2]]
    assert len(skipped) >= 5 and all(overflow for *_, overflow in skipped) and [applied for *_, applied, _ in steps[-2:]] == [True, True]
    assert [scale for _, scale, *_ in steps[:3]] == [1e9, 5e8, 2.5e8]
    assert len({loss for loss, *_ in steps[: len(skipped) + 1]}) == 1, "skipped steps change nothing"
    assert (state["step"], state["skipped_steps"], state["overflow_steps"], state["skipped_in_a_row"]) == (len(steps), len(skipped), len(skipped), 0)


def test_initial_weights_under_zero_init_are_the_plain_ones(seen):
    assert seen["initial_weights"]["equal_to_plain"]


def test_initial_standard_deviations(seen):
    residual = 0.02 / math.sqrt(2 * 8)
    for name, std in seen["initial_weights"]["stds"].items():
        if name.endswith("bias") or "norm" in name:
            assert std == 0, name
        else:
            expected = residual if name.endswith(("projection.weight", "down.weight")) else 0.02
            assert std == pytest.approx(expected, rel=0.05), name


def test_only_matrices_decay(seen):
    assert set(seen["initial_weights"]["decayed"]) == {
        name for name in seen["initial_weights"]["stds"] if name.endswith("weight") and "norm" not in name}


def test_dropout_is_drawn_again_by_checkpointing_and_differs_between_ranks(seen):
    assert_same_training(seen["dropout"]["full"], seen["dropout"]["none"])
    first, second = seen["dropout"]["loss_of_each_rank"]
    assert first != second


def test_evaluation_counts_every_validation_token_once(seen):
    evaluation = seen["evaluation"]
    assert evaluation["tokens"] == evaluation["split_tokens"] - 1
    assert evaluation["found"]["val_loss"] == pytest.approx(evaluation["nats"] / evaluation["tokens"], rel=1e-5)
    assert evaluation["found"]["val_perplexity"] == pytest.approx(math.exp(evaluation["nats"] / evaluation["tokens"]), rel=1e-4)
    assert evaluation["found"]["val_bits_per_byte"] == pytest.approx(evaluation["nats"] / math.log(2) / evaluation["bytes"], rel=1e-5)
    assert evaluation["some"]["val_loss"] != evaluation["found"]["val_loss"]
    for number, shared in evaluation["shared"].items():
        assert shared == pytest.approx(evaluation["found"][number], rel=1e-5), "processes that share a sequence count its tokens once"


def test_every_rank_samples_the_same_text(seen):
    first, second = seen["evaluation"]["samples"]
    assert first == second and first[0] and first[0] == first[1], "also where they share sequences"


def test_micro_batches_are_added_up_in_fp32(seen):
    """64 equal micro batches have the gradient of one; added up in bf16 its norm was 0.2% off."""
    for stage, error in seen["bf16_gradient_error"].items():
        assert error < 1e-4, stage


def test_what_fails_on_one_rank_is_raised_on_all(seen):
    faults = seen["faults_shared_by_all"]
    assert faults["user"] == ["UserFault: mend this"] * 2
    assert faults["file"] == ["UserFault: [Errno 2] No such file: '/x'"] * 2
    assert faults["ours"] == ["RuntimeError: rank 1 failed: RuntimeError('a bug')", "RuntimeError: a bug"]
    assert faults["disagree"][0] == faults["disagree"][1] and "rank 0: triton, rank 1: sdpa" in faults["disagree"][0]
    assert faults["agree"] == ["nothing raised"] * 2


def test_deepspeed_reads_every_key_it_is_given(seen):
    assert seen["deepspeed_keys"] == {"ours": [], "foreign": ["bogus", "enabled"]}


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", ["none", "cpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_checkpointing_and_offload_on_a_gpu(tmp_path, precision, parameters):
    """The same losses in every mode; block inputs that wait on the CPU, and whatever else is computed again, leave the GPU's memory."""
    out = tmp_path / "seen.json"
    settings = [f"train.precision={precision}", f"zero.offload_parameters={parameters}"]
    done = deepspeed_run("tests/training/zero_worker.py", *settings, out, processes=1, gpus=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())
    plain = cells.pop("plain")
    assert len(cells) == 9
    for mode, cell in cells.items():
        assert_same_training(cell, plain, relative=2e-3, name=mode)
    if precision == "bf16" and parameters == "none":
        used = {mode: cell["bytes"] for mode, cell in cells.items()}
        assert used["full"] < used["every_n"] < used["none"] and used["full"] < used["selective"] < used["selective and matmuls"] < used["none"], used
        assert max(used["deepspeed"], used["full offloaded"], used["full tiles"]) < used["full"], used


@pytest.mark.gpu(count=2)
def test_gpus_that_share_sequences_or_gather_parameters_train_as_those_that_do_not(tmp_path):
    out = tmp_path / "seen.json"
    done = deepspeed_run("tests/training/zero_worker.py", out, processes=2, gpus=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(out.read_text())
    for name, runs in seen["shared"].items():
        for how in ("shared", "everything"):
            assert_same_training(runs[how], runs["apart"], relative=2e-3, name=f"{name}, {how}")
    for precision, runs in seen["staying"].items():
        for how in ("all", "some", "none"):
            assert_same_training(runs[how], runs["stage 2"], relative=2e-3, name=f"{precision}, {how}")
