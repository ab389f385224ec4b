import textwrap
from pathlib import Path

import pytest
import yaml

from model.gpt import count_parameters
from training import memory
from training.config import Config, ConfigError, load_config

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """Write files given by name=text, load ``run``."""

    def write_and_load(*overrides, world_size=1, **files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(text))
        config, _ = load_config(tmp_path / "run.yaml", ["train.precision=fp32", *overrides], world_size=world_size)
        return config

    return write_and_load


def faults_of(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_base_yaml_documents_every_key_with_its_default():
    resolved, _ = load_config("configs/base.yaml")
    given = yaml.safe_load(Path("configs/base.yaml").read_text().replace("1e-5", "1.0e-5").replace("6e-4", "6.0e-4").replace("6e-5", "6.0e-5").replace("1e-8", "1.0e-8"))
    assert given == Config().model_dump()
    assert list(given) == list(Config.model_fields)
    assert resolved.run.name == "base"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_have_the_parameters_their_comment_says(path):
    for world_size in (1, 2, 4, 8):
        config, _ = load_config(path, world_size=world_size)
    if path.stem == "base":
        return
    comment = path.read_text().splitlines()[0]
    assert comment == f"# parameters: {count_parameters(config.model)['total']:,}"


def test_the_shipped_configurations_are_all_there():
    assert {
        "base", "quickstart", "gpt2-124m", "gpt2-124m-documents", "gpt2-355m", "gpt2-774m", "gpt-1.3b", "gpt-1.3b-long", "gpt-2.7b", "gpt-6.7b", "llama-160m", "llama-1b", "llama-7b",
        "deepspeed-offload", "fineweb-124m",
    } <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name, vocab_size, published", [
    ("gpt2-774m", 50257, 774_030_080), ("llama-160m", 32000, 162_417_408), ("llama-7b", 32000, 6_738_415_616)])
def test_geometries_have_the_parameters_of_the_released_weights(name, vocab_size, published):
    config, _ = load_config(f"configs/{name}.yaml", [f"model.vocab_size={vocab_size}"])
    assert count_parameters(config.model)["total"] == published


@pytest.mark.parametrize("gpus, settings, host", [
    (1, [], 91.6), (1, ["model.sequence_length=262144", "attention.window=null"], 24.0),
    (4, ["parallel.sequence=4", "model.sequence_length=4000000"], 91.6), (4, ["parallel.sequence=4", "model.sequence_length=1048576", "attention.window=null"], 24.0)])
def test_long_contexts_are_predicted_to_fit(gpus, settings, host):
    """On H200s in hosts of 128 GiB a GPU, as the file's comment says."""
    config, _ = load_config("configs/gpt-1.3b-long.yaml", settings, world_size=gpus, assumed_gpu=(9, 0))
    found = memory.estimate(config, gpus)
    assert config.train.global_batch_size == 1 and found.peak.bytes < 0.8 * memory.capacity("H200")
    assert sum(found.host.values()) / memory.GIB == pytest.approx(host, abs=0.05)


@pytest.mark.parametrize("processes, settings, fault", [
    (4, ["parallel.sequence=3", "model.heads=6", "model.sequence_length=1023"], "parallel.sequence: 3 processes share a sequence, and 4 cannot be divided .* use a divisor of 4"),
    (4, ["parallel.sequence=2", "train.global_batch_size=5"], "train.global_batch_size: .*4 processes / 2 that share a sequence, global_batch_size 5"),
])
def test_processes_that_share_sequences_must_work_out(processes, settings, fault):
    with pytest.raises(ConfigError, match=fault):
        load_config("configs/base.yaml", settings, world_size=processes)


def test_base_is_inherited_key_by_key_and_the_command_line_wins(load):
    config = load(
        "optimizer.lr=2e-3", "model.layers=5",
        grandparent="model: {layers: 2, heads: 3, hidden_size: 96}",
        parent="base: grandparent.yaml\nmodel: {layers: 4}\noptimizer: {betas: [0.8, 0.9]}",
        run="base: parent.yaml\noptimizer: {lr: 1e-4}\n",
    )
    assert (config.model.layers, config.model.heads, config.model.hidden_size) == (5, 3, 96)
    assert (config.optimizer.lr, config.optimizer.betas) == (2e-3, [0.8, 0.9])


