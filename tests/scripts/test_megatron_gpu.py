"""scripts/megatron_pretrain.py on GPUs, in bf16: every layout has the losses of one GPU, and a resumed run those of the uninterrupted one."""

import subprocess
import sys

import pytest

from training.corpus import write_corpus
from training.tokenizers import load_tokenizer
from training.tracking import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("train")]
TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 800
TENSOR, SEQUENCE, PIPELINE = "megatron.tensor_parallel=2", "megatron.sequence_parallel=true", "megatron.pipeline_parallel=2"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs ten steps of a GPT; returns the run's folder and its losses."""
    folder = tmp_path_factory.mktemp("megatron")
    write_corpus(folder / "sonnet", tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT], "validation": [TEXT[:5000]]}, provenance={})

    def run(name: str, gpus: int, *overrides: str):
        settings = [f"run.output_dir={folder}", f"run.name={name}", f"data.corpus={folder}/sonnet", "train.steps=10", "train.global_batch_size=8",
                    "train.micro_batch_size=2", "train.gradient_accumulation_steps=null", "train.compile=false", "model.layers=4", "model.hidden_size=512",
                    "model.heads=8", "model.sequence_length=256", "model.vocab_size=320", "checkpoint.every=5", "tracking.wandb=disabled",
                    # Under larger rates the loss jumps, and rounding with it.
                    "optimizer.warmup_steps=2", "optimizer.lr=1e-4", "optimizer.min_lr=1e-5", *overrides]  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), "scripts/megatron_pretrain.py",
                               "--config", "configs/megatron/base.yaml", *settings], capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / name, [row["loss"] for row in read_metrics(folder / name)[0]]

    return run


@pytest.fixture(scope="module")
def one(train):
    return train("one", 1)


@pytest.mark.parametrize(("gpus", "settings"), [
    pytest.param(1, ["megatron.attention=megatron", "train.compile=true", "train.activation_checkpointing=full"], id="its own attention"),
    pytest.param(2, [TENSOR], marks=pytest.mark.gpu(count=2), id="tensor"),
    pytest.param(2, [TENSOR, SEQUENCE, "megatron.recompute_attention=true"], marks=pytest.mark.gpu(count=2), id="sequence"),
    pytest.param(2, [PIPELINE], marks=pytest.mark.gpu(count=2), id="pipeline"),
    pytest.param(4, [TENSOR, SEQUENCE], marks=pytest.mark.gpu(count=4), id="sequence x data"),
    pytest.param(4, [TENSOR, PIPELINE], marks=pytest.mark.gpu(count=4), id="tensor x pipeline"),
])  # fmt: skip
def test_every_layout_has_the_losses_of_one_gpu(train, one, request, gpus, settings):
    _, losses = train(request.node.callspec.id.replace(" ", "-"), gpus, *settings)
    assert losses == pytest.approx(one[1], rel=1e-3) and losses[-1] < losses[0]


def test_a_resumed_run_equals_the_uninterrupted_one(train):
    drops = ("model.dropout=0.1", "attention.dropout=0.1", "attention.deterministic=true")
    whole, losses = train("whole", 1, *drops)
    _, more = train("resumed", 1, *drops, f"checkpoint.resume={whole}/checkpoints/step_00000005")
    assert more == losses[5:]
