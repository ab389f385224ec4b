"""Who scripts/benchmark_training.py compares: this recipe, and what else one would train the same model with.

A contender is a function of a resolved configuration that returns a ``Trainer``; it is called on every rank of a process group. All but
Hugging Face's train ``model.gpt.GPT``, from the same initial weights, with PyTorch's attention in place of ours. Every one of them clips
gradients, sums them over ranks in zero.reduce_dtype and over micro batches in float32, and steps torch's AdamW on float32 master weights.
"""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.checkpointing import Checkpointing
from model.gpt import GPT
from training.batches import Batch
from training.config import Config
from training.engine import build_engine, build_optimizer, checkpointing_of, deepspeed_config, train_step
from training.schedule import learning_rate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ATEN = torch.ops.aten
_ATTENTION = [_ATEN._scaled_dot_product_cudnn_attention.default, _ATEN._scaled_dot_product_flash_attention.default,
              _ATEN._scaled_dot_product_efficient_attention.default, _ATEN._scaled_dot_product_flash_attention_for_cpu.default]
_MATMULS = [_ATEN.mm.default, _ATEN.addmm.default]
# Found here, once: a walk through every object takes long, and none that gc.freeze() has taken out is met on it.
_CACHES = [found for found in gc.get_objects()
           if type(found) is functools._lru_cache_wrapper and str(found.__module__).startswith("deepspeed.runtime.zero")]


class Refused(ValueError):
    """A contender has nothing that does what the configuration says."""


@dataclass(frozen=True)
class Trainer:
    """A contender at work.

    step: (micro batches of one optimizer step, its number from 0) -> what gives the mean loss in nats when it is called, and waits until then.
    parameters: of its model, all ranks' shards together.
    gathered: what is gathered from the other ranks, and when.
    volume: elements of a micro batch's gathers, of a step's beside them, and of a micro batch's sums, as ``theory_gb`` takes them.
    made_of: attention, compilation and whatever else sets it apart.
    close: lets go of the GPU's memory.
    """

    step: Callable[[list[Batch], int], Callable[[], float]]
    parameters: int
    gathered: str
    volume: tuple[int, int, int]
    made_of: str
    close: Callable[[], None]


# --- DeepSpeed's ----------------------------------------------------------------------------------------------------


def ours(config: Config) -> Trainer:
    """The engine and the step of train.py."""
    engine = build_engine(config)

    def step(micro_batches: list[Batch], number: int) -> Callable[[], float]:
        result = train_step(engine, micro_batches, number, config)
        return lambda: float(result.loss)

    return Trainer(step, *zero3_gathers(engine), f"train.py's engine and step, attention.backend={config.attention.backend}"
                   + ", blocks compiled" * config.train.compile, partial(let_go, engine))


def ours_sharded(config: Config) -> Trainer:
    """``ours`` with no parameter staying, and prefetch of a block: with more it would pass over blocks that are there, which then stay."""
    with torch.device("meta"):
        block = sum(p.numel() for p in GPT(config.model).blocks[0].parameters())
    zero = config.zero.model_copy(update={"persistence_threshold": 0, "reuse_distance": 0, "prefetch_bucket_size": block})
    return ours(config.model_copy(update={"zero": zero}))


def zero3_stock(config: Config, *, deepcompile: bool = False) -> Trainer:
    """The same GPT, and DeepSpeed told no more than it must know."""
    config = with_sdpa(config)
    torch.manual_seed(config.run.seed)
    with deepspeed.zero.Init(config_dict_or_path=stock_config(config)):
        model = GPT(config.model, config.attention, checkpointing=checkpointing_of(config))
    return zero3_trainer(model, config, lambda engine, tokens, labels: cross_entropy(engine(tokens), labels),
                         "DeepCompile, SDPA" if deepcompile else "eager, SDPA", deepcompile=deepcompile)


def zero3_deepcompile(config: Config) -> Trainer:
    """``zero3_stock``, the whole of it compiled with the gathers inside."""
    return zero3_stock(config, deepcompile=True)


def huggingface_zero3(config: Config, *, our_attention: bool = False) -> Trainer:
    """The model of transformers with this geometry; eager, its own loss; SDPA, or this configuration's attention.backend."""
    torch.manual_seed(config.run.seed)
    model = huggingface_model(config)
    if our_attention:
        from model.huggingface import attention_name

        model.set_attn_implementation(attention_name(config.attention.backend))
    if config.train.activation_checkpointing == "full":
        # transformers 5.23 has a newer name for it; the peer runs with older ones too.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    # It shifts the labels itself, and so drops the last of each sequence.
    return zero3_trainer(model, config, lambda engine, tokens, labels: engine(input_ids=tokens, labels=tokens, use_cache=False).loss,
                         f"transformers' {type(model).__name__}, eager, {f'attention.backend={config.attention.backend}' if our_attention else 'SDPA'}")


