"""From YAML files and command-line overrides to one checked configuration.

A run is one YAML file.  ``base:`` names a file it builds on, ``key.sub=value`` on the command line overrides both.
Everything that is wrong is reported at once, each fault with the file and line it came from.
"""

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from kernels.attention import choose, unsupported
from model.config import AttentionConfig, GPTConfig
from training import compositions, pretrained

_LONGEST_RUN_NAME = 120  # a folder's name may have 255 bytes


class ConfigError(ValueError):
    """One or more faults in a configuration; the message lists them all."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    name: str | None = Field(None, pattern=r"^[^/\\*?\[\]]*[^/\\.*?\[\]][^/\\*?\[\]]*$")  # DeepSpeed takes * ? [ for patterns of files
    output_dir: str = "runs"
    seed: int = Field(1234, ge=0, lt=2**62)


class ModelSection(GPTConfig):
    init_from: Annotated[str, Field(min_length=1)] | None = None
    huggingface: Annotated[str, Field(min_length=1)] | None = None


class DataSection(Section):
    corpus: str | None = "data/shakespeare-gpt2"
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)

    def weights(self) -> dict[str, float]:
        """Folder -> weight of every corpus; one of the two keys is null."""
        return self.mixture or {self.corpus: 1.0}


class TrainSection(Section):
    steps: PositiveInt = 300
    micro_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = 1
    global_batch_size: PositiveInt | None = 128
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    initial_loss_scale: float = Field(65536.0, ge=1)
    loss_scale_window: PositiveInt = 1000
    bf16_states: bool = False
    activation_checkpointing: Literal["none", "full", "every_n", "selective", "deepspeed"] = "none"
    checkpoint_every: Annotated[int, Field(ge=2)] | None = None
    checkpoint_offload: bool = False
    keep_matmuls: bool = False
    cpu_checkpointing: bool = True
    partition_activations: bool | Literal["classic"] = False
    mlp_tile: PositiveInt | None = None
    compile: bool | Literal["auto"] = "auto"
    stop_after_skipped: PositiveInt = 10


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    lr: float = Field(6e-4, gt=0)
    min_lr: float = Field(6e-5, ge=0)
    warmup_steps: NonNegativeInt = 30
    decay_steps: PositiveInt | None = None
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    muon_lr: float = Field(0.02, gt=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_weight_decay: float = Field(0.01, ge=0)


class ZeroSection(Section):
    stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    reduce_bucket_size: PositiveInt = 50_000_000
    prefetch_bucket_size: PositiveInt = 100_000_000
    persistence_threshold: NonNegativeInt = 100_000
    reuse_distance: NonNegativeInt = 1_000_000_000


class ParallelSection(Section):
    sequence: PositiveInt = 1


class CheckpointSection(Section):
    every: NonNegativeInt | None = 250
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    resume: str = Field("auto", min_length=1)
    stop_seconds: PositiveInt = 60


class EvalSection(Section):
    every: NonNegativeInt = 100
    sequences: PositiveInt | None = 1024


class SampleSection(Section):
    prompt: str = "\n"
    tokens: NonNegativeInt = 128
    temperature: float = Field(0.8, ge=0)
    top_k: PositiveInt | None = 50


class TrackingSection(Section):
    log_every: PositiveInt = 10
    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "gpt-recipe"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []


class Sharing(NamedTuple):
    """Processes of a run that read the same samples."""

    processes: int
    what: str  # they share
    key: str  # that says so

    def of(self, world_size: int) -> str:
        return f"{world_size} processes" + f" / {self.processes} that share {self.what}" * (self.processes > 1)


class Config(Section):
    """One run.  ``configs/base.yaml`` documents every key."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    attention: AttentionConfig = AttentionConfig()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    zero: ZeroSection = ZeroSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    sample: SampleSection = SampleSection()
    tracking: TrackingSection = TrackingSection()

    rows: ClassVar = compositions.ROWS  # what does not compose

    @property
    def sharing(self) -> Sharing:
        return Sharing(self.parallel.sequence, "a sequence", "parallel.sequence")

    @property
    def engine(self) -> str:
        return f"ZeRO stage {self.zero.stage}"


