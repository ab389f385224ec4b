"""Check checkpoints against their manifests: every file's size and SHA-256.

    python scripts/verify_checkpoint.py runs/NAME [runs/NAME/checkpoints/step_00000100 ...]

A run's folder stands for all of its checkpoints.  Exit code 0: all are intact; 1: one is damaged; 2: nothing to check.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.manifest import MANIFEST_FILE, STATE_FILE, faults_of, named_checkpoints  # noqa: E402


def describe(checkpoint: Path) -> str:
    files = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    saved = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    layout = saved["layout"]
    engine = "Megatron-Core" if "megatron" in saved["config"] else f"ZeRO stage {layout['zero_stage']}"
    return (f"step {saved['loop']['step']}, {len(files)} files, {sum(entry['bytes'] for entry in files.values()) / 1e9:.3f} GB, "
            f"{layout['world_size']} processes, {engine}, {layout['precision']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_CHECKPOINT")
    checkpoints = []
    for path in parser.parse_args().paths:
        found = named_checkpoints(path)
        if not found:
            print(f"verify_checkpoint: {path}: no checkpoint here; give the folder of a run, its checkpoints, or one checkpoint", file=sys.stderr)
            return 2
        checkpoints += found
    damaged = False
    for checkpoint in checkpoints:
        faults = faults_of(checkpoint)
        damaged |= bool(faults)
        print(f"{checkpoint}: " + (f"DAMAGED: {'; '.join(faults)}" if faults else f"intact ({describe(checkpoint)})"))
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