def zero3_trainer(model: nn.Module, config: Config, loss_of: Callable, made_of: str, *, deepcompile: bool = False) -> Trainer:
    told = stock_config(config) | ({"compile": {"deepcompile": True}} if deepcompile else {})
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config), config=told)
    if deepcompile:
        engine.compile()

    def step(micro_batches: list[Batch], number: int) -> Callable[[], float]:
        set_learning_rate(engine.optimizer, number, config)
        losses = []
        for tokens, labels in micro_batches:
            loss = loss_of(engine, tokens, labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return lambda: torch.stack(losses).mean().item()

    return Trainer(step, *zero3_gathers(engine), f"{made_of}; DeepSpeed's default buckets, no leaf modules", partial(let_go, engine))


def let_go(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free the engine's memory: DeepSpeed 0.19.8's ``destroy`` leaves its modules in a list and in the keys of a cache."""
    engine.destroy()
    FWD_MODULE_STACK.clear()
    for cache in _CACHES:
        cache.cache_clear()


def stock_config(config: Config) -> dict:
    """DeepSpeed's defaults but for the batch, the precision, the clipping and the dtypes of sums, which are those of ``ours``."""
    own = deepspeed_config(config)
    same = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
            "communication_data_type", "data_types", "steps_per_print")
    return {key: own[key] for key in same} | {"zero_optimization": {"stage": 3}}


def zero3_gathers(engine: deepspeed.DeepSpeedEngine) -> tuple[int, str, tuple[int, int, int]]:
    """How many parameters there are, what is gathered of them, and how much that is where nothing is used again soon enough to be kept."""
    parameters = list(engine.module.parameters())
    total, stays = sum(p.ds_numel for p in parameters), sum(p.ds_numel for p in parameters if p.ds_persist)
    reuse = engine.zero_max_reuse_distance()
    kept = f", but for what is used again within {reuse:,} parameters" * (reuse > 0)
    # A parameter that modules share, as embedding and head do, is gathered for each of them.
    uses = sum(p.ds_numel for module in engine.module.modules() for p in module._parameters.values() if p is not None and not p.ds_persist)
    return total, (f"{1 - stays / total:.1%} of the parameters before the forward and again before the backward pass of every micro batch{kept}; "
                   f"{stays:,} of {total:,} stay gathered, and are gathered after every step"), (2 * uses, stays, total)


def huggingface_model(config: Config) -> nn.Module:
    """GPT2LMHeadModel or LlamaForCausalLM with as many parameters as ``GPT``.

    Raises:
        Refused: transformers has no model of this geometry, or no such checkpointing.
    """
    model, checkpointing = config.model, config.train.activation_checkpointing
    if checkpointing not in ("none", "full"):
        raise Refused(f"transformers has no train.activation_checkpointing={checkpointing}")
    dialect = (model.positions, model.norm, model.activation, model.bias)
    llama = dialect == ("rope", "rmsnorm", "swiglu", False)
    plain_heads = model.kv_heads == model.heads and model.heads * model.head_dim == model.hidden_size
    if not llama and not (dialect == ("learned", "layernorm", "gelu", True) and plain_heads):
        raise Refused(f"neither transformers' GPT-2 nor its Llama is {', '.join(map(str, dialect[:3]))}, bias {model.bias}, "
                      f"{model.heads} heads of {model.head_dim}, {model.kv_heads} of keys, in {model.hidden_size}")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shared = {"vocab_size": model.vocab_size, "initializer_range": model.init_std, "tie_word_embeddings": model.tied_embeddings,
              "use_cache": False, "attn_implementation": "sdpa"}
    if llama:
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=model.hidden_size, intermediate_size=model.ffn_size, num_hidden_layers=model.layers,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
            max_position_embeddings=model.sequence_length, rms_norm_eps=model.norm_eps, rope_theta=model.rope_theta, **shared))
    return GPT2LMHeadModel(GPT2Config(
        n_positions=model.sequence_length, n_embd=model.hidden_size, n_layer=model.layers, n_head=model.heads, n_inner=model.ffn_size,
        layer_norm_epsilon=model.norm_eps, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared))


# --- PyTorch's ------------------------------------------------------------------------------------------------------


