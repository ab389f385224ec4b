"""A rank of scripts/benchmark_training.py on a machine with too little memory: the variable SCENARIO says for what, and who finds out."""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from model.gpt import Block
from scripts import benchmark_training

SCENARIO = json.loads(os.environ["SCENARIO"])  # fits: sequences; ranks: that find out; leaks: whether a micro batch leaves memory behind
forward = Block.forward


def limited(self, x, **context):
    if len(x) > SCENARIO["fits"] and int(os.environ["RANK"]) in SCENARIO["ranks"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
    return forward(self, x, **context)


def held_share() -> float:
    """Prints the bytes of all tensors that there are, and says what the scenario does."""
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    print("held", sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()), flush=True)
    return float(SCENARIO["leaks"] and os.environ.pop("FIRST", None) is None)


Block.forward, benchmark_training.held_share, benchmark_training.AGREE_SECONDS = limited, held_share, 3
os.environ["FIRST"] = "1"
if __name__ == "__main__":
    try:
        benchmark_training.work(json.loads(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        os._exit(1)
