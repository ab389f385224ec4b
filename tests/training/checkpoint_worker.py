"""Processes, two on CPUs or one a GPU, that save, load and convert checkpoints, and meet losses and gradients that are not finite."""

import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import model.gpt
from model.conversion import export_config, export_state
from tests.checkpoint_contents import tensor_hashes
from tests.training.checkpoint_grids import CPU_GRID, GPU_GRID, MODES
from tests.training.zero_worker import END_OF_TEXT, configure, micro_batches, train_plainly
from tests.training.zero_worker import train as train_all
from training.checkpoints import Checkpoint, LoopState, check_fits, find_checkpoint, load, read_weights, save
from training.config import Config
from training.distributed import UserFault, end_process, gather, join_process_group
from training.engine import build_engine, train_step
from training.loss_scale import LossScale

GRID = GPU_GRID if torch.cuda.is_available() else CPU_GRID
SAVED_AT, END = 3, 6
FEATURES = ["model.dropout=0.1", "attention.dropout=0.1", "attention.window=20", "attention.document_mask=true"]


def configuration(layout: str, *overrides: str) -> Config:
    mode, stage = layout.split("-")
    backend = "triton" if torch.cuda.is_available() else "tiled"
    parameters = ["zero.offload_parameters=cpu"] if layout == "offload-3" else []
    return configure(f"zero.stage={stage}", *MODES[mode], *parameters, f"attention.backend={backend}", f"train.steps={END}", "optimizer.lr=1e-2",
                     "optimizer.weight_decay=0.3", *overrides)


def loop_state(config: Config, **saved) -> LoopState:
    return LoopState(loss_scale=LossScale(1024.0) if config.train.precision == "fp16" else None, **saved)


def train(engine, config: Config, first: int, last: int, state: LoopState) -> list[tuple[float, float, float | None]]:
    results = [train_step(engine, micro_batches(config, step), step, config, state.loss_scale) for step in range(first, last)]
    assert all(result.applied for result in results)
    state.step = last
    return [(float(result.loss), float(result.grad_norm), result.loss_scale) for result in results]


def write(engine, folder: Path, config: Config, state: LoopState) -> Path:
    return save(engine, folder, state, config, corpus_sha256="", parameters=30_000)


def resumed(checkpoint: Checkpoint, config: Config, scratch: Path) -> dict:
    engine = build_engine(config, end_of_text=END_OF_TEXT, load_universal=checkpoint.needs_conversion(config))
    load(engine, checkpoint, config, scratch=scratch)
    state = checkpoint.state
    state.loss_scale = (state.loss_scale or loop_state(config).loss_scale) if config.train.precision == "fp16" else None
    rows = train(engine, config, SAVED_AT, END, state)
    seen = {"rows": rows, "adam_steps": sorted({float(state["step"]) for state in engine.basic_optimizer.state.values()}),
            "weight_decays": [group["weight_decay"] for group in engine.optimizer.param_groups]}
    end = write(engine, scratch, config, state)
    engine.destroy()
    return {**seen, "hashes": tensor_hashes(end)}


def gathered(engine) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=engine.zero_optimization_stage() == 3):
            weights[name] = parameter.detach().cpu().clone()
    return weights


def read_alone(engine, folder: Path, config: Config) -> bool:
    """Whether one process, reading a checkpoint, finds the weights that the ranks hold, which are the master weights rounded."""
    weights = gathered(engine)
    if dist.get_rank() > 0:
        return True
    found = read_weights(Checkpoint.read(folder), config, scratch=folder.parent)
    return found.keys() == weights.keys() and all(torch.equal(found[name].to(held.dtype), held) for name, held in weights.items())


def saved_and_resumed(config: Config, out: Path, name: str) -> dict:
    """6 steps against 3, saved, loaded into a fresh engine, and 3 more."""
    engine, state = build_engine(config, end_of_text=END_OF_TEXT), loop_state(config)
    train(engine, config, 0, SAVED_AT, state)
    alone = read_alone(engine, write(engine, out / name, config, state), config)
    whole = train(engine, config, SAVED_AT, END, state)
    hashes = tensor_hashes(write(engine, out / "whole" / name, config, state))
    engine.destroy()
    checkpoint, _ = find_checkpoint("auto", out / name)
    return {"whole": whole, "hashes": hashes, "read_alone": alone, "resumed": resumed(checkpoint, config, out / "again" / name)}


