"""Settings that do not compose: a row each, refused when the configuration loads.

    python -m training.compositions      prints the table

A new row goes into ``ROWS`` and nowhere else: tests load its ``example``, which must be refused, and then its ``instead``, which must not.
What depends on the machine is told elsewhere: ``python -m kernels.attention`` says what each attention backend can do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.checkpointing import ATTENTION_OPERATIONS

if TYPE_CHECKING:
    from training.config import Config


@dataclass(frozen=True)
class Row:
    """Keys whose values do not compose.

    Args:
        keys: ``section.key``; a fault is told at the first of them.
        refused: whether a configuration is to be refused; it reads the sections of ``keys`` alone. Nothing is resolved in it but
            attention.backend, which is empty where it is at fault itself.
        reason: why, with ``{section.key}`` for values.
        remedy: the nearest that works.
        example: overrides of ``configs/base.yaml`` that are refused.
        instead: overrides that, after those, follow the remedy.
    """

    keys: tuple[str, ...]
    refused: Callable[["Config"], bool]
    reason: str
    remedy: str
    example: tuple[str, ...]
    instead: tuple[str, ...]

    @property
    def sections(self) -> set[str]:
        return set().union(*map(sections_of, self.keys))

    def message(self, config: "Config") -> str:
        return f"{self.reason.format(**dict(config))}; {self.remedy.format(**dict(config))}"


def sections_of(key: str) -> set[str]:
    """The sections that decide about a key: its own, and for the backend, which ``auto`` chooses, also what it chooses by."""
    return {"attention", "model", "train"} if key == "attention.backend" else {key.split(".")[0]}


ROWS = (
    Row(("model.hidden_size", "model.heads", "model.head_dim"),
        lambda c: c.model.head_dim is None and c.model.hidden_size % c.model.heads != 0,
        "{model.hidden_size} does not divide into {model.heads} heads",
        "change one of them or set head_dim",
        example=("model.hidden_size=100", "model.heads=3"), instead=("model.head_dim=32",)),
    Row(("model.kv_heads", "model.heads"),
        lambda c: c.model.kv_heads is not None and c.model.heads % c.model.kv_heads != 0,
        "{model.heads} query heads do not divide into {model.kv_heads} groups",
        "use a divisor of heads",
        example=("model.kv_heads=5",), instead=("model.kv_heads=4",)),
    Row(("model.head_dim", "model.positions"),
        lambda c: c.model.positions == "rope" and (c.model.head_dim or c.model.hidden_size // c.model.heads) % 2 != 0,
        "rotary positions turn pairs of channels, so head_dim must be even",
        "change it or use positions: learned",
        example=("model.positions=rope", "model.head_dim=33"), instead=("model.positions=learned",)),
    Row(("attention.window", "model.sequence_length"),
        lambda c: c.attention.window is not None and c.attention.window >= c.model.sequence_length,
        "{attention.window} keys hide nothing in sequences of {model.sequence_length}",
        "lower it, or use null",
        example=("attention.window=1024",), instead=("attention.window=null",)),
    Row(("model.init_from", "model.huggingface"),
        lambda c: c.model.init_from is not None and c.model.huggingface is not None,
        "model.init_from begins the project's own GPT, and model.huggingface trains another model in its place",
        "make one of them null",
        example=("model.init_from=a/b", "model.huggingface=a/b"), instead=("model.init_from=null", "model.huggingface=null")),
    Row(("model.huggingface", "attention.backend"),
        lambda c: c.model.huggingface is not None and c.attention.backend not in ("", "auto", "hopper", "triton", "sdpa", "eager"),
        "transformers knows no attention.backend={attention.backend}",
        "use auto, hopper, triton, sdpa or eager",
        example=("model.huggingface=a/b", "attention.backend=tiled"), instead=("attention.backend=auto", "model.huggingface=null")),
    Row(("model.huggingface", "attention.window", "attention.dropout", "attention.deterministic"),
        lambda c: c.model.huggingface is not None and (c.attention.window is not None or c.attention.dropout > 0 or c.attention.deterministic),
        "the model's own config.json says what its attention sees and drops, and transformers has no word for deterministic",
        "leave attention.window, dropout and deterministic as they are, or train the project's own GPT by model.init_from",
        example=("model.huggingface=a/b", "attention.dropout=0.1"), instead=("attention.dropout=0.0", "model.huggingface=null")),
    Row(("model.huggingface", "train.compile"),
        lambda c: c.model.huggingface is not None and c.train.compile is True,
        "what is compiled are the blocks of the project's own GPT",
        "use auto or false",
        example=("model.huggingface=a/b", "train.compile=true"), instead=("train.compile=auto", "model.huggingface=null")),
    Row(("model.huggingface", "optimizer.name"),
        lambda c: c.model.huggingface is not None and c.optimizer.name == "muon",
        "which rows of its matrices belong together Muon does not know",
        "use optimizer.name: adamw",
        example=("model.huggingface=a/b", "optimizer.name=muon"), instead=("optimizer.name=adamw", "model.huggingface=null")),
    Row(("parallel.sequence", "model.heads"),
        lambda c: c.model.heads % c.parallel.sequence != 0,
        "{model.heads} heads do not divide among {parallel.sequence} processes that share a sequence",
        "use a divisor of model.heads; key/value heads need not divide",
        example=("parallel.sequence=5", "model.sequence_length=1000"), instead=("parallel.sequence=1",)),
    Row(("parallel.sequence", "model.sequence_length"),
        lambda c: c.model.sequence_length % c.parallel.sequence != 0,
        "{model.sequence_length} tokens do not divide among {parallel.sequence} processes that share a sequence",
        "use a divisor of model.sequence_length",
        example=("parallel.sequence=3",), instead=("parallel.sequence=1",)),
    Row(("parallel.sequence", "model.huggingface"),
        lambda c: c.parallel.sequence > 1 and c.model.huggingface is not None,
        "sequences are shared in the blocks of the project's own GPT",
        "use parallel.sequence: 1, or train the project's own GPT by model.init_from",
        example=("parallel.sequence=2", "model.huggingface=a/b"), instead=("parallel.sequence=1", "model.huggingface=null")),
    Row(("parallel.sequence", "train.compile"),
        lambda c: c.parallel.sequence > 1 and c.train.compile is True,
        "a block that is compiled is compiled whole, and processes that share a sequence meet within it",
        "use train.compile: auto or false, or parallel.sequence: 1",
        example=("parallel.sequence=2", "train.compile=true"), instead=("train.compile=auto", "parallel.sequence=1")),
    Row(("optimizer.min_lr", "optimizer.lr"),
        lambda c: c.optimizer.min_lr > c.optimizer.lr,
        "{optimizer.min_lr} is above optimizer.lr {optimizer.lr}",
        "lower it",
        example=("optimizer.lr=1e-5",), instead=("optimizer.min_lr=1e-6",)),
    Row(("optimizer.warmup_steps", "train.steps"),
        lambda c: c.optimizer.warmup_steps > c.train.steps,
        "{optimizer.warmup_steps} steps of warm-up do not fit into train.steps {train.steps}",
        "lower it",
        example=("optimizer.warmup_steps=301",), instead=("optimizer.warmup_steps=300",)),
    Row(("optimizer.decay_steps", "optimizer.schedule"),
        lambda c: c.optimizer.decay_steps is not None and c.optimizer.schedule != "wsd",
        "the schedule {optimizer.schedule} has no decay of so many steps: it falls from the warm-up's end to the last step, or not at all",
        "use optimizer.schedule: wsd, or null",
        example=("optimizer.decay_steps=100",), instead=("optimizer.schedule=wsd",)),
    Row(("optimizer.decay_steps", "optimizer.warmup_steps", "train.steps"),
        lambda c: c.optimizer.schedule == "wsd" and c.optimizer.warmup_steps + (c.optimizer.decay_steps or 0) > c.train.steps >= c.optimizer.warmup_steps,
        "{optimizer.warmup_steps} steps of warm-up and {optimizer.decay_steps} of decay do not fit into train.steps {train.steps}",
        "lower it, or raise train.steps",
        example=("optimizer.schedule=wsd", "optimizer.decay_steps=271"), instead=("optimizer.decay_steps=270",)),
    Row(("data.mixture", "data.corpus"),
        lambda c: c.data.corpus is not None and c.data.mixture is not None,
        "data.corpus and data.mixture both name corpora",
        "make one of them null",
        example=("data.mixture={data/shakespeare-gpt2: 1.0}",), instead=("data.corpus=null",)),
    Row(("data.mixture", "data.corpus"),
        lambda c: c.data.corpus is None and c.data.mixture is None,
        "data.corpus and data.mixture are both null",
        "name a folder in data.corpus, or several in data.mixture",
        example=("data.corpus=null",), instead=("data.mixture={data/shakespeare-gpt2: 1.0}",)),
    Row(("zero.reduce_dtype", "train.precision"),
        lambda c: c.train.precision != "bf16" and c.zero.reduce_dtype != "fp32",
        "gradients of an {train.precision} run are summed in fp32",
        "use fp32, or train.precision: bf16",
        example=("train.precision=fp32", "zero.reduce_dtype=bf16"), instead=("zero.reduce_dtype=fp32",)),
    Row(("train.precision", "zero.stage"),
        lambda c: c.train.precision == "fp16" and c.zero.stage == 0,
        "DeepSpeed's stage 0 divides fp16 gradients by a loss scale that it has not multiplied the loss by",
        "use zero.stage: 1, or train.precision: bf16",
        example=("train.precision=fp16", "zero.stage=0"), instead=("zero.stage=1",)),
    Row(("train.bf16_states", "train.precision"),
        lambda c: c.train.bf16_states and c.train.precision != "bf16",
        "states are kept in bf16 where the model is, and train.precision is {train.precision}",
        "use bf16, or leave it out",
        example=("train.precision=fp32", "train.bf16_states=true"), instead=("train.precision=bf16",)),
    Row(("train.bf16_states", "zero.stage"),
        lambda c: c.train.bf16_states and c.zero.stage == 0,
        "DeepSpeed's stage 0 knows fp32 states alone",
        "use zero.stage: 1, which is the same on one process",
        example=("train.bf16_states=true", "zero.stage=0"), instead=("zero.stage=1",)),
    Row(("zero.offload_optimizer", "zero.stage"),
        lambda c: c.zero.offload_optimizer == "cpu" and c.zero.stage == 0,
        "stage 0 keeps the optimizer where the model is",
        "use zero.stage: 1, 2 or 3",
        example=("zero.stage=0", "zero.offload_optimizer=cpu"), instead=("zero.stage=1",)),
    Row(("zero.offload_parameters", "zero.stage"),
        lambda c: c.zero.offload_parameters == "cpu" and c.zero.stage != 3,
        "stage {zero.stage} keeps whole parameters on every GPU",
        "use zero.stage: 3",
        example=("zero.stage=2", "zero.offload_parameters=cpu"), instead=("zero.stage=3",)),
    Row(("optimizer.name", "zero.offload_optimizer"),
        lambda c: c.optimizer.name == "muon" and c.zero.offload_optimizer == "cpu",
        "on the CPU DeepSpeed has Adam alone, and Muon's matrix products belong on a GPU",
        "use optimizer.name: adamw, or zero.offload_optimizer: none",
        example=("optimizer.name=muon", "zero.offload_optimizer=cpu"), instead=("optimizer.name=adamw",)),
    Row(("train.checkpoint_every", "train.activation_checkpointing"),
        lambda c: c.train.activation_checkpointing == "every_n" and c.train.checkpoint_every is None,
        "every_n needs it",
        "say of how many blocks the first is computed again: 2 is every second one",
        example=("train.activation_checkpointing=every_n",), instead=("train.checkpoint_every=2",)),
    Row(("train.checkpoint_every", "train.activation_checkpointing"),
        lambda c: c.train.activation_checkpointing != "every_n" and c.train.checkpoint_every is not None,
        "read by train.activation_checkpointing: every_n alone, and that is {train.activation_checkpointing}",
        "use every_n, or null",
        example=("train.checkpoint_every=2",), instead=("train.activation_checkpointing=every_n",)),
    Row(("train.checkpoint_every", "model.layers"),
        lambda c: c.train.activation_checkpointing == "every_n" and (c.train.checkpoint_every or 0) > c.model.layers,
        "{train.checkpoint_every} blocks are more than model.layers {model.layers}",
        "lower it",
        example=("train.activation_checkpointing=every_n", "train.checkpoint_every=13"), instead=("train.checkpoint_every=12",)),
    Row(("train.activation_checkpointing", "attention.backend"),
        lambda c: c.train.activation_checkpointing == "selective" and c.attention.backend not in ("", *ATTENTION_OPERATIONS),
        "selective keeps what attention returns, by the name of its operation, and attention.backend={attention.backend} has none that PyTorch sees",
        f"use attention.backend={' or '.join(list(ATTENTION_OPERATIONS)[:2])} or sdpa, or full",
        example=("train.activation_checkpointing=selective", "attention.backend=eager"), instead=("attention.backend=sdpa",)),
    Row(("train.checkpoint_offload", "train.activation_checkpointing"),
        lambda c: c.train.checkpoint_offload and c.train.activation_checkpointing not in ("full", "every_n"),
        "what waits in the CPU's memory is the one input that full and every_n keep of a block, and train.activation_checkpointing is {train.activation_checkpointing}",
        "use full or every_n, or false; deepspeed has train.cpu_checkpointing",
        example=("train.checkpoint_offload=true",), instead=("train.activation_checkpointing=full",)),
    Row(("train.keep_matmuls", "train.activation_checkpointing"),
        lambda c: c.train.keep_matmuls and c.train.activation_checkpointing != "selective",
        "read by train.activation_checkpointing: selective alone, and that is {train.activation_checkpointing}",
        "use selective, or false",
        example=("train.keep_matmuls=true",), instead=("train.activation_checkpointing=selective",)),
    Row(("train.mlp_tile", "train.keep_matmuls"),
        lambda c: c.train.mlp_tile is not None and c.train.keep_matmuls,
        "train.keep_matmuls keeps for a whole sequence what tiles are there to leave out",
        "use train.keep_matmuls: false, or null",
        example=("train.mlp_tile=128", "train.activation_checkpointing=selective", "train.keep_matmuls=true", "attention.backend=sdpa"),
        instead=("train.keep_matmuls=false",)),
    Row(("train.mlp_tile", "train.compile"),
        lambda c: c.train.mlp_tile is not None and c.train.compile is True,
        "a block that is compiled is compiled whole, and tiles are computed one after another",
        "use train.compile: auto or false, or null",
        example=("train.mlp_tile=128", "train.compile=true"), instead=("train.compile=auto",)),
    Row(("model.huggingface", "train.mlp_tile"),
        lambda c: c.model.huggingface is not None and c.train.mlp_tile is not None,
        "tiles are cut in the blocks of the project's own GPT",
        "use train.mlp_tile: null",
        example=("model.huggingface=a/b", "train.mlp_tile=128"), instead=("train.mlp_tile=null", "model.huggingface=null")),
    Row(("train.compile", "attention.deterministic"),
        lambda c: c.train.compile is True and c.attention.deterministic,
        "the compiler chooses among kernels by their speed on this machine, and each adds up in an order of its own",
        "use false, or auto",
        example=("train.compile=true", "attention.deterministic=true", "attention.backend=eager"), instead=("train.compile=auto",)),
    Row(("train.partition_activations",),
        lambda c: c.train.partition_activations is True,
        "activations are partitioned over a tensor-parallel group, and there is none here",
        "use false, with train.cpu_checkpointing: true for less memory; classic does what older recipes did, as configs/deepspeed-offload.yaml says",
        example=("train.activation_checkpointing=deepspeed", "train.partition_activations=true"), instead=("train.partition_activations=false",)),
    Row(("train.partition_activations", "train.activation_checkpointing", "train.cpu_checkpointing"),
        lambda c: c.train.partition_activations == "classic" and not (c.train.activation_checkpointing == "deepspeed" and c.train.cpu_checkpointing),
        "classic goes with train.activation_checkpointing: deepspeed and train.cpu_checkpointing: true",
        "use both, or false",
        example=("train.partition_activations=classic",), instead=("train.activation_checkpointing=deepspeed",)),
)  # fmt: skip


def faults(config: "Config") -> list[tuple[set[str], str, str]]:
    """What does not compose in a configuration: (sections read, key, what and remedy)."""
    return [(row.sections, row.keys[0], row.message(config)) for row in config.rows if row.refused(config)]


def table() -> str:
    """The rows as Markdown."""
    named = str.maketrans("{}", "``")
    lines = ["| settings | do not compose where | the nearest that works |", "| --- | --- | --- |"]
    lines += [f"| {', '.join(f'`{key}`' for key in row.keys)} | {row.reason.translate(named)} | {row.remedy.translate(named)} |" for row in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
