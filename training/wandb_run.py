"""A run's page in wandb: one id for all starts of the run, offline when the server is dead, no step uploaded twice.

Everything that touches wandb is here. What is shown comes from run.json and metrics.jsonl alone, so that the live run and
scripts/sync_wandb.py write the same page.
"""

import contextlib
import logging
import os
import secrets
import string
from pathlib import Path
from typing import Any, Literal

# Measured with servers that refuse, never answer or answer 500: wandb gives up after these and starts offline 2 s later (10 s later on
# a machine that is busy with eight other starts), so a dead server costs a run less than 30 s.
_START_SECONDS = 10
# What is not uploaded by then stays on disk, and scripts/sync_wandb.py sends it: better than GPUs held by a dead server.
_FINISH_SECONDS = 30

logger = logging.getLogger(__name__)


class ServerUnavailable(Exception):
    """The wandb server cannot be reached or did not let the run start; the message names it and the reason."""


def new_run_id() -> str:
    """Eight characters as wandb's own; from the system's randomness, so that equal seeds do not mean equal ids."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def sync_command(run_dir: Path) -> str:
    return f"python scripts/sync_wandb.py {run_dir}"


class WandbRun:
    """One start of a run in wandb.

    description: what run.json holds; "run_name" is the name, "wandb" says which run it is (id, project, entity, group, tags), and
    the rest is the config.
    mode: "online", or "offline" (files under directory/wandb).
    finish_seconds: the longest that `finish` waits for uploads.

    `next_step` is the first step that the server does not have: 0 for a new run, and for an offline one, which cannot ask.

    Raises ValueError when wandb is not installed, has no key, or cannot start offline, and ServerUnavailable.
    """

    def __init__(
        self, description: dict[str, Any], *, mode: Literal["online", "offline"], directory: Path, finish_seconds: int
    ) -> None:
        # wandb's reports on its own errors go to the same server: one that never answers held the end of the process for 22 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"tracking.wandb={mode}: the package wandb is not installed; run `pip install wandb`, or set tracking.wandb=disabled"
            ) from None
        settings = wandb.Settings(
            mode=mode, silent=True, init_timeout=_START_SECONDS, finish_timeout=finish_seconds, finish_timeout_raises=True
        )
        try:
            server = wandb.setup(settings).settings.base_url
        except Exception as error:
            raise ValueError(f"tracking.wandb={mode}: wandb did not start: {one_line(error)}; use tracking.wandb=disabled") from None
        try:
            # Asked first because wandb.init would stop the run at a prompt for the key when a terminal is attached.
            has_key = mode == "offline" or wandb.login(prompt=False, verify=False)
            self._run = wandb.init(settings=settings, dir=directory, **_init_arguments(description, mode)) if has_key else None
        except Exception as error:
            _end_service()  # it holds on to the id of a run that did not start; a new one is free to use it
            if mode == "online":
                raise ServerUnavailable(f"{server}: {one_line(error)}") from None
            raise ValueError(f"tracking.wandb=offline: wandb did not start: {one_line(error)}; use tracking.wandb=disabled") from None
        if self._run is None:
            raise ValueError(
                f"tracking.wandb=online: no API key for {server}; run `wandb login` or set WANDB_API_KEY, or use tracking.wandb=offline"
            )
        self._run.define_metric("*", step_metric="tokens")
        self.online = mode == "online"
        self.next_step: int = self._run.starting_step
        self.url: str | None = self._run.url

    def log(self, row: dict[str, Any]) -> None:
        """Show one row of metrics, unless the server has its step: wandb keeps the first row of a step and cannot replace it."""
        if row["step"] >= self.next_step:
            self._run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])

    def finish(self, exit_code: int = 0) -> None:
        """End the run; TimeoutError when not everything was uploaded within finish_seconds."""
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            _end_service()  # an offline run's file is not whole before


def start_live(description: dict[str, Any], *, mode: Literal["online", "offline"], run_dir: Path) -> WandbRun:
    """The wandb run of a training run: of the mode asked for, or offline with one warning when the server is dead."""
    try:
        run = WandbRun(description, mode=mode, directory=run_dir, finish_seconds=_FINISH_SECONDS)
    except ServerUnavailable as error:
        logger.warning(
            "wandb did not start with the server %s; this run goes on and is recorded offline; upload it later with `%s`",
            error, sync_command(run_dir),
        )
        return WandbRun(description, mode="offline", directory=run_dir, finish_seconds=_FINISH_SECONDS)
    if run.online:
        logger.info("wandb: %s", run.url)
    else:
        logger.info("wandb is offline; upload with `%s`", sync_command(run_dir))
    return run


def _end_service() -> None:
    import wandb

    with contextlib.suppress(Exception):  # it may have died before
        wandb.teardown()


def _init_arguments(description: dict[str, Any], mode: str) -> dict[str, Any]:
    which = description["wandb"]
    return {
        **{key: which[key] for key in ("id", "project", "entity", "group", "tags")},
        "name": description["run_name"],
        "config": {key: value for key, value in description.items() if key not in ("run_name", "wandb")},
        # Offline nothing can be asked, and wandb warns when it is told to.
        "resume": "allow" if mode == "online" else None,
    }


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