def fsdp2_compile(config: Config, *, reshard_after_forward: bool) -> Trainer:
    """FSDP2 a block, each block and the loss compiled, cuDNN's attention first.  On a CPU nothing is compiled."""
    config, on_gpu = with_sdpa(config), torch.cuda.is_available()
    compiled = partial(torch.compile, dynamic=False, fullgraph=True) if on_gpu else lambda function: function
    model = sharded_gpt(config, reshard_after_forward=reshard_after_forward, compiled=compiled)
    optimizer, loss_of = build_optimizer(model, config), compiled(cross_entropy)

    def step(micro_batches: list[Batch], number: int) -> Callable[[], float]:
        set_learning_rate(optimizer, number, config)
        losses = []
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            for tokens, labels in micro_batches:
                loss = loss_of(model(tokens), labels)
                (loss / len(micro_batches)).backward()
                losses.append(loss.detach())
        clip_shards([p.grad.to_local() for p in model.parameters()], config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return lambda: torch.stack(losses).mean().item()

    total, blocks = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.blocks.parameters())
    again = "and again before its backward pass" if reshard_after_forward else "and keeps it until its backward pass"
    return Trainer(
        step, total,
        f"every block before its forward pass {again}; embeddings, last norm and head once a micro batch",
        (total + blocks * reshard_after_forward, 0, total),
        f"fully_shard of each block, {'blocks and loss compiled' if on_gpu else 'nothing compiled on a CPU'}, SDPA with cuDNN first",
        close=lambda: None)


def sharded_gpt(config: Config, *, reshard_after_forward: bool, compiled: Callable[[Callable], Callable]) -> nn.Module:
    """``GPT`` under FSDP2: master weights in float32, shards on dimension 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.run.seed)
    with torch.device(device):
        model = GPT(config.model, config.attention)
    checkpointing = checkpointing_of(config)
    # The rotary table that GPT hands to its blocks stays in float32.
    precision = MixedPrecisionPolicy(DTYPES[config.train.precision], DTYPES[config.zero.reduce_dtype], cast_forward_inputs=False)
    placement = {"mesh": init_device_mesh(device, (dist.get_world_size(),)), "mp_policy": precision}
    for index, block in enumerate(model.blocks):
        # Compiled inside of FSDP's hooks, which stay Python, and around the checkpoint, whose recomputation Inductor then plans.
        block.forward = compiled(checkpointed(block.forward, checkpointing) if checkpointing.includes(index) else block.forward)
        fully_shard(block, reshard_after_forward=reshard_after_forward, **placement)
    return fully_shard(model, **placement)


def checkpointed(forward: Callable, checkpointing: Checkpointing) -> Callable:
    """A block's forward, computed again in the backward pass.  As ``Checkpointing.run``, but such that torch.compile can trace it."""
    kept = _ATTENTION + _MATMULS * checkpointing.keep_matmuls
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if checkpointing.mode == "selective" else {}
    return lambda x, **context: checkpoint(forward, x, use_reentrant=False, **selective, **context)


@torch.no_grad()
def clip_shards(gradients: list[torch.Tensor], largest: float) -> None:
    """torch.nn.utils.clip_grad_norm_ for gradients of which every rank has its part; without the host time that DTensors cost."""
    if largest == 0:
        return
    norm = torch.nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(norm)
    torch._foreach_mul_(gradients, torch.clamp(largest / (norm.sqrt() + 1e-6), max=1.0))


# --- shared ---------------------------------------------------------------------------------------------------------


def theory_gb(volume: tuple[int, int, int], config: Config, world: int) -> dict[str, float]:
    """GB of a step's gathers and sums by ``Trainer.volume``: what a rank has of each gather, and what it gives to each sum; none on one rank."""
    micro_gathers, step_gathers, sums = (0, 0, 0) if world == 1 else volume
    micro_batches, width = config.train.gradient_accumulation_steps, DTYPES[config.train.precision].itemsize
    return {"gathers": (micro_batches * micro_gathers + step_gathers) * width / 1e9,
            "sums": micro_batches * sums * DTYPES[config.zero.reduce_dtype].itemsize / 1e9}


def with_sdpa(config: Config) -> Config:
    """The configuration with PyTorch's attention, by its own choice of kernel."""
    return config.model_copy(update={"attention": config.attention.model_copy(update={"backend": "sdpa"})})


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the targets, in nats; logits [batch, sequence, vocabulary], labels int64 [batch, sequence]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def set_learning_rate(optimizer: torch.optim.Optimizer, number: int, config: Config) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(number, config.train.steps, config.optimizer)


CONTENDERS: dict[str, Callable[[Config], Trainer]] = {
    "ours": ours,
    "ours_sharded": ours_sharded,
    "zero3_stock": zero3_stock,
    "zero3_deepcompile": zero3_deepcompile,
    "huggingface_zero3": huggingface_zero3,
    "huggingface_zero3_ours": partial(huggingface_zero3, our_attention=True),
    "fsdp2_compile": partial(fsdp2_compile, reshard_after_forward=True),
    "fsdp2_compile_no_reshard": partial(fsdp2_compile, reshard_after_forward=False),
}
