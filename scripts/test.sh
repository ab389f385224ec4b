#!/usr/bin/env bash
# The test suite, in .venv, which is made first where it is missing:
#
#     bash scripts/test.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/install.sh"
source "$root/launch/environment.sh"

# Python keeps what it compiles whatever the environment says: pip leaves it to the first import, and a hundred processes import the same.
unset PYTHONDONTWRITEBYTECODE
pip_install() { python -m pip install -qq --no-compile --disable-pip-version-check --no-input "$@"; }

# The stamp lies in .venv and so is gone whenever that is made anew.
if ! cmp -s requirements-test.txt .venv/test-stamp; then
    # DeepSpeed's CPU Adam, which tests would wait for, compiles beside pip. If it fails, they say so.
    DS_ACCELERATOR=cpu python -c 'from training.distributed import load_op; load_op("CPUAdamBuilder")' >/dev/null 2>&1 &
    pip_install -c .venv/constraints.txt -r requirements-test.txt
    # Alone: of the 40 packages that it comes with, scipy among them, its tasks of perplexity and choice import none but those named above.
    pip_install -c .venv/constraints.txt --no-deps lm-eval
    cp requirements-test.txt .venv/test-stamp
fi
# The newest release of Triton beside the pinned one: tests/kernels/test_triton.py compiles and interprets the kernels with both.
newest=3.9.0
if [[ ! -f .venv/triton-$newest/triton/__init__.py ]]; then
    pip_install --no-deps --target ".venv/triton-$newest" "triton==$newest"
fi
wait
if (($#)); then exec python -m pytest --durations=10 "$@"; fi
# Two files at a time, in the order that tests/conftest.py gives them.
exec python -m pytest --durations=10 -n 2 --dist loadfile --no-loadscope-reorder
