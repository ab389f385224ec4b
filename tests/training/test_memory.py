"""Predicted memory: beside every allocation of real training steps on two processes, and beside the tensors that the real model saves."""

import json

import pytest
import torch

from kernels.attention.backends import BACKENDS
from model.checkpointing import Checkpointing
from model.gpt import GPT
from tests.allocations import as_on_a_gpu
from tests.launching import deepspeed_run
from training import activations, memory
from training.activations import Shape, block_keeps, checkpoint_keeps
from training.config import load_config

SMALL = [
    "model.layers=2", "model.hidden_size=128", "model.heads=2", "model.vocab_size=1024", "model.sequence_length=128", "train.global_batch_size=4",
    "zero.reduce_bucket_size=200000", "zero.prefetch_bucket_size=400000", "zero.persistence_threshold=1000", "attention.backend=sdpa",
]  # fmt: skip
FEW_WORDS = "model.vocab_size=128"  # so that the blocks, and not the loss, decide the peak
LLAMA = ["model.positions=rope", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.tied_embeddings=false"]
FULL = "train.activation_checkpointing=full"
CASES = [
    ["zero.stage=3"],
    ["zero.stage=3", FEW_WORDS, "attention.backend=eager"],
    ["zero.stage=3", FEW_WORDS, FULL],
    ["zero.stage=3", FEW_WORDS, *LLAMA],
    ["zero.stage=3", "train.bf16_states=true", "zero.reduce_dtype=bf16"],
    ["zero.stage=3", "zero.offload_optimizer=cpu"],
    ["zero.stage=2"],
    ["zero.stage=2", "zero.offload_optimizer=cpu"],
    ["zero.stage=0", "train.precision=fp32"],
    ["zero.stage=1", "train.gradient_accumulation_steps=2"],
    ["zero.stage=1", "train.precision=fp16"],
]


def configure(*settings: str, processes: int = 1):
    return load_config("configs/base.yaml", [*SMALL, *settings], world_size=processes)[0]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    asked = [{"settings": [*SMALL, *case], "logits_at_once": activations.LOGITS_AT_ONCE} for case in CASES]
    asked.append({"settings": SMALL, "logits_at_once": 65536})
    (folder / "asked.json").write_text(json.dumps(asked))
    done = deepspeed_run("tests/training/memory_worker.py", folder / "asked.json", folder / "seen.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "seen.json").read_text())


def predicted(config, processes: int) -> dict[str, int]:
    """The largest moment of each phase; on a CPU, where the host's memory is the device's."""
    estimate = memory.estimate(config, processes, workspace=0)
    phases = {"forward": 0, "backward": 0, "step": 0}
    for moment in estimate.moments:
        phase = "step" if "step" in moment.name else "forward" if moment.name == "loss" or "forward" in moment.name else "backward"
        phases[phase] = max(phases[phase], moment.bytes + sum(estimate.host.values()))
    return phases


def test_the_peak_is_that_of_every_allocation_followed(seen):
    for case, peaks in zip(CASES, seen, strict=False):
        assert max(predicted(configure(*case, processes=2), 2).values()) == pytest.approx(max(peaks.values()), rel=0.05), case


def test_the_loss_and_the_step_are_predicted_by_themselves(seen):
    for case, peaks in zip(CASES, seen, strict=False):
        expected = predicted(configure(*case, processes=2), 2)
        if FEW_WORDS not in case:  # then a block's forward pass may be above the loss, and the backward pass is above both
            assert expected["forward"] == pytest.approx(peaks["forward"], rel=0.01), case
        if "step" in peaks and "zero.stage=0" not in case:
            assert expected["step"] == pytest.approx(peaks["step"], rel=0.03), case


def test_the_logits_of_a_part_of_the_tokens(seen, monkeypatch):
    monkeypatch.setattr(activations, "LOGITS_AT_ONCE", 65536)
    parts, whole = predicted(configure(processes=2), 2), seen[0]
    assert parts["forward"] == pytest.approx(seen[-1]["forward"], rel=0.01) and seen[-1]["forward"] < whole["forward"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dialect", [[], LLAMA, ["model.kv_heads=1"], [*LLAMA, "model.kv_heads=1"], ["model.dropout=0.1"]], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_block_keeps_what_the_formula_says(backend, dialect, precision, monkeypatch):
    """Every storage that autograd saves in one block more, parameters aside."""
    as_on_a_gpu(monkeypatch)
    config = configure(*dialect, f"attention.backend={backend}", f"train.precision={precision}", "train.global_batch_size=2")
    shape = Shape(config.model, config.attention, 2, memory.element_size(config))
    keeps = block_keeps(shape)
    if config.model.dropout:
        keeps["dropout masks"] *= shape.e  # on CPUs they are numbers
    assert saved(config, 3) - saved(config, 2) == pytest.approx(sum(keeps.values()), rel=4e-3)  # on CPUs LayerNorm keeps its statistics in bf16


@pytest.mark.parametrize("checkpointing", [Checkpointing("full"), Checkpointing("every_n", every=1)], ids=str)
def test_a_checkpointed_block_keeps_its_input(checkpointing):
    config = configure("train.global_batch_size=2")
    shape = Shape(config.model, config.attention, 2, 2)
    kept = saved(config, 3, checkpointing) - saved(config, 2, checkpointing)
    assert kept == pytest.approx(sum(checkpoint_keeps(shape, checkpointing).values()), rel=1e-3)


def saved(config, layers: int, checkpointing: Checkpointing = Checkpointing()) -> int:
    """Bytes of the storages that autograd holds after the forward pass of a model of so many layers, parameters aside."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    model = GPT(config.model.model_copy(update={"layers": layers}), config.attention, checkpointing=checkpointing).to(dtype)
    own, storages = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.zeros(2, config.model.sequence_length, dtype=torch.int64))
    assert logits.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)
