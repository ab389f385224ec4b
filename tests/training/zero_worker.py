"""Two processes under the DeepSpeed launcher that train every combination worth comparing and write down what they saw.

One launch for all of them: starting Python, torch and the process group costs more than the training.  ``test_zero.py`` reads the JSON.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cpuinfo
import deepspeed
import torch
import torch._dynamo  # before zero.Init replaces what it looks at
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from model import compilation
from model.gpt import GPT, IGNORED_LABEL, hidden_layers, parameter_groups
from scripts.training_peers import let_go
from training.batches import validation_batches
from training.checkpoints import LoopState
from training.config import Config, load_config
from training.corpus import Corpus, write_corpus
from training.distributed import UserFault, agree, end_process, join_process_group, together
from training.engine import build_engine, deepspeed_config, set_hyperparameters, train_step, unread_keys
from training.evaluation import evaluate, sample_text
from training.loss_scale import LossScale
from training.schedule import learning_rate
from training.tokenizers import load_tokenizer
from training.zero3_step import GradientBuckets

STEPS = 3
TINY = [
    "model.layers=2", "model.hidden_size=32", "model.heads=2", "model.kv_heads=1", "model.vocab_size=264", "model.sequence_length=32",
    "train.global_batch_size=8", "train.precision=fp32", "train.compile=false", "attention.backend=eager", "optimizer.warmup_steps=0",
    f"train.steps={STEPS}",
]
END_OF_TEXT = 256
FEATURES = ["model.positions=alibi", "attention.window=20", "attention.document_mask=true"]
LLAMA = ["model.positions=rope", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.tied_embeddings=false"]


CHECKPOINTING = {
    "none": [], "full": [], "every_n": ["train.checkpoint_every=2"], "selective": [], "selective and matmuls": ["train.keep_matmuls=true"],
    "deepspeed": [], "deepspeed classic": ["train.partition_activations=classic"],
}  # fmt: skip
OFFLOAD = {"none": [], "optimizer": ["zero.offload_optimizer=cpu"], "both": ["zero.offload_optimizer=cpu", "zero.offload_parameters=cpu"]}
LET_GO = ["zero.reuse_distance=0", "zero.prefetch_bucket_size=1", "zero.persistence_threshold=0"]  # parameters, as of large models, after each use
BIG = ["model.layers=8", "model.hidden_size=256", "model.heads=4", "model.sequence_length=1024"]  # for GPUs
TWO_ROWS = ["train.global_batch_size=2"]  # for Triton's interpreter, which takes its time
LINEAR = torch.nn.functional.linear

cpuinfo.get_cpu_info = functools.lru_cache(cpuinfo.get_cpu_info)  # DeepSpeed's CPU Adam asks each time, which takes a second
get_accelerator().is_fp16_supported = lambda: True  # on any CPU: not fast, but right


def configure(*overrides: str) -> Config:
    config, _ = load_config("configs/base.yaml", [*TINY, *overrides], world_size=dist.get_world_size())
    return config


def global_batch(config: Config, step: int, ignored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The same (tokens, labels) on every rank, int64 [global_batch, sequence]; ``ignored`` masks labels unevenly over the rows."""
    generator = torch.Generator().manual_seed(step)
    windows = torch.randint(257, (config.train.global_batch_size, config.model.sequence_length + 1), generator=generator)
    if config.attention.document_mask:
        windows[torch.rand(windows.shape, generator=generator) < 0.1] = END_OF_TEXT
    tokens, labels = windows[:, :-1].clone(), windows[:, 1:].clone()
    if ignored:
        for row in range(len(labels)):
            labels[row, : 4 * row] = IGNORED_LABEL
    return tokens, labels


