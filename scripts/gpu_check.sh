#!/usr/bin/env bash
# Everything that only a GPU can check, in at most nine minutes: every GPU test, kernel times beside PyTorch's, whether training learns.
#   bash scripts/gpu_check.sh [OUT.json]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -x .venv/bin/python ]]; then PATH="$PWD/.venv/bin:$PATH"; fi
exec python scripts/gpu_check.py "$@"
