"""scripts/megatron_pretrain.py: what it refuses, and runs of two gloo processes against our own GPT under PyTorch alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model.gpt import count_parameters
from training.config import ConfigError, load_config
from training.corpus import write_corpus
from training.megatron_config import ROWS, MegatronConfig
from training.runs import differing, read_runs
from training.stopping import STOPPED_EXIT_CODE
from training.tokenizers import load_tokenizer

SHARED = Path("configs/megatron/base.yaml")
TEXT = "But soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n"
RUNS = {"pipeline, then sequence": "gpt2", "tensor": "llama", "data, Megatron's attention": "llama"}


def load(*overrides, file=SHARED, world_size=1):
    return load_config(file, overrides, world_size=world_size, schema=MegatronConfig)[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    write_corpus(folder / "corpus", tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT] * 200, "validation": [TEXT] * 20}, provenance={})
    done = subprocess.run([sys.executable, "-m", "tests.scripts.megatron_worker", str(folder), str(folder / "corpus")], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


@pytest.mark.parametrize(("name", "reference"), RUNS.items())
def test_every_layout_has_the_losses_of_one_process_of_pytorch(found, name, reference):
    """The second has its first two steps from another layout, by way of a checkpoint."""
    run = found[name]
    assert run["codes"] == [0, 0], run["log"]
    assert [row["loss"] for row in run["rows"]] == pytest.approx(found[reference], rel=2e-6)


def test_a_resumed_run_goes_on_from_the_checkpoint_of_another_layout(found):
    assert found["pipeline"]["codes"] == [0, 0], found["pipeline"]["log"]
    assert len(found["pipeline"]["rows"]) == 2
    assert "2 of 4 steps are done" in found["pipeline, then sequence"]["log"]
    assert "changed since the checkpoint: megatron.pipeline_parallel: 2 -> 1" in found["pipeline, then sequence"]["log"]


def test_a_run_that_is_stopped_and_started_again_ends_as_one_that_was_not_bit_for_bit(found):
    """Tensor and sequence parallelism x data parallelism, bf16, dropout."""
    whole, stopped, resumed = (found[name] for name in ("uninterrupted", "stopped", "resumed"))
    assert whole["codes"] == resumed["codes"] == [0] * 4, whole["log"] + resumed["log"]
    assert stopped["codes"] == [STOPPED_EXIT_CODE] * 4 and "stopped by SIGTERM after step 1" in stopped["log"], stopped["log"]
    assert len(stopped["rows"]) == 1 and "1 of 4 steps are done" in resumed["log"]
    for name in ("loss", "grad_norm", "lr"):
        assert [row[name] for row in resumed["rows"]] == [row[name] for row in whole["rows"]]
    assert resumed["rows"][-1]["val_loss"] == whole["rows"][-1]["val_loss"] < whole["rows"][0]["loss"]
    assert "Warning" not in whole["log"]
    assert "device 4 x CPU (peak unknown, so no MFU), Megatron: tensor 2 with sequence parallelism x pipeline 1, bf16" in whole["log"]


def test_its_checkpoints_are_not_taken_for_those_of_train_py(found):
    *resumed, exported = found["strangers"]
    assert all("train.py and scripts/megatron_pretrain.py do not read each other's checkpoints" in fault for fault in resumed)
    assert "is of scripts/megatron_pretrain.py; those of train.py alone can be exported" in exported


def test_without_megatron_core_it_says_how_to_install_it(found):
    assert found["without megatron-core"]["codes"] == [2]
    assert "megatron-core is missing: python -m pip install -r requirements-megatron.txt" in found["without megatron-core"]["log"]


def test_the_record_is_that_of_train_py(found):
    runs = [run for name in ("tensor", "data") for run in read_runs(found["folder"] / name)]
    assert {"megatron.tensor_parallel", "megatron.attention"} <= set(differing(runs))
    row = runs[0].rows[-1]
    assert {"step", "tokens", "flops", "elapsed_seconds", "lr", "loss", "grad_norm", "tokens_per_second", "tokens_per_second_per_gpu", "step_seconds",
            "data_seconds", "mfu", "hfu", "peak_memory_bytes", "skipped_steps", "val_loss", "val_perplexity", "val_bits_per_byte"} <= set(row)
    assert row["tokens"] == 4 * 4 * 32 and 0 < row["val_loss"] < math.log(272)
    assert [run.rows[-1]["val_loss"] for run in runs] == pytest.approx([row["val_loss"]] * 2, rel=1e-5)
    assert [run.rows[-1]["grad_norm"] for run in runs] == pytest.approx([row["grad_norm"]] * 2, rel=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.keys[0])
def test_every_row_is_refused_and_its_remedy_accepted(row):
    with pytest.raises(ConfigError) as caught:
        load(*row.example)
    assert any(line.split(": ")[1] == row.keys[0] for line in str(caught.value).splitlines()[1:])
    load(*row.example, *row.instead)
    config = load()
    alone = type("Alone", (), {section: getattr(config, section) for section in row.sections})
    assert not row.refused(alone)
    assert all(name in type(getattr(config, section)).model_fields for section, name in (key.split(".") for key in row.keys))


def test_the_processes_are_shared_out_or_refused():
    config = load("megatron.tensor_parallel=2", "megatron.pipeline_parallel=2", "train.micro_batch_size=4", "train.gradient_accumulation_steps=null", world_size=8)
    assert config.train.gradient_accumulation_steps == 16
    assert config.sharing.of(8) == "8 processes / 4 that share a model"
    with pytest.raises(ConfigError, match="4 processes share a model, and 6 cannot be divided into such groups; .* start a multiple of 4 processes"):
        load("megatron.tensor_parallel=4", world_size=6)


def test_ranks_may_share_key_heads_where_they_share_them_evenly():
    load("model.heads=8", "model.kv_heads=2", "megatron.tensor_parallel=4", world_size=4)
    unequal = ["model.heads=12", "model.kv_heads=4", "megatron.tensor_parallel=6"]
    cut_up = ["model.heads=4", "model.kv_heads=1", "megatron.tensor_parallel=4", "model.head_dim=65"]  # 6 heads of 65 are 390 rows
    for settings in (unequal, cut_up):
        with pytest.raises(ConfigError, match="ranks do not divide heads"):
            load(*settings, "model.ffn_size=2304", "model.vocab_size=50400", world_size=12)


def test_an_unknown_key_is_told_with_its_nearest():
    with pytest.raises(ConfigError, match="megatron.tensor_paralel: unknown key; the nearest valid one is megatron.tensor_parallel"):
        load("megatron.tensor_paralel=2")
    with pytest.raises(ConfigError, match="megatron: unknown key"):
        load_config(SHARED)  # train.py


def test_the_shipped_files_load_and_document_every_key():
    documented = yaml.safe_load(SHARED.read_text())["megatron"]
    assert load().megatron.model_dump() == documented
    for file in SHARED.parent.glob("megatron-*.yaml"):
        for world_size in (1, 4, 8):
            config = load(file=file, world_size=world_size)
        assert file.read_text().splitlines()[0] == f"# parameters: {count_parameters(config.model)['total']:,}"


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, "scripts/megatron_pretrain.py", "--config", str(SHARED), f"run.output_dir={tmp_path}"], capture_output=True,
                          text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 2 and "torch sees no GPU, and Megatron-Core runs on nothing else" in done.stderr
