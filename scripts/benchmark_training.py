"""Time this recipe beside its peers: the same model, global batch and dtype of sums on the same GPUs; one JSON out, and a table.

    python scripts/benchmark_training.py --configs gpt2-124m gpt-1.3b --gpus 4
    python scripts/benchmark_training.py --gpus 2 --configs gpt-1.3b,train.activation_checkpointing=none,train.global_batch_size=64
    python scripts/benchmark_training.py --configs gpt2-124m --contenders ours fsdp2_compile --micro-batches 64 32 --profile ours
    python scripts/benchmark_training.py --configs gpt2-124m --contenders ours,train.compile=false ours,zero.persistence_threshold=0 ours

**A case** is a file in configs/ (or a path to one) and, after commas, settings that replace the file's, as train.py takes them. The model,
train.global_batch_size, train.activation_checkpointing, zero.reduce_dtype, precision, optimizer and seed hold for all contenders; what
makes them differ is in scripts/training_peers.py:

    ours                      train.py's engine and step, configured by the file
    ours_sharded              the same, but every block is let go of after its forward pass and gathered again, where there are several GPUs
    zero3_stock               the same GPT with PyTorch's attention under DeepSpeed's ZeRO-3 as it comes
    zero3_deepcompile         the same, compiled by DeepSpeed's DeepCompile
    huggingface_zero3         GPT-2 or Llama of transformers, with SDPA, under the same; left out where that is not installed
    huggingface_zero3_ours    the same with our attention: model.huggingface, by the file's attention.backend
    fsdp2_compile             the same GPT under FSDP2, blocks and loss compiled, cuDNN's attention; blocks are gathered again for backward
    fsdp2_compile_no_reshard  the same, blocks stay gathered from the forward to the backward pass

A contender may have settings of its own after commas, as long as it still trains the same; as ours,zero.reduce_bucket_size=100000000 does.

Tokens are random, the same for all; nothing is logged, evaluated or saved.

**Micro batches.** Powers of two that divide the global batch's share of a GPU (or --micro-batches), from the largest down: those that do
not fit, the first that does, and on while the next is faster. The fastest is the row, and all of them are its `trials`. Gradient
accumulation fills the global batch; the share is the largest micro batch there can be, so raise train.global_batch_size where it fits.

**Time.** Each contender runs in --gpus processes of its own, at most --limit seconds. A step's time is that between CUDA events at the ends
of two steps, of the slowest rank; the row has the median of --steps after --warmup. On a CPU it is the clock's.

**MFU** is as training/flops.py says, over the table's peak of the GPU; `mfu_causal` counts what the causal mask shows alone, `hfu` also
what is computed again; `of_matmul` is MFU over the rate of a large matrix product, measured on all of the GPUs at once in the same launch.
**Memory** is the peak of the timed steps on the rank that takes most: `allocated` by tensors, `reserved` from the driver.

**Communication.** `theory_gb` is what a step's gathers and sums come to, of a rank's larger side of each call, which --profile measures beside
it. Under ZeRO-3 it is the most: what zero.reuse_distance keeps from the forward to the backward pass is gathered once less.

--profile NAME traces 3 steps of rank 0 at that contender's best micro batch in a launch of its own: a Chrome trace beside the JSON, and in
the JSON and on the screen what scripts/training_profile.py makes of it.

A contender that fails is left out, and JSON and table say why; every process's output is in the folder beside the JSON. The JSON is
written after every contender. Exit status 1 when a contender failed, otherwise than by its memory, a missing package or a geometry that it
has not.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from scripts.training_profile import PROFILED, read_trace, report, summarise  # noqa: E402
from training.config import Config, ConfigError, load_config  # noqa: E402
from training.distributed import end_process, free_port, gather, join_process_group  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.tracking import collect_environment, to_json  # noqa: E402

CONTENDERS = ("ours", "ours_sharded", "zero3_stock", "zero3_deepcompile", "huggingface_zero3", "huggingface_zero3_ours", "fsdp2_compile",
              "fsdp2_compile_no_reshard")
# What peers have no part of, or not the same: a comparison holds where the configuration says so.
COMPARABLE = {
    "zero.stage": (3,), "zero.offload_optimizer": ("none",), "zero.offload_parameters": ("none",), "optimizer.name": ("adamw",),
    "train.precision": ("bf16", "fp32"), "train.bf16_states": (False,),
    "train.activation_checkpointing": ("none", "full", "every_n", "selective"), "model.dropout": (0.0,), "attention.dropout": (0.0,),
    "attention.window": (None,), "attention.document_mask": (False,),
}  # fmt: skip
# What a contender's own settings may not change.
SAME = ("model", "optimizer", "run.seed", "train.global_batch_size", "train.activation_checkpointing", "train.precision", "zero.reduce_dtype")
OUT_OF_MEMORY = "out of memory"
REFUSED = "scripts.training_peers.Refused: "
PROFILED_STEPS = 3
HELD_SHARE = 0.01  # of a GPU's memory in use before a micro batch: with more its processes are started anew
AGREE_SECONDS = 120  # for a rank to come after another is done with a micro batch: it may be stuck in a collective
DIE_SECONDS = 10  # for the other ranks to say what they died of
GB = 1e9


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folder = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": collect_environment() | {"transformers": _version("transformers")}, "device": options.device, "gpus": options.gpus,
        "steps": options.steps, "warmup": options.warmup, "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), "summary": {}, "attention_in_huggingface": {}, "rows": [],
    }  # fmt: skip
    for case in options.configs:
        for contender in options.contenders:
            row = run_contender(case, contender, options, folder)
            result["rows"].append(row)
            print(line(row), flush=True)
            write(options.out, result)
            if contender in options.profile and "micro_batch" in row:
                row["profile"] = profile_contender(row, case, options, folder)
                print(row["profile"].get("left_out") or report(row["profile"]), flush=True)
                write(options.out, result)
    print(f"\n{table(result)}\n\nwritten to {options.out}")
    return int(any(row.get("failed", False) for row in result["rows"]))


# --- what is asked for ----------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, metavar="NAME[,section.key=value...]", help="see above")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="processes, a GPU each; default: all")
    parser.add_argument("--contenders", nargs="+", default=[name for name in CONTENDERS if name != "zero3_deepcompile"],
                        metavar="NAME[,section.key=value...]", help="default: all but zero3_deepcompile, which is built by a CUDA compiler")
    parser.add_argument("--micro-batches", nargs="+", type=int, help="to choose among; default: powers of two")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before")
    parser.add_argument("--limit", type=int, default=600, help="seconds for each launch of a contender")
    parser.add_argument("--profile", nargs="+", default=[], metavar="CONTENDER", help="of --contenders, as it is written there")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmark_training.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and torch.cuda.device_count() < options.gpus:
        parser.error(f"--gpus {options.gpus}: torch sees {torch.cuda.device_count()} CUDA GPUs here; ask for fewer, or --device cpu")
    for contender in (*options.contenders, *options.profile):
        if contender.split(",")[0] not in CONTENDERS:
            parser.error(f"--contenders {contender}: there is no such contender; there are {', '.join(CONTENDERS)}")
    if strangers := set(options.profile) - set(options.contenders):
        parser.error(f"--profile {' '.join(strangers)}: not among --contenders")
    try:
        for case in options.configs:
            config = case_config(case, options.gpus, candidates(case, options)[0])
            if wrong := not_comparable(config):
                parser.error(f"--configs {case}: {wrong}")
            for contender in options.contenders:
                own = case_config(own_case(case, contender), options.gpus, config.train.micro_batch_size)
                if wrong := not_comparable(own) or differing(config, own):
                    parser.error(f"--contenders {contender}: {wrong}")
    except ConfigError as error:
        parser.error(str(error))
    return options


def case_config(case: str, world: int, micro_batch: int | None = None) -> Config:
    """The resolved configuration of a case for so many processes; with a micro batch of its own, accumulation fills the global batch."""
    name, *overrides = re.split(r",(?=\w+\.\w+=)", case)
    file = Path(name) if name.endswith(".yaml") else ROOT / "configs" / f"{name}.yaml"
    if micro_batch is not None:
        overrides += [f"train.micro_batch_size={micro_batch}", "train.gradient_accumulation_steps=null"]
    return load_config(file, overrides, world_size=world)[0]


def own_case(case: str, contender: str) -> str:
    """The case with a contender's own settings."""
    return ",".join([case, *contender.split(",")[1:]])


