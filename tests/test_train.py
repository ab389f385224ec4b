"""train.py as users run it: the launcher, two processes, a YAML file, and what is left behind."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.launching import deepspeed_run
from training.corpus import write_corpus
from training.tokenizers import load_tokenizer

TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sonnet"
    write_corpus(folder, tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT[:200]] * 64, "validation": [TEXT]}, provenance={})
    write_corpus(folder.parent / "upper", tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT.upper()], "validation": [TEXT.upper()]}, provenance={})
    return folder


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.yaml").write_text(f"""
run: {{output_dir: {folder}/runs}}
model: {{layers: 2, hidden_size: 64, heads: 2, vocab_size: 257, sequence_length: 64, positions: alibi, dropout: 0.1}}
attention: {{window: 48, document_mask: true, dropout: 0.1}}
data: {{corpus: null, mixture: {{{corpus}: 3, {corpus.parent}/upper: 1}}}}
train: {{steps: 25, global_batch_size: 16, gradient_accumulation_steps: 2, precision: fp32, activation_checkpointing: full}}
optimizer: {{lr: 1e-2, warmup_steps: 2}}
checkpoint: {{every: 10}}
eval: {{every: 10, sequences: null}}
sample: {{prompt: "Shall", tokens: 20}}
tracking: {{log_every: 5, project: test, tags: [mine]}}
""")
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(run_file):
    done = deepspeed_run("train.py", "--config", run_file)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_run_learns_and_leaves_one_row_a_step(finished, run_file, corpus):
    run_dir = run_file.parent / "runs" / "tiny"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 26))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.5
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 25]
    assert rows[-1]["tokens"] == 25 * 16 * 64
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(16 * 64 / row["step_seconds"])
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / 2)
        assert row["grad_norm"] > 0 and row["peak_memory_bytes"] > 1e8 and 0 <= row["data_seconds"] <= row["step_seconds"]
        assert row["mfu"] is row["mfu_causal"] is row["hfu"] is None
    assert rows[0]["lr"] == pytest.approx(5e-3) and rows[2]["lr"] == pytest.approx(1e-2) and rows[-1]["lr"] == pytest.approx(6e-5)
    described = json.loads((run_dir / "run.json").read_text())
    corpora = {each["name"]: each for each in described["corpora"]}
    assert corpora["sonnet"]["corpus_sha256"] == json.loads((corpus / "manifest.json").read_text())["corpus_sha256"] != described["corpus_sha256"]
    assert (corpora["sonnet"]["share"], corpora["upper"]["share"]) == (0.75, 0.25)
    assert corpora["upper"]["epochs"] == pytest.approx(25 * 16 * 0.25 / ((len(TEXT) + 1 - 1) // 64))
    for row in (rows[9], rows[-1]):
        assert row["val_loss"] == pytest.approx(0.75 * row["val_loss/sonnet"] + 0.25 * row["val_loss/upper"])
    assert rows[-1]["val_loss/sonnet"] != rows[-1]["val_loss/upper"]
    assert described["config"]["attention"] == {"backend": "tiled", "window": 48, "document_mask": True, "dropout": 0.1, "deterministic": False}
    assert described["deepspeed_config"]["zero_optimization"]["stage"] == 3
    assert described["world_size"] == 2
    assert (run_dir / "sample.txt").read_text().startswith("Shall")
    assert list((run_dir / "wandb").glob("offline-run-*")), "tracking.wandb is offline by default"
    assert described["wandb"]["group"] == "tiny" and {"seq64", "tiled", "zero3", "fp32", "mine"} <= set(described["wandb"]["tags"])
    assert json.loads((run_dir / "outcome.json").read_text()) == {"outcome": "finished", "step": 25}


def test_a_run_leaves_its_last_checkpoints_intact(finished, run_file):
    done = subprocess.run([sys.executable, "scripts/verify_checkpoint.py", run_file.parent / "runs" / "tiny"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("intact (step 2") == 2 and "2 processes, ZeRO stage 3, fp32" in done.stdout
    assert (run_file.parent / "runs/tiny/checkpoints/latest").read_text() == "step_00000025\n"


def test_rank_0_alone_speaks_and_says_little(finished):
    lines = [line for line in finished.stdout.splitlines() if line]
    assert [line.split()[0] for line in lines[:8]] == ["wandb", "attention.backend:", "train.compile:", "model", "data", "data", "batch", "device"]
    assert re.search(r"data +\S+/upper: 3,241 training tokens, 2.00 epochs of them in this run, 25.00% of its samples", finished.stdout)
    assert re.search(r"validation loss .* bits/byte \| (sonnet|upper) \d.* \| (sonnet|upper) \d", finished.stdout)
    assert "attention tiled in a window of 48 within documents, checkpointing full" in lines[3]
    assert len([line for line in lines if re.match(r"step +\d+/25 \| loss ", line)]) == 6
    assert len([line for line in lines if "validation loss" in line]) == 4
    assert lines[-1].startswith("metrics ") and lines[-2].startswith("validation loss ")
    assert len(lines) < 26
    assert finished.stderr == ""


def test_a_finished_run_is_not_overwritten(finished, run_file):
    before = (run_file.parent / "runs/tiny/metrics.jsonl").read_text()
    done = deepspeed_run("train.py", "--config", run_file)
    assert done.returncode == 2
    assert done.stderr.count("holds a finished run") == 1
    assert (run_file.parent / "runs/tiny/metrics.jsonl").read_text() == before


def test_faults_in_the_configuration_are_told_once_with_exit_code_2(run_file):
    done = deepspeed_run("train.py", "--config", run_file, "train.stepz=3", "attention.backend=magic", "model.layers=0")
    assert done.returncode == 2
    assert done.stderr.count("2 faults in the configuration") == 1
    assert "nearest valid one is train.steps" in done.stderr and "Traceback" not in done.stderr


def test_an_altered_shard_is_named_before_the_first_step(run_file, corpus, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    with open(damaged / "train_00000.bin", "r+b") as shard:
        shard.seek(100)
        shard.write(b"\x07")
    done = deepspeed_run("train.py", "--config", run_file, f"data.corpus={damaged}", "data.mixture=null", "run.name=damaged")
    assert done.returncode == 2
    assert done.stderr.count(f"{damaged}/train_00000.bin: altered since it was prepared") == 1
    assert "Traceback" not in done.stderr and "step" not in done.stdout


def test_a_run_that_diverges_stops_with_one_message(run_file):
    done = deepspeed_run("train.py", "--config", run_file, "optimizer.lr=1e9", "optimizer.warmup_steps=0", "run.name=diverged")
    assert done.returncode == 2
    assert len(re.findall(r"steps \d+ to \d+ were skipped: loss or gradients were not finite", done.stderr)) == 1 and "Traceback" not in done.stderr


def test_a_misspelt_option_is_told_with_the_usage():
    done = subprocess.run([sys.executable, "train.py", "--steps", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: train.py" in done.stderr and "Traceback" not in done.stderr


def test_print_config_shows_the_resolved_yaml(run_file):
    done = subprocess.run([sys.executable, "train.py", "--config", run_file, "--print-config", "model.layers=3"], capture_output=True, text=True, check=True)
    shown = yaml.safe_load(done.stdout)
    assert shown["model"]["layers"] == 3 and shown["model"]["head_dim"] == 32
    assert shown["run"]["name"] == "tiny,layers=3" and shown["train"]["micro_batch_size"] == 8


def test_a_dry_run_says_what_the_run_will_without_corpus_launcher_or_gpu(finished, run_file):
    command = [sys.executable, "train.py", "--config", run_file, "--dry-run", "--gpus", "2", "--mfu", "0.5", "--gpu-name", "NVIDIA A10", "attention.backend=tiled", "train.compile=false"]
    done = subprocess.run([*command, "data.mixture={/nowhere: 1.0}"], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    printed = {line.split()[0]: line for line in finished.stdout.splitlines() if line}
    assert lines["model"] == printed["model"] and lines["batch"] == printed["batch"]
    described = json.loads((run_file.parent / "runs" / "tiny" / "run.json").read_text())
    assert yaml.safe_load(done.stdout.partition("DeepSpeed is told:\n")[2]) == described["deepspeed_config"]
    flops = 25 * 16 * 64 * described["flops_per_token"]
    assert f"{described['flops_per_token']:,} FLOPs a token" in lines["work"] and f"{25 * 16 * 64:,} tokens" in lines["work"] and f"{flops:.4g} FLOPs" in lines["work"]
    assert "on each GPU at the peak" in lines["memory"] and "micro batches up to" in lines["fits"] and " less" in lines["less"]
    assert f"{0.5 * 31.2e12 / described['flops_per_token']:,.0f} tokens/s/GPU" in lines["time"]
    assert f"{flops / (0.5 * 31.2e12 * 2) / 3600:.3g} hours" in lines["time"] and f"{flops / (0.5 * 31.2e12) / 3600:.3g} GPU hours" in lines["time"]
    assert done.stderr == ""


@pytest.mark.parametrize("arguments, expected", [
    (["--dry-run", "--gpu-name", "NVIDIA H900"], "its peak is not known; known (as patterns): A100"),
    (["--dry-run", "--mfu", "1.5"], "MFU is above 0 and at most 1"),
    (["--mfu", "0.5"], "say what --dry-run assumes"),
])
def test_what_a_dry_run_cannot_assume_is_refused(run_file, arguments, expected):
    done = subprocess.run([sys.executable, "train.py", "--config", run_file, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
