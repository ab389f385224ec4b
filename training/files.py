"""Files that are there whole or not at all, whatever crashes."""

import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Replace a file, on the disk too, so that a crash leaves the old content or the new one."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # several processes may write the same file
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    rename_durably(temporary, file)


def rename_durably(temporary: Path, file: Path) -> None:
    """Put ``temporary`` in ``file``'s place, on the disk too: a file's own fsync does not cover its name."""
    temporary.replace(file)
    fsync(file.parent)


def fsync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
