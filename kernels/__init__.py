"""GPU kernels as pure functions on tensors; this package knows nothing of models or training."""
