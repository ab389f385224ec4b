"""Our Triton kernel in models of transformers, by Triton's interpreter: errors against transformers' own eager attention, as JSON."""

import json
import sys

from model.huggingface import register
from tests.model.huggingface_models import CONFIGS, batches, build, logits_and_gradients


def main() -> None:
    register("triton_flash", backend="triton")  # what it cannot do it would refuse
    seen = {}
    for name in CONFIGS:
        layers = 2 if name == "gemma2" else 1  # its two are of two kinds
        ours, eager = (build(name, attention, layers=layers) for attention in ("triton_flash", "eager"))
        for case in ("left", "packed"):
            batch = batches()[case]
            errors = [(a - b).abs().max().item() / b.abs().max().item()
                      for a, b in zip(logits_and_gradients(ours, batch), logits_and_gradients(eager, batch), strict=True)]
            seen[f"{name} {case}"] = errors
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
