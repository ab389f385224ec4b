"""DeepSpeed: its configuration generated from ours, the engine built, one optimizer step taken."""

import importlib
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from torch.utils import cpp_extension

from model.checkpointing import Checkpointing
from model.compilation import compile_blocks
from model.gpt import GPT, IGNORED_LABEL, Block, hidden_layers, parameter_groups
from model.offload import Offload
from training.config import Config, OptimizerSection
from training.distributed import UserFault, load_op, sequence_group, together
from training.loss_scale import LossScale
from training.memory import check_host, host_capacity
from training.muon import Matrix, MuonWithAdamW, find_shards
from training.pretrained import buffers_kept, load_huggingface, load_weights
from training.schedule import learning_rate
from training.zero3_step import shorten_step


COMPILED_CODE = ".compiled"  # folder of run.output_dir


def deepspeed_config(config: Config) -> dict:
    """The dictionary DeepSpeed is started with, derived from a resolved configuration.

    Raises:
        UserFault: the installed DeepSpeed does not read one of the keys.
    """
    zero = config.zero
    generated = {
        # It counts a micro batch for every process, and knows nothing of those that share one.
        "train_batch_size": config.train.global_batch_size * config.parallel.sequence,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        # In fp32 stage 0 DeepSpeed neither tells the norm nor looks whether it is finite: train_step clips there.
        "gradient_clipping": 0.0 if _is_plain(config) else config.optimizer.grad_clip,
        "bf16": {"enabled": config.train.precision == "bf16", "bf16_master_weights_and_grads": config.train.bf16_states,
                 "bf16_optimizer_states": config.train.bf16_states},
        # A scale that stands still: train_step gives it that of LossScale.
        "fp16": {"enabled": config.train.precision == "fp16", "loss_scale": config.train.initial_loss_scale},
        "communication_data_type": zero.reduce_dtype,
        # DeepSpeed would add micro batches up in bf16. Its stage 0 can do nothing else.
        **({"data_types": {"grad_accum_dtype": "bf16" if config.train.bf16_states else "fp32"}} if zero.stage > 0 else {}),
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": True,
            # Of stage 3 training.zero3_step makes one copy, not two.
            "contiguous_gradients": not _shortened(config),
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            # A single process has each parameter whole, unless it waits on the host.
            "stage3_param_persistence_threshold": (
                sys.maxsize if _alone(config) and zero.offload_parameters == "none" else zero.persistence_threshold),
            "stage3_max_reuse_distance": zero.reuse_distance,
            # What is kept must not stop the prefetch; DeepSpeed's default otherwise.
            "stage3_max_live_parameters": max(zero.reuse_distance, 1_000_000_000),
            **({"offload_optimizer": {"device": "cpu"}} if zero.offload_optimizer == "cpu" else {}),
            **({"offload_param": {"device": "cpu"}} if zero.offload_parameters == "cpu" else {}),
            # DeepSpeed's linear layer for stage 3 adds the bias in place, to a product that keep_matmuls would keep without it. Compiled
            # code needs it not: it keeps no gathered weight either.
            "memory_efficient_linear": not (config.train.keep_matmuls or config.train.compile),
        },
        # DeepSpeed knows torch's AdamW; Muon's ZeRO is training.muon's, tested against the unsharded one.
        **({"zero_allow_untested_optimizer": True} if config.optimizer.name == "muon" else {}),
        "steps_per_print": None,
        # A clock that nobody reads, for which the host would wait for the GPU before and after every micro batch.
        "timers": {"throughput": {"enabled": False}},
    }
    unread = unread_keys(generated)
    if unread:
        raise UserFault(f"DeepSpeed {deepspeed.__version__} does not read {', '.join(sorted(unread))}; install the version in the constraints file")
    return generated


def checkpointing_of(config: Config) -> Checkpointing:
    """The model's share of ``train.activation_checkpointing``; DeepSpeed's is configured by ``build_engine``."""
    train = config.train
    return Checkpointing(train.activation_checkpointing, every=train.checkpoint_every or 1, keep_matmuls=train.keep_matmuls,
                         backend=config.attention.backend, function=deepspeed.checkpointing.checkpoint,
                         offload=Offload() if train.checkpoint_offload else None)