# --- YAML -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, not 1.1's: ``1e-4`` is a float, ``off`` a string, ``010`` ten, a date a string."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class _Tree:
    """Nested keys and values, each leaf with the place it came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[tuple[str, ...], str] = {}
        self.overridden: dict[str, str] = {}
        self.faults: list[str] = []

    def origin(self, path: Iterable) -> str:
        """The place that set this key, or the nearest enclosing one that is known."""
        path = tuple(str(part) for part in path)
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "defaults")

    def set(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        """Merge value in at path: mappings key by key, everything else replaced."""
        section = self.values
        for depth, part in enumerate(path[:-1], start=1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                self.faults.append(f"{origin}: {'.'.join(path)}: {'.'.join(path[:depth])} is {section!r} in {self.origin(path[:depth])}, not a section")
                return
        self.origins[path] = origin
        if not (isinstance(value, dict) and isinstance(section.get(path[-1]), dict)):
            section[path[-1]] = value

    def read(self, file: Path, including: tuple[Path, ...] = ()) -> None:
        """Merge a YAML file in, its ``base:`` first."""
        if file.resolve() in including:
            self.faults.append(f"{file}: base: the file includes itself by way of {' -> '.join(p.name for p in including)}; remove one base")
            return
        try:
            root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
        except FileNotFoundError:
            self.faults.append(f"{file}: no such file; the shipped configurations are in configs/")
            return
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            self.faults.append(f"{file}: not readable as YAML: {' '.join(str(error).split())}")
            return
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            self.faults.append(f"{file}: the top level must be a mapping of sections (run:, model:, ...)")
            return
        for key, value in root.value:
            if key.value == "base":
                if not isinstance(value, yaml.ScalarNode) or not value.value:
                    self.faults.append(f"{file}:{key.start_mark.line + 1}: base: must be the name of one YAML file")
                    continue
                self.read(file.parent / value.value, (*including, file.resolve()))
        self._merge((), root, lambda node: f"{file}:{node.start_mark.line + 1}")

    def _merge(self, path: tuple[str, ...], node: yaml.Node, place: Callable[[yaml.Node], str]) -> None:
        """Merge what a YAML node says in at path; ``place`` tells where a node stands."""
        if len(path) > 9:  # an alias to what encloses it has no end
            self.faults.append(f"{place(node)}: {'.'.join(path[:2])}: nested too deeply; keys are section.key")
            return
        if not isinstance(node, yaml.MappingNode):
            try:
                self.set(path, _Loader("").construct_object(node, deep=True), place(node))
            except (yaml.YAMLError, ValueError) as error:
                self.faults.append(f"{place(node)}: {'.'.join(path)}: {' '.join(str(error).split())}")
            return
        if path:
            self.set(path, {}, place(node))
        seen: dict[str, str] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                self.faults.append(f"{place(key)}: {'.'.join((*path, name))}: given twice, first in {seen[name]}; remove one")
            elif path or name != "base":
                self._merge((*path, name), value, place)
            seen.setdefault(name, place(key))

    def override(self, text: str) -> None:
        """Merge one ``key.sub=value`` of the command line in; the value is read as YAML."""
        key, equals, value = text.partition("=")
        if not equals or not key:
            self.faults.append(f"command line: {text!r}: not of the form section.key=value")
            return
        try:
            node = yaml.compose(value, Loader=_Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except yaml.YAMLError as error:
            self.faults.append(f"command line: {key}: {' '.join(str(error).split())}")
            return
        self.overridden[key] = value
        self._merge(tuple(key.split(".")), node, lambda node: "command line")


# --- Checks ---------------------------------------------------------------------------------------------------------


def _describe(error: dict, tree: _Tree, schema: type[Config]) -> str:
    """One pydantic error as: place: key: what, remedy."""
    path = error["loc"]
    key = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        section: Any = schema
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        close = difflib.get_close_matches(str(path[-1]), section.model_fields, n=1, cutoff=0.0)
        what = f"unknown key; the nearest valid one is {'.'.join(str(part) for part in (*path[:-1], *close))}"
    else:
        what = f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
    return f"{tree.origin(path)}: {key}: {what}"


def _resolve_batch(train: TrainSection, world_size: int, sharing: Sharing) -> tuple[TrainSection, str | None]:
    """Fill in the one of micro, accumulation and global batch size that is null; refuse what does not multiply out."""
    micro, accumulation, total = train.micro_batch_size, train.gradient_accumulation_steps, train.global_batch_size
    given = f"micro_batch_size {micro} x gradient_accumulation_steps {accumulation} x {sharing.of(world_size)}, global_batch_size {total}"
    world_size //= sharing.processes
    if [micro, accumulation, total].count(None) > 1:
        return train, f"only one of the three may be null ({given}); set the others"
    if total is None:
        total = micro * accumulation * world_size
    elif micro is None:
        micro = total // (accumulation * world_size)
    elif accumulation is None:
        accumulation = total // (micro * world_size)
    if not micro or not accumulation or micro * accumulation * world_size != total:
        return train, f"the batch sizes do not multiply out: {given}; change one of them, or make one null and it follows from the others"
    resolved = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "global_batch_size": total}
    return train.model_copy(update=resolved), None


def load_config(
    file: str | Path, overrides: Iterable[str] = (), *, world_size: int = 1, assumed_gpu: tuple[int, int] | None = None, schema: type[Config] = Config
) -> tuple[Config, list[str]]:
    """Read, merge, check and resolve one run's configuration.

    Args:
        file: the YAML file; relative ``base:`` paths in it are relative to it.
        overrides: ``section.key=value`` strings; values are YAML.
        world_size: number of processes of the run, for the batch arithmetic.
        assumed_gpu: compute capability of a GPU to resolve for; None: this machine's, or its CPU.
        schema: the class of the configuration.

    Returns:
        The configuration with every derived value filled in, and what ``auto`` chose and why, a line each.

    Raises:
        ConfigError: every fault found, a line each: file and line, key, what is wrong, remedy.
    """
    file = Path(file)
    tree = _Tree()
    tree.read(file)
    for text in overrides:
        tree.override(text)
    faults = tree.faults
    broken: set[str] = set()
    try:
        config = schema.model_validate(tree.values)
    except ValidationError as error:
        faults += [_describe(fault, tree, schema) for fault in error.errors()]
        broken = {str(fault["loc"][0]) for fault in error.errors()}
        # The sound sections are checked on, so that every fault is told at once.
        config = schema.model_validate({section: values for section, values in tree.values.items() if section not in broken})
    given = {} if "model" in broken else tree.values.get("model", {})
    config, pretrained_faults = _resolve_pretrained(config, given)
    faults += [f"{tree.origin(key.split('.'))}: {key}: {what}" for key, what in pretrained_faults]
    config, notes, found = _resolve(config, _run_name(file, tree.overridden, schema), file.stem, world_size, assumed_gpu)
    faults += [f"{tree.origin(key.split('.'))}: {key}: {what}" for sections, key, what in found if not broken & sections]
    if faults:
        raise ConfigError(f"{file}: {len(faults)} fault{'s' * (len(faults) > 1)} in the configuration\n" + "\n".join(f"  {f}" for f in faults))
    return config, notes


def _run_name(file: Path, overridden: dict[str, str], schema: type[Config]) -> str:
    """The file's name and what the command line makes differ in the curve: ``gpt2-124m,backend=sdpa,seed=2``."""
    silent = ("run.name", "run.output_dir", "checkpoint.", "eval.", "sample.", "tracking.")
    holders = Counter(key for section in schema.model_fields.values() for key in section.annotation.model_fields)
    differing = []
    for key, value in overridden.items():
        last = Path(key.split(".")[-1]).name  # a key of data.mixture is a folder
        if not key.startswith(silent):
            differing.append(f"{key if holders[last] > 1 else last}={re.sub(r'[^-.,=+0-9A-Za-z_]', '', Path(value).name)}")
    name = ",".join([file.stem, *differing])
    if len(name) <= _LONGEST_RUN_NAME:
        return name
    return f"{name[:_LONGEST_RUN_NAME - 9]},{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _resolve_pretrained(config: Config, given: dict[str, Any]) -> tuple[Config, list[tuple[str, str]]]:
    """The architecture of model.init_from or model.huggingface, and what of ``given``, the run's own ``model``, contradicts it: (key, what)."""
    keys = {"model.init_from", "model.huggingface"}
    if (config.model.init_from, config.model.huggingface) == (None, None) or any(keys & set(row.keys) and row.refused(config) for row in config.rows):
        return config, []
    model, faults = pretrained.resolve(config.model, given, config.attention.window)
    return config.model_copy(update={"model": model}), faults


