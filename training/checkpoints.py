"""Checkpoints: a crash at any moment leaves the last complete one usable, and none is read before it is found intact.

    checkpoints/
      latest                     the name of the newest complete one
      step_00000100/
        manifest.json            bytes and SHA-256 of every other file
        state.json               LoopState, the configuration, and the layout it was saved in
        rng_rank_00000.pt        the random generators of each rank
        *_states.pt              DeepSpeed's: parameters and optimizer states

A checkpoint is written as ``step_N.tmp``; only when every rank is done and every byte is on the disk is it renamed, and only then does
``latest`` name it.  A folder without the suffix is therefore complete, and what its manifest does not confirm was damaged later.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from training.config import CheckpointSection, Config, OptimizerSection
from training.distributed import LoneFault, UserFault, from_first_rank, gather, together
from training.engine import StepResult, set_hyperparameters
from training.files import rename_durably, write_atomically
from training.loss_scale import LossScale
from training.manifest import STATE_FILE, complete_checkpoints, faults_of, named_checkpoints, seal, step_folder, step_of, write_manifest
from training.schedule import learning_rate
from training.universal import convert_to_universal, load_universal
from training.universal import read_weights as universal_weights

LATEST_FILE = "latest"
# Bytes a parameter, at most: fp32 master weight, two moments, and the copy that stages 0 to 2 write beside them.
_BYTES_PER_PARAMETER = 16
# A conversion may outlast the process group's time-out: the ranks that wait for it meet this often.
_WAIT_SECONDS = 20
# All that DeepSpeed's checkpoints hold besides tensors and plain containers.
ALLOWED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


@dataclass
class LoopState:
    """All that a resumed run needs besides parameters, optimizer states and random generators."""

    step: int = 0  # optimizer steps taken, skipped ones included; data order and learning rate follow from it
    skipped_steps: int = 0  # those whose loss or gradients were not finite
    skipped_in_a_row: int = 0
    overflow_steps: int = 0  # of the skipped ones, those whose gradients alone overflowed in fp16, and that the loss scale answered by falling
    loss_scale: LossScale | None = None  # fp16's
    elapsed_seconds: float = 0.0  # of training, over all starts of the run
    wandb_id: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loss_scale, dict):  # as state.json holds it
            self.loss_scale = LossScale(**self.loss_scale)

    def count(self, result: StepResult) -> None:
        """One more step. Where the loss scale falls it is not the run that goes astray: such steps do not count as skipped in a row."""
        self.step += 1
        self.skipped_steps += not result.applied
        self.overflow_steps += result.overflow
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + (not result.overflow)


def layout(config: Config) -> dict[str, Any]:
    """What decides which file holds what: another layout needs conversion."""
    return {"world_size": dist.get_world_size(), "zero_stage": config.zero.stage, "precision": config.train.precision, **_newer_layout(config)}


def _newer_layout(config: Config) -> dict[str, Any]:
    """What older checkpoints do not mention: they have its defaults."""
    return {"offload_optimizer": config.zero.offload_optimizer, "bf16_states": config.train.bf16_states}


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint and the content of its state.json."""

    folder: Path
    saved: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        return cls(folder, json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    @property
    def state(self) -> LoopState:
        return LoopState(**self.saved["loop"])

    def needs_conversion(self, config: Config) -> bool:
        return _newer_layout(Config()) | self.saved["layout"] != layout(config)


# --- Writing --------------------------------------------------------------------------------------------------------


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, state: LoopState, config: Config, *, corpus_sha256: str, parameters: int) -> Path:
    """Write the checkpoint of ``state.step`` into ``folder``, point ``latest`` to it and prune older ones; call it on every rank.

    Args:
        folder: the run's ``checkpoints``.
        parameters: of the model, for the check that the disk has room.

    Returns:
        The new checkpoint's folder.

    Raises:
        UserFault: the disk is full or not writable; earlier checkpoints are as they were.
    """

    def write(temporary: Path) -> None:
        try:
            with _told_if_not_written(temporary):
                engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
        except UserFault as error:
            raise LoneFault(str(error)) from error

    return save_as(write, folder, state, config, corpus_sha256=corpus_sha256, parameters=parameters)


