"""Pretrain a GPT with Megatron-Core's model, distributed optimizer and tensor, pipeline and sequence parallelism, on our attention, from one YAML file:

    bash launch/megatron.sh --config configs/megatron/megatron-124m.yaml megatron.tensor_parallel=2 megatron.sequence_parallel=true
    torchrun --nproc_per_node 4 scripts/megatron_pretrain.py --config FILE [section.key=value ...]

Corpus, data order, initial weights, schedule, metrics.jsonl and wandb are train.py's, so that scripts/compare_runs.py lays a run beside one of
DeepSpeed. The same command goes on from the newest intact checkpoint, under another layout too. docs/megatron.md says more.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.stopping import StopRequests, write_outcome  # noqa: E402  first: it looks who started us

# isort: split
import yaml  # noqa: E402

from train import corpora_facts, describe, diverged, make_run_dir, open_corpus, open_recorder, refuse_if_finished, stop_run  # noqa: E402
from training.config import load_config  # noqa: E402
from training.distributed import Ranks, UserFault, agree, any_rank, end_process, free_port, one_clear_message, output_to, together  # noqa: E402
from training.megatron_config import MegatronConfig  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and stop")
    return parser.parse_intermixed_args()


def main() -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's order of kernels and communication relies on it; read when CUDA starts
    ranks = Ranks.from_environment()
    logging.basicConfig(level=logging.INFO if ranks.rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")  # from every process: of old names within, of Transformer Engine
    arguments = parse_arguments()
    with one_clear_message(ranks):
        config, notes = load_config(arguments.config, arguments.overrides, world_size=ranks.world, schema=MegatronConfig)
        if arguments.print_config:
            if ranks.rank == 0:
                print(yaml.safe_dump(config.model_dump(), sort_keys=False), end="")
            return
        train(config, notes, ranks)


def join_process_group(config: MegatronConfig, device) -> None:
    """Start torch.distributed and Megatron's groups within it."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    layout = config.megatron
    parallel_state.initialize_model_parallel(layout.tensor_parallel, layout.pipeline_parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)


def own_device(local_rank: int):
    """This process's GPU. Megatron-Core asks for "cuda" by name throughout, so there is no other."""
    import torch

    if not torch.cuda.is_available():
        raise UserFault("scripts/megatron_pretrain.py: torch sees no GPU, and Megatron-Core runs on nothing else; train.py trains on CPUs")
    return torch.device("cuda", local_rank)