def differing(config: Config, own: Config) -> str | None:
    """What a contender's own settings change that all have in common."""
    for key in SAME:
        ours, its = config.model_dump(), own.model_dump()
        for part in key.split("."):
            ours, its = ours[part], its[part]
        if ours != its:
            return f"{key} must be the same for all; change it in --configs"
    return None


def not_comparable(config: Config) -> str | None:
    """The first setting in which peers would differ, with what it may be."""
    for key, values in COMPARABLE.items():
        section, name = key.split(".")
        found = getattr(getattr(config, section), name)
        if found not in values:
            return f"{key} is {found}, in which the contenders would differ; use {' or '.join(map(str, values))}"
    return None


def candidates(case: str, options: argparse.Namespace) -> list[int]:
    """Micro batches to choose among, the largest first."""
    if options.micro_batches:
        return sorted(options.micro_batches, reverse=True)
    share = case_config(case, options.gpus, micro_batch=1).train.gradient_accumulation_steps
    return [2**power for power in reversed(range(share.bit_length())) if share % 2**power == 0]


# --- a contender, seen from outside ---------------------------------------------------------------------------------


def run_contender(case: str, contender: str, options: argparse.Namespace, folder: Path) -> dict:
    """Its row: the fastest of its trials, or why there is none."""
    row = {"config": case, "contender": contender}
    if contender.startswith("huggingface") and importlib.util.find_spec("transformers") is None:
        return row | {"left_out": "the package transformers is not installed"}
    trials, reason = launch_until_done(request(own_case(case, contender), contender, candidates(case, options), options), folder)
    return row | best_row(trials, reason)


