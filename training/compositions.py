"""Settings that do not compose: a row each, refused when the configuration loads.

    python -m training.compositions      prints the table

A new row goes into ``ROWS`` and nowhere else: tests load its ``example``, which must be refused, and then its ``instead``, which must not.
What depends on the machine is told elsewhere: ``python -m kernels.attention`` says what each attention backend can do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    Row(("data.corpus", "data.mixture"),
        lambda c: c.data.corpus is None and c.data.mixture is None,
        "data.corpus and data.mixture are both null",
        "name a folder in data.corpus, or several in data.mixture",
        example=("data.corpus=null",), instead=("data.mixture={data/shakespeare-gpt2: 1.0}",)),
    Row(("zero.reduce_dtype", "train.precision"),
        lambda c: c.train.precision == "fp32" and c.zero.reduce_dtype != "fp32",
        "gradients of an fp32 run are fp32",
        "use fp32, or train.precision: bf16",
        example=("train.precision=fp32", "zero.reduce_dtype=bf16"), instead=("zero.reduce_dtype=fp32",)),
)  # fmt: skip


def faults(config: "Config") -> list[tuple[set[str], str, str]]:
    """What does not compose in a configuration: (sections read, key, what and remedy)."""
    return [(row.sections, row.keys[0], row.message(config)) for row in ROWS if row.refused(config)]


def table() -> str:
    """The rows as Markdown."""
    named = str.maketrans("{}", "``")
    lines = ["| settings | do not compose where | the nearest that works |", "| --- | --- | --- |"]
    lines += [f"| {', '.join(f'`{key}`' for key in row.keys)} | {row.reason.translate(named)} | {row.remedy.translate(named)} |" for row in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
