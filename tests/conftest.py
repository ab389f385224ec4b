"""Tests marked `gpu`, or `gpu(count=N)`, are skipped where torch sees fewer CUDA devices; every other test runs everywhere."""
import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        needed = max((marker.kwargs.get("count", 1) for marker in item.iter_markers("gpu")), default=0)
        if needed > torch.cuda.device_count():
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU{'s' * (needed > 1)}"))
