"""Say what a run needs before any GPU is touched: memory by part, the host's share, FLOPs, hours; what fits, and what would lower it.

    python scripts/estimate_memory.py --config configs/gpt-1.3b.yaml --gpus 8 --tokens 26e9 [section.key=value ...]
    deepspeed --num_gpus 2 scripts/estimate_memory.py --measure --out docs/results/memory-h200-x2.json
    python scripts/estimate_memory.py --table docs/results/memory-h200*.json

The first needs no GPU, corpus or launcher. What it assumes of the GPU, and --mfu, the share of its peak that a run reaches, are options;
docs/memory.md derives the numbers.

--measure trains each row of ``ROWS`` for this many processes, three steps on random tokens by train.py's engine, and writes the peak of
``torch.cuda.max_memory_allocated`` beside the prediction, after every row. --part 1/2 takes every second row, so that two processes share
the work of one on two GPUs. Rows that --limit leaves no time for are left out. The same command again keeps what --out has measured, and goes
on behind it: remove the file to begin anew. Exit status 1 when a row failed otherwise than by its memory. Weights are of one size, since memory
does not depend on them. Where DeepSpeed's CPU Adam is not compiled yet, torch's steps the host's states: neither holds memory of the GPU.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

from training.config import Config, ConfigError, load_config  # noqa: E402
from training.distributed import Ranks, UserFault, one_clear_message  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.flops import compute_capability, known_gpus  # noqa: E402
from training.memory import GIB, Estimate, Moment, estimate, is_out_of_memory, summary  # noqa: E402

STEPS = 3  # the optimizer's states are there from the second on; stage 3 keeps parameters gathered from the third on
NO_CHECKPOINTING = "train.activation_checkpointing=none"
FULL = "train.activation_checkpointing=full"
SELECTIVE = "train.activation_checkpointing=selective"
OFFLOAD = "zero.offload_optimizer=cpu"
COMPILED = "train.compile=true"  # else a row's blocks are as written, which is what is predicted
AWAY = "train.checkpoint_offload=true"
LONG = ("model.positions=rope", "model.sequence_length=131072", AWAY, "attention.window=4096", "train.mlp_tile=16384")
# processes -> (configuration, settings); micro batch by its first number. The most telling come first.
ROWS = {
    1: (
        ("gpt2-124m", 16, NO_CHECKPOINTING), ("gpt-1.3b", 8, FULL), ("gpt2-124m", 16, SELECTIVE),
        ("gpt2-124m", 16, "attention.backend=eager"),
        ("gpt2-124m", 16, FULL), ("gpt2-124m", 16, SELECTIVE, "train.keep_matmuls=true"), ("gpt2-355m", 16, NO_CHECKPOINTING),
        ("llama-160m", 16, NO_CHECKPOINTING), ("gpt2-124m", 16, "zero.stage=0", "attention.backend=sdpa"),
        ("gpt-1.3b", 4, NO_CHECKPOINTING),
        ("gpt2-124m", 32, "zero.stage=1"), ("gpt2-124m", 16, "zero.stage=2", "train.precision=fp16"),
        ("gpt2-124m", 8, "train.precision=fp32"),
        ("gpt2-774m", 8, FULL), ("gpt2-124m", 16, "attention.backend=eager", FULL),
        ("gpt2-124m", 32, "train.activation_checkpointing=every_n", "train.checkpoint_every=2", "attention.backend=triton"),
        ("gpt-1.3b", 1, FULL, "model.sequence_length=32768"),
        ("gpt2-124m", 1, NO_CHECKPOINTING, "model.sequence_length=32768", "attention.backend=triton"),
        ("gpt2-124m", 32, "train.activation_checkpointing=deepspeed"), ("gpt2-355m", 8, SELECTIVE, OFFLOAD),
        ("gpt2-124m", 16, OFFLOAD, "zero.offload_parameters=cpu"), ("gpt2-124m", 16, OFFLOAD, "zero.stage=2"),
        ("gpt-1.3b", 1, FULL, *LONG), ("gpt-1.3b", 1, FULL, *LONG[:-1]),
        ("gpt2-124m", 16, NO_CHECKPOINTING, COMPILED), ("llama-160m", 16, NO_CHECKPOINTING, COMPILED), ("gpt-1.3b", 8, FULL, COMPILED),
    ),
    2: (
        ("gpt-1.3b", 8, FULL), ("gpt2-124m", 16, "zero.stage=3"), ("gpt2-124m", 16, "zero.stage=2"), ("gpt2-124m", 16, "zero.stage=1"),
        ("gpt2-124m", 16, "zero.stage=0"), ("gpt-1.3b", 4, NO_CHECKPOINTING, "attention.backend=triton"), ("llama-1b", 4, FULL),
        ("gpt2-774m", 8, SELECTIVE, "zero.stage=2"), ("gpt2-355m", 16, "zero.stage=1", "train.precision=fp16"),
        ("gpt2-355m", 8, "train.bf16_states=true", "zero.reduce_dtype=bf16"), ("gpt2-355m", 8, FULL, "train.precision=fp32"),
        ("gpt2-124m", 8, "optimizer.name=muon"), ("gpt-1.3b", 16, FULL, "zero.reduce_bucket_size=10000000"),
        ("gpt2-355m", 8, OFFLOAD, "zero.offload_parameters=cpu"), ("gpt-1.3b", 4, NO_CHECKPOINTING, COMPILED),
        ("gpt-1.3b", 1, FULL, *LONG, "parallel.sequence=2"),
        ("llama-1b", 1, FULL, "model.sequence_length=65536", "parallel.sequence=2", AWAY),
        ("gpt-1.3b", 4, FULL, "zero.reuse_distance=0", "zero.prefetch_bucket_size=50000000", "zero.persistence_threshold=0"),
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        try:
            print(table([row for file in options.table for row in json.loads(file.read_text())["rows"]]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"--table: not what --measure writes: {type(error).__name__}: {error}; give it files of --measure --out", file=sys.stderr)
            return 2
        return 0
    if options.measure:
        with one_clear_message(Ranks.from_environment()):
            return measure(options)
    try:
        config, notes = load_config(
            options.config, options.overrides, world_size=options.gpus, assumed_gpu=compute_capability(options.gpu_name)
        )
        found = estimate(config, options.gpus)
    except (ConfigError, UserFault) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*notes, *summary(config, options.gpus, options.gpu_name), *speed(config, options), *moments(found)]))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="YAML file of the run")
    what.add_argument("--measure", action="store_true", help="train each row and write predictions beside measured peaks")
    what.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="print what --measure wrote as Markdown")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, default=1, help="processes, a GPU each")
    parser.add_argument("--gpu-name", default="H200", help="as CUDA calls it")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation that the hours assume")
    parser.add_argument("--tokens", type=float, help="budget of the run; default: that of train.steps")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/memory.json")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the Kth of every N rows")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which no row is begun")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    options = parser.parse_intermixed_args(arguments)
    if options.config and compute_capability(options.gpu_name) is None:
        parser.error(f"--gpu-name {options.gpu_name}: its peak is not known; known (as patterns): {', '.join(known_gpus())}")
    if options.measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU, and torch sees none here")
    try:
        part, parts = (int(number) for number in options.part.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        parser.error(f"--part {options.part}: not the Kth of every N rows, as in 1/2")
    options.part = part, parts
    if options.gpus < 1 or not 0 < options.mfu <= 1 or (options.tokens is not None and not 0 < options.tokens < float("inf")):
        parser.error("--gpus is at least 1, --mfu above 0 and at most 1, --tokens above 0")
    return options


# --- the prediction in words ------------------------------------------------------------------------------------------


def speed(config: Config, options: argparse.Namespace) -> list[str]:
    """A line: FLOPs, tokens/s and hours."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's remarks on the machine
        from training.metering import Meter

        meter = Meter(config, options.gpus, device_name=options.gpu_name)
    tokens = options.tokens or config.train.steps * meter.tokens_per_step
    per_gpu = options.mfu * meter.peak_flops / meter.flops_per_token
    hours = tokens / (per_gpu * options.gpus) / 3600
    again = meter.hardware_flops_per_token / meter.flops_per_token
    return [
        f"time   {tokens:,.0f} tokens, {tokens * meter.flops_per_token:.4g} FLOPs ({again:.2f} times that with what is computed again); "
        f"at an assumed MFU of {options.mfu:.3g} {per_gpu:,.0f} tokens/s/GPU, {hours:.3g} hours, {hours * options.gpus:.3g} GPU hours"
    ]


