"""What a checkpoint holds, whatever the order in which it was pickled."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from training.checkpoints import ALLOWED_CLASSES


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 over the tensors of each file: parameters, optimizer states, random generators."""
    with torch.serialization.safe_globals(ALLOWED_CLASSES):
        return {file.name: _hash(torch.load(file, map_location="cpu", weights_only=True)) for file in sorted(checkpoint.glob("*.pt"))}


def _hash(content: object) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(content):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(content: object) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors(part)
