"""Two processes under the DeepSpeed launcher that train in every mode whose memory is predicted, and follow each allocation.

``test_memory.py`` reads the JSON: for each configuration the peaks, of the rank that has more, in the forward pass, the backward
pass and the step; and rows of ``scripts/estimate_memory.py --measure``, which finds no GPU here.
"""

import functools
import gc
import json
import sys
import time
from pathlib import Path

import cpuinfo
import pytest
import torch
import torch._dynamo  # before zero.Init replaces what it looks at

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from model import loss
from scripts.estimate_memory import measured_row
from scripts.training_peers import let_go
from tests.allocations import Allocations, as_on_a_gpu
from training.config import load_config
from training.distributed import end_process, gather, join_process_group
from training.engine import build_engine, train_step

LINEAR = torch.nn.functional.linear
cpuinfo.get_cpu_info = functools.lru_cache(cpuinfo.get_cpu_info)  # DeepSpeed's CPU Adam asks each time, which takes a second
get_accelerator().is_fp16_supported = lambda: True


def follow(settings: list[str], logits_at_once: int) -> dict[str, int]:
    """Peak bytes by phase of the third step: from then on stage 3 knows the order of modules."""
    torch.nn.functional.linear = LINEAR  # DeepSpeed's stage 3 replaces it for good
    loss.LOGITS_AT_ONCE = logits_at_once
    config, _ = load_config("configs/base.yaml", settings, world_size=dist.get_world_size())
    gc.collect()
    with Allocations() as followed:
        engine = build_engine(config)
        for group in engine.optimizer.param_groups:
            if "fused" in group:
                group.update(fused=True, foreach=False)
        backward, step = engine.backward, engine.step

        def phase(name: str, call=lambda *_: None):
            def begin(*arguments, **options):
                if name == "step":
                    time.sleep(0.02)  # gloo's threads let go of what was reduced when they please
                followed.phase = name
                return call(*arguments, **options)

            return begin

        engine.register_forward_pre_hook(phase("forward"))
        engine.backward, engine.step = phase("backward", backward), phase("step", step)
        for number in range(3):
            if number == 2:
                followed.peaks.clear()
            batches = []
            for _ in range(config.train.gradient_accumulation_steps):
                tokens = torch.randint(config.model.vocab_size, (config.train.micro_batch_size, config.model.sequence_length + 1))
                sharing = config.parallel.sequence
                batches.append((tokens[:, :-1].clone(), tokens[:, 1:].chunk(sharing, 1)[dist.get_rank() % sharing].clone()))
            train_step(engine, batches, number, config)
    del engine.backward, engine.step, backward, step, phase
    let_go(engine)
    of_ranks = gather(followed.peaks)
    return {name: max(peaks[name] for peaks in of_ranks) for name in followed.peaks}


def main() -> None:
    asked, out = (Path(file) for file in sys.argv[-2:])  # the launcher puts its own before
    gc.freeze()  # DeepSpeed collects garbage for every engine, and would walk through all that was imported
    join_process_group()
    with pytest.MonkeyPatch.context() as monkeypatch:
        as_on_a_gpu(monkeypatch)
        asked = json.loads(asked.read_text())
        seen = [follow(**each) for each in asked["followed"]]
    rows = [measured_row(*row, dist.get_world_size()) for row in asked["rows"]]
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"followed": seen, "rows": rows}))
    end_process()


if __name__ == "__main__":
    main()
