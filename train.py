"""Train a GPT from one YAML file:  deepspeed train.py --config configs/gpt2-124m.yaml [section.key=value ...]"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

import yaml

from training.stopping import OUTCOME_FILE, STOPPED_EXIT_CODE, StopRequests, has_finished, write_outcome  # first: it looks who started us

# isort: split
from training.config import Config, load_config
from training.distributed import Ranks, UserFault, agree, any_rank, end_process, gather, join_process_group, one_clear_message, output_to, together


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and stop")
    instead.add_argument("--dry-run", action="store_true",
                        help="print what the run would be, and how long it would take, and stop: needs no GPU, no corpus, no launcher")
    parser.add_argument("--gpus", type=int, help="GPUs that --dry-run assumes; default: those of this machine, or 1")
    parser.add_argument("--gpu-name", help="which GPU --dry-run assumes, as CUDA calls it; default: this machine's, or H200")
    parser.add_argument("--mfu", type=float, help="model FLOPs utilisation that --dry-run assumes; default: 0.4")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log and build output")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it; the environment says the same

    def fail(message: str) -> None:
        raise UserFault(f"{message}\n{parser.format_usage()}")

    parser.error = fail
    arguments = parser.parse_intermixed_args()
    if not arguments.dry_run and (arguments.gpus, arguments.gpu_name, arguments.mfu) != (None, None, None):
        fail("--gpus, --gpu-name and --mfu say what --dry-run assumes; a run takes what there is")
    return arguments


def main() -> None:
    ranks = Ranks.from_environment()
    logging.basicConfig(level=logging.INFO if ranks.rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    with one_clear_message(ranks):
        arguments = parse_arguments()
        if not arguments.verbose:
            warnings.filterwarnings("ignore", module="torch.distributed")  # of DeepSpeed's calls: names torch is changing, devices it infers
        if arguments.dry_run:
            if ranks.rank == 0:
                print(dry_run(arguments, processes=ranks.world), end="")
            return
        config, notes = load_config(arguments.config, arguments.overrides, world_size=ranks.world)
        if arguments.print_config:
            if ranks.rank == 0:
                print(yaml.safe_dump(config.model_dump(), sort_keys=False), end="")
            return
        from training.memory import out_of_memory_explained

        with out_of_memory_explained(config, ranks.world):
            train(config, notes, ranks, verbose=arguments.verbose)


def dry_run(arguments: argparse.Namespace, *, processes: int) -> str:
    """What a run would print before its first step, its tokens, FLOPs and hours, and what DeepSpeed would be told."""
    import torch

    from training.flops import compute_capability, known_gpus

    gpus = processes if arguments.gpus is None and processes > 1 else max(1, torch.cuda.device_count()) if arguments.gpus is None else arguments.gpus
    name = arguments.gpu_name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "H200")
    mfu = 0.4 if arguments.mfu is None else arguments.mfu
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserFault(f"--gpus {gpus} --mfu {mfu}: GPUs are at least 1, and MFU is above 0 and at most 1")
    if compute_capability(name) is None:
        raise UserFault(f"--gpu-name {name}: its peak is not known; known (as patterns): {', '.join(known_gpus())}")
    config, notes = load_config(arguments.config, arguments.overrides, world_size=gpus, assumed_gpu=compute_capability(name))
    with output_to(None if arguments.verbose else Path(os.devnull)):
        from training.engine import deepspeed_config
        from training.memory import summary
        from training.metering import Meter

        meter, told = Meter(config, gpus, device_name=name), deepspeed_config(config)
    tokens = config.train.steps * meter.tokens_per_step
    flops = tokens * meter.flops_per_token
    speed = mfu * meter.peak_flops

    def short(number: float) -> str:
        return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

    return "\n".join([
        *notes, describe(config, meter),
        f"work   {meter.flops_per_token:,} FLOPs a token, {meter.flops_per_token * meter.tokens_per_step:.4g} a step; {config.train.steps:,} steps: "
        f"{tokens:,} tokens ({short(tokens / meter.parameters['total'])} a parameter), {flops:.4g} FLOPs",
        f"time   at an assumed MFU of {mfu:.3g}: {speed / meter.flops_per_token:,.0f} tokens/s/GPU, "
        f"{meter.flops_per_token * meter.tokens_per_step / (speed * gpus):.3g} s a step, {short(flops / (speed * gpus) / 3600)} hours, "
        f"{short(flops / speed / 3600)} GPU hours; evaluation, checkpoints and the start come on top",
        *summary(config, gpus, name),
        "DeepSpeed is told:", *(f"  {line}" for line in yaml.safe_dump(told, sort_keys=False).splitlines()), ""])


def train(config: Config, notes: list[str], ranks: Ranks, *, verbose: bool) -> None:
    # 1. The processes find each other.
    first = ranks.rank == 0
    run_dir = Path(config.run.output_dir, config.run.name)
    make_run_dir(run_dir)
    stop = StopRequests(run_dir, grace_seconds=config.checkpoint.stop_seconds)
    deepspeed_log = None if verbose else run_dir / f"deepspeed-{ranks.rank}.log"
    with output_to(deepspeed_log):
        join_process_group()

    # Imported late, so that a fault in the configuration is told sooner, and DeepSpeed's remarks on the machine go to its log.
    from training import checkpoints
    from training.batches import TrainingBatches, validation_batches
    from training.engine import build_engine, check_machine, deepspeed_config, train_step
    from training.evaluation import evaluate, mixed, sample_text
    from training.loss_scale import LossScale
    from training.metering import Meter, mark, seconds_between
    from training.tracking import METRICS_FILE, ProgressLine, collect_environment

    agree("attention.backend", config.attention.backend)

    # 2. The data, checked whole before the first step: one process a host reads every byte.
    corpus = together(lambda: open_corpus(config, verify=ranks.local_rank == 0))
    tokenizer = corpus.load_tokenizer()

    # 3. Where the run begins: with a checkpoint, found intact, or with nothing.
    checkpoint, passed_over = checkpoints.find_checkpoint(config.checkpoint.resume, run_dir / "checkpoints")
    state = checkpoints.LoopState() if checkpoint is None else checkpoint.state
    changed = [] if checkpoint is None else checkpoints.check_fits(checkpoint, config, corpus_sha256=corpus.sha256)
    together(lambda: refuse_if_finished(config, run_dir, state.step), here=first)

    # 4. The record of the run: run.json, metrics.jsonl, wandb.
    meter = Meter(config, ranks.world, elapsed_seconds=state.elapsed_seconds)
    info = {"config": config.model_dump(), "deepspeed_config": deepspeed_config(config), "corpus_sha256": corpus.sha256,
            "corpora": corpora_facts(corpus, config), **meter.description()}
    recorder = together(lambda: open_recorder(config, run_dir, {**info, "environment": collect_environment()}, meter, checkpoint), here=first)
    if first:
        state.wandb_id = recorder.wandb_id
        began = [f"resume {checkpoint.folder}: {state.step} of {config.train.steps} steps are done"] if checkpoint else []
        print("\n".join([*notes, *passed_over, *changed, *began, describe(config, meter, corpus)]), flush=True)

    # 5. Model, optimizer, engine.
    build = together(lambda: check_machine(config))
    if build and first:
        print(build, flush=True)
    state.loss_scale = (state.loss_scale or LossScale(config.train.initial_loss_scale)) if config.train.precision == "fp16" else None
    convert = checkpoint is not None and checkpoint.needs_conversion(config)
    with output_to(deepspeed_log):
        engine = build_engine(config, end_of_text=tokenizer.end_of_text, load_universal=convert)
        if checkpoint:
            checkpoints.load(engine, checkpoint, config, scratch=run_dir / "checkpoints")
    shape = {"sequence_length": config.model.sequence_length, "rank": ranks.rank, "world": ranks.world, "sharing": config.parallel.sequence,
             "device": engine.device}
    batches = TrainingBatches([each.split("train") for each in corpus.corpora], shares=corpus.shares, micro_batch_size=config.train.micro_batch_size,
                              accumulation=config.train.gradient_accumulation_steps, seed=config.run.seed, **shape)

    def validate() -> dict:
        held_out = (validation_batches(each.split("validation"), batch_size=config.train.micro_batch_size, sequences=config.eval.sequences, **shape)
                    for each in corpus.corpora)
        return mixed({name: evaluate(engine, batches, corpus.token_bytes) for name, batches in zip(corpus.names, held_out, strict=True)}, corpus.shares)

    def save_checkpoint() -> Path:
        stop.saving = True
        state.elapsed_seconds = meter.elapsed_seconds()
        if first:
            recorder.sync()
        with output_to(deepspeed_log):
            saved = checkpoints.save(engine, run_dir / "checkpoints", state, config, corpus_sha256=corpus.sha256, parameters=meter.parameters["total"])
        stop.saving = stop.reason is not None  # what follows a stop's checkpoint counts as part of it
        return saved

    # 6. The loop.
    progress = ProgressLine(config.train.steps, every=config.tracking.log_every)
    validation = None
    untold: tuple | None = None

    def tell(*, evaluates: bool = False) -> None:
        """Count and record the step that has not been yet, once the GPU has done with it; with a validation, if it is its turn."""
        nonlocal untold, validation
        if untold is None:
            return
        (step, result, began, ended, data_seconds), untold = untold, None
        row = meter.row(step, result, step_seconds=seconds_between(began, ended), data_seconds=data_seconds)
        state.count(result)
        row |= {"loss": float(result.loss), "grad_norm": float(result.grad_norm), "skipped_steps": state.skipped_steps}
        if state.loss_scale:
            row["overflow_steps"] = state.overflow_steps
        if evaluates:
            validation = validate()
            row |= validation
        if first:
            recorder.record(row)
            progress.update(row)
            if not result.applied:
                falls = f"; the loss scale falls from {result.loss_scale:g} to {state.loss_scale.scale:g}" if result.overflow else ""
                progress.note(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}: skipped on every rank ({state.skipped_steps} so far){falls}")
        if state.skipped_in_a_row >= config.train.stop_after_skipped:
            raise UserFault(diverged(state, config, run_dir))

    with recorder or contextlib.nullcontext(), contextlib.closing(batches):
        stop.begin_loop()
        for step in range(state.step + 1, config.train.steps + 1):
            began, started = mark(), time.perf_counter()
            micro_batches = batches.step(step - 1)
            data_seconds = time.perf_counter() - started
            result = train_step(engine, micro_batches, step - 1, config, state.loss_scale, stopping=lambda: stop.reason is not None)
            ended = mark()
            tell()  # of the step before: the GPU has this one to do while the host waits for that
            untold = (step, result, began, ended, data_seconds)
            last, stops = step == config.train.steps, float(result.stopping) > 0  # asked for before the backward pass: that is not waited for
            saves = config.checkpoint.every is not None and (last or config.checkpoint.every and step % config.checkpoint.every == 0)
            evaluates = last or config.eval.every and step % config.eval.every == 0
            # A CPU has done with it, and fp16 has waited for it.
            if last or saves or stops or evaluates or engine.device.type == "cpu" or state.loss_scale:
                tell(evaluates=evaluates)
            saved = save_checkpoint() if saves else None
            if saves or evaluates:
                stops = any_rank(stop.reason is not None, engine.device)  # asked again after what takes long
            if stops and not last:
                if config.checkpoint.every is not None and saved is None:
                    saved = save_checkpoint()
                stop_run(stop, config, run_dir, state, saved, progress, recorder)

    # 7. What it learned.
    validation = validation or validate()
    text = sample_text(engine, tokenizer, config.sample, sequence_length=config.model.sequence_length, seed=config.run.seed)
    if first:
        progress.close()
        (run_dir / "sample.txt").write_text(config.sample.prompt + text, encoding="utf-8")
        write_outcome(run_dir, "finished", step=state.step)
        print(f"\n{config.sample.prompt}{text}\n\nvalidation loss {validation['val_loss']:.4f} nats per token, "
              f"{validation['val_bits_per_byte']:.4f} bits per byte\nmetrics {run_dir / METRICS_FILE}", flush=True)
    end_process()


def stop_run(stop: StopRequests, config: Config, run_dir: Path, state, saved: Path | None, progress, recorder) -> NoReturn:
    """The end of a run that was asked to stop: the marker, one line, and every rank's exit together."""
    reason = next(filter(None, gather(stop.reason)))
    if recorder is not None:
        write_outcome(run_dir, "stopped", reason=reason, step=state.step, checkpoint=saved and str(saved))
        again = "the same command" if config.checkpoint.resume == "auto" else "the same command with checkpoint.resume=auto"
        progress.note(f"stopped by {reason} after step {state.step}; " + (f"{again} goes on from {saved}" if saved else "checkpoint.every is null: nothing was saved"))
        recorder.finish()
    end_process(STOPPED_EXIT_CODE)


