"""Runs of train.py that are stopped, resumed, converted and fed damaged checkpoints; ``test_reliability.py`` reads what they left."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train
import training.engine
from tests.forked_runs import ForkedRun, import_what_a_run_imports
from training import checkpoints, corpus, manifest
from training.manifest import seal, write_manifest
from training.tokenizers import load_tokenizer

STEPS = 20


class Scenario:
    """Runs in one folder, with what they printed."""

    def __init__(self, folder: Path):
        self.folder = folder
        text = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 10
        for name, documents in (("sonnet", [text] * 4), ("couplet", ["So long lives this, and this gives life to thee."])):
            corpus.write_corpus(folder / name, tokenizer=load_tokenizer("bytes"), splits={"train": documents, "validation": [text]}, provenance={})
        (folder / "run.yaml").write_text(f"""
run: {{output_dir: {folder}/runs}}
model: {{layers: 1, hidden_size: 16, heads: 1, vocab_size: 257, sequence_length: 16, dropout: 0.1}}
data: {{corpus: null, mixture: {{{folder}/sonnet: 0.6, {folder}/couplet: 0.4}}}}
train: {{steps: {STEPS}, global_batch_size: 4, micro_batch_size: null, precision: fp32}}
optimizer: {{lr: 1e-2, warmup_steps: 2}}
eval: {{every: 0, sequences: 2}}
sample: {{tokens: 0}}
tracking: {{wandb: disabled}}
checkpoint: {{every: 0}}
""")

    def run(self, name: str, *overrides: str, processes: int = 2, hook: Callable[[int], None] = lambda rank: None, during=lambda run: None) -> dict:
        """One start; its exit code, output, seconds until every process was gone, and the run's marker."""
        log = self.folder / "logs" / f"{name}-{time.monotonic_ns()}"
        log.parent.mkdir(exist_ok=True)
        run = ForkedRun(["--config", str(self.folder / "run.yaml"), f"run.name={name}", *overrides], processes=processes, log=log, hook=hook)
        during(run)
        seconds = run.wait(90)
        outcome = self.folder / "runs" / name / "outcome.json"
        return {"code": run.code, "output": log.read_text(), "seconds": seconds, "outcome": json.loads(outcome.read_text()) if outcome.exists() else None,
                "checkpoints": [each.name for each in manifest.complete_checkpoints(self.folder / "runs" / name / "checkpoints")]}


def at_step(step: int, rank: int, action: Callable[[], None]) -> Callable[[int], None]:
    """A hook: ``action`` in ``rank``'s process, in the middle of an optimizer step."""
    def hook(this_rank: int) -> None:
        original, calls = training.engine.learning_rate, 0

        def wrapped(*arguments):
            nonlocal calls
            if arguments[0] == step - 1:
                action()
            return original(*arguments)

        if this_rank == rank:
            training.engine.learning_rate = wrapped

    return hook


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def exact(scenario: Scenario) -> dict:
    """20 steps; 10, stopped, and 10 more; and the same on 2, 1 and 2 processes, without dropout."""
    seen = {"whole": scenario.run("whole"), "stopped": scenario.run("parts", hook=at_step(10, 1, signal_self(signal.SIGTERM))),
            "resumed": scenario.run("parts")}
    seen["elastic_whole"] = scenario.run("elastic-whole", "model.dropout=0.0")
    for part, (processes, stop) in enumerate([(2, 7), (1, 14), (2, None)]):
        hook = at_step(stop, 0, signal_self(signal.SIGTERM)) if stop else lambda rank: None
        seen[f"elastic_{part}"] = scenario.run("elastic", "model.dropout=0.0", processes=processes, hook=hook)
    return seen


def signals(scenario: Scenario) -> list[dict]:
    """Every signal, to each rank and to the launcher, while the run starts, in a step, and while it saves."""
    seen = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for victim in (0, 1, "launcher"):
            for moment in ("start", "step", "save"):
                seen.append(one_signal(scenario, number, victim, moment))
    return seen


