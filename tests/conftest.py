"""Tests marked `gpu`, or `gpu(count=N)`, are skipped where torch sees fewer CUDA devices; every other test runs everywhere."""
import pytest
import torch

# First the files that measure how soon something ends, beside each other, for they mostly wait; then the longest, so that none is left at the end.
FIRST = ["test_kills", "test_reliability", "test_launcher", "test_train", "test_tracking", "test_zero", "test_checkpoints", "test_memory", "test_triton"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        needed = max((marker.kwargs.get("count", 1) for marker in item.iter_markers("gpu")), default=0)
        if needed > torch.cuda.device_count():
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU{'s' * (needed > 1)}"))
