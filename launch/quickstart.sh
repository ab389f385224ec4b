#!/usr/bin/env bash
# From a bare clone to a trained GPT and its loss curve, on every GPU of this machine or on two CPU processes:
#
#     bash launch/quickstart.sh [section.key=value ...]
#
# Installs (launch/install.sh), prepares Shakespeare as bytes, trains configs/quickstart.yaml and draws the curve.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$here/install.sh"
SECONDS=0
source "$here/environment.sh"

# What decides about processes and folders may be overridden like any other key.
global_batch_size=$(sed -n 's/^ *global_batch_size: *\([0-9]*\).*/\1/p' configs/quickstart.yaml)
output_dir=runs
name=""
for override in "$@"; do
    case $override in
        train.global_batch_size=*) global_batch_size=${override#*=} ;;
        run.output_dir=*) output_dir=${override#*=} ;;
        run.name=*) name=${override#*=} ;;
    esac
done
if [ -z "$name" ]; then # a run folder is never overwritten
    name=quickstart
    for ((attempt = 2; ; attempt++)); do
        [ -e "$output_dir/$name" ] || break
        name=quickstart-$attempt
    done
fi
run_dir=$output_dir/$name

if [ "$gpus" -gt 0 ]; then
    processes=$gpus
    if [[ $global_batch_size =~ ^[1-9][0-9]*$ ]]; then # train.py derives null, and refuses what is no number
        while [ $((global_batch_size % processes)) -ne 0 ]; do
            processes=$((processes - 1))
        done
    fi
    if [ "$processes" -lt "$gpus" ]; then
        echo "quickstart: using $processes of $gpus GPUs, the most that divide the global batch of $global_batch_size sequences"
    fi
    # --include instead of CUDA_VISIBLE_DEVICES, which the launcher obeys only with a message and never beside --num_gpus.
    IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
    included=$(IFS=, && echo "${devices[*]:0:processes}")
    if [[ ! $included =~ ^[0-9,\ ]+$ ]]; then
        echo "quickstart: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names devices by UUID, and the launcher takes indices alone:" \
            "set it to indices of nvidia-smi -L, as in CUDA_VISIBLE_DEVICES=0,1" >&2
        exit 2
    fi
    placement=(--include "localhost:$included")
    unset CUDA_VISIBLE_DEVICES
else
    placement=(--num_gpus 2) # to the launcher a number of processes, GPUs or not
fi

[ -e data/shakespeare-bytes/manifest.json ] || python scripts/prepare_data.py
free_port=$(python -c 'from training.distributed import free_port; print(free_port())')
deepspeed --quiet "${placement[@]}" --master_port "$free_port" \
    train.py --config configs/quickstart.yaml "run.output_dir=$output_dir" "run.name=$name" "$@"
python scripts/compare_runs.py "$run_dir" --png "$run_dir/loss.png" >/dev/null

echo
echo "loss curve  $(realpath -m "$run_dir")/loss.png"
echo "metrics     $(realpath -m "$run_dir")/metrics.jsonl"
echo "elapsed     $((SECONDS / 60)) min $((SECONDS % 60)) s since the end of the install"