def best_row(trials: list[dict], reason: str | None) -> dict:
    """The fastest trial as a row; without one, or where the search broke off (``reason``), what happened."""
    measured = [trial for trial in trials if "step_ms" in trial]
    failed = {"failed": True} if reason is not None and OUT_OF_MEMORY not in reason and REFUSED not in reason else {}
    if not measured:
        return {"left_out": reason or trials[-1]["left_out"], "trials": trials, **failed}
    broke_off = {} if reason is None else {"search_broke_off": reason, **failed}
    return max(measured, key=lambda trial: trial["tokens_per_second_per_gpu"]) | broke_off | {"trials": trials}


def profile_contender(row: dict, case: str, options: argparse.Namespace, folder: Path) -> dict:
    """The summary of a trace at the row's micro batch, and the trace's name."""
    case, contender = own_case(case, row["contender"]), row["contender"]
    trace = folder / f"{_file_name(case)}-{contender.split(',')[0]}-trace.json.gz"
    asked = request(case, contender, [row["micro_batch"]], options) | {"profile": str(trace.resolve())}
    trials, reason = launch_until_done(asked, folder)
    if reason is not None or "left_out" in trials[-1]:
        return {"left_out": f"profile: {reason or trials[-1]['left_out']}"}
    return {"trace": f"{folder.name}/{trace.name}", "theory_gb": row["theory_gb"], **summarise(read_trace(trace), PROFILED_STEPS)}


def request(case: str, contender: str, micro_batches: list[int], options: argparse.Namespace) -> dict:
    return {"case": case, "contender": contender.split(",")[0], "candidates": micro_batches, "world": options.gpus, "device": options.device,
            "steps": options.steps, "warmup": options.warmup, "limit": options.limit, "profile": None}


def launch_until_done(asked: dict, folder: Path) -> tuple[list[dict], str | None]:
    """Every trial, and why the search broke off, if it did.

    After a micro batch that memory did not suffice for, or that left memory behind, the next is tried in the same processes where that can
    be done; where not, they have ended, and are started anew. So they are after one that failed otherwise, as kernels may at sizes that
    others fit; two such in a row end the search.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file, known, failed = Path(scratch, "trials.json"), [], None
        while True:
            write_atomically(file, json.dumps({"trials": known, "complete": False}))
            name = f"{_file_name(asked['case'])}-{asked['contender']}{'-profile' if asked['profile'] else ''}-{len(known)}"
            reason = launch(asked | {"trials": str(file)}, folder, name)
            found = json.loads(file.read_text())
            trials, before = found["trials"], len(known)
            if found["complete"]:
                return trials, failed
            if len(trials) == before:
                return trials, reason or "ended without a trial"
            if set(trials[-1]) == {"micro_batch"}:  # begun, and not ended
                trials[-1]["left_out"] = reason = reason or "ended in the middle of it"
                if OUT_OF_MEMORY not in reason:
                    again = len(trials) > 1 and OUT_OF_MEMORY not in trials[-2].get("left_out", OUT_OF_MEMORY)
                    if again or REFUSED in reason or reason.startswith("not done after") or len(trials) == len(asked["candidates"]):
                        return trials, reason
                    failed = failed or reason
            known = trials


def launch(asked: dict, folder: Path, name: str) -> str | None:
    """Start one process a rank and wait for them; None, or why they did not end well."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(asked["world"])}
    if asked["device"] == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"{name}-{rank}.log" for rank in range(asked["world"])]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                processes.append(subprocess.Popen(
                    [sys.executable, __file__, "--rank-of", json.dumps(asked)], cwd=ROOT, start_new_session=True,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))
        return wait(processes, logs, asked["limit"])
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
            process.wait()