def test_scalars_are_those_of_yaml_1_2(load):
    config = load(run="""
        run: {name: off, output_dir: 2026-11-22}
        optimizer: {lr: 1e-4, min_lr: 1E-5, eps: .5e-8, weight_decay: 0, warmup_steps: 1}
        train: {steps: 010}
        sample: {prompt: "no", top_k: ~}
        """)
    assert (config.run.name, config.run.output_dir) == ("off", "2026-11-22")
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.eps, config.optimizer.weight_decay) == (1e-4, 1e-5, 5e-9, 0.0)
    assert config.train.steps == 10
    assert (config.sample.prompt, config.sample.top_k) == ("no", None)


def test_all_faults_are_reported_at_once_with_file_line_and_nearest_key(load, tmp_path):
    message = faults_of(lambda: load("zero.stage=7", "nonsense", parent="train:\n  stepz: 3\n", run="""\
        base: parent.yaml
        model:
          layers: many
          layers: 3
        modle: {}
        attention: {backend: sdpa, bakend: eager}
        """))
    assert "7 faults" in message
    for expected in (
        f"{tmp_path}/parent.yaml:2: train.stepz: unknown key; the nearest valid one is train.steps",
        f"{tmp_path}/run.yaml:3: model.layers: input should be a valid integer, not 'many'",
        f"{tmp_path}/run.yaml:5: modle: unknown key; the nearest valid one is model",
        f"{tmp_path}/run.yaml:6: attention.bakend: unknown key; the nearest valid one is attention.backend",
        "command line: zero.stage: input should be 0, 1, 2 or 3, not 7",
        "command line: 'nonsense': not of the form section.key=value",
    ):
        assert expected in message


def test_duplicate_keys_are_refused(load, tmp_path):
    message = faults_of(lambda: load(run="train:\n  steps: 3\n  steps: 4\n"))
    assert f"{tmp_path}/run.yaml:3: train.steps: given twice, first in {tmp_path}/run.yaml:2" in message


def test_faults_of_every_kind_are_told_together(load):
    message = faults_of(lambda: load("model.heads=7", "train.global_batch_size=7", "train.micro_batch_size=2", "zero.stagee=1", "attention.backend=magic", run=""))
    for expected in ("does not divide into 7 heads", "do not multiply out", "zero.stagee: unknown key", "magic is not known"):
        assert expected in message


def test_a_mapping_on_the_command_line_is_merged_and_checked_for_duplicates(load):
    assert load("model={layers: 3, heads: 6}", run="model: {layers: 2, dropout: 0.1}").model.dropout == 0.1
    assert load("model={layers: 3, heads: 6}", run="model: {layers: 2}").model.layers == 3
    assert "given twice" in faults_of(lambda: load("train={steps: 9, steps: 8}", run=""))


@pytest.mark.parametrize("text, expected", [
    ("base: [a, b]", "base: must be the name of one YAML file"),
    ("base:", "base: must be the name of one YAML file"),
    ("model: {layers: !!int abc}", "model.layers: invalid literal"),
    ("model: &m {layers: *m}", "model.layers: nested too deeply"),
    ("run: {name: ../escaped}", "run.name: string should match"),
    ("run: {name: ..}", "run.name: string should match"),
    ("run: {seed: 99999999999999999999999}", "run.seed: input should be less than"),
    ("optimizer: {betas: [0.9, 1.5]}", "optimizer.betas.1: input should be less than 1"),
    ("optimizer: {lr: .inf}", "optimizer.lr: input should be a finite number"),
    ("model: {init_std: .inf}", "model.init_std: input should be a finite number"),
    ("optimizer: {warmup_steps: 301}", "do not fit into train.steps 300"),
    ("base: missing.yaml", "missing.yaml: no such file"),
    ("base: run.yaml", "includes itself"),
    ("- a list", "top level must be a mapping"),
    ("train: {steps: [", "not readable as YAML"),
    ("train: 3", "command line: train.precision: train is 3 in"),
    ("optimizer: 3", "optimizer: input should be a valid dictionary"),
    ("train: {steps: 3.0}", "valid integer, not 3.0"),
    ("train: {steps: true}", "valid integer, not True"),
    ("model: {hidden_size: 100, heads: 3}", "100 does not divide into 3 heads"),
    ("model: {kv_heads: 5}", "12 query heads do not divide into 5 groups"),
    ("model: {positions: rope, head_dim: 33}", "head_dim must be even"),
    ("attention: {backend: sdpaa}", "attention.backend: sdpaa is not known"),
    ("optimizer: {min_lr: 1.0}", "above optimizer.lr"),
    ("zero: {reduce_dtype: bf16}", "gradients of an fp32 run are summed in fp32"),
    ("attention: {window: 0}", "attention.window: input should be greater than 0"),
    ("attention: {window: 64}\nmodel: {sequence_length: 64}", "attention.window: 64 keys hide nothing in sequences of 64; lower it, or use null"),
    ("attention: {dropout: 1.0}", "attention.dropout: input should be less than 1"),
    ("attention: {document_mask: 1}", "attention.document_mask: input should be a valid boolean"),
    ("model: {positions: absolute}", "model.positions: input should be 'learned', 'rope' or 'alibi'"),
])
def test_faults_name_the_file_and_the_remedy(load, text, expected):
    message = faults_of(lambda: load(run=text))
    assert expected in message and "run.yaml" in message