def _resolve(
    config: Config, run_name: str, group: str, world_size: int, assumed_gpu: tuple[int, int] | None
) -> tuple[Config, list[str], list[tuple[set[str], str, str]]]:
    """Derived values, ``auto``'s choice, and the faults that only several keys together show: (sections read, key, what and remedy)."""
    backend, notes, backend_faults = _resolve_backend(config, assumed_gpu)
    attention = config.attention.model_copy(update={"backend": "" if backend_faults else backend})
    faults = compositions.faults(config.model_copy(update={"attention": attention}))
    faults += [(compositions.sections_of("attention.backend"), key, what) for key, what in backend_faults]
    train, sharing = config.train, config.sharing
    if any(key == sharing.key for _, key, _ in faults):
        pass  # told; of the batch nothing is known then
    elif world_size % sharing.processes:
        what = f"{sharing.processes} processes share {sharing.what}, and {world_size} cannot be divided into such groups"
        remedy = f"use a divisor of {world_size}, 1 for no sharing, or start a multiple of {sharing.processes} processes"
        faults.append((compositions.sections_of(sharing.key), sharing.key, f"{what}; {remedy}"))
    else:
        train, batch_fault = _resolve_batch(train, world_size, sharing)
        if batch_fault:
            faults.append(({"train"} | compositions.sections_of(sharing.key), "train.global_batch_size", batch_fault))
    if set("*?[") & set(config.run.output_dir):
        faults.append(({"run"}, "run.output_dir", f"{config.run.output_dir} has one of * ? [ in it, which DeepSpeed takes for a pattern; rename that folder"))
    on_gpu = assumed_gpu is not None or torch.cuda.is_available()
    if train.compile == "auto":
        compiled, why = _choose_compile(config, backend, on_gpu)
        train = train.model_copy(update={"compile": compiled})
        notes.append(f"train.compile: auto -> {str(compiled).lower()} ({why})")
    notes += _mode_notes(config, on_gpu=on_gpu)
    resolved = config.model_copy(update={
        "run": config.run.model_copy(update={"name": config.run.name or run_name}),
        "model": config.model.resolved(),
        "attention": attention,
        "train": train,
        "optimizer": _resolve_decay(config.optimizer, config.train.steps),
        "tracking": config.tracking.model_copy(update={"group": config.tracking.group or group}),
    })
    return resolved, notes, faults


