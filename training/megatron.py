"""A GPT of megatron-core for one resolved configuration: the model shared out, its optimizer, a step, validation, checkpoints.

It begins with the very weights that ``model.gpt.GPT`` draws, whatever the layout, so that runs of both trainers and of all layouts compare.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.gpt import GPT, IGNORED_LABEL
from model.megatron import with_our_attention
from training.batches import Batch
from training.checkpoints import Checkpoint
from training.engine import StepResult
from training.evaluation import validation_results
from training.megatron_config import MegatronConfig
from training.schedule import learning_rate

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # isort: skip
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

# Each parameter whole, however many processes hold it: a checkpoint may be loaded into another layout.
_CHECKPOINT_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


# --- The model ------------------------------------------------------------------------------------------------------


class Norm:
    """LayerNorm or RMSNorm of PyTorch, as Megatron builds them; its own wrapper of them refuses sequence parallelism, in which the ranks'
    gradients of a norm are to be added up."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
        if config.normalization == "RMSNorm":
            norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        else:
            norm = torch.nn.LayerNorm(hidden_size, eps=eps, bias=config.add_bias_linear)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def transformer_config(config: MegatronConfig) -> TransformerConfig:
    model, train, layout = config.model, config.train, config.megatron
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    # Megatron's fusions are functions compiled by torch.compile; that of GELU is the tanh form.
    activation = F.silu if model.activation == "swiglu" else F.gelu if train.compile and model.bias else _gelu
    recompute = {"recompute_granularity": "selective"} if layout.recompute_attention else {}
    if train.activation_checkpointing == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.layers, hidden_size=model.hidden_size, num_attention_heads=model.heads, num_query_groups=model.kv_heads,
        kv_channels=model.head_dim, ffn_hidden_size=model.ffn_size, add_bias_linear=model.bias,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm", layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.activation == "swiglu", activation_func=activation,
        bias_activation_fusion=train.compile and activation is not _gelu, bias_dropout_fusion=train.compile,
        hidden_dropout=model.dropout, attention_dropout=config.attention.dropout, attention_softmax_in_fp32=True,
        window_size=None if config.attention.window is None else (config.attention.window - 1, 0),
        deterministic_mode=config.attention.deterministic,
        bf16=train.precision == "bf16", params_dtype=dtype, pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor_parallel, pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel, **recompute,
    )  # fmt: skip


