"""The folder of a checkpoint on the disk: its manifest, and the check against it."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.files import write_atomically

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"


def seal(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, once all of it is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def write_manifest(folder: Path, seals: dict[str, Any]) -> None:
    """``seals``: what ``seal`` returned for each file name of the folder."""
    write_atomically(folder / MANIFEST_FILE, json.dumps({"format": FORMAT_VERSION, "files": seals}, indent=2) + "\n")


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def is_step_folder(path: Path) -> bool:
    return path.match("step_" + "[0-9]" * 8) and path.is_dir()


def named_checkpoints(path: Path) -> list[Path]:
    """What a path given by a user stands for: one checkpoint, or all of a run, newest first; nothing where there is none."""
    if is_step_folder(path):
        return [path]
    return complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Newest first; those still being written have another name."""
    return sorted(filter(is_step_folder, checkpoints.glob("step_*")), reverse=True)


def faults_of(folder: Path, *, share: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint, a line each; nothing when it is intact.

    Args:
        share: which of its files to read, by their place in the manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        files = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_FILE} is damaged ({type(error).__name__}: {' '.join(str(error).split())})"]
    if version != FORMAT_VERSION:
        return [f"{MANIFEST_FILE}: format {version}, and this program reads {FORMAT_VERSION}"]
    if STATE_FILE not in files:
        return [f"{MANIFEST_FILE} is damaged (it does not list {STATE_FILE})"]
    return [fault for name, expected in sorted(files.items())[share] for fault in _faults_of_file(folder / name, *expected)]


def _faults_of_file(file: Path, size: int, sha256: str) -> Iterator[str]:
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno()).st_size
            if found != size:
                yield f"{file.name} has {found:,} bytes instead of {size:,}"
            elif hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
                yield f"{file.name} was altered (its SHA-256 is not the manifest's)"
    except FileNotFoundError:
        yield f"{file.name} is missing"
    except OSError as error:
        yield f"{file.name} cannot be read ({error.strerror})"
