"""Train a GPT from one YAML file:  deepspeed train.py --config configs/gpt2-124m.yaml [section.key=value ...]"""

import argparse
import contextlib
import logging
import math
import sys
import time
import warnings
from pathlib import Path

import yaml

from training.config import Config, load_config
from training.distributed import Ranks, UserFault, agree, end_process, join_process_group, one_clear_message, output_to, together


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and stop")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log and build output")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it; the environment says the same

    def fail(message: str) -> None:
        raise UserFault(f"{message}\n{parser.format_usage()}")

    parser.error = fail
    return parser.parse_intermixed_args()


def main() -> None:
    ranks = Ranks.from_environment()
    logging.basicConfig(level=logging.INFO if ranks.rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    with one_clear_message(ranks):
        arguments = parse_arguments()
        if not arguments.verbose:
            warnings.filterwarnings("ignore", module="torch.distributed")  # of DeepSpeed's calls: names torch is changing, devices it infers
        config, notes = load_config(arguments.config, arguments.overrides, world_size=ranks.world)
        if arguments.print_config:
            if ranks.rank == 0:
                print(yaml.safe_dump(config.model_dump(), sort_keys=False), end="")
            return
        train(config, notes, ranks, verbose=arguments.verbose)


def train(config: Config, notes: list[str], ranks: Ranks, *, verbose: bool) -> None:
    # 1. The processes find each other.
    first = ranks.rank == 0
    run_dir = Path(config.run.output_dir, config.run.name)
    make_run_dir(run_dir)
    deepspeed_log = None if verbose else run_dir / f"deepspeed-{ranks.rank}.log"
    with output_to(deepspeed_log):
        join_process_group()

    # Imported late, so that a fault in the configuration is told sooner, and DeepSpeed's remarks on the machine go to its log.
    from training.batches import TrainingBatches, validation_batches
    from training.engine import build_engine, deepspeed_config, train_step
    from training.evaluation import evaluate, sample_text
    from training.metering import Meter
    from training.tokenizers import load_tokenizer
    from training.tracking import METRICS_FILE, ProgressLine, collect_environment

    agree("attention.backend", config.attention.backend)

    # 2. The data, checked whole before the first step: one process a host reads every byte.
    corpus = together(lambda: open_corpus(config, verify=ranks.local_rank == 0))
    tokenizer = load_tokenizer(corpus.tokenizer_name)

    # 3. The record of the run: run.json, metrics.jsonl, wandb.
    meter = Meter(config, ranks.world)
    info = {"config": config.model_dump(), "deepspeed_config": deepspeed_config(config), "corpus_sha256": corpus.sha256,
            **meter.description()}
    recorder = together(lambda: open_recorder(config, run_dir, {**info, "environment": collect_environment()}), here=first)
    if first:
        print("\n".join([*notes, describe(config, meter, corpus)]), flush=True)

    # 4. Model, optimizer, engine.
    with output_to(deepspeed_log):
        engine = build_engine(config)
    shape = {"sequence_length": config.model.sequence_length, "rank": ranks.rank, "world": ranks.world, "device": engine.device}
    batches = TrainingBatches(corpus.split("train"), micro_batch_size=config.train.micro_batch_size,
                              accumulation=config.train.gradient_accumulation_steps, seed=config.run.seed, **shape)

    # 5. The loop.
    progress = ProgressLine(config.train.steps, every=config.tracking.log_every)
    with recorder or contextlib.nullcontext(), contextlib.closing(batches):
        for step in range(1, config.train.steps + 1):
            started = time.perf_counter()
            micro_batches = batches.step(step - 1)
            data_seconds = time.perf_counter() - started
            result = train_step(engine, micro_batches, step - 1, config)
            if not math.isfinite(result.loss):
                raise UserFault(f"step {step}: the loss is {result.loss}; lower optimizer.lr or lengthen optimizer.warmup_steps")
            row = meter.row(step, result, step_seconds=time.perf_counter() - started, data_seconds=data_seconds)
            if step == config.train.steps or (config.eval.every and step % config.eval.every == 0):
                held_out = validation_batches(corpus.split("validation"), batch_size=config.train.micro_batch_size, sequences=config.eval.sequences, **shape)
                row |= evaluate(engine, held_out, corpus.token_bytes)
            if first:
                recorder.record(row)
                progress.update(row)

    # 6. What it learned.
    text = sample_text(engine, tokenizer, config.sample, sequence_length=config.model.sequence_length, seed=config.run.seed)
    if first:
        progress.close()
        (run_dir / "sample.txt").write_text(config.sample.prompt + text, encoding="utf-8")
        print(f"\n{config.sample.prompt}{text}\n\nvalidation loss {row['val_loss']:.4f} nats per token, {row['val_bits_per_byte']:.4f} bits per byte\n"
              f"metrics {run_dir / METRICS_FILE}", flush=True)
    end_process()


def make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserFault(f"run.output_dir: cannot make {run_dir}: {error.strerror}; choose another run.output_dir or run.name") from None


def open_corpus(config: Config, *, verify: bool):
    """The corpus, found whole and fit for this model; ValueError otherwise."""
    from training.corpus import Corpus

    corpus = Corpus.open(config.data.corpus)
    corpus.check_fits(model_vocab_size=config.model.vocab_size, sequence_length=config.model.sequence_length)
    if verify:
        corpus.verify()
    return corpus


def describe(config: Config, meter, corpus) -> str:
    """What is about to happen, in four lines: every derived number with where it comes from."""
    model, train = config.model, config.train
    peak = f"{meter.peak_flops / 1e12:.0f} TFLOP/s peak in {train.precision}" if meter.peak_flops else "peak unknown, so no MFU"
    return (
        f"model  {meter.parameters['total']:,} parameters: {model.layers} layers, {model.hidden_size} wide, {model.heads} heads of {model.head_dim}, "
        f"attention {config.attention.backend}, checkpointing {train.activation_checkpointing}\n"
        f"data   {corpus.folder}: {corpus.split('train').tokens:,} training tokens, {corpus.tokenizer_name} tokenizer, corpus {corpus.sha256[:12]}\n"
        f"batch  {train.micro_batch_size} micro x {train.gradient_accumulation_steps} accumulation x {meter.world} processes = {train.global_batch_size} "
        f"sequences of {model.sequence_length} = {meter.tokens_per_step:,} tokens a step, {train.steps} steps\n"
        f"device {meter.world} x {meter.device_name} ({peak}), ZeRO stage {config.zero.stage}, {train.precision}"
    )


def open_recorder(config: Config, run_dir: Path, info: dict):
    from training.tracking import RunRecorder

    tracking = config.tracking
    return RunRecorder(run_dir, info=info, wandb_mode=tracking.wandb, wandb_project=tracking.project, wandb_entity=tracking.entity,
                       wandb_group=tracking.group, wandb_tags=tracking.tags, run_name=config.run.name)


if __name__ == "__main__":
    main()