def train(config: MegatronConfig, notes: list[str], ranks: Ranks) -> None:
    device = own_device(ranks.local_rank)
    first = ranks.rank == 0
    run_dir = Path(config.run.output_dir, config.run.name)
    make_run_dir(run_dir)
    stop = StopRequests(run_dir, grace_seconds=config.checkpoint.stop_seconds)
    # 1. The processes find each other. What Megatron and DeepSpeed remark on absent packages goes to a log.
    with output_to(run_dir / f"megatron-{ranks.rank}.log"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from training import checkpoints, megatron
        except ModuleNotFoundError as error:
            raise UserFault(str(error)) from None
        from training.batches import TrainingBatches, validation_batches
        from training.evaluation import mixed
        from training.metering import Meter
        from training.tracking import METRICS_FILE, ProgressLine, collect_environment
    join_process_group(config, device)
    agree("attention.backend", config.attention.backend)

    # 2. The data, and where the run begins: as in train.py.
    corpus = together(lambda: open_corpus(config, verify=ranks.local_rank == 0))
    checkpoint, passed_over = checkpoints.find_checkpoint(config.checkpoint.resume, run_dir / "checkpoints")
    state = checkpoints.LoopState() if checkpoint is None else checkpoint.state
    changed = [] if checkpoint is None else checkpoints.check_fits(checkpoint, config, corpus_sha256=corpus.sha256)
    together(lambda: refuse_if_finished(config, run_dir, state.step), here=first)

    # 3. The record of the run.
    meter = Meter(config, ranks.world, elapsed_seconds=state.elapsed_seconds, recomputed=config.recomputed())
    info = {"config": config.model_dump(), "corpus_sha256": corpus.sha256, "corpora": corpora_facts(corpus, config), **meter.description()}
    recorder = together(lambda: open_recorder(config, run_dir, {**info, "environment": collect_environment()}, meter, checkpoint), here=first)
    if first:
        state.wandb_id = recorder.wandb_id
        began = [f"resume {checkpoint.folder}: {state.step} of {config.train.steps} steps are done"] if checkpoint else []
        print("\n".join([*notes, *passed_over, *changed, *began, describe(config, meter, corpus)]), flush=True)

    # 4. Model and optimizer; the replicas share out the data, the processes of one read the same.
    model = together(lambda: megatron.build_model(config, device))
    optimizer = megatron.build_optimizer(config, model)
    if checkpoint:
        megatron.load(model, optimizer, checkpoint)
    replica = megatron.parallel_state.get_data_parallel_rank()
    shape = {"sequence_length": config.model.sequence_length, "rank": replica, "world": ranks.world // config.sharing.processes, "device": device}
    batches = TrainingBatches([each.split("train") for each in corpus.corpora], shares=corpus.shares, micro_batch_size=config.train.micro_batch_size,
                              accumulation=config.train.gradient_accumulation_steps, seed=config.run.seed, **shape)

    def validate() -> dict:
        held_out = (validation_batches(each.split("validation"), batch_size=config.train.micro_batch_size, sequences=config.eval.sequences, **shape)
                    for each in corpus.corpora)
        results = {name: megatron.evaluate(model, each, corpus.token_bytes, config) for name, each in zip(corpus.names, held_out, strict=True)}
        return mixed(results, corpus.shares)

    def save_checkpoint() -> Path:
        stop.saving = True
        state.elapsed_seconds = meter.elapsed_seconds()
        if first:
            recorder.sync()

        def write(folder: Path) -> None:
            together(folder.mkdir, here=first)
            megatron.save(model, optimizer, folder)

        saved = checkpoints.save_as(write, run_dir / "checkpoints", state, config, corpus_sha256=corpus.sha256, parameters=meter.parameters["total"])
        stop.saving = stop.reason is not None
        return saved

    # 5. The loop.
    progress = ProgressLine(config.train.steps, every=config.tracking.log_every)
    validation = None
    with recorder or contextlib.nullcontext(), contextlib.closing(batches):
        stop.begin_loop()
        for step in range(state.step + 1, config.train.steps + 1):
            started = time.perf_counter()
            micro_batches = batches.step(step - 1)
            data_seconds = time.perf_counter() - started
            result = megatron.train_step(model, optimizer, micro_batches, step - 1, config, stopping=lambda: stop.reason is not None)
            state.count(result)
            row = meter.row(step, result, step_seconds=time.perf_counter() - started, data_seconds=data_seconds)
            row |= {"skipped_steps": state.skipped_steps, "loss": result.loss, "grad_norm": result.grad_norm}
            last, stops = step == config.train.steps, result.stopping > 0
            saves = config.checkpoint.every is not None and (last or config.checkpoint.every and step % config.checkpoint.every == 0)
            if last or config.eval.every and step % config.eval.every == 0:
                validation = validate()
                row |= validation
            if first:
                recorder.record(row)
                progress.update(row)
                if not result.applied:
                    progress.note(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped on every rank ({state.skipped_steps} so far)")
            if state.skipped_in_a_row >= config.train.stop_after_skipped:
                raise UserFault(diverged(state, config, run_dir))
            saved = save_checkpoint() if saves else None
            if saves or "val_loss" in row:
                stops = any_rank(stop.reason is not None, device)  # asked again after what takes long
            if stops and not last:
                if config.checkpoint.every is not None and saved is None:
                    saved = save_checkpoint()
                stop_run(stop, config, run_dir, state, saved, progress, recorder)
    if validation is None:
        validation = validate()
    if first:
        progress.close()
        write_outcome(run_dir, "finished", step=state.step)
        print(f"validation loss {validation['val_loss']:.4f} nats per token, {validation['val_bits_per_byte']:.4f} bits per byte\n"
              f"metrics {run_dir / METRICS_FILE}", flush=True)
    end_process()


if __name__ == "__main__":
    main()
