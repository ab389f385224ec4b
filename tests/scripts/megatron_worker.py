"""Runs of scripts/megatron_pretrain.py on gloo processes forked from one that has imported everything; what they did, as one line of JSON.

    python -m tests.scripts.megatron_worker FOLDER CORPUS

Run by itself, not inside pytest, with nothing but the main thread. What only a GPU has is stood in for (tests.model.cuda_stand_in).
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402

import training.megatron  # noqa: E402
from model.gpt import GPT, parameter_groups  # noqa: E402
from scripts import megatron_pretrain  # noqa: E402
from scripts.export_hf import export  # noqa: E402
from tests.model.cuda_stand_in import cuda_on_cpu  # noqa: E402
from training.batches import TrainingBatches  # noqa: E402
from training.checkpoints import Checkpoint, check_fits  # noqa: E402
from training.config import Config, load_config  # noqa: E402
from training.distributed import UserFault, free_port  # noqa: E402
from training.megatron_config import MegatronConfig  # noqa: E402
from training.mixture import Mixture  # noqa: E402
from training.schedule import learning_rate  # noqa: E402
from training.tracking import read_metrics  # noqa: E402

STEPS = 4
SMALL = ["sample.tokens=0", "tracking.wandb=disabled", "train.compile=false", "train.precision=fp32", f"train.steps={STEPS}", "train.global_batch_size=4",
         "train.micro_batch_size=1", "train.gradient_accumulation_steps=null", "model.layers=2", "model.hidden_size=32", "model.heads=4", "model.ffn_size=64",
         "model.sequence_length=32", "model.vocab_size=272", "model.init_std=0.1", "optimizer.lr=1e-2", "optimizer.warmup_steps=1", "eval.sequences=8", "eval.every=0",
         "checkpoint.every=null"]  # fmt: skip
GPT2 = ["model.positions=learned", "model.kv_heads=2", "attention.window=9"]
LLAMA = ["model.positions=rope", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.kv_heads=1", "model.tied_embeddings=false"]


def run(name: str, processes: int, *settings: str, folder: Path, corpus: str, before: Callable[[int], None] = lambda rank: None) -> dict:
    """One start of a run on so many processes, each of which first calls ``before``: its exit codes, what they printed, and the rows recorded so far."""
    arguments = ["--config", "configs/megatron/base.yaml", *SMALL, f"data.corpus={corpus}", f"run.output_dir={folder}", f"run.name={name}", *settings]
    log, port = folder / f"{name}.log", free_port()
    children = [_fork(rank, processes, port, arguments, log, before) for rank in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    rows = read_metrics(folder / name)[0] if (folder / name / "metrics.jsonl").exists() else []
    return {"codes": codes, "log": log.read_text()[-4000:], "rows": rows}


def _fork(rank: int, processes: int, port: int, arguments: list[str], log: Path, before: Callable[[int], None]) -> int:
    child = os.fork()
    if child:
        return child
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      CUDA_DEVICE_MAX_CONNECTIONS="1")  # fmt: skip
    sys.argv = ["megatron_pretrain.py", *arguments]
    megatron_pretrain.own_device = lambda local_rank: torch.device("cpu")
    warnings.resetwarnings()
    before(rank)
    try:
        with cuda_on_cpu():
            megatron_pretrain.main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def stopped_at_once(rank: int) -> None:
    """The last process gets a signal as its first step begins."""

    class Stopped(megatron_pretrain.StopRequests):
        def begin_loop(self) -> None:
            super().begin_loop()
            if rank == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                while self.reason is None:
                    time.sleep(0.01)

    megatron_pretrain.StopRequests = Stopped


def without_megatron(rank: int) -> None:
    for name in ("training.megatron", "model.megatron"):
        del sys.modules[name]
    del training.megatron
    sys.modules["megatron.core.packed_seq_params"] = None


def plain(*settings: str, corpus: str) -> list[float]:
    """Losses of our own GPT on the same samples, trained by PyTorch alone in one process."""
    config, _ = load_config("configs/megatron/base.yaml", [*SMALL, f"data.corpus={corpus}", *settings], schema=MegatronConfig)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, config.attention)
    decayed, kept = parameter_groups(model)
    optimizer = torch.optim.AdamW([decayed | {"weight_decay": config.optimizer.weight_decay}, kept | {"weight_decay": 0.0}],
                                  betas=tuple(config.optimizer.betas), eps=config.optimizer.eps)  # fmt: skip
    mixture = Mixture.open(config.data.weights())
    batches = TrainingBatches([each.split("train") for each in mixture.corpora], shares=mixture.shares, micro_batch_size=1, accumulation=4,
                              seed=config.run.seed, sequence_length=config.model.sequence_length, rank=0, world=1, device=torch.device("cpu"))  # fmt: skip
    losses = []
    for step in range(STEPS):
        tokens, labels = (torch.cat(parts) for parts in zip(*batches.step(step), strict=True))
        loss = model(tokens, labels) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, config.optimizer)
        optimizer.step()
        losses.append(loss.item())
    batches.close()
    return losses


def fault_of(work: Callable[[], object]) -> str:
    try:
        return f"no fault: {work()}"
    except UserFault as fault:
        return str(fault)


def faults_of_strangers(run_dir: Path) -> list[str]:
    """What is said where one trainer's checkpoint is given to the other, and Megatron's to the export."""
    ours, megatrons = Config(), MegatronConfig()
    asked = [(ours, megatrons), (megatrons, ours)]
    checkpoints = [(Checkpoint(run_dir, {"config": saved.model_dump(), "corpus_sha256": ""}), taken) for saved, taken in asked]
    return [*(fault_of(lambda: check_fits(checkpoint, taken, corpus_sha256="")) for checkpoint, taken in checkpoints),
            fault_of(lambda: export(run_dir, run_dir / "exported"))]  # fmt: skip


def main(folder: Path, corpus: str) -> dict:
    def start(name: str, *settings: str, processes: int = 2, **options) -> dict:
        return run(name, processes, "optimizer.schedule=constant", *settings, folder=folder, corpus=corpus, **options)

    tensor = "megatron.tensor_parallel=2"
    four = {"processes": 4}
    drops = (*GPT2, tensor, "megatron.sequence_parallel=true", "train.precision=bf16", "model.dropout=0.1", "attention.dropout=0.1")
    return {
        "gpt2": plain(*GPT2, "optimizer.schedule=constant", corpus=corpus),
        "llama": plain(*LLAMA, "optimizer.schedule=constant", corpus=corpus),
        "pipeline": start("gpt2", *GPT2, "megatron.pipeline_parallel=2", "megatron.recompute_attention=true", "train.steps=2", "checkpoint.every=0"),
        "pipeline, then sequence": start("gpt2", *GPT2, tensor, "megatron.sequence_parallel=true"),
        "tensor": start("tensor", *LLAMA, tensor, "train.activation_checkpointing=full"),
        "data, Megatron's attention": start("data", *LLAMA, "megatron.attention=megatron"),
        "uninterrupted": start("uninterrupted", *drops, **four),
        "stopped": start("resumed", *drops, "checkpoint.every=0", **four, before=stopped_at_once),
        "resumed": start("resumed", *drops, **four),
        "strangers": faults_of_strangers(folder / "gpt2"),
        "without megatron-core": start("without", processes=1, before=without_megatron),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
