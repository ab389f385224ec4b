"""One run, killed at 50 points and resumed each time, in processes forked from this one; ``test_kills.py`` reads what it writes down."""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.forked_runs import ForkedRun, import_what_a_run_imports
from training import checkpoints, files, manifest
from training.corpus import write_corpus
from training.tokenizers import load_tokenizer

STEPS = 1000  # more than a machine makes while it is killed: after a launcher's death the ranks train on for up to a second
POINTS = 50
# Moments of a checkpoint: the function at whose call the process is killed, before or after it has done its work.
MOMENTS = [(checkpoints, "_make_room"), (checkpoints, "_save_generators"), (checkpoints, "seal"), (checkpoints, "_publish"), (checkpoints, "write_manifest"),
           (files, "fsync"), (checkpoints, "write_atomically"), (checkpoints, "_remove"), (files, "rename_durably")]
ON_RANK_0_ALONE = {"_make_room", "_publish", "write_manifest", "write_atomically", "fsync", "_remove", "rename_durably"}


def prepare(folder: Path) -> Path:
    text = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. " * 10
    write_corpus(folder / "sonnet", tokenizer=load_tokenizer("bytes"), splits={"train": [text] * 4, "validation": [text]}, provenance={})
    (folder / "run.yaml").write_text(f"""
run: {{output_dir: {folder}/runs}}
model: {{layers: 1, hidden_size: 16, heads: 1, vocab_size: 257, sequence_length: 16, dropout: 0.1}}
data: {{corpus: {folder}/sonnet}}
train: {{steps: {STEPS}, global_batch_size: 4, precision: fp32}}
optimizer: {{lr: 1e-2, warmup_steps: 2}}
eval: {{every: 0, sequences: 2}}
sample: {{tokens: 0}}
tracking: {{wandb: disabled}}
checkpoint: {{every: 1, keep_last: 3}}
""")
    return folder / "run.yaml"


def kill_at(module, name: str, *, victim: str | int, rank: int, after: bool, countdown: int) -> Callable[[int], None]:
    """A hook that wraps a function: at its n-th call on ``rank`` the victim, a rank or the launcher, gets SIGKILL."""
    def hook(this_rank: int) -> None:
        original, left = getattr(module, name), countdown

        def wrapped(*arguments, **named):
            nonlocal left
            left -= 1
            result = original(*arguments, **named) if after else None
            if left == 0:
                os.kill(os.getppid() if victim == "launcher" else os.getpid(), signal.SIGKILL)
            return result if after else original(*arguments, **named)

        if this_rank == rank:
            setattr(module, name, wrapped)

    return hook


def chosen_points(rng: random.Random) -> list[dict]:
    points = []
    for module, name in MOMENTS:
        for after in (False, True):
            rank = 0 if name in ON_RANK_0_ALONE else 1
            points.append({"module": module, "name": name, "victim": rank, "rank": rank, "after": after, "countdown": rng.randint(1, 9)})
            points.append({"module": module, "name": name, "victim": "launcher", "rank": rank, "after": after, "countdown": rng.randint(1, 9)})
    return points


def newest_intact(folder: Path) -> int:
    return next((manifest.step_of(each) for each in manifest.complete_checkpoints(folder) if not manifest.faults_of(each)), 0)


def resumed_at(said: str) -> int | None:
    """The step that a start said it goes on from; None where it said nothing, being new or killed too soon."""
    found = re.search(r"^resume .*: (\d+) of", said, re.MULTILINE)
    return int(found[1]) if found else None


def newest(folder: Path) -> int:
    return max(map(manifest.step_of, manifest.complete_checkpoints(folder)), default=0)


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    run_file = prepare(folder)
    log = folder / "killed.log"
    import_what_a_run_imports(["--config", str(run_file), "run.name=first", "train.steps=2"], log=folder / "first.log")
    saved = folder / "runs" / "killed" / "checkpoints"
    points = chosen_points(rng)
    points += [{"victim": rng.choice([0, 1, "launcher"]), "steps": rng.randint(0, 6)} for _ in range(POINTS - len(points))]
    rng.shuffle(points)
    seen = []
    for point in points:
        newest_before = newest(saved)
        said_before = len(log.read_text()) if log.exists() else 0
        hook = kill_at(**point) if "name" in point else lambda rank: None
        run = ForkedRun(["--config", str(run_file), "run.name=killed"], log=log, hook=hook)
        if "steps" in point:  # 0: while it starts
            time.sleep(rng.uniform(0, 0.5))
            deadline = time.monotonic() + 60
            while newest(saved) < newest_before + point["steps"] and time.monotonic() < deadline:
                time.sleep(0.002)
            run.kill(point["victim"])
        seconds = run.wait(60)
        seen.append({"point": point.get("name", "random"), "victim": point["victim"], "after": point.get("after"), "resumed": resumed_at(log.read_text()[said_before:]),
                     "left": newest_intact(saved), "exit_code": run.code, "seconds": seconds,
                     "damaged": [each.name for each in manifest.complete_checkpoints(saved) if manifest.faults_of(each)]})
    last = ForkedRun(["--config", str(run_file), "run.name=killed", "checkpoint.every=0"], log=log)  # one at the end
    last.wait(120)
    whole = ForkedRun(["--config", str(run_file), "run.name=whole", "checkpoint.every=0"], log=folder / "whole.log")
    whole.wait(120)
    (folder / "seen.json").write_text(json.dumps({"points": seen, "codes": [last.code, whole.code]}))


if __name__ == "__main__":
    main()