def moments(found: Estimate) -> list[str]:
    """The moments that can be the peak, a line each, GiB by part; of the blocks the one with the most."""
    best: dict[str, Moment] = {}
    for moment in found.moments:
        kind = moment.name.split(" of block")[0]
        best[kind] = max(best.get(kind, moment), moment, key=lambda each: each.bytes)
    columns = list(dict.fromkeys(part for moment in best.values() for part, size in moment.parts.items() if abs(size) >= GIB / 100))
    rows = [["GiB at", *columns, "together"]]
    for moment in sorted(best.values(), key=lambda each: -each.bytes):
        rows.append([moment.name, *(f"{moment.parts.get(part, 0) / GIB:.2f}" for part in columns), f"{moment.bytes / GIB:.2f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def table(rows: list[dict]) -> str:
    """Markdown: prediction beside measurement, and how far apart."""
    lines = ["| configuration | GPUs | predicted GiB | at | measured GiB | difference |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        name = f"`{row['config']}` {row['micro_batch']}, " + ", ".join(f"`{each}`" for each in row["settings"])
        if "measured_bytes" not in row:
            lines.append(f"| {name} | {row['gpus']} | | | left out: {' '.join(row['left_out'].split())} | |")
            continue
        apart = row["predicted_bytes"] / row["measured_bytes"] - 1
        lines.append(
            f"| {name} | {row['gpus']} | {row['predicted_bytes'] / GIB:.2f} | {row['moment']} | "
            f"{row['measured_bytes'] / GIB:.2f} | {apart:+.1%} |"
        )
    return "\n".join(lines)


# --- the measurement --------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> NoReturn:
    from training.distributed import end_process, from_first_rank, gather, join_process_group
    from training.tracking import collect_environment, to_json

    started = time.perf_counter()
    join_process_group()
    import torch.distributed as dist

    world, first = dist.get_world_size(), dist.get_rank() == 0
    if world not in ROWS:
        raise SystemExit(f"--measure has rows for {' or '.join(map(str, ROWS))} processes, not for {world}")
    torch._dynamo.config.recompile_limit = 64  # the loss is compiled for each dtype and size; past the limit it would be eager
    part, parts = options.part
    result = {"environment": collect_environment(), "gpus": world, "steps": STEPS, "rows": []}
    before = from_first_rank(lambda: measured_before(options.out, gpus=world)) or {"rows": []}
    result["rows"] = [row for row in before["rows"] if "measured_bytes" in row]
    there = [(row["config"], row["micro_batch"], *row["settings"]) for row in result["rows"]]
    for name, micro, *settings in ROWS[world][part - 1 :: parts]:
        if (name, micro, *settings) in there:
            print(f"{name} {micro} {settings}: measured before, in {options.out}", flush=True)
            continue
        # One rank's clock for all: each begins the same rows.
        if max(gather(time.perf_counter() - started)) > options.limit:
            print(f"{name} {micro} {settings}: left out, --limit is over", flush=True)
            continue
        row = measured_row(name, micro, settings, world) | {"git_sha": result["environment"]["git_sha"]}
        result["rows"].append(row)
        if first:
            print(table([row]).splitlines()[-1], f"{row['seconds']:.1f} s", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.out, to_json(result))
    if first:
        print(f"\n{table(result['rows'])}\n\nwritten to {options.out} after {time.perf_counter() - started:.0f} s")
    end_process(int(any("failed" in row for row in result["rows"])))


def measured_before(file: Path, **same: object) -> dict | None:
    """What a start before this one wrote, so that it can go on; None where there is no such file.

    same: what has to be the same of both, by key of the JSON; and so has the GPU.

    Raises:
        UserFault: it is not, or the file is no such JSON.
    """
    if not file.exists():
        return None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        before = json.loads(file.read_text())
        found = {"gpu_name": before["environment"]["gpu_name"]} | {key: before[key] for key in same}
    except (ValueError, KeyError, TypeError) as error:
        raise UserFault(f"--out {file}: not what this program writes ({type(error).__name__}: {error}); name another file") from None
    for key, value in ({"gpu_name": gpu} | same).items():
        if found[key] != value:
            raise UserFault(f"--out {file}: was measured with {key} {found[key]}, and this is {value}; remove it, or name another file")
    return before


def measured_row(name: str, micro: int, settings: list[str], world: int) -> dict:
    """A row: what was predicted, and of the rank with the most what was measured; or why it was not."""
    from training.distributed import gather

    began = time.perf_counter()
    batch = [f"train.micro_batch_size={micro}", "train.gradient_accumulation_steps=1", "train.global_batch_size=null"]
    row = {"config": name, "micro_batch": micro, "settings": settings, "gpus": world}
    try:
        config, _ = load_config(ROOT / "configs" / f"{name}.yaml", [*batch, "train.compile=false", *settings], world_size=world)
    except ConfigError as error:  # what this machine has not, on every rank
        return row | {"left_out": str(error), "seconds": 0.0}
    predicted = estimate(config, world)
    row |= {
        "backend": config.attention.backend,
        "predicted_bytes": predicted.peak.bytes,
        "moment": predicted.peak.name,
        "parts": predicted.peak.parts,
        "predicted_host_bytes": sum(predicted.host.values()),
    }
    fault, failed, seen = None, False, {}
    try:
        seen = train(config)
    except Exception as error:  # whatever it is, the rows after it can still be had
        fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        failed = not (isinstance(error, RuntimeError) and is_out_of_memory(error))
    let_go_of_all()
    faults, failures, seen_by = zip(*gather((fault, failed, seen)), strict=True)
    if any(faults):
        row |= {"left_out": next(filter(None, faults))} | ({"failed": True} if any(failures) else {})
    elif not torch.cuda.is_available():
        row["left_out"] = "trained, but there is no GPU whose memory could be measured"
    else:
        row |= max(seen_by, key=lambda each: each["measured_bytes"])
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def train(config: Config, *, steps: int = STEPS, first: int | None = None) -> dict:
    """Seconds of each step, and of a GPU its peak bytes and what the host holds more than before, on this rank.

    first: the first step is of so many tokens a sequence, after which the optimizer's states are there, and its peak is forgotten.
    """
    from training.engine import build_engine, train_step
    from training.loss_scale import LossScale

    let_go_of_all()
    on_gpu = torch.cuda.is_available()
    held, host = torch.cuda.memory_allocated() if on_gpu else 0, resident()
    lengths, seconds = [first or config.model.sequence_length, *[config.model.sequence_length] * (steps - 1)], []
    global _engine
    with quickly(config):
        _engine = build_engine(config, end_of_text=0)
        scale = LossScale(1.0) if config.train.precision == "fp16" else None
        for step, length in enumerate(lengths):
            if on_gpu and (step == 0 or step == 1 and first is not None):
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            tokens = torch.randint(config.model.vocab_size, (config.train.micro_batch_size, length + 1), device=_engine.device)
            labels = tokens[:, 1:].chunk(config.parallel.sequence, 1)[0]  # of random tokens any part will do
            batch = [(tokens[:, :-1].contiguous(), labels.contiguous())]
            del tokens, labels
            result = train_step(_engine, batch, step, config, scale)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    if not result.applied:
        raise RuntimeError(f"the last step was skipped: loss {float(result.loss)}, gradient norm {float(result.grad_norm)}")  # then states may be missing
    if not on_gpu:
        return {"step_seconds": seconds}
    return {
        "step_seconds": seconds,
        "measured_bytes": torch.cuda.max_memory_allocated() - held,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "held_before_bytes": held,
        "host_bytes": resident() - host,
    }


_engine = None  # the row's, so that it can be let go also after a failure
_LINEAR = torch.nn.functional.linear


def let_go_of_all() -> None:
    """Free what the row before left: its engine, DeepSpeed's replacement of a function, and cuBLAS's workspaces, which count anew."""
    global _engine
    if _engine is not None:
        from scripts.training_peers import let_go

        let_go(_engine)
        _engine = None
    torch.nn.functional.linear = _LINEAR
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def quickly(config: Config) -> Iterator[None]:
    """Initial weights that cost no time; and torch's AdamW for the host's states where DeepSpeed's would have to be compiled first."""
    from model.gpt import GPT
    from training import engine

    def fill(self, weight: torch.Tensor, std: float) -> None:
        if not weight.is_meta:
            weight.data.fill_(std).view(-1)[::3].neg_()  # of equal weights a norm would make zeros, and of those large gradients

    with contextlib.ExitStack() as stack:
        for module in (torch.nn.Linear, torch.nn.Embedding):
            stack.enter_context(mock.patch.object(module, "reset_parameters", lambda self: None))
        stack.enter_context(mock.patch.object(GPT, "_draw", fill))
        if config.zero.offload_optimizer == "cpu" and engine.check_machine(config) is not None:
            generated = engine.deepspeed_config
            stack.enter_context(
                mock.patch.object(engine, "deepspeed_config", lambda config: generated(config) | {"zero_force_ds_cpu_optimizer": False})
            )
            stack.enter_context(mock.patch.object(engine, "build_optimizer", host_adamw))
        yield


def host_adamw(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    from model.gpt import parameter_groups
    from training.engine import group_settings

    groups = [named | own for named, own in zip(parameter_groups(model), group_settings(config.optimizer), strict=True)]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def resident() -> int:
    """Bytes of this process in the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    raise SystemExit(main())
