"""Checkpoints across layouts: DeepSpeed's universal format, one file a parameter and state, and what it lacks.

    zero/NAME/fp32.pt  exp_avg.pt  exp_avg_sq.pt  step.pt     full tensors of one parameter, and Adam's step count
    zero/optimizer_state.pt                                   what belongs to no parameter

DeepSpeed 0.19.8 converts stages 1 to 3, but what it writes from stage 3 its stages 1 and 2 cannot read, nor the other way round, and it
has nothing for stage 0.  Here every stage writes, and every stage reads, the same folder.
"""

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, PARAM, PARAM_GROUPS
from deepspeed.ops.adam import DeepSpeedCPUAdam

from model.gpt import GPT, parameter_groups
from training.config import ModelSection
from training.pretrained import meta_huggingface

_STATES = ("fp32", "exp_avg", "exp_avg_sq")
_STAGE_3_MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_MODEL_FILE = "mp_rank_00_model_states.pt"


def convert_to_universal(source: Path, target: Path, layout: dict[str, Any], model: ModelSection, optimizer: str) -> None:
    """Write the checkpoint ``source``, saved in ``layout``, into ``target`` in the universal format; one process does it.

    The disk needs room for it twice over for the moment.
    """
    shutil.rmtree(target, ignore_errors=True)
    (target / "zero").mkdir(parents=True)
    if layout["zero_stage"] == 0:
        _convert_stage_0(source, target, layout["precision"], model, optimizer)
    else:
        wishes = argparse.Namespace(input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
                                    keep_temp_folder=False, strict=True, inject_missing_state=True)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(wishes)
        (target.parent / "latest_universal").unlink()  # we name the folder we load
        _complete(target, model, optimizer)
    for name in (_MODEL_FILE, _STAGE_3_MODEL_FILE):
        if not (target / name).exists():
            shutil.copy(target / (_STAGE_3_MODEL_FILE if name == _MODEL_FILE else _MODEL_FILE), target / name)


def _complete(target: Path, model: ModelSection, optimizer: str) -> None:
    """Bring what DeepSpeed wrote from stage 3, or from stages 1 and 2, into the form that all of them read."""
    common = torch.load(target / "zero" / "optimizer_state.pt")
    if OPTIMIZER_STATE_DICT in common:
        step = common[OPTIMIZER_STATE_DICT]["state"][0]["step"]
    else:
        step = torch.load(target / "zero" / next(iter(_shapes(model, optimizer))) / "step.pt")
        common[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: common[PARAM_GROUPS]}
    common["ds_version"] = deepspeed.__version__
    torch.save(common, target / "zero" / "optimizer_state.pt")
    for name, shape in _shapes(model, optimizer).items():
        folder = target / "zero" / name
        torch.save(step, folder / "step.pt")
        for state in _STATES:
            tensor = torch.load(folder / f"{state}.pt")
            if isinstance(tensor, torch.Tensor):
                torch.save({PARAM: tensor.view(shape)}, folder / f"{state}.pt")


def _convert_stage_0(source: Path, target: Path, precision: str, model: ModelSection, optimizer: str) -> None:
    whole = torch.load(source / _MODEL_FILE, map_location="cpu")
    saved = whole["optimizer"]
    adam = saved if precision == "fp32" else saved["optimizer_state_dict"]
    masters = [m for group in saved["fp32_groups"] for m in group] if precision == "bf16" else [whole["module"][name] for name in _shapes(model, optimizer)]
    for index, (name, master) in enumerate(zip(_shapes(model, optimizer), masters, strict=True)):
        folder = target / "zero" / name
        folder.mkdir()
        state = adam["state"][index]
        torch.save(state["step"], folder / "step.pt")
        for key, tensor in {"fp32": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}.items():
            torch.save({PARAM: tensor}, folder / f"{key}.pt")
    common = {PARAM_GROUPS: adam["param_groups"], OPTIMIZER_STATE_DICT: {"state": {0: {"step": state["step"]}}, PARAM_GROUPS: adam["param_groups"]},
              "ds_version": deepspeed.__version__}
    torch.save(common, target / "zero" / "optimizer_state.pt")
    shutil.copy(source / _MODEL_FILE, target)


def load_universal(engine: deepspeed.DeepSpeedEngine, folder: Path, model: ModelSection, optimizer: str) -> None:
    """Load a folder that ``convert_to_universal`` wrote into an engine of any layout, built with ``checkpoint.load_universal``."""
    if engine.zero_optimization_stage() == 0:
        _load_stage_0(engine, folder, model, optimizer)
    else:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    for parameter, state in engine.basic_optimizer.state.items():
        # DeepSpeed gives all groups one step count, which each of them would count up, and leaves it on the CPU, where fused AdamW has none.
        # Its CPU Adam counts in a Python integer.
        if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
            state["step"] = int(state["step"])
        else:
            state["step"] = torch.tensor(float(state["step"]), device=parameter.device if parameter.is_cuda else "cpu")


def read_weights(folder: Path, model: ModelSection, optimizer: str) -> dict[str, torch.Tensor]:
    """The master weights in a folder that ``convert_to_universal`` wrote, in float32, by name."""
    return {name: torch.load(folder / "zero" / name / "fp32.pt", map_location="cpu")[PARAM].float() for name in _shapes(model, optimizer)}


def _load_stage_0(engine: deepspeed.DeepSpeedEngine, folder: Path, model: ModelSection, optimizer: str) -> None:
    masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    parameters = dict(engine.module.named_parameters())
    for name, master in zip(_shapes(model, optimizer), masters, strict=True):
        files = {state: torch.load(folder / "zero" / name / f"{state}.pt", map_location=master.device)[PARAM] for state in _STATES}
        for held in (master, parameters[name]):
            held.data.copy_(files["fp32"])
        engine.basic_optimizer.state[master] = {"step": torch.load(folder / "zero" / name / "step.pt"), **{k: files[k] for k in _STATES[1:]}}


def _shapes(model: ModelSection, optimizer: str) -> dict[str, torch.Size]:
    """Names and shapes of the parameters, in the order of the optimizer ``adamw`` or ``muon``."""
    if model.huggingface is not None:
        built = meta_huggingface(model.huggingface)
    else:
        with torch.device("meta"):
            built = GPT(model)
    names = {id(p): name for name, p in built.named_parameters()}
    return {names[id(p)]: p.shape for group in parameter_groups(built, hidden_apart=optimizer == "muon") for p in group["params"]}