def save_as(write: Callable[[Path], None], folder: Path, state: LoopState, config: Config, *, corpus_sha256: str, parameters: int) -> Path:
    """What ``save`` does, where ``write`` puts parameters and optimizer states into a folder; it is called on every rank."""
    final = step_folder(folder, state.step)
    temporary = final.with_suffix(".tmp")
    first = dist.get_rank() == 0
    together(lambda: _make_room(folder, _BYTES_PER_PARAMETER * parameters), here=first)
    write(temporary)
    together(lambda: _save_generators(temporary))

    def write_state() -> None:
        saved = {"loop": dataclasses.asdict(state), "layout": layout(config), "config": config.model_dump(),
                 "corpus_sha256": corpus_sha256, "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__}}
        (temporary / STATE_FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")

    together(write_state, here=first)
    files = from_first_rank(lambda: sorted(temporary.iterdir()))
    if not all(gather(temporary / _generators_file(dist.get_rank()) in files)):
        raise UserFault(f"run.output_dir: {folder} is not the same folder on every host; choose one that all of them share")
    mine = files[dist.get_rank() :: dist.get_world_size()]
    seals = gather(together(lambda: {file.name: seal(file) for file in mine}))
    together(lambda: _publish(temporary, final, {name: entry for part in seals for name, entry in part.items()}, config.checkpoint), here=first)
    return final


def _make_room(folder: Path, needed: int) -> None:
    """Remove what earlier crashes left, and see that the disk has room."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserFault(f"{folder}: a checkpoint needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; earlier checkpoints are complete: "
                        f"free some space, lower checkpoint.keep_last, or choose another run.output_dir, and start again")


def _save_generators(folder: Path) -> None:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    with _told_if_not_written(folder):
        torch.save(generators, folder / _generators_file(dist.get_rank()))


@contextlib.contextmanager
def _told_if_not_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch's word for a failed write
            raise
        raise UserFault(f"{folder} could not be written: {error}; earlier checkpoints are complete, mend the disk and start again") from error


def _generators_file(rank: int) -> str:
    return f"rng_rank_{rank:05d}.pt"


def _publish(temporary: Path, final: Path, seals: dict[str, Any], section: CheckpointSection) -> None:
    write_manifest(temporary, seals)
    rename_durably(temporary, final)
    write_atomically(final.parent / LATEST_FILE, final.name + "\n")
    for old in complete_checkpoints(final.parent)[section.keep_last :]:
        if not section.keep_every or step_of(old) % section.keep_every:
            _remove(old)


def _remove(folder: Path) -> None:
    """By way of another name: half a checkpoint must not look like one."""
    doomed = folder.with_suffix(".old.tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed)


# --- Finding --------------------------------------------------------------------------------------------------------


def set_aside(checkpoint: Path) -> str:
    """Renames a damaged checkpoint ``step_N`` to ``step_N.damaged``, or ``.damaged2`` where that is an earlier one; the new name."""
    suffixes = (f".damaged{n or ''}" for n in itertools.chain([0], itertools.count(2)))
    aside = next(place for place in map(checkpoint.with_suffix, suffixes) if not place.exists())
    return checkpoint.rename(aside).name


def find_checkpoint(resume: str, folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that ``checkpoint.resume`` asks for, found intact; call it on every rank.

    Args:
        resume: ``auto`` takes the newest intact one of this run, if it has any; ``never`` none; anything else is the path of a
            checkpoint, or of a run, whose newest intact one is taken.
        folder: this run's ``checkpoints``.

    Returns:
        The checkpoint, None where the run starts from the beginning; and a line for each damaged one that was passed over.

    Raises:
        UserFault: what is asked for is not there or damaged, or none of several is intact.
    """
    own = from_first_rank(lambda: complete_checkpoints(folder))
    if resume == "auto" and not own:
        return None, []
    candidates = own if resume == "auto" else [] if resume == "never" else from_first_rank(lambda: _named_ones(Path(resume)))
    its_own = bool(candidates) and candidates[0].resolve().parent == folder.resolve()
    if own and not its_own:
        raise UserFault(f"checkpoint.resume={resume}: {folder} already holds checkpoints; choose another run.name, or move them away")
    if its_own and candidates[0].resolve() != own[0].resolve():
        raise UserFault(f"checkpoint.resume: this run has newer checkpoints than {candidates[0]} ({own[0].name}); "
                        "branch off under another run.name, or move them away")
    if resume == "never":
        return None, []
    damaged = []
    for candidate in candidates:
        shares = gather(faults_of(candidate, share=slice(dist.get_rank(), None, dist.get_world_size())))
        faults = [fault for share in shares for fault in share]
        told = [f"checkpoint {each} is damaged and passed over: {what}" for each, what in damaged]
        if not faults:
            if its_own:  # aside, or it would count among those to keep
                names = from_first_rank(lambda: [set_aside(each) for each, _ in damaged])
                told = [f"{line}; it is now {name}" for line, name in zip(told, names, strict=True)]
            return from_first_rank(lambda: Checkpoint.read(candidate)), told
        damaged.append((candidate, faults[0] + f" (and {len(faults) - 1} more)" * (len(faults) > 1)))
    told = [f"checkpoint {each} is damaged: {what}" for each, what in damaged]
    raise UserFault("\n".join(told) + f"\ncheckpoint.resume={resume}: no intact checkpoint is left; "
                    "checkpoint.resume=never and another run.name start from the beginning")


def _named_ones(path: Path) -> list[Path]:
    found = named_checkpoints(path)
    if not found:
        what = "holds no checkpoint" if path.exists() else "does not exist"
        raise UserFault(f"checkpoint.resume: {path} {what}; give the folder of a run or of one checkpoint (runs/NAME/checkpoints/step_...)")
    if glob.escape(str(path)) != str(path):
        raise UserFault(f"checkpoint.resume: {path} has one of * ? [ in it, which DeepSpeed takes for a pattern; rename that folder")
    return found


def check_fits(checkpoint: Checkpoint, config: Config, *, corpus_sha256: str) -> list[str]:
    """A line for each setting that changed since the checkpoint was saved; a key newer than the checkpoint had its default then.

    Raises:
        UserFault: one changed that the saved weights or the order of the data do not survive.
    """
    fixed = {"run.seed", "train.global_batch_size", "optimizer.name"}
    not_architecture = ("model.dropout", "model.init_from", "model.huggingface")
    free = {"run", "checkpoint", "tracking", "sample", "eval", "attention.backend", "data"}
    changed, faults = [], []
    before, now = _flat(Config().model_dump()) | _flat(checkpoint.saved["config"]), _flat(config.model_dump())
    before["data.corpus_sha256"], now["data.corpus_sha256"] = checkpoint.saved["corpus_sha256"], corpus_sha256
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        line = f"{key}: {before.get(key)} -> {now.get(key)}"
        if key in fixed or key == "data.corpus_sha256" or (key.startswith("model.") and key not in not_architecture):
            faults.append(line)
        elif key not in free and key.split(".")[0] not in free:
            changed.append(f"changed since the checkpoint: {line}")
    if ("megatron" in checkpoint.saved["config"]) != hasattr(config, "megatron"):
        faults.append("train.py and scripts/megatron_pretrain.py do not read each other's checkpoints")
    if faults:
        raise UserFault(f"{checkpoint.folder} does not fit this configuration; take the checkpoint's values, or start another run:\n  " + "\n  ".join(faults))
    return changed + _rates_so_far(checkpoint, config)


def _rates_so_far(checkpoint: Checkpoint, config: Config) -> list[str]:
    """A line where other learning rates are asked for than before: whether the steps already taken had those that this configuration gives."""
    before = {key: value for key, value in checkpoint.saved["config"]["optimizer"].items() if key in OptimizerSection.model_fields}
    planned, done = checkpoint.saved["config"]["train"]["steps"], checkpoint.state.step
    then = partial(learning_rate, steps=planned, optimizer=OptimizerSection(**before))
    now = partial(learning_rate, steps=config.train.steps, optimizer=config.optimizer)
    differing = [step for step in range(done) if then(step) != now(step)]
    if differing:
        return [f"learning rate: step {differing[0] + 1} had {then(differing[0]):.3g} and would have {now(differing[0]):.3g} by this configuration: "
                f"it goes on with {now(done):.3g}, where the checkpoint's would have {then(done):.3g}, and no uninterrupted run has this curve"]
    if any(then(step) != now(step) for step in range(done, max(planned, config.train.steps))):
        return [f"learning rate: all {done} steps so far had the one that this configuration gives them, as in an uninterrupted run of it"]
    return []


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- Loading --------------------------------------------------------------------------------------------------------


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, config: Config, *, scratch: Path) -> None:
    """Put a checkpoint's parameters, optimizer states and random generators into a fresh engine; call it on every rank.

    A checkpoint of another number of ranks, ZeRO stage, precision or place of the optimizer is converted first, into ``scratch``; its random generators
    cannot be shared out anew, so each rank's are then seeded from the run's seed and the step.

    Raises:
        UserFault: a file holds more than tensors and the few classes of DeepSpeed's that belong there.
    """
    if checkpoint.needs_conversion(config):
        universal = scratch / f"{checkpoint.folder.name}.universal.tmp"

        def convert() -> None:
            with _only_tensors(checkpoint.folder):
                convert_to_universal(checkpoint.folder, universal, checkpoint.saved["layout"], config.model, config.optimizer.name)

        with ThreadPoolExecutor(max_workers=1) as worker:
            converted = worker.submit(convert) if dist.get_rank() == 0 else None
            while not from_first_rank(lambda: not wait([converted], timeout=_WAIT_SECONDS).not_done):
                pass
        together(lambda: converted.result(), here=dist.get_rank() == 0)
        with _only_tensors(universal):
            load_universal(engine, universal, config.model, config.optimizer.name)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(universal)
        torch.manual_seed(config.run.seed + 1 + dist.get_rank() + dist.get_world_size() * checkpoint.state.step)
    else:
        try:
            with _only_tensors(checkpoint.folder):
                engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
        except UserFault as error:
            raise LoneFault(str(error)) from error
        generators = together(lambda: _load_generators(checkpoint.folder))
        torch.set_rng_state(generators["cpu"])
        if torch.cuda.is_available() and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])
    set_hyperparameters(engine, config)