def one_signal(scenario: Scenario, number: int, victim: int | str, moment: str) -> dict:
    def send() -> None:
        launcher = os.getppid()
        os.kill(launcher if victim == "launcher" else os.getpid(), number)
        deadline = time.monotonic() + 10
        while victim == "launcher" and os.getppid() == launcher and time.monotonic() < deadline:  # Python takes its time to end
            time.sleep(0.05)
        time.sleep(3 if victim == "launcher" else 0.5)  # so that the moment lasts until it has been seen

    rank = 0 if victim == "launcher" else victim

    def hook(this_rank: int) -> None:
        at_step(8, rank, send)(this_rank) if moment == "step" else None
        if this_rank == rank and moment == "start":
            original_open = train.open_corpus
            train.open_corpus = lambda *a, **k: (send(), original_open(*a, **k))[1]
        if this_rank == rank and moment == "save":
            original_seal, done = checkpoints.seal, []

            def sealing(file: Path) -> dict:
                if not done:
                    done.append(file)
                    send()
                return original_seal(file)

            checkpoints.seal = sealing

    name = f"{signal.Signals(number).name}-{victim}-{moment}"
    # The save that the signal meets is that of step 8, the run's only periodic one.
    return {"signal": signal.Signals(number).name, "victim": victim, "moment": moment, **scenario.run(name, "checkpoint.every=8", hook=hook)}


def damage(scenario: Scenario) -> dict:
    """Three checkpoints, the newest damaged in every way; what the next start says, and from which step it goes on."""
    scenario.run("sound", "checkpoint.every=4", "checkpoint.keep_last=9", hook=at_step(12, 0, signal_self(signal.SIGTERM)))
    sound = scenario.folder / "runs" / "sound"
    shard = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def halve(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)

    cases = {
        "shard truncated": lambda newest: halve(newest / shard),
        "shard empty": lambda newest: os.truncate(newest / shard, 0),
        "one bit flipped": lambda newest: flip(newest / shard),
        "shard deleted": lambda newest: (newest / shard).unlink(),
        "generators deleted": lambda newest: (newest / "rng_rank_00001.pt").unlink(),
        "state truncated": lambda newest: halve(newest / "state.json"),
        "manifest deleted": lambda newest: (newest / "manifest.json").unlink(),
        "manifest truncated": lambda newest: halve(newest / "manifest.json"),
        "manifest emptied": lambda newest: (newest / "manifest.json").write_text("{}"),
        "newest empty": lambda newest: (shutil.rmtree(newest), newest.mkdir()),
        "half a newer one": lambda newest: (shutil.copytree(newest, newest.with_name("step_00000016.tmp")), (newest.parent / "latest.1.tmp").touch()),
        "latest deleted": lambda newest: (newest.parent / "latest").unlink(),
        "latest garbled": lambda newest: (newest.parent / "latest").write_bytes(b"\xff\x00"),
        "all damaged": lambda newest: [halve(each / shard) for each in manifest.complete_checkpoints(newest.parent)],
        "two damaged": lambda newest: [halve(each / shard) for each in manifest.complete_checkpoints(newest.parent)[:2]],
    }
    seen = {}
    for name, harm in cases.items():
        run_dir = scenario.folder / "runs" / name
        shutil.copytree(sound, run_dir)
        harm(run_dir / "checkpoints" / "step_00000012")
        done = scenario.run(name)
        resumed = re.search(r"^resume .*: (\d+) of", done["output"], re.MULTILINE)
        seen[name] = {**done, "resumed": int(resumed[1]) if resumed else None}
    return seen


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['TOUCHED']}",)