def refuse_if_finished(config: Config, run_dir: Path, done: int) -> None:
    """Raises UserFault when no step is left to do; removes an earlier start's marker otherwise."""
    if done > config.train.steps:
        raise UserFault(f"train.steps: {done} steps are done and {config.train.steps} asked for; raise it, or choose another run.name")
    if has_finished(run_dir) and done in (0, config.train.steps):
        longer = f"; to go on with it give run.name={config.run.name} and more train.steps" if done else ""
        raise UserFault(f"{run_dir} holds a finished run; choose another run.name{longer}")
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)


def diverged(state, config: Config, run_dir: Path) -> str:
    first_skipped = state.step - state.skipped_in_a_row + 1
    return (f"steps {first_skipped} to {state.step} were skipped: loss or gradients were not finite (train.stop_after_skipped: {config.train.stop_after_skipped}). "
            f"Look at {run_dir / 'metrics.jsonl'}: a loss or gradient norm that rises before step {first_skipped} asks for a lower optimizer.lr, a longer "
            "optimizer.warmup_steps or a smaller optimizer.grad_clip; one that jumps from nothing, at the data of that step, or at the precision: "
            "train.precision=fp32 and attention.backend=eager tell which part it is")


def make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserFault(f"run.output_dir: cannot make {run_dir}: {error.strerror}; choose another run.output_dir or run.name") from None


