#!/usr/bin/env bash
# The training figures of the README: gpt2-124m on source code with our kernel and with PyTorch's, on one GPU and on two, and gpt-1.3b;
# and three seeds of gpt2-124m beside one run of every other backend, with compare_runs.py's verdict.
#
#     bash scripts/reproduce_curves.sh [data] [one] [two] [large] [summary] [seeds]
#
# Without arguments every part, in that order; about 25 minutes on two H200s.  Runs go to runs/curves and runs/seeds, the tables, pictures
# and the JSON behind them to docs/results.  On a machine of one GPU leave out "two"; "large" takes every GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=runs/curves
corpus=data/python-source-gpt2
if [ -d .venv ]; then
    source launch/environment.sh
else # a machine with an environment of its own
    gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
fi

train() { # train NAME CONFIG DEVICES [override ...]
    local name=$1 config=$2 devices=$3 port
    shift 3
    port=$(python3 -c 'from training.distributed import free_port; print(free_port())')
    deepspeed --quiet --include "localhost:$devices" --master_port "$port" train.py --config "configs/$config.yaml" \
        "run.output_dir=$runs" "run.name=$name" "data.corpus=$corpus" checkpoint.every=null "$@"
}

data() { [ -e $corpus/manifest.json ] || python3 scripts/prepare_data.py --source python-source --tokenizer gpt2 --out $corpus; }

one() { # side by side where there are two GPUs
    local processes=()
    train triton-1gpu gpt2-124m 0 attention.backend=triton train.micro_batch_size=32 &
    processes+=($!)
    [ "$gpus" -gt 1 ] || wait "${processes[0]}"
    train sdpa-1gpu gpt2-124m "$((gpus > 1))" attention.backend=sdpa train.micro_batch_size=32 &
    processes+=($!)
    for process in "${processes[@]}"; do wait "$process"; done
}

two() {
    train triton-2gpu gpt2-124m 0,1 attention.backend=triton train.micro_batch_size=32
    train sdpa-2gpu gpt2-124m 0,1 attention.backend=sdpa train.micro_batch_size=32
}

large() {
    train "gpt-1.3b-triton-${gpus}gpu" gpt-1.3b "$(seq -s, 0 $((gpus - 1)))" attention.backend=triton train.steps=50 train.micro_batch_size=16
}

summary() {
    python3 scripts/compare_runs.py "$runs"/* --json docs/results/curves.json --png docs/results/curves.png
}

seeds() { # one run a GPU, all GPUs at work
    local runs=runs/seeds gpu queue=() processes=()
    for run in triton-1 triton-2 triton-3 sdpa-1 sdpa_cudnn-1 sdpa_flash-1 sdpa_efficient-1 eager-1; do queue+=("$run"); done
    for ((gpu = 0; gpu < gpus; gpu++)); do
        for ((i = gpu; i < ${#queue[@]}; i += gpus)); do
            train "${queue[i]}" gpt2-124m "$gpu" "attention.backend=${queue[i]%-*}" "run.seed=${queue[i]#*-}" \
                train.micro_batch_size=32 train.steps=150 optimizer.warmup_steps=50 eval.every=50
        done &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process"; done
    python3 scripts/compare_runs.py "$runs"/* --baseline backend=triton --json docs/results/seeds.json --png docs/results/seeds.png --html docs/results/seeds.html
}

for part in "${@:-data one two large summary seeds}"; do
    for name in $part; do "$name"; done
done
