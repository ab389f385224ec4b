#!/usr/bin/env bash
# The training figures of the README: gpt2-124m on source code with our kernel and with PyTorch's, on one GPU and on two, and gpt-1.3b;
# three seeds of gpt2-124m beside one run of every other backend, with compare_runs.py's verdict; and packed documents of 8192 tokens with
# document masks on two kernels that skip what they hide, beside the same run without the mask, where there is nothing to skip.
#
#     bash scripts/reproduce_curves.sh [data] [one] [two] [large] [summary] [seeds] [documents] [modes]
#
# Without arguments every part but modes (checkpointing, offload, precisions), in that order; about 30 minutes on two H200s.  Runs go to
# runs/curves, runs/seeds and so on, the tables, pictures and the JSON behind them to docs/results.  On a machine of one GPU leave out "two";
# "large" takes every GPU.
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

short() { # short CONFIG MICRO_BATCH "NAME [override ...]" ...: 150 steps of each, one run a GPU, all GPUs at work
    local config=$1 micro_batch=$2 gpu i run processes=()
    shift 2
    for ((gpu = 0; gpu < gpus; gpu++)); do
        for ((i = gpu + 1; i <= $#; i += gpus)); do
            read -ra run <<< "${!i}"
            train "${run[0]}" "$config" "$gpu" "train.micro_batch_size=$micro_batch" \
                train.steps=150 optimizer.warmup_steps=50 eval.every=50 "${run[@]:1}"
        done &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process"; done
}

seeds() {
    local runs=runs/seeds run queue=()
    for run in triton-1 triton-2 triton-3 sdpa-1 sdpa_cudnn-1 sdpa_flash-1 sdpa_efficient-1 eager-1; do
        queue+=("$run attention.backend=${run%-*} run.seed=${run#*-}")
    done
    short gpt2-124m 32 "${queue[@]}"
    python3 scripts/compare_runs.py "$runs"/* --baseline backend=triton --json docs/results/seeds.json --png docs/results/seeds.png --html docs/results/seeds.html
}

documents() {
    local runs=runs/documents
    short gpt2-124m-documents 4 "triton attention.backend=triton" "flex attention.backend=flex" \
        "triton-unmasked attention.backend=triton attention.document_mask=false"
    python3 scripts/compare_runs.py "$runs"/* --json docs/results/documents.json --png docs/results/documents.png
}

modes() { # 150 steps each: what memory and speed the modes cost, what the precisions; the last is the classic recipe
    local runs=runs/modes
    short gpt2-355m 8 "none" "full train.activation_checkpointing=full" "every_2 train.activation_checkpointing=every_n train.checkpoint_every=2" \
        "selective train.activation_checkpointing=selective" "matmuls train.activation_checkpointing=selective train.keep_matmuls=true" \
        "deepspeed train.activation_checkpointing=deepspeed" "stage-1 zero.stage=1" "stage-2 zero.stage=2" \
        "offload-optimizer zero.offload_optimizer=cpu" "offload-both zero.offload_optimizer=cpu zero.offload_parameters=cpu"
    short gpt2-124m 32 "bf16" "fp16 train.precision=fp16" "fp32 train.precision=fp32" "bf16-states train.bf16_states=true"
    short deepspeed-offload 8 "classic"
    python3 scripts/compare_runs.py "$runs"/* --json docs/results/modes.json --png docs/results/modes.png
}

for part in "${@:-data one two large summary seeds documents}"; do
    for name in $part; do "$name"; done
done