def read_weights(checkpoint: Checkpoint, config: Config, *, scratch: Path) -> dict[str, torch.Tensor]:
    """The master weights of a checkpoint, saved in any layout, in float32, by name; in one process, without a GPU.

    Args:
        config: the checkpoint's own.
        scratch: a folder to convert it in, with room for twice the checkpoint for the moment.

    Raises:
        UserFault: a file holds more than tensors and the few classes of DeepSpeed's that belong there.
    """
    universal = scratch / f"{checkpoint.folder.name}.universal.tmp"
    try:
        with _only_tensors(checkpoint.folder):
            convert_to_universal(checkpoint.folder, universal, _newer_layout(Config()) | checkpoint.saved["layout"], config.model, config.optimizer.name)
            return universal_weights(universal, config.model, config.optimizer.name)
    finally:
        shutil.rmtree(universal, ignore_errors=True)


def _load_generators(folder: Path) -> dict[str, torch.Tensor]:
    with _only_tensors(folder):
        return torch.load(folder / _generators_file(dist.get_rank()), weights_only=True)


@contextlib.contextmanager
def _only_tensors(folder: Path) -> Iterator[None]:
    """Within it torch.load, wherever DeepSpeed calls it, builds tensors, plain containers and the allowed classes alone."""
    name, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            yield
    except pickle.UnpicklingError as error:
        raise UserFault(f"{folder} was not loaded: a file in it would run code. {str(error).splitlines()[0]}") from error
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
