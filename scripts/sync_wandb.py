"""Upload runs to wandb from their run.json and metrics.jsonl: runs recorded offline, without wandb, or while the server was dead.

    python scripts/sync_wandb.py RUN_DIR [RUN_DIR ...]

Only steps that the server does not have are sent, to the run of the id in run.json, so it can be repeated at any time; unlike
`wandb sync`, which sends each start of a run whole, and so the steps between a checkpoint and a crash twice.
Exit code 2 and one line on stderr for each run that cannot be uploaded.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.tracking import METRICS_FILE, open_locked, read_description, read_metrics, write_description
from training.wandb_run import ServerUnavailable, WandbRun, new_run_id

# A long run's rows are some 100 MB; whatever takes longer is told, and goes on when the program is started again.
FINISH_SECONDS = 600
# A server may take a moment to show what it took.
CHECK_AFTER_SECONDS = (0, 2, 10)


def sync(run_dir: Path) -> str:
    """Upload one run; what was done, in one line.

    Raises ValueError for what the user can put right, ServerUnavailable, and TimeoutError when the server stopped taking rows.
    """
    if not (run_dir / METRICS_FILE).is_file():
        raise ValueError(f"{run_dir}: not the directory of a run: it holds no {METRICS_FILE}")
    try:
        lock = open_locked(run_dir / METRICS_FILE)
    except BlockingIOError:
        raise ValueError(f"{run_dir}: the run is being recorded or uploaded at this moment; try again when that has ended") from None
    with lock:
        description, (rows, _) = read_description(run_dir), read_metrics(run_dir)
        if "wandb" not in description:
            raise ValueError(f"{run_dir}: run.json does not say to which wandb project the run belongs")
        if description["wandb"]["id"] is None:
            description["wandb"]["id"] = new_run_id()
            write_description(run_dir, description)
        # What wandb writes for itself is of no use afterwards: the rows are in metrics.jsonl.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            open_run = partial(WandbRun, description, mode="online", directory=Path(directory), finish_seconds=FINISH_SECONDS)
            return f"{run_dir}: {_upload(open_run, rows)}"


def _upload(open_run: Callable[[], WandbRun], rows: list[dict[str, Any]]) -> str:
    run = open_run()
    missing = [row for row in rows if row["step"] >= run.next_step]
    for row in missing:
        run.log(row)
    run.finish()
    last_step = rows[-1]["step"]
    if missing and not _has_arrived(open_run, last_step):
        raise ValueError(f"the server does not show step {last_step}, which was sent to {run.url}; look there, then start this again")
    return f"{len(missing)} steps sent, the server has them up to step {last_step}: {run.url}"


def _has_arrived(open_run: Callable[[], WandbRun], last_step: int) -> bool:
    """Whether the server shows the step. wandb does not tell when its rows are refused, so the server is asked."""
    for seconds in CHECK_AFTER_SECONDS:
        time.sleep(seconds)
        run = open_run()
        run.finish()
        if run.next_step > last_step:
            return True
    return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Upload runs to wandb from run.json and metrics.jsonl; no step is sent twice.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    status = 0
    for run_dir in parser.parse_args(arguments).run_dirs:
        try:
            print(sync(run_dir), flush=True)
        except ServerUnavailable as error:
            print(f"sync_wandb: {run_dir}: the server did not let it start: {error}", file=sys.stderr)
            return 2
        except TimeoutError:
            print(f"sync_wandb: {run_dir}: not everything was taken within {FINISH_SECONDS} s; start this again", file=sys.stderr)
            return 2
        except (ValueError, OSError) as error:
            print(f"sync_wandb: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