def wait(processes: list[subprocess.Popen], logs: list[Path], limit: float) -> str | None:
    """Until all have ended, one has failed, or ``limit`` seconds have passed; None, or what went wrong."""
    deadline = time.monotonic() + limit
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        if time.monotonic() > deadline:
            return f"not done after {limit} s"
        time.sleep(0.2)
    if not any(process.poll() for process in processes):
        return None
    deadline = time.monotonic() + DIE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    said = [what_it_died_of(log.read_text(errors="replace")) for process, log in zip(processes, logs, strict=True) if process.poll()]
    return next((reason for reason in said if OUT_OF_MEMORY in reason), said[0])


def what_it_died_of(log: str) -> str:
    """The last exception in a rank's output, or its last line."""
    lines = [each.strip() for each in log.splitlines() if each.strip()] or ["died without a word"]
    errors = [each for each in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt|Refused)\b", each)]
    reason = (errors or lines)[-1][:500]
    return f"{OUT_OF_MEMORY}: {reason}" if re.search(OUT_OF_MEMORY, "\n".join(lines[-60:]), re.IGNORECASE) else reason


# --- a contender, seen from inside ----------------------------------------------------------------------------------


def work(asked: dict) -> None:
    """One rank of a contender's processes: its micro batches in turn.  Rank 0 writes down what it begins and what came of it.

    Ends the process: when the search is complete, or before a micro batch for which it has not all of the memory.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to keep a GPU when whoever started this is killed
    join_process_group()
    from scripts.benchmark_attention import matmul_tflops, square_product
    from scripts.training_peers import CONTENDERS as build

    agreeing = dist.new_group(backend="gloo", timeout=timedelta(seconds=AGREE_SECONDS))
    file = Path(asked["trials"])
    known = json.loads(file.read_text())["trials"]
    dist.barrier()
    ceiling = matmul_tflops(asked["device"])
    square_product.cache_clear()

    def note(trials: list[dict], complete: bool = False) -> None:
        if dist.get_rank() == 0:
            write_atomically(file, to_json({"trials": trials, "complete": complete}))

    def attempt(micro_batch: int) -> dict:
        for trial in known:
            if trial["micro_batch"] == micro_batch:
                return trial
        if max(gather(held_share())) > HELD_SHARE:
            end_process()
        begun = {"micro_batch": micro_batch}
        note([*known, begun])
        config = case_config(asked["case"], asked["world"], micro_batch)
        known.append(begun | try_out(partial(build[asked["contender"]], config), config, asked, ceiling, agreeing))
        note(known)
        return known[-1]

    search(asked["candidates"], attempt)
    note(known, complete=True)
    end_process()


def held_share() -> float:
    """Of the GPU's memory, what earlier micro batches have left in use."""
    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.memory_allocated() / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def search(micro_batches: Iterable[int], attempt: Callable[[int], dict]) -> list[dict]:
    """Trials from the largest micro batch down: past those that do not fit, and on from the first that does while the next is faster.

    attempt: a micro batch -> its trial, with ``tokens_per_second_per_gpu`` where it fits.
    """
    trials, fastest = [], 0.0
    for micro_batch in sorted(micro_batches, reverse=True):
        trials.append(attempt(micro_batch))
        speed = trials[-1].get("tokens_per_second_per_gpu")
        if speed is not None and speed <= fastest:
            break
        fastest = speed or fastest
    return trials


