"""train.py on GPUs with our kernel, gpt2-124m: exact resume, and resume on another number of GPUs."""

import pytest
import torch

from tests.checkpoint_contents import tensor_hashes
from tests.launching import deepspeed_run
from training.corpus import write_corpus
from training.tokenizers import load_tokenizer
from training.tracking import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("train")]
TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 800


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs 20 steps of gpt2-124m with dropout; returns the run's folder and its (step, loss, gradient norm)."""
    folder = tmp_path_factory.mktemp("gpu")
    write_corpus(folder / "sonnet", tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT], "validation": [TEXT[:5000]]}, provenance={})

    def run(name: str, gpus: int, *overrides: str):
        done = deepspeed_run(
            "train.py", "--config", "configs/gpt2-124m.yaml", f"run.output_dir={folder}", f"run.name={name}", f"data.corpus={folder}/sonnet",
            "train.steps=20", "train.global_batch_size=8", "train.micro_batch_size=null", "train.gradient_accumulation_steps=1", "optimizer.warmup_steps=5",
            "model.dropout=0.1", "attention.dropout=0.1", "attention.window=256", "attention.backend=triton",
            "checkpoint.every=5", "checkpoint.keep_last=4",
            "sample.tokens=0", "tracking.wandb=disabled", *overrides, processes=gpus, gpus=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / name, [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / name)[0]]

    return run


@pytest.mark.parametrize("gpus", [pytest.param(count, marks=pytest.mark.gpu(count=count)) for count in (1, 2, 4)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train, gpus):
    whole, rows = train(f"whole-{gpus}", gpus)
    resumed, more = train(f"resumed-{gpus}", gpus, f"checkpoint.resume={whole}/checkpoints/step_00000010")
    assert more == rows[10:] and rows[-1][1] < rows[0][1]
    assert tensor_hashes(resumed / "checkpoints/step_00000020") == tensor_hashes(whole / "checkpoints/step_00000020")


@pytest.mark.gpu(count=2)
def test_a_run_goes_on_with_fewer_and_with_more_gpus(train):
    most = torch.cuda.device_count()
    whole, rows = train("elastic-whole", most, "model.dropout=0.0", "attention.dropout=0.0")
    fewer, middle = train("elastic-fewer", 1, "model.dropout=0.0", "attention.dropout=0.0", f"checkpoint.resume={whole}/checkpoints/step_00000005")
    _, end = train("elastic-more", most, "model.dropout=0.0", "attention.dropout=0.0", f"checkpoint.resume={fewer}/checkpoints/step_00000010")
    for found in (middle, end):
        expected = rows[-len(found):]
        assert [row[0] for row in found] == [row[0] for row in expected]
        assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=5e-3)
        assert found[0][1] == pytest.approx(expected[0][1], rel=2e-4), "before bf16 rounding has been trained on"
