"""Tests marked `gpu`, or `gpu(count=N)`, are skipped where torch sees fewer CUDA devices; every other test runs everywhere."""
import pytest
import torch

# In this order, then the other files: the longest, lest one is left at the end, beside those that mostly wait for processes to end.
FIRST = [
    *("test_kills", "test_zero", "test_reliability", "test_launcher", "test_checkpoints"),
    *("test_train", "test_memory", "test_tracking", "test_triton"),
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        needed = max((marker.kwargs.get("count", 1) for marker in item.iter_markers("gpu")), default=0)
        if needed > torch.cuda.device_count():
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU{'s' * (needed > 1)}"))
