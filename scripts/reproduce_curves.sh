#!/usr/bin/env bash
# The training figures of the README: gpt2-124m on source code with our kernel and with PyTorch's, on one GPU and on two, and gpt-1.3b.
#
#     bash scripts/reproduce_curves.sh [data] [one] [two] [large] [summary]
#
# Without arguments every part, in that order; about 15 minutes on two H200s.  Runs go to runs/curves, the table, the picture and the
# JSON behind them to docs/results.  On a machine of one GPU leave out "two"; "large" takes every GPU.
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
        "run.output_dir=$runs" "run.name=$name" "data.corpus=$corpus" "$@"
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

for part in "${@:-data one two large summary}"; do
    for name in $part; do "$name"; done
done