def try_out(build: Callable, config: Config, asked: dict, ceiling: float, agreeing: dist.ProcessGroup) -> dict:
    """What a micro batch gave, or that memory did not suffice on some rank; the same on every rank, and its memory free again.

    Ranks agree over gloo, as one of them may wait inside of NCCL for another that is out of memory: then this raises, which ends them all.
    """
    told, problem = {}, None
    try:
        told = measure(build, config, asked, ceiling)
    except torch.OutOfMemoryError as error:
        problem = f"{OUT_OF_MEMORY}: {str(error).splitlines()[0]}"
    # Not before here: the exception held the frames, and these the tensors.
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    problems: list[str | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(problems, problem, group=agreeing)
    except RuntimeError as error:
        raise RuntimeError(problem or "another rank did not come to its end of a micro batch") from error
    problem = next(filter(None, problems), None)
    return told if problem is None else {"left_out": problem}


def measure(build: Callable, config: Config, asked: dict, ceiling: float) -> dict:
    """One micro batch: trained for a few steps, and timed or profiled."""
    from scripts.training_peers import theory_gb
    from training.metering import Meter, mark, seconds_between

    on_gpu, micro_batches, meter = torch.cuda.is_available(), random_batches(config), Meter(config, dist.get_world_size())
    trainer = build()
    try:
        if trainer.parameters != meter.parameters["total"]:
            raise RuntimeError(f"{trainer.parameters:,} parameters, and the configuration's model has {meter.parameters['total']:,}")
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()  # of what building took
        first = trainer.step(micro_batches, 0)
        for number in range(1, asked["warmup"]):
            trainer.step(micro_batches, number)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        if asked["profile"]:
            profile(lambda number: trainer.step(micro_batches, asked["warmup"] + number), Path(asked["profile"]))
            return {"profiled": True}
        marks = [mark()]
        for number in range(asked["steps"]):
            last = trainer.step(micro_batches, asked["warmup"] + number)
            marks.append(mark())
        step_ms = slowest([1000 * seconds_between(*pair) for pair in pairwise(marks)])
        train, memory = config.train, peak_memory()
        return {
            "micro_batch": train.micro_batch_size, "accumulation": train.gradient_accumulation_steps,
            "global_batch": train.global_batch_size, "checkpointing": train.activation_checkpointing,
            **speed(step_ms, meter, ceiling), **memory, "gathered": trainer.gathered,
            "theory_gb": theory_gb(trainer.volume, config, dist.get_world_size()), "made_of": trainer.made_of,
            "reduce_dtype": config.zero.reduce_dtype, "first_loss": over_ranks(first()), "last_loss": over_ranks(last()),
        }  # fmt: skip
    finally:
        trainer.close()


def random_batches(config: Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's micro batches, (tokens, labels) as ``training.batches`` gives them; the same tokens in every step, of any size."""
    train, model, sharing = config.train, config.model, config.parallel.sequence
    reader, part = divmod(dist.get_rank(), sharing)
    shape = (train.micro_batch_size * train.gradient_accumulation_steps, model.sequence_length + 1)
    windows = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(config.run.seed + reader))
    windows = windows.to("cuda" if torch.cuda.is_available() else "cpu")
    return [(micro[:, :-1], micro[:, 1:].chunk(sharing, 1)[part]) for micro in windows.split(train.micro_batch_size)]


def over_ranks(loss: float) -> float:
    """The mean of the ranks' losses: that of the global batch, as every rank has as many targets."""
    return sum(gather(loss)) / dist.get_world_size()


def slowest(times: list[float]) -> list[float]:
    """Of every rank's times, one by one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = torch.tensor(times, dtype=torch.float32, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()


def speed(step_ms: list[float], meter, ceiling: float) -> dict:
    """What the step times come to; ``meter``: a ``training.metering.Meter``; ``ceiling``: TFLOP/s of a large matrix product."""
    per_gpu = meter.tokens_per_step / (median(step_ms) / 1000) / meter.world
    peak = meter.peak_flops
    return {
        "step_ms": median(step_ms), "all_step_ms": step_ms, "tokens_per_second_per_gpu": per_gpu,
        **meter.utilisation(per_gpu),
        "peak_tflops": peak and peak / 1e12, "matmul_tflops": ceiling, "of_matmul": meter.flops_per_token * per_gpu / (ceiling * 1e12),
        "parameters": meter.parameters["total"], "flops_per_token": meter.flops_per_token,
    }  # fmt: skip


def peak_memory() -> dict:
    """Of the rank that takes most; on a CPU what the process ever held."""
    from training.metering import peak_memory_bytes

    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    allocated, reserved = slowest([peak_memory_bytes() / GB, reserved / GB])
    return {"allocated_gb": allocated, "reserved_gb": reserved or None}


def profile(step: Callable[[int], object], trace: Path) -> None:
    """Steps of every rank, traced on rank 0; twice, as the profiler's own start would be in the first trace."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    first = dist.get_rank() == 0
    for steps in (1, PROFILED_STEPS):
        dist.barrier()
        with torch.profiler.profile(activities=activities) if first else contextlib.nullcontext() as profiler:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            with torch.profiler.record_function(PROFILED):
                for number in range(steps):
                    step(number)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    if first:
        profiler.export_chrome_trace(str(trace))


# --- what is told ---------------------------------------------------------------------------------------------------


def write(out: Path, result: dict) -> None:
    result["summary"] = ratios(result["rows"])
    result["attention_in_huggingface"] = attention_in_huggingface(result["rows"])
    write_atomically(out, to_json(result, indent=1) + "\n")


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Case -> peer -> how many times as many tokens a second ``ours`` takes."""
    speeds: dict[str, dict[str, float]] = {}
    for row in rows:
        if "micro_batch" in row:
            speeds.setdefault(row["config"], {})[row["contender"]] = row["tokens_per_second_per_gpu"]
    return {case: {peer: found["ours"] / speed for peer, speed in found.items() if peer != "ours"}
            for case, found in speeds.items() if "ours" in found}


def attention_in_huggingface(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Case -> contender -> Hugging Face's step with our attention against that with SDPA."""
    done: dict[str, dict[str, dict]] = {}
    for row in rows:
        if "micro_batch" in row:
            done.setdefault(row["config"], {})[row["contender"]] = row
    return {case: {name: {"times_as_fast": row["tokens_per_second_per_gpu"] / found["huggingface_zero3"]["tokens_per_second_per_gpu"],
                          "times_the_memory": row["allocated_gb"] / found["huggingface_zero3"]["allocated_gb"]}
                   for name, row in found.items() if name.startswith("huggingface_zero3_ours")}
            for case, found in done.items() if "huggingface_zero3" in found}


def line(row: dict) -> str:
    said = f"left out: {row['left_out']}" if "left_out" in row else (
        f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU at micro batch {row['micro_batch']} x {row['accumulation']}, "
        f"{row['step_ms']:.1f} ms a step")
    return f"{row['config']}: {row['contender']}: {said}"


def table(result: dict) -> str:
    """Markdown, a table a case."""
    head = ["contender", "micro x acc.", "step ms", "tokens/s/GPU", "MFU", "causal", "HFU", "of matmul", "GB", "GB reserved", "ours / it"]
    gpu, lines = result["environment"]["gpu_name"] or "CPU", []
    for case in dict.fromkeys(row["config"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["config"] == case]
        lines += ["", f"{case}, {result['gpus']} x {gpu}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in rows if "micro_batch" in row):
            ratio = result["summary"].get(case, {}).get(row["contender"])
            shares = [row[key] for key in ("mfu", "mfu_causal", "hfu", "of_matmul")]
            cells = [row["contender"], f"{row['micro_batch']} x {row['accumulation']}", f"{row['step_ms']:.1f}",
                     f"{row['tokens_per_second_per_gpu']:,.0f}", *("" if share is None else f"{share:.3f}" for share in shares),
                     f"{row['allocated_gb']:.1f}", "" if row["reserved_gb"] is None else f"{row['reserved_gb']:.1f}",
                     "" if ratio is None else f"{ratio:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
        for name, times in result["attention_in_huggingface"].get(case, {}).items():
            lines += ["", f"{name}: {times['times_as_fast']:.3f} times as many tokens a second as huggingface_zero3, {times['times_the_memory']:.3f} times its memory"]
        lines += [""] + [f"{row['contender']}: left out: {row['left_out']}" if "left_out" in row else
                         f"{row['contender']}: gathers {row['gathered']} ({row['made_of']}; sums in {row['reduce_dtype']})" for row in rows]
        lines += [f"{row['contender']}: its search broke off: {row['search_broke_off']}" for row in rows if "search_broke_off" in row]
    return "\n".join(lines).strip()


def _file_name(case: str) -> str:
    return re.sub(r"[^-.=+0-9A-Za-z_]+", "_", Path(case.split(",")[0]).stem + "".join(f"+{each}" for each in case.split(",")[1:]))[:120]


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        try:
            work(json.loads(sys.argv[2]))
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the interpreter's own end could wait for a collective
    else:
        sys.exit(main())