def _choose_compile(config: Config, backend: str, on_gpu: bool) -> tuple[bool, str]:
    """What train.compile: auto comes to, and why."""
    if not on_gpu:
        return False, "on a CPU it saves nothing, and takes a minute"
    if config.model.huggingface is not None:
        return False, "model.huggingface: what is compiled are the blocks of the project's own GPT"
    if config.train.mlp_tile is not None:
        return False, "train.mlp_tile: a block that is compiled is compiled whole"
    if config.parallel.sequence > 1:
        return False, "parallel.sequence: a block that is compiled is compiled whole, and processes meet within it"
    if config.attention.deterministic:
        return False, "attention.deterministic: what is compiled may add up in another order after another start"
    if backend in ("flex", "flash_attn"):
        return False, f"attention.backend: {backend}, with which it has not been tried on a GPU"
    return True, "on a GPU fewer and larger kernels; the first step takes a minute, a later start's less"


def _resolve_decay(optimizer: OptimizerSection, steps: int) -> OptimizerSection:
    """Fill in a null decay_steps of the schedule that has one: a fifth of the run, less where the warm-up leaves less."""
    if optimizer.schedule != "wsd" or optimizer.decay_steps is not None:
        return optimizer
    return optimizer.model_copy(update={"decay_steps": max(1, min(math.ceil(steps / 5), steps - optimizer.warmup_steps))})


