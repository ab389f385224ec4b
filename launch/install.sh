#!/usr/bin/env bash
# Makes .venv and installs what training needs, in the versions that were tested:
#
#     bash launch/install.sh
#
# constraints-gpu.txt applies where an NVIDIA GPU is seen, constraints-cpu.txt elsewhere. What is up to date is left alone.
#
# PYTHON           the interpreter, 3.11 or 3.12 (default: the first that fits of .venv's own, python3, python3.12, python3.11)
# TORCH_INDEX_URL  the package index torch is taken from (default: the one .venv was made with, else pip's own)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/install-stamp

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

# The interpreter behind a command, with links and virtual environments resolved.
resolve() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable))' 2>/dev/null; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

find_python() {
    local command python version refused="" candidates=("$venv/bin/python" python3 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for command in "${candidates[@]}"; do
        python=$(resolve "$command") || continue
        version=$(version_of "$python")
        case $version in
            3.11 | 3.12) echo "$python" && return ;;
        esac
        refused+=" $command is Python $version."
    done
    fail "Python 3.11 or 3.12 is needed.${refused:- ${PYTHON:-python3} does not run.}" \
        "  Debian/Ubuntu: apt install python3.12 python3.12-venv python3.12-dev (or 3.11); elsewhere: python.org, conda, pyenv." \
        "  If it is not on PATH: PYTHON=/path/to/python3.12 bash launch/install.sh"
}

# Reports every fault before giving up, so that one visit to the package manager cures them all.
check_machine() {
    local header faults=()
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        faults+=("$python lacks the venv module (ensurepip)."
            "  Debian/Ubuntu: apt install python$version-venv; elsewhere: a Python built with ensurepip.")
    fi
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    if [ ! -f "$header" ]; then
        faults+=("the headers of $python are missing: there is no $header."
            "  Debian/Ubuntu: apt install python$version-dev; elsewhere: python$version-devel or the like.")
    fi
    if [ -z "$CXX" ]; then
        faults+=("no C++ compiler was found (c++, g++, clang++ or \$CXX); DeepSpeed and Triton compile code."
            "  Debian/Ubuntu: apt install g++; elsewhere: GCC or Clang.")
    fi
    [ ${#faults[@]} -eq 0 ] || fail "${faults[@]}"
}

phase() { # phase NAME COMMAND...
    local name=$1 begin=$SECONDS
    shift
    "$@" || fail "failed: $name"
    printf 'install: %4d s  %s\n' $((SECONDS - begin)) "$name"
}

pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input -c "$venv/constraints.txt" "$@"; }

install_torch() {
    # Only torch itself: what it depends on comes from the default index.
    [ -z "$torch_index" ] || pip_install --no-deps --index-url "$torch_index" torch || return
    pip_install torch setuptools
}

# Built from source, with torch importable. DeepSpeed's own communication for CPUs is compiled here rather than at first use, where an
# interrupted build leaves a lock that later runs wait on. As accelerator "cpu" the build asks for no CUDA toolkit. pip's cache would
# return a build for another torch.
install_deepspeed() {
    PATH=$venv/bin:$PATH DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_ENABLE_NINJA=1 \
        pip_install --no-cache-dir --no-build-isolation --use-pep517 deepspeed
}

python=$(find_python)
# torch's extension builder calls c++ unless told otherwise, and a machine may have g++ or clang++ alone.
export CXX=${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}
version=$(version_of "$python")
check_machine
profile=cpu
if nvidia-smi -L >/dev/null 2>&1; then
    profile=gpu
fi
torch_index=${TORCH_INDEX_URL:-$(cat "$venv/torch-index" 2>/dev/null || true)}

cd "$root"
wanted=$({
    "$python" -c 'import sys; print(sys.executable, sys.version)'
    echo "$root $profile $torch_index"
    cat requirements.txt constraints-common.txt "constraints-$profile.txt" launch/install.sh
} | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

# The stamp marks the folder as ours from its first moment, and as complete only at the end.
if [ -e "$venv" ] && [ ! -e "$stamp" ]; then
    fail "$venv exists and was not made by launch/install.sh: move it away, then run this again."
fi
case $profile in
    gpu) echo "install: Python $version, constraints-gpu.txt (nvidia-smi shows an NVIDIA GPU)" ;;
    cpu) echo "install: Python $version, constraints-cpu.txt (nvidia-smi shows no NVIDIA GPU)" ;;
esac
rm -rf "$venv"
mkdir "$venv"
echo incomplete >"$stamp"
echo "$torch_index" >"$venv/torch-index"
phase "virtual environment" "$python" -m venv "$venv"

# Triton comes last and by itself: torch for CUDA insists on one Triton and torch for CPUs on none, while the kernels
# are tested with one version.
sed "s|^-c |-c $root/|; /^triton==/d" "constraints-$profile.txt" >"$venv/constraints.txt"
grep -vE '^(torch|deepspeed|triton)\b' requirements.txt >"$venv/requirements.txt"
phase "torch" install_torch
phase "other packages" pip_install --no-build-isolation -r "$venv/requirements.txt"
phase "deepspeed (compiles)" install_deepspeed
phase "triton" pip_install --no-deps "$(grep '^triton==' "constraints-$profile.txt")"
echo "$wanted" >"$stamp"
echo "install: done in $SECONDS s"
