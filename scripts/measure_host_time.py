"""Host time of a training step, on CPUs: ours under ZeRO-3, and beside it the same GPT under FSDP2 and on its own.

    torchrun --nproc-per-node 1 scripts/measure_host_time.py
    torchrun --nproc-per-node 2 scripts/measure_host_time.py --contenders ours_stays fsdp2 --steps 100

12 layers 32 wide, one sequence of 16 tokens a micro batch, 4 micro batches a step: arithmetic is next to nothing, and what is left is what
a GPU would wait for. Nothing is compiled. What streams and events of a GPU cost the host is not in it.

    plain            no process group, parameters in bf16
    fsdp2            scripts/training_peers.py's, each block gathered before its forward and again before its backward pass
    fsdp2_keeps      the same, each block gathered before its forward pass
    ours_shards      as fsdp2: zero.persistence_threshold=0 and zero.reuse_distance=0
    ours_keeps       as fsdp2_keeps, but that vectors stay, as they do in configs/gpt-1.3b.yaml
    ours_stays       every parameter stays on every process, as in configs/gpt2-124m.yaml; with one process the three are one

Time is that of rank 0's main thread on its core, in microseconds, the median of --steps: `forward` and `backward` of a micro batch, and
`rest` of a step beside those of its micro batches. The run is added to the list in the file --out, under --label.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from model.gpt import GPT  # noqa: E402
from scripts.training_peers import Batch, clip_shards, cross_entropy, let_go, sharded_gpt, with_sdpa  # noqa: E402
from training.config import Config, load_config  # noqa: E402
from training.distributed import end_process, join_process_group  # noqa: E402
from training.engine import build_engine, build_optimizer, train_step  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

MICRO_BATCHES, WARMUP = 4, 12
LINEAR = torch.nn.functional.linear
TINY = ["model.layers=12", "model.hidden_size=32", "model.heads=2", "model.vocab_size=64", "model.sequence_length=16",
        "train.micro_batch_size=1", f"train.gradient_accumulation_steps={MICRO_BATCHES}", "train.global_batch_size=null",
        "train.compile=false", "attention.backend=sdpa", "train.steps=100000"]  # fmt: skip
BLOCK = 12 * 32**2 + 13 * 32  # parameters
SETTINGS = {
    "plain": [], "fsdp2": [], "fsdp2_keeps": [],
    "ours_shards": ["zero.persistence_threshold=0", "zero.reuse_distance=0", f"zero.prefetch_bucket_size={BLOCK}"],
    "ours_keeps": ["zero.persistence_threshold=1000"],
    "ours_stays": ["zero.persistence_threshold=1000000000"],
}  # fmt: skip


class Parts:
    """Seconds of this thread by part, call by call."""

    def __init__(self):
        self.spent: dict[str, list[float]] = {}

    def timed(self, part: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            start = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.spent.setdefault(part, []).append(time.thread_time() - start)

        return call


def ours(config: Config, parts: Parts) -> Callable[[list[Batch], int], object]:
    engine = build_engine(config)
    torch.nn.functional.linear = LINEAR  # not DeepSpeed's, which compiled blocks have no part of either (training/engine.py)
    for group in engine.optimizer.param_groups:
        group.update(fused=True, foreach=False)  # as on a GPU
    engine.forward, engine.backward = parts.timed("forward", engine.forward), parts.timed("backward", engine.backward)

    def step(batches: list[Batch], number: int) -> Callable[[], None]:
        train_step(engine, batches, number, config)
        return lambda: let_go(engine)

    return step


def pytorchs(config: Config, parts: Parts, contender: str) -> Callable[[list[Batch], int], object]:
    torch.manual_seed(config.run.seed)
    if contender == "plain":
        model = GPT(config.model, config.attention).bfloat16()
    else:
        model = sharded_gpt(with_sdpa(config), reshard_after_forward=contender == "fsdp2", compiled=lambda function: function)
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
    forward = parts.timed("forward", lambda tokens, labels: cross_entropy(model(tokens), labels))
    backward = parts.timed("backward", lambda loss: loss.backward())

    def step(batches: list[Batch], number: int) -> Callable[[], None]:
        for batch in batches:
            backward(forward(*batch) / MICRO_BATCHES)
        clip_shards([p.grad.to_local() if contender != "plain" else p.grad for p in model.parameters()], config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return lambda: None

    return step


def measure(contender: str, steps: int) -> dict[str, int]:
    config, _ = load_config(ROOT / "configs/base.yaml", [*TINY, *SETTINGS[contender]], world_size=dist.get_world_size())
    parts, whole, close = Parts(), [], lambda: None
    step = ours(config, parts) if contender.startswith("ours") else pytorchs(config, parts, contender)
    batches = []
    for tokens in torch.randint(config.model.vocab_size, (MICRO_BATCHES, 1, config.model.sequence_length + 1)):
        batches.append((tokens[:, :-1].clone(), tokens[:, 1:].clone()))
    for number in range(WARMUP + steps):
        if number == WARMUP:
            parts.spent.clear()
        dist.barrier()
        start = time.thread_time()
        close = step(batches, number)
        whole.append(time.thread_time() - start)
    close()
    of_micro = {part: median(parts.spent[part]) for part in ("forward", "backward")}
    rest = median(whole[WARMUP:]) - MICRO_BATCHES * sum(of_micro.values())
    return {part: round(1e6 * seconds) for part, seconds in {**of_micro, "rest": rest, "step": median(whole[WARMUP:])}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=60, help="that are timed")
    parser.add_argument("--label", help="what of, such as a change")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/host_time.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    join_process_group()
    logging.disable(logging.WARNING)
    rows = {}
    for contender in options.contenders:
        rows[contender] = measure(contender, options.steps)
        if dist.get_rank() == 0:
            print(f"{contender:12}" + "".join(f"  {part} {us:6,}" for part, us in rows[contender].items()), flush=True)
    if dist.get_rank() == 0:
        run = {"label": options.label, "environment": collect_environment(), "processes": dist.get_world_size(), "steps": options.steps}
        before = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps([*before, run | {"microseconds": rows}], indent=1) + "\n")
    end_process()


if __name__ == "__main__":
    main()