def check_machine(config: Config) -> str | None:
    """A line on what DeepSpeed is about to compile for a configuration; None where nothing, or where it was compiled before.

    Raises:
        UserFault: this machine lacks what the configuration needs.
    """
    compiler = os.environ.get("CXX", "c++")
    if config.train.compile and not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise UserFault(f"train.compile=true: on a CPU it takes a C++ compiler, and there is none ({compiler}); "
                        "install one (apt-get install g++), or use false")
    if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserFault("train.precision=fp16: DeepSpeed trains in it on GPUs, and on CPUs with AVX512-FP16, which this one has not; use bf16 or fp32")
    if torch.cuda.is_available():
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_host(config, world, min(world, torch.cuda.device_count()), host_capacity())
    if config.zero.offload_optimizer == "none":
        return None
    built = Path(cpp_extension._get_build_directory(CPUAdamBuilder.NAME, verbose=False), f"{CPUAdamBuilder.NAME}.so")
    if built.exists() or find_spec(CPUAdamBuilder().absolute_name()):  # at its first use; when DeepSpeed was installed
        return None
    if shutil.which(compiler) is None:
        raise UserFault(f"zero.offload_optimizer=cpu: DeepSpeed's CPU Adam has to be compiled, and there is no C++ compiler ({compiler}); "
                        "install one (apt-get install g++), or use zero.offload_optimizer=none")
    return f"zero.offload_optimizer: cpu -> DeepSpeed's CPU Adam is compiled into {built.parent}, once on this machine: about 100 s of one core"


def _is_plain(config: Config) -> bool:
    """Whether DeepSpeed leaves AdamW as it is, unwrapped."""
    return config.zero.stage == 0 and config.train.precision == "fp32"


def _shortened(config: Config) -> bool:
    """Whether training.zero3_step has a part in it."""
    return config.zero.stage == 3 and config.zero.offload_optimizer == "none"


def _alone(config: Config) -> bool:
    """Whether one process trains: it alone has all of the global batch, and shares no sequence."""
    train = config.train
    return train.micro_batch_size * train.gradient_accumulation_steps == train.global_batch_size * config.parallel.sequence


class _ReadKeys(dict):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, content: dict):
        super().__init__(content)
        self.read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.read.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> object:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.read.add(key)
        return super().get(key, default)


def unread_keys(generated: dict) -> set[str]:
    """Top-level keys that the installed DeepSpeed never looks at: it would ignore them without a word."""
    watched = _ReadKeys(generated)
    if not dist.is_initialized():  # in a dry run: DeepSpeed then takes itself for the only process
        watched["train_batch_size"] = generated["train_micro_batch_size_per_gpu"] * generated["gradient_accumulation_steps"]
    DeepSpeedConfig(watched)
    return generated.keys() - watched.read