def same_layout(out: Path) -> dict:
    """With dropout, also of attention, a window and documents."""
    return {layout: saved_and_resumed(configuration(layout, *FEATURES), out, layout) for layout in GRID.layouts}


def other_layouts(out: Path) -> dict:
    """Without dropout, whose masks would differ."""
    seen = {}
    for before, after in GRID.conversions:
        checkpoint = Checkpoint.read(out / before / "step_00000003")
        seen[f"{before} {after}"] = resumed(checkpoint, configuration(after), out / "converted" / before / after)
    return seen


def muon(out: Path) -> dict:
    """Muon's optimizer states, resumed in the same layout and in others; and what AdamW is told of them."""
    name, seen = "optimizer.name=muon", {}
    same = {layout: saved_and_resumed(configuration(layout, name), out, f"muon-{layout}") for layout in GRID.muon_layouts}
    for before, after in GRID.muon_conversions:
        checkpoint = Checkpoint.read(out / f"muon-{before}" / "step_00000003")
        seen[f"{before} {after}"] = resumed(checkpoint, configuration(after, name), out / "converted" / f"muon-{before}" / after)
    try:
        refusal = str(check_fits(Checkpoint.read(out / "muon-fp32-2" / "step_00000003"), configuration("fp32-2"), corpus_sha256=""))
    except UserFault as error:
        refusal = str(error)
    return {"same_layout": same, "other_layouts": seen, "adamw": refusal}


def new_hyperparameters(out: Path) -> list:
    config = configuration("fp32-2", "optimizer.weight_decay=0.5", "optimizer.grad_clip=0.25", "optimizer.eps=1e-6")
    engine = build_engine(config)
    load(engine, Checkpoint.read(out / "fp32-2" / "step_00000003"), config, scratch=out)
    groups = engine.optimizer.param_groups
    seen = [[group["weight_decay"] for group in groups], [group["eps"] for group in groups], engine.optimizer.clip_grad]
    engine.destroy()
    return seen


def other_settings(out: Path) -> dict:
    """What is told, or refused, where other settings of attention are asked for than the checkpoint's, or than an older one's, which has none."""
    checkpoint = Checkpoint.read(out / "fp32-2" / "step_00000003")
    older = Checkpoint(checkpoint.folder, checkpoint.saved | {"config": checkpoint.saved["config"] | {"attention": {"backend": "sdpa"}}})

    def told(checkpoint: Checkpoint, *overrides: str) -> list[str] | str:
        try:
            return check_fits(checkpoint, configuration("fp32-2", *FEATURES, *overrides), corpus_sha256="")
        except UserFault as error:
            return str(error)

    changed = ["attention.window=12", "attention.document_mask=false", "attention.dropout=0.0"]
    plain = ["attention.window=null", *changed[1:]]
    return {"same": told(checkpoint), "changed": told(checkpoint, *changed), "positions": told(checkpoint, "model.positions=alibi"),
            "older": told(older, *plain), "older changed": told(older, *plain[1:])}


def initial_weights() -> dict:
    """Whether each stage starts from the weights of a model built on a CPU by itself."""
    seen = {}
    for stage in GRID.stages:
        config = configuration(f"fp32-{stage}")
        engine = build_engine(config)
        torch.manual_seed(config.run.seed)
        plain = dict(model.gpt.GPT(config.model).named_parameters())
        equal = True
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, enabled=stage == 3):
                equal &= torch.equal(parameter.data.cpu(), plain[name].data)
        seen[stage] = equal
        engine.destroy()
    return seen


