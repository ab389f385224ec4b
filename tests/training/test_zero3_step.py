import sys
from types import SimpleNamespace

import pytest
import torch

from training.config import load_config
from training.engine import deepspeed_config
from training.zero3_step import shorten_step


def test_what_deepspeed_no_longer_has_is_not_replaced_without_a_word():
    engine = SimpleNamespace(optimizer=SimpleNamespace(), module=torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="is not what training/zero3_step.py relies on .*no attribute 'fp16_groups'.* install the"):
        shorten_step(engine, on_gpu_only=True)


@pytest.mark.parametrize(("processes", "settings", "threshold"), [
    (1, [], sys.maxsize), (2, [], 100_000), (1, ["zero.offload_optimizer=cpu", "zero.offload_parameters=cpu"], 100_000),
    (2, ["parallel.sequence=2", "train.compile=false"], 100_000),
])  # fmt: skip
def test_a_single_process_has_every_parameter_for_good(processes, settings, threshold):
    batch = ["train.global_batch_size=8", "train.micro_batch_size=1", "train.gradient_accumulation_steps=null"]
    config, _ = load_config("configs/base.yaml", [*batch, *settings], world_size=processes)
    assert deepspeed_config(config)["zero_optimization"]["stage3_param_persistence_threshold"] == threshold
