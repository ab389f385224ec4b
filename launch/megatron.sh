#!/usr/bin/env bash
# Pretrains under Megatron-Core on every GPU of this machine, or on those in CUDA_VISIBLE_DEVICES:
#
#     bash launch/megatron.sh --config configs/megatron/megatron-124m.yaml [section.key=value ...]
#
# Installs first (launch/install.sh, requirements-megatron.txt). On several hosts, start scripts/megatron_pretrain.py by torchrun on each: docs/megatron.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$here/install.sh"
source "$here/environment.sh"

python -m pip install -qq --disable-pip-version-check --no-input -c .venv/constraints.txt -r requirements-megatron.txt
# Without a GPU one process says what is missing.
exec torchrun --standalone --nproc_per_node $((gpus > 0 ? gpus : 1)) scripts/megatron_pretrain.py "$@"