def build_model(config: MegatronConfig, device: torch.device) -> DistributedDataParallel:
    """This process's share of the model, with the weights that model.gpt.GPT draws from run.seed; call it on every rank."""
    shape, settings = config.model, transformer_config(config)
    layer = get_gpt_layer_local_spec(normalization=settings.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if config.megatron.attention == "ours":
        layer = with_our_attention(layer, config.attention.backend)
    model = GPTModel(
        settings,
        TransformerBlockSubmodules([layer] * get_num_layers_to_build(settings), layer_norm=Norm),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="learned_absolute" if shape.positions == "learned" else "rope",
        rotary_base=shape.rope_theta,
    ).to(device)
    torch.manual_seed(config.run.seed)
    load_weights(model, config, GPT(shape).state_dict())
    wrapped = Float16Module(settings, model) if settings.bf16 else model
    sharding = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(settings, sharding, wrapped)
    _count_padding(wrapped)
    settings.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _count_padding(model: DistributedDataParallel) -> None:
    """Let the padding between two buckets count as content: Megatron 0.16.1 saves optimizer states by their places with it out of tensors
    without it, which shifts those behind the bucket that an embedding shared by two stages has for itself."""
    for buffer in model.buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


@torch.no_grad()
def load_weights(model: GPTModel, config: MegatronConfig, ours: dict[str, torch.Tensor]) -> None:
    """Copy this rank's share of our GPT's weights into Megatron's model. ours: the whole state_dict, on the CPU."""
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    first_layer = model.decoder.layers[0].layer_number - 1
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"layers.{first_layer + int(layer)}.{rest}"
        whole = _of_ours(name, config, ours, ranks)
        if getattr(parameter, "tensor_model_parallel", False):
            whole = whole.chunk(ranks, dim=parameter.partition_dim)[rank]
        parameter.copy_(whole)


_NAMES = {
    "embedding.word_embeddings.weight": "token_embedding.weight", "embedding.position_embeddings.weight": "position_embedding.weight",
    "output_layer.weight": "head.weight", "decoder.final_layernorm": "final_norm",
    "input_layernorm": "attention_norm", "self_attention.linear_qkv": "attention.qkv", "self_attention.linear_proj": "attention.projection",
    "pre_mlp_layernorm": "ffn_norm", "mlp.linear_fc1": "ffn.up", "mlp.linear_fc2": "ffn.down",
}  # fmt: skip


def _of_ours(name: str, config: MegatronConfig, ours: dict[str, torch.Tensor], ranks: int) -> torch.Tensor:
    """Megatron's parameter of that name, whole, with its rows in the order in which consecutive chunks are its ranks'."""
    if name in _NAMES:
        return ours[_NAMES[name]]
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"blocks.{layer}."
    weight = ours[f"{prefix}{_NAMES[module]}.{kind}"]
    model = config.model
    if module == "self_attention.linear_qkv":  # ours: the heads of Q, then K, then V; Megatron's: group by group, the queries, the key, the value
        heads = weight.unflatten(0, (-1, model.head_dim))
        q, k, v = heads.split([model.heads, model.kv_heads, model.kv_heads])
        return torch.cat((q.unflatten(0, (model.kv_heads, -1)), k.unsqueeze(1), v.unsqueeze(1)), dim=1).flatten(0, 2)
    if module == "mlp.linear_fc1" and model.activation == "swiglu":  # each rank has its rows of the gate, then those of the value
        return weight.unflatten(0, (2, ranks, -1)).transpose(0, 1).flatten(0, 2)
    return weight


# --- A step ---------------------------------------------------------------------------------------------------------


def build_optimizer(config: MegatronConfig, model: DistributedDataParallel):
    """Megatron's distributed optimizer: AdamW, its states shared out over the data-parallel ranks. train_step sets rates and decay."""
    optimizer = config.optimizer
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=optimizer.lr, weight_decay=optimizer.weight_decay, adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
            adam_eps=optimizer.eps, clip_grad=optimizer.grad_clip, bf16=config.train.precision == "bf16",
            params_dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32, use_distributed_optimizer=True,
        ),
        [model],
    )  # fmt: skip


def train_step(model: DistributedDataParallel, optimizer, micro_batches: list[Batch], step: int, config: MegatronConfig,
               stopping: Callable[[], bool] = lambda: False) -> StepResult:  # fmt: skip
    """One optimizer step over this replica's micro batches; arguments and result as of training.engine.train_step, and so is what it does."""
    if config.model.dropout or config.attention.dropout:  # a function of seed and step alone, so that a resumed run draws what it would have
        tensor_parallel.model_parallel_cuda_manual_seed(_seed(config.run.seed, step))
    lr = learning_rate(step, config.train.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, config.optimizer.weight_decay * group["wd_mult"]
    model.zero_grad_buffer()
    optimizer.zero_grad()
    counts = _run(model, micro_batches, config, forward_only=False)
    nats, targets, stops = _totals(counts, stopping(), device=micro_batches[0][0].device)
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    applied = math.isfinite(nats) and math.isfinite(norm)
    if applied:
        optimizer.step()
    return StepResult(loss=nats / targets, grad_norm=norm, lr=lr, applied=applied, stopping=stops)


def _seed(seed: int, step: int) -> int:
    """Of this process at a step; those of replicas and steps stand far enough apart for the few thousand that Megatron adds for tensor parallelism."""
    replica, stage = parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    return seed + 1 + 8192 * (1024 * step + replica) + 100 * stage


def _run(model: DistributedDataParallel, micro_batches: list[Batch], config: MegatronConfig, *, forward_only: bool) -> list[torch.Tensor]:
    """The micro batches through all stages; on the last one [nats, targets] of each, elsewhere nothing."""

    def forward_step(batches: Iterator[Batch], model):
        tokens, labels = next(batches)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None, labels=labels), partial(loss_of, labels)

    def loss_of(labels: torch.Tensor, losses: torch.Tensor):
        counted = labels != IGNORED_LABEL
        nats = (losses.float() * counted).sum()
        # Megatron averages over micro batches and replicas, which here have as many targets each.
        return nats / labels.numel(), torch.stack((nats.detach(), counted.sum()))

    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(micro_batches), model=model, num_microbatches=len(micro_batches),
        seq_length=config.model.sequence_length, micro_batch_size=config.train.micro_batch_size, forward_only=forward_only,
    )  # fmt: skip