def weights_from_elsewhere(out: Path) -> dict:
    """Whether each stage starts from the weights of model.init_from, and what is said where the file lacks one."""
    config = configuration("fp32-0", "model.kv_heads=2")  # as GPT-2 has it
    torch.manual_seed(5)
    plain = model.gpt.GPT(config.model)
    state = export_state(dict(plain.named_parameters()), config.model, vocab_size=config.model.vocab_size)
    folder, broken = out / "elsewhere", out / "broken"
    if dist.get_rank() == 0:
        for each, weights in ((folder, state), (broken, dict(list(state.items())[1:]))):
            each.mkdir(parents=True)
            (each / "config.json").write_text(json.dumps(export_config(config.model, config.attention, vocab_size=config.model.vocab_size, end_of_text=0)))
            save_file(weights, each / "model.safetensors")
    dist.barrier()
    seen = {}
    for stage in GRID.stages:
        engine = build_engine(configuration(f"fp32-{stage}", "model.kv_heads=2", f"model.init_from={folder}"))
        weights = gathered(engine)
        seen[stage] = all(gather(all(torch.equal(weights[name], parameter.data) for name, parameter in plain.named_parameters())))
        engine.destroy()
    try:
        build_engine(configuration("fp32-3", "model.kv_heads=2", f"model.init_from={broken}"))
    except UserFault as error:
        seen["broken"] = str(error)
    return seen


def of_transformers(out: Path) -> dict:
    """A model of transformers in the place of ours, saved and resumed in one layout, and loaded into another."""
    asked = [f"model.huggingface={out / 'elsewhere'}", "model.kv_heads=2", "attention.backend=eager", "attention.document_mask=true"]
    same = saved_and_resumed(configuration("bf16-3", *asked), out, "of-transformers")
    checkpoint = Checkpoint.read(out / "of-transformers" / "step_00000003")
    return {"same_layout": same, "bf16-1": resumed(checkpoint, configuration("bf16-1", *asked), out / "converted" / "of-transformers")}


def plain_and_zero() -> dict:
    """Plain PyTorch on one process, on the CPU, and each stage, in fp32."""
    stages = {stage: train_all(configuration(f"fp32-{stage}")) for stage in GRID.stages}
    return {"plain": train_plainly(configuration("fp32-0")), "stages": stages}


def not_finite(out: Path) -> dict:
    """One loss, then one gradient, that is not finite, on the last rank alone, in the first of two micro batches."""
    cross_entropy, seen = model.gpt.linear_cross_entropy, {}
    poison = None

    def poisoned(x, *arguments):
        nonlocal poison
        kind, poison = poison, None
        if kind == "gradient":
            x = x * 1
            x.register_hook(lambda gradient: gradient * torch.nan)
        loss = cross_entropy(x, *arguments)
        return loss * torch.inf if kind == "loss" else loss

    model.gpt.linear_cross_entropy = poisoned
    for layout in GRID.not_finite:
        config = configuration(layout, "train.gradient_accumulation_steps=2")
        engine, state = build_engine(config), loop_state(config)
        train(engine, config, 0, 1, state)
        results, scales = [], []
        for step, kind in ((1, "loss"), (2, "gradient")):
            poison = kind if dist.get_rank() == dist.get_world_size() - 1 else None
            result = train_step(engine, micro_batches(config, step), step, config, state.loss_scale)
            results.append((repr(float(result.loss)), repr(float(result.grad_norm)), bool(result.applied), result.overflow))
            scales += [state.loss_scale.scale] if state.loss_scale else []
        skipped = train(engine, config, 1, 3, state)
        engine.destroy()
        engine, state = build_engine(config), loop_state(config)
        train(engine, config, 0, 1, state)
        undisturbed = train(engine, config, 1, 3, state)
        engine.destroy()
        seen[layout] = {"results": gather(results), "scales": scales, "skipped": [row[:2] for row in skipped],
                        "undisturbed": [row[:2] for row in undisturbed]}
    model.gpt.linear_cross_entropy = cross_entropy
    return seen


def main() -> None:
    out = Path(sys.argv[-1])
    gc.freeze()  # DeepSpeed collects garbage for every engine, and would walk through all that was imported
    join_process_group()
    folder = out.parent / "checkpoints"
    seen = {"same_layout": same_layout(folder), "other_layouts": other_layouts(folder), "new_hyperparameters": new_hyperparameters(folder),
            "other_settings": other_settings(folder), "muon": muon(folder),
            "initial_weights": initial_weights(), "elsewhere": weights_from_elsewhere(folder), "of_transformers": of_transformers(folder),
            "not_finite": not_finite(folder), "plain": plain_and_zero()}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(seen))
    end_process()


if __name__ == "__main__":
    main()