@pytest.mark.parametrize("train, world_size, expected", [
    ("micro_batch_size: 4, gradient_accumulation_steps: 2, global_batch_size: null", 3, (4, 2, 24)),
    ("micro_batch_size: null, gradient_accumulation_steps: 2, global_batch_size: 24", 3, (4, 2, 24)),
    ("micro_batch_size: 4, gradient_accumulation_steps: null, global_batch_size: 24", 3, (4, 2, 24)),
    ("micro_batch_size: 4, gradient_accumulation_steps: 2, global_batch_size: 24", 3, (4, 2, 24)),
    ("micro_batch_size: 4, gradient_accumulation_steps: 2, global_batch_size: 24", 2, None),
    ("micro_batch_size: null, gradient_accumulation_steps: 1, global_batch_size: 25", 2, None),
    ("micro_batch_size: null, gradient_accumulation_steps: 4, global_batch_size: 2", 1, None),
    ("micro_batch_size: null, gradient_accumulation_steps: null, global_batch_size: 24", 1, None),
])
def test_batch_arithmetic_is_checked_and_never_rounded(load, train, world_size, expected):
    def resolve():
        config = load(run=f"train: {{{train}}}", world_size=world_size).train
        return config.micro_batch_size, config.gradient_accumulation_steps, config.global_batch_size

    if expected is None:
        assert "global_batch_size" in faults_of(resolve)
    else:
        assert resolve() == expected


def test_a_backend_asked_for_by_name_is_refused_when_it_cannot_do_it(monkeypatch, load):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = faults_of(lambda: load("attention.backend=sdpa_cudnn", run=""))
    assert "attention.backend: sdpa_cudnn runs on cuda, not on cpu" in message and "use sdpa" in message
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert "needs float16 or bfloat16, not float32" in faults_of(lambda: load("attention.backend=sdpa_flash", run=""))
    assert load("attention.backend=sdpa_flash", "train.precision=bf16", run="").attention.backend == "sdpa_flash"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert "bf16 needs compute capability 8.0, and this GPU has 7.5" in faults_of(lambda: load("train.precision=bf16", run=""))


