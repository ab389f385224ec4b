"""model.init_from and model.huggingface: what a folder decides, what contradicts it, what is missing in it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.checkpointing import Checkpointing
from model.config import AttentionConfig, GPTConfig, ModelFault
from model.conversion import export_config, export_state
from model.gpt import GPT
from model.huggingface import attention_for
from tests.launching import deepspeed_run
from training.config import ConfigError, load_config
from training.corpus import write_corpus
from training.metering import Meter
from training.pretrained import PretrainedError, initial_weights, load_huggingface, read_state
from training.tokenizers import load_tokenizer

SMALL = {"layers": 2, "hidden_size": 48, "heads": 4, "vocab_size": 80, "sequence_length": 32, "ffn_size": 72}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "kv_heads": 2, "tied_embeddings": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (folder as scripts/export_hf.py writes it, the GPT whose weights it holds)."""

    def write(name, architecture, **attention):
        config, seen = GPTConfig(**SMALL | architecture).resolved(), AttentionConfig(**attention)
        folder, model = tmp_path_factory.mktemp(name), GPT(config)
        (folder / "config.json").write_text(json.dumps(export_config(config, seen, vocab_size=80, end_of_text=0)))
        save_file(export_state(dict(model.named_parameters()), config, vocab_size=80), folder / "model.safetensors", metadata={"format": "pt"})
        return folder, model

    return {"gpt2": write("gpt2", {}), "llama": write("llama", LLAMA), "mistral": write("mistral", LLAMA, window=8)}


def load(*overrides):
    return load_config("configs/base.yaml", ["train.precision=fp32", *map(str, overrides)])[0]


def faults_of(*overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("key", ["init_from", "huggingface"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_architecture_follows_from_the_folder(folders, key, name):
    folder, model = folders[name]
    config = load(f"model.{key}={folder}")
    expected = {"layers": 2, "hidden_size": 48, "heads": 4, "kv_heads": 4 if name == "gpt2" else 2, "head_dim": 12, "ffn_size": 72, "vocab_size": 80,
                "sequence_length": 32, "tied_embeddings": name == "gpt2"}  # fmt: skip
    assert {field: getattr(config.model, field) for field in expected} == expected
    again = load_config("configs/base.yaml", [f"model.{field}={json.dumps(value)}" for field, value in config.model.model_dump().items()] + ["train.precision=fp32"])[0]
    assert again.model == config.model, "what --print-config prints means the same"
    parameters = sum(p.numel() for p in model.parameters())
    assert Meter(config, 1).parameters["total"] == parameters
    full = Meter(load(f"model.{key}={folder}", "train.activation_checkpointing=full"), 1)
    assert full.parameters == Meter(config, 1).parameters and full.hardware_flops_per_token > full.flops_per_token
    assert set(full.parameters) == {"total", "matmul"}


def test_what_contradicts_the_folder_is_refused(folders):
    gpt2, llama, mistral = (folders[name][0] for name in ("gpt2", "llama", "mistral"))
    told = faults_of(f"model.init_from={gpt2}", "model.layers=3", "model.norm=rmsnorm", "model.sequence_length=64")
    assert "3 faults" in told and f"model.layers: 3, and {gpt2} has 2; leave it out" in told
    assert "model.norm: rmsnorm, and" in told and "model.sequence_length: 64 are more than the 32 positions" in told
    assert "attention.window: None, and" in faults_of(f"model.init_from={mistral}", "model.sequence_length=16")
    assert load(f"model.init_from={mistral}", "model.sequence_length=16", "attention.window=8").attention.window == 8
    assert "model.dropout: 0.1 is for the project's own GPT" in faults_of(f"model.huggingface={llama}", "model.dropout=0.1")
    assert load(f"model.init_from={llama}", "model.dropout=0.1", "model.sequence_length=64").model.sequence_length == 64, "RoPE has no end"


def test_a_backend_that_this_machine_has_not_is_refused_for_a_model_of_transformers_too(folders):
    llama = folders["llama"][0]
    told = faults_of(f"model.huggingface={llama}", "attention.backend=triton")
    assert "1 fault in" in told and "attention.backend: triton runs on cuda, not on cpu" in told and told.endswith("; use auto, sdpa or eager")
    for capability, head_dim in (((8, 0), "compute capability"), ((9, 0), "head_dim from 64")):
        with pytest.raises(ConfigError, match=f"attention.backend: hopper needs {head_dim}"):
            load_config("configs/base.yaml", [f"model.huggingface={llama}", "attention.backend=hopper"], assumed_gpu=capability)
    assert load(f"model.huggingface={llama}", "attention.backend=sdpa")


def test_what_is_not_there_is_told(folders, tmp_path):
    assert "model.init_from: nowhere: no such folder" in faults_of("model.init_from=nowhere")
    assert f"{tmp_path} has no config.json" in faults_of(f"model.huggingface={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert "model_type opt is none of gpt2, llama, mistral" in (told := faults_of(f"model.init_from={tmp_path}")) and "model.huggingface trains it" in told
    with pytest.raises(PretrainedError, match="has no model.safetensors"):
        read_state(str(tmp_path))


def test_weights_become_those_of_our_gpt(folders):
    """Shards and all; positions beyond the sequence length are left out."""
    folder, model = folders["gpt2"]
    state = initial_weights(load(f"model.init_from={folder}", "model.sequence_length=16", "model.vocab_size=96").model)
    for name, parameter in model.named_parameters():
        expected = parameter[:16] if name == "position_embedding.weight" else parameter
        assert torch.equal(state[name], expected), name
    whole = read_state(str(folder))
    names = sorted(whole)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}}))
    for part in range(2):
        save_file({name: whole[name] for name in names[part::2]}, folder / f"part-{part}.safetensors")
    sharded = read_state(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    assert sharded.keys() == whole.keys() and all(torch.equal(sharded[name], whole[name]) for name in names)


def test_a_weight_that_transformers_would_draw_anew_is_refused(folders, tmp_path):
    folder, _ = folders["llama"]
    state = read_state(str(folder))
    state.pop("model.layers.1.mlp.up_proj.weight")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PretrainedError, match="does not fit LlamaForCausalLM.*layers.1.mlp.up_proj"):
        load_huggingface(load(f"model.huggingface={tmp_path}"), Checkpointing(), end_of_text=None)
    with pytest.raises(PretrainedError, match="weights missing: model.layers.1.mlp.up_proj.weight"):
        initial_weights(load(f"model.init_from={tmp_path}").model)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(PretrainedError, match="transformers does not load .* with attention.backend=sdpa"):
        load_huggingface(load(f"model.huggingface={tmp_path}", "attention.backend=sdpa"), Checkpointing(), end_of_text=None)
    with pytest.raises(PretrainedError, match="its safetensors cannot be read: .*; fetch or export it anew"):
        initial_weights(load(f"model.init_from={tmp_path}").model)


