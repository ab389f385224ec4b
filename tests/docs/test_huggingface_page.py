"""docs/huggingface.md: every example above its part on GPUs, as it stands there, on a small model."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, deepspeed_run
from training.corpus import write_corpus
from training.tokenizers import load_tokenizer

PAGE = (ROOT / "docs/huggingface.md").read_text(encoding="utf-8").split("## On a GPU")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
QUICKSTART = ["run.name=quickstart", "model.layers=2", "model.hidden_size=64", "model.ffn_size=96", "model.sequence_length=64", "train.steps=12", "train.global_batch_size=8",
              "optimizer.warmup_steps=2", "optimizer.lr=1e-2", "eval.sequences=16", "eval.every=0", "sample.tokens=0"]  # fmt: skip
TEXT = "But soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n"
CAPITALS = [{"question": "The capital of France is", "choices": [" Paris", " a window"], "answer": 0}]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the examples print, block by block, in a folder with what the page says is there."""
    folder = tmp_path_factory.mktemp("huggingface")
    write_corpus(folder / "data/shakespeare-bytes", tokenizer=load_tokenizer("bytes"), splits={"train": [TEXT] * 200, "validation": [TEXT] * 20}, provenance={})
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, TEXT[::-1] * 3)))
    (folder / "tasks").mkdir()
    (folder / "tasks/capitals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CAPITALS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        train("--config", str(ROOT / "configs/quickstart.yaml"), *QUICKSTART, processes=1)
        files = [text for kind, text in BLOCKS if kind == "yaml"]
        for text in files:  # commands may stand before the files that they read
            Path(re.match(r"# (\S+)\n", text)[1]).write_text(text)
        for kind, text in BLOCKS:
            if kind == "python":
                exec(text, {})
            elif kind == "bash":
                for line in text.splitlines():
                    run(shlex.split(line, comments=True))
        yield folder


def train(*arguments: str, processes: int) -> None:
    if processes > 1:
        done = deepspeed_run(ROOT / "train.py", *arguments, processes=processes, cwd=Path.cwd())
    else:
        done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], env=os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                              capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def run(words: list[str]) -> None:
    """A command of the page: programs of scripts/ in this process, which has imported all that they need."""
    if words[:5] == ["deepspeed", "--num_gpus", "2", "train.py", "--config"]:
        train(*words[4:], processes=2)
    elif words[:3] == ["python", "train.py", "--config"]:
        train(*words[2:], processes=1)
    elif words[0] == "python" and words[1].startswith("scripts/"):
        assert importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main(words[2:]) == 0, words
    else:
        assert words[:4] == ["python", "-m", "pip", "install"], f"a command that this test cannot run: {words}"


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_is_shown_in_ten_lines():
    assert len(BLOCKS) >= 8 and all(len(text.splitlines()) <= 10 for _, text in BLOCKS)


def test_both_ways_begin_with_the_exported_weights_and_learn(seen):
    trained, again, finetuned = (rows(seen / "runs" / name) for name in ("quickstart", "again", "finetune"))
    assert trained[-1]["loss"] < trained[0]["loss"] - 1
    # The same samples, the same weights: of our GPT, and of transformers' Llama, under ZeRO-3 on two processes.
    assert again[0]["loss"] < trained[0]["loss"] - 1
    for ours, theirs in zip(again, finetuned, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4) and theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    assert again[-1]["loss"] < again[0]["loss"]
    described = [json.loads((seen / "runs" / name / "run.json").read_text()) for name in ("again", "finetune")]
    assert described[0]["parameters"] == described[1]["parameters"]
    assert all(each["config"]["model"]["layers"] == 2 and each["config"]["model"]["sequence_length"] == 64 for each in described)


def test_what_was_fine_tuned_is_exported_with_its_tokenizer(seen):
    from safetensors.torch import load_file

    before, after = (load_file(seen / "exported" / name / "model.safetensors") for name in ("quickstart", "finetune"))
    assert before.keys() == after.keys() and all((before[name] != after[name]).any() for name in before)
    assert json.loads((seen / "exported/finetune/config.json").read_text())["model_type"] == "llama"
    assert (seen / "exported/finetune/tokenizer.json").read_text() == (seen / "exported/quickstart/tokenizer.json").read_text()


def test_lm_evals_perplexity_is_ours(seen):
    results = json.loads((seen / "evaluation.json").read_text())
    assert results["ours"]["bits_per_byte"] == pytest.approx(results["lm_eval"]["text"]["bits_per_byte,none"], rel=1e-5)
    assert 0 < results["ours"]["bits_per_byte"] < 8