@pytest.mark.parametrize("settings, refusal", [
    ("train.precision=fp16 zero.stage=0", "train.precision: DeepSpeed's stage 0 divides fp16 gradients by a loss scale"),
    ("train.precision=fp16 zero.reduce_dtype=bf16", "zero.reduce_dtype: gradients of an fp16 run are summed in fp32"),
    ("train.precision=fp16 train.bf16_states=true", "train.bf16_states: states are kept in bf16 where the model is, and train.precision is fp16; use bf16"),
    ("train.precision=bf16 train.bf16_states=true zero.stage=0", "train.bf16_states: DeepSpeed's stage 0 knows fp32 states alone; use zero.stage: 1"),
    ("zero.stage=0 zero.offload_optimizer=cpu", "zero.offload_optimizer: stage 0 keeps the optimizer where the model is; use zero.stage: 1, 2 or 3"),
    ("zero.stage=2 zero.offload_parameters=cpu", "zero.offload_parameters: stage 2 keeps whole parameters on every GPU; use zero.stage: 3"),
    ("train.activation_checkpointing=every_n", "train.checkpoint_every: every_n needs it"),
    ("train.activation_checkpointing=every_n train.checkpoint_every=13", "train.checkpoint_every: 13 blocks are more than model.layers 12; lower it"),
    ("train.activation_checkpointing=every_n train.checkpoint_every=1", "train.checkpoint_every: input should be greater than or equal to 2"),
    ("train.activation_checkpointing=full train.checkpoint_every=2", "read by train.activation_checkpointing: every_n alone, and that is full"),
    ("train.activation_checkpointing=selective attention.backend=eager", "attention.backend=eager has none that PyTorch sees; use attention.backend=triton or hopper"),
    ("train.activation_checkpointing=selective attention.window=64", "attention.backend=tiled has none that PyTorch sees"),
    ("train.activation_checkpointing=full train.keep_matmuls=true", "train.keep_matmuls: read by train.activation_checkpointing: selective alone"),
    ("train.activation_checkpointing=deepspeed train.partition_activations=true", "over a tensor-parallel group, and there is none here; use false"),
    ("train.activation_checkpointing=full train.partition_activations=classic", "classic goes with train.activation_checkpointing: deepspeed and"),
    ("train.activation_checkpointing=deepspeed train.cpu_checkpointing=false train.partition_activations=classic", "classic goes with"),
])  # fmt: skip
def test_modes_that_do_not_go_together_are_refused_with_the_nearest_that_do(monkeypatch, load, settings, refusal):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = faults_of(lambda: load(*settings.split(), run=""))
    assert refusal in message and ": 1 fault in" in message


def test_deepspeeds_checkpointing_is_told_as_it_is(monkeypatch):
    def notes(*overrides: str) -> str:
        return "\n".join(load_config("configs/deepspeed-offload.yaml", overrides)[1])

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for on_gpu, copies in ((False, "nothing is moved"), (True, "pinned memory of the CPU while the next block is computed")):
        monkeypatch.setattr("torch.cuda.is_available", lambda on_gpu=on_gpu: on_gpu)
        assert "partitioned over 1 process" in notes() and "computation waits for each copy" in notes()
        assert copies in notes("train.partition_activations=false")
        assert ("DeepSpeed takes the same path as beside a GPU" in notes()) is not on_gpu
        ours = notes("train.activation_checkpointing=full", "train.checkpoint_offload=true", "train.partition_activations=false")
        assert ("copied there and back all the same" in ours) is not on_gpu