def test_a_model_with_attention_of_its_own_keeps_it_where_auto_is_asked_for(tmp_path, caplog):
    """BLOOM is outside of transformers' AttentionInterface, where another's name breaks off or is not heeded."""
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=80, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load_huggingface(load(f"model.huggingface={tmp_path}", "model.sequence_length=16"), Checkpointing("full"), end_of_text=None)
    assert "auto -> the model's own, because BloomForCausalLM has attention of its own" in caplog.text
    tokens = torch.arange(16)[None]
    model(tokens, labels=tokens).backward()
    for overrides, message in ((["attention.backend=eager", "attention.document_mask=true"], "document_mask: BloomForCausalLM has attention of its own"),
                               (["attention.document_mask=true"], "use false"), (["attention.backend=sdpa"], "transformers does not load")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_huggingface(load(f"model.huggingface={tmp_path}", "model.sequence_length=16", *overrides), Checkpointing(), end_of_text=0)
    with pytest.raises(ModelFault, match="attention.backend=triton: BloomForCausalLM has attention of its own.*; use auto"):
        attention_for(BloomForCausalLM, "triton", packed=False)


@pytest.mark.gpu
def test_on_gpus_both_ways_train_alike_and_our_kernels_serve_both(tmp_path):
    """In bf16 under ZeRO-3, from the same weights, on the same samples."""
    config, text = GPTConfig(layers=2, hidden_size=128, heads=2, vocab_size=257, sequence_length=128, **LLAMA | {"kv_heads": 1}).resolved(), "To be, or not. " * 40
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(export_config(config, AttentionConfig(), vocab_size=257, end_of_text=256)))
    save_file(export_state(dict(GPT(config).named_parameters()), config, vocab_size=257), tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    write_corpus(tmp_path / "corpus", tokenizer=load_tokenizer("bytes"), splits={"train": [text] * 64, "validation": [text] * 8}, provenance={})
    losses = {}
    for key in ("init_from", "huggingface"):
        done = deepspeed_run("train.py", "--config", "configs/base.yaml", f"model.{key}={tmp_path}/model", f"data.corpus={tmp_path}/corpus", f"run.name={key}",
                             f"run.output_dir={tmp_path}/runs", "train.steps=12", "train.global_batch_size=8", "optimizer.warmup_steps=2", "optimizer.lr=1e-2",
                             "eval.sequences=8", "sample.tokens=4", "checkpoint.every=null", "tracking.wandb=disabled", processes=1, gpus=True)  # fmt: skip
        assert done.returncode == 0 and "computes attention, because" not in done.stdout + done.stderr, done.stdout + done.stderr
        losses[key] = [json.loads(line)["loss"] for line in (tmp_path / f"runs/{key}/metrics.jsonl").read_text().splitlines()]
    assert losses["huggingface"] == pytest.approx(losses["init_from"], rel=0.02) and losses["init_from"][-1] < losses["init_from"][0] - 1


def test_a_model_of_the_hub_is_fetched(folders, monkeypatch):
    asked = []

    def snapshot_download(model, revision, allow_patterns):
        asked.append((model, revision))
        if model == "some/private":
            raise OSError("403 Forbidden\nfor url")
        return str(folders["llama"][0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("model.init_from=some/llama@v1").model.hidden_size == 48 and asked == [("some/llama", "v1")]
    assert read_state("some/llama").keys() == read_state(str(folders["llama"][0])).keys() and asked[-1] == ("some/llama", None)
    assert "not to be had from the Hugging Face Hub: 403 Forbidden for url (a private or gated model" in faults_of("model.huggingface=some/private")