def _totals(counts: list[torch.Tensor], other: float, *, device: torch.device) -> list[float]:
    """Nats and targets of all replicas, of what _run returns, and the sum of another number over all processes, on every rank."""
    found = torch.tensor([0, 0, other], dtype=torch.float64, device=device)
    if counts:  # the ranks of a tensor-parallel group have the same
        found[:2] = torch.stack(counts).double().sum(0) / parallel_state.get_tensor_model_parallel_world_size()
    dist.all_reduce(found)
    return found.tolist()


@torch.no_grad()
def evaluate(model: DistributedDataParallel, batches: Iterable[Batch], token_bytes: np.ndarray, config: MegatronConfig) -> dict[str, float]:
    """Loss over validation batches, the same on every rank; see training.evaluation.evaluate."""
    model.eval()
    batches = list(batches)
    counts = _run(model, batches, config, forward_only=True)
    model.train()
    read = torch.cat([labels[labels != IGNORED_LABEL] for _, labels in batches])
    text_bytes = int(token_bytes[read.cpu()].sum())
    nats, targets, all_bytes = _totals(counts, text_bytes, device=read.device)
    return validation_results(nats, targets, all_bytes / config.sharing.processes)  # each process of a replica has read the same


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def save(model: DistributedDataParallel, optimizer, folder: Path) -> None:
    """Write weights and optimizer states into an existing folder that every host sees; call it on every rank."""
    # Megatron would start a process to pass on what its writers say, for checkpoints written beside training, and that outlives a run.
    filesystem_async._results_queue = SimpleQueue()
    dist_checkpointing.save(_sharded(model, optimizer, is_loading=False), str(folder))


def load(model: DistributedDataParallel, optimizer, checkpoint: Checkpoint) -> None:
    """Take them out of one, saved in any layout; call it on every rank."""
    for each in optimizer.chained_optimizers:
        if isinstance(each.optimizer, torch.optim.AdamW):
            _count_steps(each)
    loaded = dist_checkpointing.load(_sharded(model, optimizer, is_loading=True), str(checkpoint.folder))
    _unwrapped(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for each in optimizer.chained_optimizers:
        for state in each.optimizer.state.values():
            if "step" in state:  # one tensor for all parameters, in which each would count
                state["step"] = state["step"].clone()


def _count_steps(optimizer) -> None:
    """Let a fresh distributed optimizer around PyTorch's AdamW be loaded: Megatron 0.16.1 expects the count of steps, which AdamW keeps with
    each parameter, before the first step, and again among the tensors of a checkpoint, which has it once for all."""
    for parameter in (parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    states_of, set_states = optimizer._get_main_param_and_optimizer_states, optimizer._set_main_param_and_optimizer_states
    optimizer._set_main_param_and_optimizer_states = lambda parameter, tensors: set_states(parameter, {"step": states_of(parameter)["step"], **tensors})


def _sharded(model: DistributedDataParallel, optimizer, *, is_loading: bool) -> dict:
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = _unwrapped(model).sharded_state_dict(metadata=_CHECKPOINT_FORMAT | groups)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_CHECKPOINT_FORMAT | groups)}


def _unwrapped(model: torch.nn.Module) -> GPTModel:
    while not isinstance(model, GPTModel):
        model = model.module
    return model