def _mode_notes(config: Config, *, on_gpu: bool) -> list[str]:
    """What DeepSpeed makes of what was asked for, where its name would make one expect otherwise."""
    train, zero, notes = config.train, config.zero, []
    if train.activation_checkpointing == "deepspeed" and train.partition_activations == "classic":
        notes.append("train.partition_activations: classic -> block inputs are partitioned over 1 process: each keeps the whole of its own, and saves no memory "
                     "by it; they are copied to the CPU and back one by one, and computation waits for each copy")
    elif train.activation_checkpointing == "deepspeed" and train.cpu_checkpointing:
        notes.append("train.cpu_checkpointing: true -> " + (
            "block inputs go to pinned memory of the CPU while the next block is computed; the last one's stays; computation waits for each on its way back"
            if on_gpu else "block inputs are on the CPU as it is: nothing is moved"))
    if not on_gpu and train.checkpoint_offload:
        notes.append("train.checkpoint_offload: true -> block inputs are on the CPU as it is; they are copied there and back all the same")
    if not on_gpu and "cpu" in (zero.offload_optimizer, zero.offload_parameters):
        notes.append("zero.offload_*: cpu -> all is on the CPU as it is; DeepSpeed takes the same path as beside a GPU")
    return notes


def _resolve_backend(config: Config, assumed_gpu: tuple[int, int] | None) -> tuple[str, list[str], list[tuple[str, str]]]:
    """The attention backend by name; what ``auto`` chose and why; the reason an explicit one cannot do what is asked."""
    model = config.model.resolved()
    on_gpu = assumed_gpu is not None or torch.cuda.is_available()
    capability = assumed_gpu or (torch.cuda.get_device_capability() if on_gpu else None)
    if on_gpu and config.train.precision == "bf16" and capability < (8, 0):
        return "", [], [("train.precision", f"bf16 needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}; use fp16 or fp32")]
    backend = config.attention.backend
    asked = {
        "device_type": "cuda" if on_gpu else "cpu",
        "dtype": {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision],
        "head_dim": max(1, model.head_dim),  # hidden_size below heads is told by its own fault
        "compute_capability": capability,
        "grouped": model.kv_heads != model.heads,
        "window": config.attention.window is not None,
        "document_ids": config.attention.document_mask,
        "alibi": model.positions == "alibi",
        "dropout": config.attention.dropout > 0,
        "deterministic": config.attention.deterministic,
    }
    if config.model.huggingface is not None:  # its layers may differ, and only they know what they ask for: each call chooses
        reason = unsupported(backend, **{key: asked[key] for key in ("device_type", "dtype", "head_dim", "compute_capability")})
        if reason is None or backend not in ("hopper", "triton"):  # any other is refused, or transformers' own
            return backend, [], []
        return backend, [], [("attention.backend", reason.removeprefix("attention.backend=").split("; ")[0] + "; use auto, sdpa or eager")]
    if backend == "auto":
        chosen, why = choose(**asked)
        return chosen, [f"attention.backend: auto -> {chosen} ({why})"], []
    reason = unsupported(backend, **asked)
    if reason is None:
        return backend, [], []
    keys = {"window": "attention.window", "document_ids": "attention.document_mask", "alibi": "model.positions: alibi",
            "dropout": "attention.dropout", "deterministic": "attention.deterministic"}
    plain = asked | dict.fromkeys(keys, False)
    if unsupported(backend, **plain) is None:
        refused = [key for feature, key in keys.items() if asked[feature] and unsupported(backend, **plain | {feature: True})]
        reason += f", or do without {' and '.join(refused)}"
    return backend, [], [("attention.backend", reason.removeprefix("attention.backend="))]