def micro_batches(config: Config, step: int, ignored: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    device, sharing = "cuda" if torch.cuda.is_available() else "cpu", config.parallel.sequence
    tokens, labels = (x.chunk(dist.get_world_size() // sharing)[dist.get_rank() // sharing].to(device) for x in global_batch(config, step, ignored))
    labels = labels.chunk(sharing, 1)[dist.get_rank() % sharing]
    return list(zip(tokens.split(config.train.micro_batch_size), labels.split(config.train.micro_batch_size), strict=True))


def train(config: Config, ignored: bool = False, expected: dict[str, torch.Tensor] | None = None) -> dict:
    engine = build_engine(config, end_of_text=END_OF_TEXT)
    scale = LossScale(config.train.initial_loss_scale) if config.train.precision == "fp16" else None
    results = []
    for step in range(STEPS):
        results.append(train_step(engine, micro_batches(config, step, ignored), step, config, scale))
    found = {"losses": [float(r.loss) for r in results], "grad_norms": [float(r.grad_norm) for r in results]}
    if expected is not None:
        found["furthest"] = furthest(engine, expected)
    let_go(engine)
    return found


def furthest(engine: deepspeed.DeepSpeedEngine, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a matrix from what is expected of it, relative to its largest element; biases of keys follow rounding errors."""
    differences = []
    for name, parameter in engine.module.named_parameters():
        if expected[name].dim() < 2:
            continue
        with deepspeed.zero.GatheredParameters(parameter, enabled=engine.zero_optimization_stage() == 3):
            differences.append(float((parameter.detach() - expected[name]).abs().max() / expected[name].abs().max()))
    return max(differences)


def train_plainly(
    config: Config, ignored: bool = False, parameters: dict[str, torch.Tensor] | None = None, means_of: int | None = None
) -> dict:
    """The same without DeepSpeed, processes or micro batches: the whole global batch in one forward and backward, torch's own optimizers.

    parameters: what is given here gets those after the last step.
    means_of: cut the batch into so many and take the mean of their means, which is what training must not do.
    """
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, config.attention.model_copy(update={"backend": "eager"}), end_of_text=END_OF_TEXT)
    o = config.optimizer
    *hidden, decayed, kept = parameter_groups(model, hidden_apart=o.name == "muon")
    adamw = torch.optim.AdamW([decayed | {"weight_decay": o.weight_decay}, kept | {"weight_decay": 0.0}], betas=tuple(o.betas), eps=o.eps)
    # The matrices stacked in a parameter, each a parameter in the same storage, for torch's Muon knows nothing of them.
    stacked = {layer.weight: [torch.nn.Parameter(part) for part in layer.weight.data.split(layer.parts)] for layer in hidden_layers(model) if hidden}
    muon = torch.optim.Muon([part for parts in stacked.values() for part in parts], momentum=o.muon_momentum, weight_decay=o.muon_weight_decay) if hidden else None
    losses, norms = [], []
    for step in range(STEPS):
        rate = learning_rate(step, config.train.steps, o)
        for group in adamw.param_groups:
            group["lr"] = rate
        tokens, labels = global_batch(config, step, ignored)
        parts = means_of or 1
        loss = sum(model(t, y) / (y != IGNORED_LABEL).sum() for t, y in zip(tokens.chunk(parts), labels.chunk(parts), strict=True)) / parts
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip).item())
        losses.append(loss.item())
        adamw.step()
        if muon:
            for whole, parts in stacked.items():
                for part, gradient in zip(parts, whole.grad.split([len(part) for part in parts]), strict=True):
                    part.grad = gradient
            muon.param_groups[0]["lr"] = rate * o.muon_lr / o.lr
            # torch's Newton-Schulz is in bf16, whose rounding makes much of what fp32 sums in another order differ by.
            with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
                muon.step()
        model.zero_grad()
    if parameters is not None:
        parameters |= {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "grad_norms": norms}


def grid() -> dict:
    """checkpointing x stage x offload, over which backends, accumulation and what stays gathered take turns; each checkpointing with
    Triton's kernels; stage x offload in bf16 and fp16, over which checkpointing takes turns.  By name, with the settings."""
    cells, modes, turn = {}, list(CHECKPOINTING), itertools.count()
    places = [(stage, offload) for stage, offload in itertools.product(range(4), OFFLOAD) if not (stage == 0 and offload != "none" or stage < 3 and offload == "both")]

    def cell(precision: str, mode: str, stage: int, offload: str, backend: str, accumulation: int) -> None:
        torch.nn.functional.linear = LINEAR  # DeepSpeed's stage 3 replaces it for good, also where the next cell asks for PyTorch's
        settings = [f"train.precision={precision}", f"train.activation_checkpointing={mode.split()[0]}", f"zero.stage={stage}",
                    f"attention.backend={backend}", f"train.gradient_accumulation_steps={accumulation}",
                    f"zero.persistence_threshold={(0, 1000, 100_000)[len(cells) // len(places) % 3]}"]  # all sharded; some; none
        settings += TWO_ROWS if backend == "triton" else []
        cells[f"{precision}, {mode}, stage {stage}, {offload} offloaded, {backend}, {accumulation}"] = train(
            configure(*settings, *CHECKPOINTING[mode], *OFFLOAD[offload]))

    for mode, (stage, offload) in itertools.product(modes, places):
        which = next(turn)
        backend = "sdpa" if mode.startswith("selective") else ("eager", "tiled", "sdpa")[which % 3]
        cell("fp32", mode, stage, offload, backend, (1, 2, 4)[which // 2 % 3])
    for mode in modes:
        cell("fp32", mode, 2 + next(turn) % 2, "none", "triton", 1)
    for precision, (stage, offload) in itertools.product(("bf16", "fp16"), places):
        if (precision, stage) != ("fp16", 0):  # refused
            cell(precision, modes[next(turn) % len(modes)], stage, offload, "sdpa", 2)
    return cells


def compiled() -> dict:
    """Blocks compiled: by Inductor, with what came of it, and what a forward pass leaves of the gathered parameters; traced alone in every mode."""
    torch.nn.functional.linear = LINEAR
    counters = torch._dynamo.utils.counters
    counters.clear()
    by_inductor = ["train.compile=true", "attention.backend=sdpa"]
    inductor = {"plain": train(configure(*by_inductor))}
    inductor["graphs"] = {name: dict(counters[name]) for name in ("stats", "graph_break")}
    dropout = ["train.compile=true", "model.dropout=0.5", "attention.dropout=0.3"]
    inductor["dropout"] = {mode: train(configure(*by_inductor, "model.dropout=0.5", f"train.activation_checkpointing={mode}")) for mode in ("none", "full")}
    left = parameters_left(configure(*by_inductor, "zero.persistence_threshold=0"))
    by_aot_eager = torch.compile(compilation._run, fullgraph=True, dynamic=False, backend="aot_eager")
    compilation._compiled = lambda: by_aot_eager
    traced = {"fp32, full offloaded, sdpa": train(configure("train.compile=true", "attention.backend=sdpa", "train.activation_checkpointing=full",
                                                            "train.checkpoint_offload=true"))}
    for mode, (precision, stage) in zip(CHECKPOINTING, itertools.cycle([("fp32", 3), ("bf16", 3), ("fp16", 2), ("fp32", 1)])):  # noqa: B905
        backend = "triton" if mode == "selective and matmuls" else "sdpa"  # whose interpreter takes its time
        settings = [f"train.activation_checkpointing={mode.split()[0]}", f"train.precision={precision}", f"zero.stage={stage}", f"attention.backend={backend}",
                    "zero.persistence_threshold=0"]
        traced[f"{precision}, {mode}, {backend}"] = train(configure("train.compile=true", "train.gradient_accumulation_steps=2", *settings, *CHECKPOINTING[mode]))
    deepspeed_dropout = train(configure(*dropout, "train.activation_checkpointing=deepspeed"))
    plain_dropout = train(configure(*dropout))
    llama = train(configure("train.compile=true", *LLAMA, "train.activation_checkpointing=selective", "attention.backend=sdpa"))
    features = train(configure("train.compile=true", *FEATURES, "attention.backend=tiled", "train.activation_checkpointing=full"))
    return {"inductor": inductor, "left": left, "traced": traced, "dropout": [plain_dropout, deepspeed_dropout], "llama": llama, "features": features}


def parameters_left(config: Config) -> dict[str, int]:
    """How many gathered parameters of blocks there are, and how many of them something holds on to after a forward pass."""
    engine, gathered = build_engine(config), []
    for block in engine.module.blocks:
        block.register_forward_hook(lambda block, *_: gathered.extend(StorageWeakRef(p.untyped_storage()) for p in block.parameters()), prepend=True)
    loss = engine(*micro_batches(config, 0)[0])
    found = {"gathered": len(gathered), "left": sum(not reference.expired() for reference in gathered), "needs_backward": loss.requires_grad}
    let_go(engine)
    return found


def long_contexts() -> dict:
    """Sequences shared by both processes, tiles, block inputs in the host's memory, in combinations; by what they are to be compared with."""
    torch.nn.functional.linear = LINEAR
    shared, tiles, away = ["parallel.sequence=2"], ["train.mlp_tile=24"], ["train.activation_checkpointing=full", "train.checkpoint_offload=true"]
    some_away = ["train.activation_checkpointing=every_n", "train.checkpoint_every=2", "train.checkpoint_offload=true"]
    odd = ["model.heads=6", "model.kv_heads=3", "model.head_dim=8", "model.layers=3", "model.positions=rope"]  # three key heads for two processes
    own_keys = ["model.kv_heads=2"]  # as many as query heads
    every, one_row = [*shared, *tiles, *away, *LET_GO], ["train.global_batch_size=1"]  # for Triton's interpreter
    cells = {
        "plain": [
            shared, [*shared, "zero.stage=0"], [*shared, *tiles, "zero.stage=2", "train.gradient_accumulation_steps=2"],
            [*every, "attention.backend=sdpa", *OFFLOAD["both"]], [*shared, *tiles, "train.activation_checkpointing=selective", "attention.backend=sdpa"],
            [*tiles, *away, "train.gradient_accumulation_steps=2"], [*tiles, *LET_GO], [*tiles, "zero.stage=1"], some_away,
        ],
        "plain_llama": [[*LLAMA, *every, "attention.backend=sdpa"]],
        "plain_features": [[*FEATURES, *shared, *tiles, "attention.backend=tiled", *some_away]],
        "plain_row": [[*FEATURES, *one_row, *every, "attention.backend=triton"]],
        "plain_odd": [[*odd, *every]],
        "plain_own_keys": [[*own_keys, *every, "attention.backend=sdpa"]],
    }  # fmt: skip
    found = {name: {" ".join(settings): train(configure(*settings)) for settings in many} for name, many in cells.items()}
    found["plain_ignored"] = {"ignored": train(configure(*shared, *tiles, "train.gradient_accumulation_steps=4"), ignored=True)}
    plain = {"plain_row": [*FEATURES, *one_row, *shared], "plain_odd": odd, "plain_own_keys": own_keys}
    bf16 = train(configure("train.precision=bf16", *every, "attention.backend=sdpa"))
    return {"cells": found, "bf16": bf16, **{name: train_plainly(configure(*settings)) for name, settings in plain.items()}}


def without_a_part(threshold: int) -> dict:
    """Losses and gradient norms where the last block has no part in the second rank's loss, nor in any in the second step."""
    # Where any are gathered, then for the backward pass once more: beside those gathers sums must come in the same order on both ranks.
    config = configure(f"zero.persistence_threshold={threshold}", "zero.reuse_distance=0", "zero.prefetch_bucket_size=1")
    engine, results = build_engine(config), []
    block = engine.module.blocks[-1]
    for step in range(STEPS):
        if step == 1 or dist.get_rank() == 1:
            block.forward = lambda x: x
        results.append(train_step(engine, micro_batches(config, step), step, config))
        vars(block).pop("forward", None)
    engine.destroy()
    return {"losses": [float(r.loss) for r in results], "grad_norms": [float(r.grad_norm) for r in results]}


def without_a_part_plainly() -> dict:
    """The same on one process."""
    config = configure()
    torch.manual_seed(config.run.seed)
    model, o = GPT(config.model, config.attention), config.optimizer
    decayed, kept = parameter_groups(model)
    adamw = torch.optim.AdamW([decayed | {"weight_decay": o.weight_decay}, kept | {"weight_decay": 0.0}], betas=tuple(o.betas), eps=o.eps)
    found = {"losses": [], "grad_norms": []}
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, o)
        loss = 0.0
        for rank, (tokens, labels) in enumerate(zip(*(x.chunk(2) for x in global_batch(config, step)), strict=True)):
            if step == 1 or rank == 1:
                model.blocks[-1].forward = lambda x: x
            loss += model(tokens, labels)
            vars(model.blocks[-1]).pop("forward", None)
        loss = loss / global_batch(config, step)[1].numel()
        model.zero_grad(set_to_none=False)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found["grad_norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip).item())
        found["losses"].append(loss.item())
        adamw.step()
    return found


def let_go_of_between_steps() -> dict:
    """As ``train``, but that after each step all parameters are gathered and let go of again."""
    config = configure()
    engine, results = build_engine(config), []
    for step in range(STEPS):
        results.append(train_step(engine, micro_batches(config, step), step, config))
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            pass
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in engine.module.modules())
    engine.destroy()
    return {"losses": [float(r.loss) for r in results], "grad_norms": [float(r.grad_norm) for r in results], "hooks": hooks}


def sums_put_off() -> dict:
    """As ``train`` where gradients are summed on a stream of their own, as on a GPU, as late as that may be: when something waits for them."""
    config = configure("zero.reduce_bucket_size=3000", "zero.persistence_threshold=1000", "train.gradient_accumulation_steps=2")
    engine, results, late, add = build_engine(config), [], [], GradientBuckets._add

    def wait(_) -> None:
        while late:
            late.pop()()

    engine.optimizer.reduce_and_partition_stream = mock.Mock()
    with (mock.patch.object(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=wait)),
          mock.patch.object(torch.cuda, "stream", contextlib.nullcontext), mock.patch.object(torch.cuda, "Event", mock.Mock),
          mock.patch.object(GradientBuckets, "_add", lambda *its: late.append(functools.partial(add, *its)))):
        for step in range(STEPS):
            results.append(train_step(engine, micro_batches(config, step), step, config))
    sums = engine.optimizer.reduce_and_partition_stream.wait_stream.call_count
    engine.destroy()
    return {"losses": [float(r.loss) for r in results], "grad_norms": [float(r.grad_norm) for r in results], "sums": sums}


class Asked(TorchDispatchMode):
    """Counts what a GPU's host would have to wait for: numbers of tensors that Python asks for."""

    times = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.times += operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)
        return operation(*arguments, **named or {})


def asked_in_a_step(*settings: str) -> dict:
    config = configure(*settings)
    engine, asked = build_engine(config), Asked()
    for group in engine.optimizer.param_groups:
        group["fused"] = None  # as a loaded checkpoint of an earlier version has it
    set_hyperparameters(engine, config)
    train_step(engine, micro_batches(config, 0), 0, config)  # in which the ranks compare the order of their gathers
    with asked:
        results = [train_step(engine, micro_batches(config, step), step, config) for step in range(1, STEPS)]
    engine.destroy()
    within = asked.times
    with asked:
        read = [float(result.grad_norm) for result in results]
    return {"within": within, "after": asked.times - within, "read": len(read)}


def muon() -> dict:
    """Every stage in fp32, its matrices after the last step too, against torch's Muon and AdamW on one process; and in bf16."""
    settings, expected = ["optimizer.name=muon", "optimizer.muon_lr=0.2", "optimizer.grad_clip=0.5", *LLAMA], {}
    plain = train_plainly(configure(*settings), parameters=expected)
    stages = {stage: train(configure(*settings, f"zero.stage={stage}"), expected=expected) for stage in range(4)}
    stages["accumulated"] = train(configure(*settings, "train.gradient_accumulation_steps=2"), expected=expected)
    bf16 = ["train.precision=bf16", "attention.backend=sdpa"]
    in_bf16 = {stage: train(configure(*settings, *bf16, f"zero.stage={stage}")) for stage in (0, 1, 3)}
    return {"plain": plain, "fp32": stages, "bf16": in_bf16, "bf16_states": train(configure(*settings, *bf16, "train.bf16_states=true"))}


def on_a_gpu(*settings: str) -> dict:
    """Losses and peak memory of each checkpointing mode with these settings, in a model whose activations count; "plain": without them, and without any."""
    big = [*BIG, "attention.backend=triton", "zero.offload_optimizer=cpu"]
    modes = {**CHECKPOINTING, "full offloaded": ["train.checkpoint_offload=true"], "full tiles": ["train.mlp_tile=512"]}
    cells = {"plain": train(configure(*big, "train.precision=bf16"))}
    for mode, of_mode in modes.items():
        torch.nn.functional.linear = LINEAR
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        trained = train(configure(*big, f"train.activation_checkpointing={mode.split()[0]}", *settings, *of_mode))
        cells[mode] = {**trained, "bytes": torch.cuda.max_memory_allocated() - held}
    return cells


def on_two_gpus() -> dict:
    """Two that share sequences, and two that do not: key heads fewer than GPUs, features, everything that long contexts take.

    And stage 3 with all, some and no parameters that stay beside stage 2: there streams may overtake each other, and on a CPU there are none.
    """
    everything = ["train.activation_checkpointing=full", "train.checkpoint_offload=true", "train.mlp_tile=512", *LET_GO]
    cases = {"plain": ["attention.backend=auto"], "llama": [*LLAMA, "attention.backend=auto"], "features": [*FEATURES, "attention.backend=triton"]}
    sharing = {"apart": [], "shared": ["parallel.sequence=2"], "everything": ["parallel.sequence=2", *everything]}
    shared = {name: {how: train(configure(*BIG, "train.precision=bf16", *case, *more)) for how, more in sharing.items()}
              for name, case in cases.items()}
    never = ["zero.persistence_threshold=0", "zero.reuse_distance=0", "zero.prefetch_bucket_size=1000000"]
    staying = {"stage 2": ["zero.stage=2"], "all": ["zero.persistence_threshold=1000000000"], "some": [], "none": never}
    small = [*BIG, "attention.backend=auto", "train.gradient_accumulation_steps=2", "zero.reduce_bucket_size=500000"]
    stages = {precision: {how: train(configure(*small, f"train.precision={precision}", *more)) for how, more in staying.items()}
              for precision in ("bf16", "fp16")}
    return {"shared": shared, "staying": stages}


def loss_scale_search() -> dict:
    """fp16 from a scale that is far too large, and what the run counts."""
    config = configure("train.precision=fp16", "train.initial_loss_scale=1e9", "train.steps=40")
    engine, state = build_engine(config), LoopState(loss_scale=LossScale(config.train.initial_loss_scale))
    results = []
    while state.step < 3 or results[-1].overflow or results[-2].overflow:
        results.append(train_step(engine, micro_batches(config, 0), 0, config, state.loss_scale))
        state.count(results[-1])
    engine.destroy()
    return {"steps": [(float(r.loss), r.loss_scale, bool(r.applied), r.overflow) for r in results], "state": dataclasses.asdict(state)}


def initial_weights() -> dict:
    """Standard deviations under ZeRO-3, and whether the weights are those of a model built without it."""
    config = configure("model.hidden_size=64", "model.layers=8", "model.dropout=0.0")
    engine = build_engine(config)
    torch.manual_seed(config.run.seed)
    plain = dict(GPT(config.model).named_parameters())
    stds, equal = {}, True
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            stds[name] = parameter.detach().std(correction=0).item()
            equal &= torch.equal(parameter.data, plain[name].data)
    groups = parameter_groups(engine.module)
    decayed = {id(p) for p in groups[0]["params"]}
    names = [name for name, p in engine.module.named_parameters() if id(p) in decayed]
    engine.destroy()
    return {"stds": stds, "equal_to_plain": equal, "decayed": names}


def dropout_differs() -> dict:
    """Ranks draw different dropout masks; checkpointing draws the same mask again."""
    runs = {checkpointing: train(configure("model.dropout=0.5", f"train.activation_checkpointing={checkpointing}")) for checkpointing in ("none", "full")}
    engine = build_engine(configure("model.dropout=0.5"))
    tokens, labels = (x[:2] for x in global_batch(configure(), 0))
    losses = [None, None]
    dist.all_gather_object(losses, engine(tokens, labels).item())
    engine.destroy()
    return {**runs, "loss_of_each_rank": losses}


def documents_of_the_layers() -> list[bool]:
    """Whether each layer is given the very tensor of document ids that the first one is, and with it what was made of it there."""
    config, given = configure(*FEATURES), []
    engine = build_engine(config, end_of_text=END_OF_TEXT)
    for block in engine.module.blocks:
        block.attention.register_forward_pre_hook(lambda module, inputs, named: given.append(named["document_ids"]), with_kwargs=True)
    engine(*micro_batches(config, 0)[0])
    engine.destroy()
    return [ids is given[0] for ids in given]


def evaluation(folder: Path) -> dict:
    """Validation over two ranks against one plain pass; samples on every rank."""
    tokenizer = load_tokenizer("bytes")
    if dist.get_rank() == 0:
        text = "To be, or not to be: that is the question. " * 30
        write_corpus(folder, tokenizer=tokenizer, splits={"train": [text], "validation": [text[: 32 * 9 + 5], "é" * 20]}, provenance={})
    dist.barrier()
    corpus = Corpus.open(folder)
    config = configure(*FEATURES, "attention.dropout=0.5")
    engine = build_engine(config, end_of_text=tokenizer.end_of_text)
    shape = {"sequence_length": 32, "batch_size": 2, "rank": dist.get_rank(), "world": dist.get_world_size(), "device": engine.device}
    found = evaluate(engine, validation_batches(corpus.split("validation"), sequences=None, **shape), corpus.token_bytes)
    some = evaluate(engine, validation_batches(corpus.split("validation"), sequences=3, **shape), corpus.token_bytes)
    torch.manual_seed(config.run.seed)
    plain, split = GPT(config.model, config.attention, end_of_text=tokenizer.end_of_text).eval(), corpus.split("validation")
    nats = tokens = text_bytes = 0
    with torch.no_grad():
        for index in range(split.windows_covering_all(32)):
            window = torch.from_numpy(split.window(index, 32))
            nats += float(plain(window[None, :-1], window[None, 1:]))
            tokens += len(window) - 1
            text_bytes += int(corpus.token_bytes[window[1:]].sum())
    shared_engine = build_engine(configure(*FEATURES, "parallel.sequence=2", "train.mlp_tile=24"), end_of_text=tokenizer.end_of_text)
    shared = evaluate(shared_engine, validation_batches(corpus.split("validation"), sequences=None, **shape, sharing=2), corpus.token_bytes)
    settings = config.sample.model_copy(update={"tokens": 20, "prompt": "To be"})
    sampled = [sample_text(each, tokenizer, settings, sequence_length=32, seed=7) for each in (engine, shared_engine)]
    texts = [None, None]
    dist.all_gather_object(texts, sampled)
    engine.destroy()
    shared_engine.destroy()
    return {"found": found, "some": some, "shared": shared, "nats": nats, "tokens": tokens, "bytes": text_bytes, "split_tokens": split.tokens, "samples": texts}


def bf16_gradient_error(stage: int, *overrides: str) -> float:
    """Relative error of the gradient norm after many micro batches in bf16, whose sum must be kept in fp32.

    Every micro batch is the same, so that the accumulated gradient is that of one of them and only the addition can go wrong.
    """
    def grad_norm(accumulation: int) -> float:
        config = configure("train.precision=bf16", "attention.backend=sdpa", f"zero.stage={stage}", "train.global_batch_size=null",
                           "train.micro_batch_size=1", f"train.gradient_accumulation_steps={accumulation}", "optimizer.grad_clip=0", *overrides)
        engine = build_engine(config)
        tokens, labels = (x[:1] for x in global_batch(configure(), 0))
        result = train_step(engine, [(tokens, labels)] * accumulation, 0, config)
        engine.destroy()
        return float(result.grad_norm)

    once, many = grad_norm(1), grad_norm(64)
    return abs(many / once - 1)


def faults_shared_by_all() -> dict:
    """What every rank raises when one of them fails, or resolves a setting otherwise."""
    def told(call) -> list[str]:
        try:
            call()
            message = "nothing raised"
        except (UserFault, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
        messages: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(messages, message)
        return messages

    def fail(error: Exception):
        raise error

    second = dist.get_rank() == 1
    return {
        "user": told(lambda: together(lambda: fail(ValueError("mend this")), here=second)),
        "file": told(lambda: together(lambda: fail(FileNotFoundError(2, "No such file", "/x")), here=second)),
        "ours": told(lambda: together(lambda: fail(RuntimeError("a bug")), here=second)),
        "disagree": told(lambda: agree("attention.backend", "sdpa" if second else "triton")),
        "agree": told(lambda: agree("attention.backend", "sdpa")),
    }


def deepspeed_keys() -> dict:
    generated = deepspeed_config(configure())
    return {"ours": sorted(unread_keys(generated)), "foreign": sorted(unread_keys({**generated, "enabled": True, "bogus": 1}))}


def main() -> None:
    out = Path(sys.argv[-1])  # the launcher puts --local_rank first
    gc.freeze()  # DeepSpeed collects garbage for every engine, and would walk through all that was imported
    join_process_group()
    seen = (on_two_gpus() if dist.get_world_size() == 2 else on_a_gpu(*sys.argv[2:-1])) if torch.cuda.is_available() else {
        "grid": grid(),
        "plain": train_plainly(configure()),
        "plain_two_rows": train_plainly(configure(*TWO_ROWS)),
        "plain_llama": train_plainly(configure(*LLAMA)),
        "llama": train(configure(*LLAMA, "train.activation_checkpointing=full", "attention.backend=sdpa")),
        "plain_features": train_plainly(configure(*FEATURES)),
        "features": [train(configure(*FEATURES, "attention.backend=tiled", "train.activation_checkpointing=full")),
                     train(configure(*FEATURES, "zero.stage=2"))],
        "documents_of_the_layers": documents_of_the_layers(),
        "plain_ignored": train_plainly(configure(), ignored=True),
        "means_of_means": {n: train_plainly(configure(), ignored=True, means_of=n) for n in (2, 4, 8)},
        "accumulated": {n: train(configure(f"train.gradient_accumulation_steps={n}", f"zero.stage={s}"), ignored=True) for n, s in ((1, 3), (4, 3), (2, 2))},
        "bf16": {stage: train(configure("train.precision=bf16", "attention.backend=sdpa", f"zero.stage={stage}")) for stage in range(4)},
        "long_contexts": long_contexts(),


        "without_a_part": {threshold: without_a_part(threshold) for threshold in (0, 100_000)},
        "without_a_part_plainly": without_a_part_plainly(),
        "let_go_of_between_steps": let_go_of_between_steps(),
        "sums_put_off": sums_put_off(),
        "asked_in_a_step": [asked_in_a_step(), asked_in_a_step("train.precision=bf16", "zero.persistence_threshold=0", "train.gradient_accumulation_steps=2")],
        "muon": muon(),
        "compiled": compiled(),
        "bf16_gradient_error": {f"{stage} {offload}": bf16_gradient_error(stage, *OFFLOAD[offload]) for stage in (1, 2, 3) for offload in ("none", "optimizer")},
        "loss_scale_search": loss_scale_search(),
        "initial_weights": initial_weights(),
        "dropout": dropout_differs(),
        "evaluation": evaluation(out.parent / "corpus"),
        "faults_shared_by_all": faults_shared_by_all(),
        "deepspeed_keys": deepspeed_keys(),
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(seen))
    end_process()


if __name__ == "__main__":
    main()
