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
    # Alone: of the 40 packages that it comes with, scipy among them, its tasks of perplexity and choice import none but those named above.
    python -m pip install -qq --disable-pip-version-check --no-input -c .venv/constraints.txt --no-deps lm-eval
    cp requirements-test.txt .venv/test-stamp
fi
# The newest release of Triton beside the pinned one: tests/kernels/test_triton.py compiles and interprets the kernels with both.
newest=3.9.0
if [[ ! -f .venv/triton-$newest/triton/__init__.py ]]; then
    python -m pip install -qq --disable-pip-version-check --no-input --no-deps --target ".venv/triton-$newest" "triton==$newest"
fi
if (($#)); then exec python -m pytest --durations=10 "$@"; fi
# Two files at a time, the longest first, but for those that measure how soon something ends: these get the machine to themselves.
alone=(tests/training/test_kills.py tests/training/test_reliability.py tests/training/test_tracking.py tests/test_*.py)
longest=(tests/training/test_{zero,checkpoints,memory}.py tests/kernels/test_triton.py)
python -m pytest --durations=10 -n 2 --dist loadfile "${longest[@]}" tests "${alone[@]/#/--ignore=}"
exec python -m pytest --durations=10 "${alone[@]}"
