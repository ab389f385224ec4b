#!/usr/bin/env bash
# The test suite, in .venv, which is made first where it is missing:
#
#     bash scripts/test.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/install.sh"
source "$root/launch/environment.sh"

# The stamp lies in .venv and so is gone whenever that is made anew.
if ! cmp -s requirements-test.txt .venv/test-stamp; then
    python -m pip install -qq --disable-pip-version-check --no-input -c .venv/constraints.txt -r requirements-test.txt
    cp requirements-test.txt .venv/test-stamp
fi
# The newest release of Triton beside the pinned one: tests/kernels/test_triton.py compiles and interprets the kernels with both.
newest=3.9.0
if [[ ! -f .venv/triton-$newest/triton/__init__.py ]]; then
    python -m pip install -qq --disable-pip-version-check --no-input --no-deps --target ".venv/triton-$newest" "triton==$newest"
fi
if (($#)); then exec python -m pytest --durations=10 "$@"; fi
# What starts training measures how soon it ends, and gets the machine to itself.
python -m pytest --durations=10 -n 2 --dist loadfile tests/kernels tests/launch tests/model tests/scripts
exec python -m pytest --durations=10 tests/training tests/test_*.py