def test_auto_is_resolved_once_with_its_reason(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config, notes = load_config("configs/gpt2-124m.yaml")
    assert config.attention.backend == "sdpa"
    assert config.train.compile is False
    assert [note.partition(" (")[0] for note in notes] == ["attention.backend: auto -> sdpa", "train.compile: auto -> false"]


def test_blocks_are_compiled_on_gpus_where_that_is_known_to_work():
    def compiled(*overrides: str) -> bool:
        return load_config("configs/gpt2-124m.yaml", overrides, assumed_gpu=(9, 0))[0].train.compile

    assert compiled() and compiled("train.activation_checkpointing=deepspeed") and not compiled("train.compile=false")
    assert not compiled("attention.deterministic=true") and not compiled("attention.backend=flex")


def test_a_run_is_named_by_its_file_and_what_the_command_line_changes_in_the_curve(tmp_path):
    def name(*overrides: str) -> str:
        return load_config("configs/gpt2-124m.yaml", overrides)[0].run.name

    assert name() == name("tracking.wandb=disabled", "checkpoint.every=10", "run.output_dir=elsewhere", "eval.every=5") == "gpt2-124m"
    assert name("attention.backend=sdpa", "run.seed=2") == "gpt2-124m,backend=sdpa,seed=2"
    assert name("data.corpus=/somewhere/else/corpus", "run.seed=1", "run.seed=3") == "gpt2-124m,corpus=corpus,seed=3"
    assert name("data.mixture={data/a: 1}", "data.mixture.data/b=2", "data.corpus=null") == "gpt2-124m,mixture=a1,b=2,corpus=null"
    assert name("run.seed=2", "run.name=mine") == "mine"
    assert name("model.dropout=0.1", "attention.window=8") == "gpt2-124m,model.dropout=0.1,window=8", "two keys are called dropout"
    long = [f"data.corpus={'x' * 150}{end}" for end in "ab"]
    assert len(name(long[0])) == 120 and name(long[0]) != name(long[1])
    assert load_config("configs/gpt2-124m.yaml", ["run.seed=2"])[0].tracking.group == "gpt2-124m"


@pytest.mark.parametrize("key, refusal", [
    ("attention.window=64", "has no sliding window; use tiled or eager, or do without attention.window"),
    ("attention.document_mask=true", "has no documents given by document_ids; use tiled or eager, or do without attention.document_mask"),
    ("attention.dropout=0.1", "or do without attention.dropout"),
    ("model.positions=alibi", "has no ALiBi; use tiled or eager, or do without model.positions: alibi"),
    ("attention.deterministic=true", "the same bits in every backward pass; use tiled or eager, or do without attention.deterministic"),
])
def test_what_attention_is_asked_for_decides_which_backend_can(monkeypatch, load, key, refusal):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load(key, run="")
    assert config.attention.backend == "tiled"
    section, name = key.partition("=")[0].split(".")
    assert getattr(getattr(config, section), name) != getattr(getattr(Config(), section), name)
    message = faults_of(lambda: load(key, "attention.backend=sdpa", run=""))
    assert "attention.backend: sdpa " in message and refusal in message
    assert "do without" not in faults_of(lambda: load(key, "attention.backend=hopper", run="")), "it needs a GPU in any case"
    both = faults_of(lambda: load("attention.window=64", "attention.dropout=0.1", "attention.backend=sdpa", run=""))
    assert "or do without attention.window and attention.dropout" in both


def test_auto_passes_over_a_backend_that_lacks_what_is_asked_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for key in ("attention.window=64", "attention.dropout=0.1", "attention.document_mask=true", "model.positions=alibi"):
        assert load_config("configs/gpt2-124m.yaml", [key])[0].attention.backend == "triton"
    assert load_config("configs/gpt2-124m.yaml", ["attention.deterministic=true"])[0].attention.backend == "hopper"


@pytest.mark.parametrize("given, resolved", [
    ("schedule: wsd", 60), ("schedule: wsd, decay_steps: 7", 7), ("schedule: wsd, warmup_steps: 280", 20), ("schedule: wsd, warmup_steps: 300", 1), ("schedule: cosine", None)])
def test_the_decay_of_wsd_is_a_fifth_of_the_run_unless_given(load, given, resolved):
    assert load(run=f"optimizer: {{{given}}}").optimizer.decay_steps == resolved


def test_a_configuration_can_be_resolved_for_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config, _ = load_config("configs/gpt2-124m.yaml", ["attention.backend=sdpa_flash"], assumed_gpu=(9, 0))
    assert config.attention.backend == "sdpa_flash"
    assert "bf16 needs compute capability 8.0" in faults_of(lambda: load_config("configs/gpt2-124m.yaml", assumed_gpu=(7, 5)))


def test_one_corpus_or_a_mixture_of_them(load):
    assert load(run="data: {corpus: data/a}").data.weights() == {"data/a": 1.0}
    mixed = load(run="data: {corpus: null, mixture: {data/a-v1.5: 0.7, data/b: 3}}").data
    assert mixed.weights() == {"data/a-v1.5": 0.7, "data/b": 3.0}
    assert load("data.mixture.data/b=1", run="data: {corpus: null, mixture: {data/a: 0.7, data/b: 3}}").data.weights() == {"data/a": 0.7, "data/b": 1.0}
    load(run="base: other.yaml\ndata: {corpus: null, mixture: {data/a: 1}}", other="data: {corpus: data/c}")


@pytest.mark.parametrize("data, message", [
    ("{mixture: {data/a: 1}}", "data.mixture: data.corpus and data.mixture both name corpora; make one of them null"),
    ("{corpus: null}", "data.mixture: data.corpus and data.mixture are both null; name a folder in data.corpus, or several in data.mixture"),
    ("{corpus: null, mixture: {data/a: 0}}", "run.yaml:1: data.mixture.data/a: input should be greater than 0, not 0"),
    ("{corpus: null, mixture: {data/a: much}}", "run.yaml:1: data.mixture.data/a: input should be a valid number, not 'much'"),
    ("{corpus: null, mixture: {}}", "data.mixture: dictionary should have at least 1 item"),
    ("{corpus: null, mixture: [data/a, data/b]}", "data.mixture: input should be a valid dictionary"),
])
def test_what_is_no_mixture_is_refused(load, data, message):
    found = faults_of(lambda: load(run=f"data: {data}"))
    assert message in found and "1 fault" in found