def open_corpus(config: Config, *, verify: bool):
    """The corpora as one, found whole and fit for this model and each other; ValueError otherwise."""
    from training.mixture import Mixture

    corpus = Mixture.open(config.data.weights())
    corpus.check_fits(model_vocab_size=config.model.vocab_size, sequence_length=config.model.sequence_length)
    if verify:
        corpus.verify()
    return corpus


def corpora_facts(corpus, config: Config) -> list[dict]:
    """What the run takes from each corpus, for run.json."""
    found = corpus.facts(sequence_length=config.model.sequence_length, run_samples=config.train.steps * config.train.global_batch_size)
    return [dataclasses.asdict(facts) for facts in found]


def describe_data(config: Config, corpus) -> str:
    """A line for each corpus."""
    facts = corpora_facts(corpus, config)
    lines = [f"{each['folder']}: {each['training_tokens']:,} training tokens, {each['epochs']:.2f} epochs of them in this run"
             + f", {each['share']:.2%} of its samples" * (len(facts) > 1) for each in facts]
    lines[-1] += f"; {corpus.tokenizer_name} tokenizer, corpus {corpus.sha256[:12]}"
    return "\n".join(f"data   {line}" for line in lines)


def describe(config: Config, meter, corpus=None) -> str:
    """What is about to happen, a line each, without those of the data where there is no corpus: every derived number with where it comes from."""
    model, attention, train = config.model, config.attention, config.train
    within = f" in a window of {attention.window}" * (attention.window is not None) + " within documents" * attention.document_mask
    peak = f"{meter.peak_flops / 1e12:.0f} TFLOP/s peak in {train.precision}" if meter.peak_flops else "peak unknown, so no MFU"
    data = "" if corpus is None else f"{describe_data(config, corpus)}\n"
    return (
        f"model  {meter.parameters['total']:,} parameters: {model.layers} layers, {model.hidden_size} wide, {model.heads} heads of {model.head_dim}, "
        f"attention {attention.backend}{within}, checkpointing {train.activation_checkpointing}"
        f"{', offloaded' * train.checkpoint_offload}{f', feed-forward in tiles of {train.mlp_tile}' if train.mlp_tile else ''}{', compiled' * train.compile}\n"
        f"{data}"
        f"batch  {train.micro_batch_size} micro x {train.gradient_accumulation_steps} accumulation x {config.sharing.of(meter.world)} = {train.global_batch_size} "
        f"sequences of {model.sequence_length} = {meter.tokens_per_step:,} tokens a step, {train.steps} steps\n"
        f"device {meter.world} x {meter.device_name} ({peak}), {config.engine}, {train.precision}"
    )


def open_recorder(config: Config, run_dir: Path, info: dict, meter, checkpoint):
    from training.tracking import METRICS_FILE, REPLACED_FILE, RunRecorder, run_tags

    tracking = config.tracking
    goes_on = checkpoint is not None and checkpoint.folder.parent.parent.resolve() == run_dir.resolve()
    metrics = run_dir / METRICS_FILE
    crashed_early = checkpoint is None and config.checkpoint.resume == "auto" and metrics.exists() and metrics.stat().st_size > 0
    if crashed_early:
        logging.info("an earlier start left no checkpoint: its rows move to %s, and the run begins anew", run_dir / REPLACED_FILE)
    return RunRecorder(run_dir, info=info, run_name=config.run.name, wandb_mode=tracking.wandb, wandb_project=tracking.project,
                       wandb_entity=tracking.entity, wandb_group=tracking.group,
                       wandb_tags=[*run_tags(config.model_dump(), meter.parameters["total"]), *tracking.tags],
                       wandb_id=checkpoint.state.wandb_id if goes_on else None,
                       resume_step=checkpoint.state.step if goes_on else 0 if crashed_early else None)


if __name__ == "__main__":
    main()
