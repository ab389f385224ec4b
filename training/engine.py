"""DeepSpeed: its configuration generated from ours, the engine built, one optimizer step taken."""

import functools
import importlib
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from model.gpt import GPT, IGNORED_LABEL, Block, parameter_groups
from training.config import Config
from training.schedule import learning_rate


def deepspeed_config(config: Config) -> dict:
    """The dictionary DeepSpeed is started with, derived from a resolved configuration.

    Raises:
        ValueError: a top-level key that this DeepSpeed version does not read (it would ignore it without a word).
    """
    zero = config.zero
    generated = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": zero.reduce_dtype,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
        },
        "steps_per_print": None,
    }
    unknown = generated.keys() - known_deepspeed_keys()
    if unknown:
        raise ValueError(f"DeepSpeed {deepspeed.__version__} does not read {', '.join(sorted(unknown))}; install the version in the constraints file")
    return generated


@functools.cache
def known_deepspeed_keys() -> frozenset[str]:
    """The top-level keys DeepSpeed reads: the string constants of the modules in which it names them."""
    modules = ("deepspeed.runtime.constants", "deepspeed.runtime.config", "deepspeed.runtime.zero.config", "deepspeed.runtime.precision_config")
    names = (vars(importlib.import_module(module)) for module in modules)
    return frozenset(value for module in names for key, value in module.items() if key.isupper() and isinstance(value, str))


def build_engine(config: Config) -> deepspeed.DeepSpeedEngine:
    """Model, AdamW and DeepSpeed engine for a resolved configuration; call it on every rank."""
    generated = deepspeed_config(config)
    torch.manual_seed(config.run.seed)
    with deepspeed.zero.Init(config_dict_or_path=generated, enabled=config.zero.stage == 3):
        model = GPT(config.model, attention_backend=config.attention.backend, activation_checkpointing=config.train.activation_checkpointing)
    if config.zero.stage == 3:
        # One gather a block instead of one a submodule: fewer and larger messages, and fewer of the hooks that cost host time.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=0.0,  # train_step sets every step's rate; until then a step, such as DeepSpeed's below, must change nothing
        betas=tuple(config.optimizer.betas),
        eps=config.optimizer.eps,
        fused=torch.cuda.is_available(),
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=generated)
    if config.zero.stage == 0:
        # Its bf16 optimizer allocates the states by a step with zero gradients, which would count in Adam's bias correction.
        optimizer.state.clear()
    # Ranks hold different samples, so their dropout masks must differ too; the initial weights must not.
    torch.manual_seed(config.run.seed + 1 + dist.get_rank())
    return engine


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss in nats per target token of the global batch, gradient norm before clipping, learning rate."""

    loss: float
    grad_norm: float
    lr: float


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[tuple[torch.Tensor, torch.Tensor]], step: int, config: Config) -> StepResult:
    """One optimizer step over this rank's micro batches, each (tokens, labels), int64 [micro_batch, sequence].

    The loss is the sum over all targets of the global batch divided by their number, whatever their spread over ranks and
    micro batches: a mean of means would weigh a token by how many neighbours it has.
    """
    lr = learning_rate(step, config.train.steps, config.optimizer)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    targets = torch.stack([(labels != IGNORED_LABEL).sum() for _, labels in micro_batches]).sum().double()
    dist.all_reduce(targets)
    # DeepSpeed averages gradients over ranks; times the world size that is the sum the division by targets needs.
    weight = dist.get_world_size() / targets.float()
    loss = torch.zeros_like(targets)
    for tokens, labels in micro_batches:
        loss_sum = engine(tokens, labels)
        engine.backward(loss_sum * weight, scale_wrt_gas=False)
        if engine.optimizer is engine.basic_optimizer:  # not wrapped (stage 0 in fp32): nobody else tells the norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()])
        engine.step()
        loss += loss_sum.detach()
    dist.all_reduce(loss)
    if engine.optimizer is not engine.basic_optimizer:
        norm = engine.get_global_grad_norm()
    return StepResult(loss=(loss / targets).item(), grad_norm=float(norm), lr=lr)