def untrusted(scenario: Scenario) -> dict:
    """A file that runs code when unpickled, under a manifest that confirms it: in the same layout, and where it must be converted."""
    os.environ["TOUCHED"] = str(scenario.folder / "touched")
    seen = {}
    for name, processes, file in (("same", 2, "zero_pp_rank_0_mp_rank_00_model_states.pt"), ("same", 2, "rng_rank_00001.pt"),
                                  ("same", 2, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
                                  ("other", 1, "zero_pp_rank_1_mp_rank_00_optim_states.pt")):
        run_dir = scenario.folder / "runs" / f"untrusted-{name}-{file}"
        shutil.copytree(scenario.folder / "runs" / "sound", run_dir)
        newest = run_dir / "checkpoints" / "step_00000012"
        torch.save({"cpu": Malicious()}, newest / file)
        write_manifest(newest, {each.name: seal(each) for each in newest.iterdir() if each.name != manifest.MANIFEST_FILE})
        done = scenario.run(run_dir.name, processes=processes)
        seen[f"{name} {file}"] = {**done, "ran": (scenario.folder / "touched").exists()}
    return seen


def asked_for(scenario: Scenario) -> dict:
    """What checkpoint.resume may say, and what must not change on the way."""
    runs = scenario.folder / "runs"
    return {
        "missing": scenario.run("m1", f"checkpoint.resume={runs}/nothing-here"),
        "run without": scenario.run("m2", f"checkpoint.resume={scenario.folder}/sonnet"),
        "damaged": scenario.run("m3", f"checkpoint.resume={runs}/all damaged/checkpoints/step_00000012"),
        "branch": scenario.run("branch", f"checkpoint.resume={runs}/sound/checkpoints/step_00000008", "optimizer.lr=5e-3"),
        "branch again": scenario.run("branch", f"checkpoint.resume={runs}/sound/checkpoints/step_00000008"),
        "newest of a run": scenario.run("branch2", f"checkpoint.resume={runs}/sound"),
        "older of its own": scenario.run("sound", f"checkpoint.resume={runs}/sound/checkpoints/step_00000008"),
        "never": scenario.run("sound", "checkpoint.resume=never"),
        "other run's": scenario.run("sound", f"checkpoint.resume={runs}/whole"),
        "finished": scenario.run("whole"),
        "other batch": scenario.run("sound", "train.global_batch_size=8"),
        "other model": scenario.run("sound", "model.layers=2"),
        "other seed": scenario.run("sound", "run.seed=7"),
        "fewer steps": scenario.run("sound", "train.steps=10"),
        "longer": scenario.run("whole", "train.steps=24"),
    }


def decays(scenario: Scenario) -> dict:
    """A decay that begins at a checkpoint of a stable phase, beside the run that decayed there without a stop; and one that comes too late for that."""
    decay = ["optimizer.schedule=wsd", "optimizer.decay_steps=6", "train.steps=14"]
    resume = f"checkpoint.resume={scenario.folder}/runs/stable/checkpoints/step_00000008"
    return {"stable": scenario.run("stable", "optimizer.schedule=constant", "train.steps=10", "checkpoint.every=8"),
            "branch": scenario.run("decayed", *decay, resume),
            "whole": scenario.run("decayed-whole", *decay),
            "late": scenario.run("decayed-late", *decay, "optimizer.decay_steps=9", resume)}


def crashed(scenario: Scenario) -> dict:
    """Killed before the first checkpoint, and killed after rows that no checkpoint holds."""
    kill = lambda step: at_step(step, 1, signal_self(signal.SIGKILL))  # noqa: E731
    early = [scenario.run("early", hook=kill(5)), scenario.run("early")]
    late = [scenario.run("late", "checkpoint.every=4", hook=kill(7)), scenario.run("late", "checkpoint.every=4")]
    none = [scenario.run("none", "checkpoint.every=null", hook=at_step(5, 0, signal_self(signal.SIGTERM)))]
    return {"early": early, "late": late, "none": none}


def disk_full(scenario: Scenario) -> dict:
    """A write that fails on one rank alone, inside DeepSpeed and outside."""
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def inside(rank: int) -> None:
        if rank == 1:
            torch.save = fail

    def outside(rank: int) -> None:
        original = torch.save
        if rank == 1:
            torch.save = lambda content, file, *more, **named: (fail if "rng_rank" in str(file) else original)(content, file, *more, **named)

    return {"inside": scenario.run("full-inside", "checkpoint.every=5", hook=inside), "outside": scenario.run("full-outside", "checkpoint.every=5", hook=outside)}


def diverging(scenario: Scenario) -> dict:
    return scenario.run("diverging", "optimizer.lr=1e30", "optimizer.warmup_steps=0", "train.stop_after_skipped=3")


def hung(scenario: Scenario) -> dict:
    """One rank that never comes back: a signal ends it all the same, in checkpoint.stop_seconds; so does the launcher's death."""
    asleep = scenario.folder / "asleep"
    sleeping = at_step(3, 1, lambda: (asleep.touch(), time.sleep(300)))

    def when_asleep(act: Callable[[ForkedRun], None]) -> Callable[[ForkedRun], None]:
        def during(run: ForkedRun) -> None:
            while not asleep.exists():
                time.sleep(0.05)
            act(run)

        return during

    both = when_asleep(lambda run: (run.kill(0, signal.SIGTERM), run.kill(1, signal.SIGTERM)))
    by_signal = scenario.run("hung-signal", "checkpoint.stop_seconds=3", hook=sleeping, during=both)
    asleep.unlink()
    return {"signal": by_signal, "launcher": scenario.run("hung-launcher", hook=sleeping, during=when_asleep(lambda run: run.kill("launcher")))}


def main() -> None:
    folder = Path(sys.argv[1])
    scenario = Scenario(folder)
    import_what_a_run_imports(["--config", str(folder / "run.yaml"), "run.name=first", "train.steps=2"], log=folder / "first.log")
    seen = {part.__name__: part(scenario) for part in (exact, signals, damage, untrusted, asked_for, decays, crashed, disk_full, diverging, hung)}
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