def build_engine(config: Config, *, end_of_text: int | None = None, load_universal: bool = False) -> deepspeed.DeepSpeedEngine:
    """Model, optimizer and DeepSpeed engine for a resolved configuration; call it on every rank.

    Args:
        end_of_text: the tokenizer's; needed with attention.document_mask.
        load_universal: a checkpoint in the universal format will be loaded (``training.universal``).
    """
    train = config.train
    deepspeed.utils.nvtx.enable_nvtx = False  # marks for a profiler around thousands of calls a step
    if train.compile or torch.cuda.is_available():  # where model.loss compiles in any case
        importlib.import_module("torch._dynamo")  # for two seconds, and before zero.Init replaces what it looks at
    generated = deepspeed_config(config) | ({"checkpoint": {"load_universal": True}} if load_universal else {})
    torch.manual_seed(config.run.seed)
    if config.model.huggingface is not None:
        model = together(lambda: load_huggingface(config, checkpointing_of(config), end_of_text=end_of_text))
    else:
        with deepspeed.zero.Init(config_dict_or_path=generated, enabled=config.zero.stage == 3):
            model = GPT(config.model, config.attention, end_of_text=end_of_text, checkpointing=checkpointing_of(config),
                        mlp_tile=config.train.mlp_tile, sequence=sequence_group(config.parallel.sequence))
        if config.model.init_from is not None:
            load_weights(model, config.model)
    blocks = [Block] if config.model.huggingface is None else model.block_types
    if config.zero.stage == 3 and blocks:
        # One gather a block instead of one a submodule: fewer and larger messages, and fewer of the hooks that cost host time.
        deepspeed.utils.set_z3_leaf_modules(model, blocks)
    if train.compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(config.run.output_dir, COMPILED_CODE).resolve()))
        compile_blocks(model)
    if train.activation_checkpointing == "deepspeed":
        classic = train.partition_activations == "classic"
        # Without partitioning, its copy of what is on the CPU already is no copy, and it would empty both.
        deepspeed.checkpointing.configure(None, partition_activations=classic, checkpoint_in_cpu=train.cpu_checkpointing and (classic or torch.cuda.is_available()))
    optimizer = build_optimizer(model, config)
    with buffers_kept(model):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=generated)
    if config.optimizer.name == "muon" and config.zero.stage > 0:
        find_shards(optimizer, engine.optimizer, [layer.weight for layer in hidden_layers(model)])
    if _shortened(config):
        shorten_step(engine, on_gpu_only=config.zero.offload_parameters == "none")
    if config.zero.stage == 0:
        # Its bf16 optimizer allocates the states by a step with zero gradients, which would count in Adam's bias correction.
        optimizer.state.clear()
    set_hyperparameters(engine, config)
    # Ranks hold different samples, so their dropout masks must differ too; the initial weights must not.
    torch.manual_seed(config.run.seed + 1 + dist.get_rank())
    return engine


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW, with a learning rate of 0: train_step sets every step's, and DeepSpeed's own before it must change nothing."""
    muon = config.optimizer.name == "muon"
    groups = [named | own for named, own in zip(parameter_groups(model, hidden_apart=muon), group_settings(config.optimizer), strict=True)]
    if config.zero.offload_optimizer == "cpu":
        load_op("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, lr=0.0, fp32_optimizer_states=not config.train.bf16_states)
    if not muon:
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    matrices = [Matrix(layer.out_features, layer.in_features, layer.parts) for layer in hidden_layers(model)]
    return MuonWithAdamW(groups, matrices, dtype=dtype, fused=torch.cuda.is_available())


def group_settings(settings: OptimizerSection) -> list[dict]:
    """What the configuration says of each of ``parameter_groups``; ``lr_scale``: its learning rate in units of optimizer.lr."""
    adamw = {"algorithm": "adamw", "lr_scale": 1.0, "betas": tuple(settings.betas), "eps": settings.eps}
    muon = {"algorithm": "muon", "lr_scale": settings.muon_lr / settings.lr, "momentum": settings.muon_momentum, "weight_decay": settings.muon_weight_decay}
    return [muon] * (settings.name == "muon") + [adamw | {"weight_decay": settings.weight_decay}, adamw | {"weight_decay": 0.0}]


def set_hyperparameters(engine: deepspeed.DeepSpeedEngine, config: Config) -> None:
    """Give the optimizer the configuration's settings.  A loaded checkpoint brings its own, and a universal one those of one group for all."""
    settings = config.optimizer
    for group, own in zip(engine.optimizer.param_groups, group_settings(settings), strict=True):
        group |= own
        if "fused" in engine.basic_optimizer.defaults:  # which one of an earlier version, saved on a CPU, was not
            group["fused"] = engine.basic_optimizer.defaults["fused"]
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = settings.grad_clip


class Late:
    """A number on its way from the GPU; to read it, by ``float()`` or ``bool()``, waits for what was asked of the GPU before it, and for nothing after."""

    def __init__(self, number: torch.Tensor):
        self.here = number.detach().to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if number.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def __float__(self) -> float:
        if self.arrived:
            self.arrived.synchronize()
        return float(self.here)

    def __bool__(self) -> bool:
        return float(self) != 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss in nats per target token of the global batch, gradient norm before clipping, learning rate.

    To read the norm or ``applied``, by ``float()`` and ``bool()``, right after the step waits for the GPU to end it, which all else here does not.

    ``applied`` is false where the loss or a gradient was not finite on some rank: then no rank has changed a parameter or a state.
    ``loss_scale`` is what it was taken with, in fp16; ``overflow`` is true where gradients alone were not finite and the scale fell.
    ``stopping``: on how many ranks the step was told so.
    """

    loss: float | Late
    grad_norm: float | Late
    lr: float
    applied: bool | Late
    loss_scale: float | None = None
    overflow: bool = False
    stopping: float | Late = 0.0


def train_step(
    engine: deepspeed.DeepSpeedEngine, micro_batches: list[tuple[torch.Tensor, torch.Tensor]], step: int, config: Config,
    loss_scale: LossScale | None = None, stopping: Callable[[], bool] = lambda: False,
) -> StepResult:  # fmt: skip
    """One optimizer step over this rank's micro batches, each (tokens, labels), int64 [micro_batch, sequence].

    The loss is the sum over all targets of the global batch divided by their number, whatever their spread over ranks and
    micro batches: a mean of means would weigh a token by how many neighbours it has. loss_scale: needed in fp16, and moved on.
    stopping: asked during the last micro batch, for every rank to know.
    """
    lr = learning_rate(step, config.train.steps, config.optimizer)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if loss_scale is not None:
        engine.optimizer.override_loss_scale(loss_scale.scale)
    targets = torch.stack([(labels != IGNORED_LABEL).sum() for _, labels in micro_batches]).sum().double()
    dist.all_reduce(targets)
    # DeepSpeed averages gradients over ranks; times the world size that is the sum the division by targets needs.
    weight = dist.get_world_size() / targets.float()
    loss = torch.zeros_like(targets)
    for micro_batch, (tokens, labels) in enumerate(micro_batches, start=1):
        loss_sum = engine(tokens, labels)
        loss += loss_sum.detach()
        if micro_batch == len(micro_batches):
            totals = torch.stack((loss, torch.full_like(loss, stopping())))
            dist.all_reduce(totals)
            loss = totals[0]
            # Asked for before the backward pass; the step after that looks at the norm, and waits for it: then they are there.
            mean, stops = Late(loss / targets), Late(totals[1])
            # 0 or NaN: a loss that is not finite makes every rank's gradients NaN, and so no rank takes the step.
            weight = weight + (loss * 0).float()
        engine.backward(loss_sum * weight, scale_wrt_gas=False)
        if micro_batch == len(micro_batches):
            norm, applied = _take_plain_step(engine, config.optimizer.grad_clip) if _is_plain(config) else _take_step(engine)
        else:
            engine.step()
    result = StepResult(loss=mean, grad_norm=norm, lr=lr, applied=applied, stopping=stops)
    if loss_scale is None:
        return result
    before, falls = loss_scale.scale, not applied and math.isfinite(mean) and loss_scale.can_fall()
    loss_scale.update(float(mean), applied, config.train.loss_scale_window)
    return replace(result, loss_scale=before, overflow=falls)


def _take_step(engine: deepspeed.DeepSpeedEngine) -> tuple[float | Late, bool | Late]:
    """The optimizer step after the last micro batch: gradient norm before clipping, and whether the step was applied."""
    engine.step()
    applied = engine.was_step_applied()
    if not applied and engine.zero_cpu_offload() and engine.zero_optimization_stage() < 3:
        # DeepSpeed 0.19.8 keeps these sums, which are no numbers, and would add every later gradient to them.
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
    norm = engine.get_global_grad_norm()
    if not torch.is_tensor(norm):
        return norm, applied
    return Late(norm), applied and Late(norm.isfinite())  # it may be the GPU alone that knows


def _take_plain_step(engine: deepspeed.DeepSpeedEngine, grad_clip: float) -> tuple[float, bool]:
    """``_take_step`` for AdamW that DeepSpeed has not wrapped."""
    parameters = list(engine.module.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    applied = math.isfinite(norm)
    if not applied:
        engine.zero_grad()  # AdamW passes over parameters without a gradient
    elif grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    engine.step()
    return float(norm), applied
