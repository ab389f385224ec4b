#!/usr/bin/env bash
# The training figures of the README: gpt2-124m on source code with our kernel and with PyTorch's, on one GPU and on two, and gpt-1.3b;
# three seeds of gpt2-124m beside one run of every other backend, with compare_runs.py's verdict; and packed documents of 8192 tokens with
# document masks on two kernels that skip what they hide, beside the same run without the mask, where there is nothing to skip.
#
#     bash scripts/reproduce_curves.sh [data] [one] [two] [large] [summary] [seeds] [documents] [hopper] [modes] [precisions] [to_loss]
#
# Without arguments every part but hopper, modes (checkpointing, stages, offload), precisions and to_loss, in that order; about 30 minutes on two H200s.
# Runs go to runs/curves, runs/seeds and so on, the tables, pictures and the JSON behind them to docs/results.  On a machine of one GPU leave out
# "two"; "large" takes every GPU.
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

# side_by_side "NAME CONFIG STEPS [override ...]" ...: one run on each GPU at a time, the next goes to the GPU that is free first
side_by_side() {
    local queue gpu run processes=()
    queue=$(mktemp)
    printf '%s\n' "$@" > "$queue"
    for ((gpu = 0; gpu < gpus; gpu++)); do
        while read -ra run < <(flock "$queue.lock" sed -i -e '1{w /dev/stdout' -e 'd}' "$queue"); do
            train "${run[0]}" "${run[1]}" "$gpu" "train.steps=${run[2]}" "optimizer.warmup_steps=$((run[2] / 3))" \
                "eval.every=$((run[2] / 3))" "${run[@]:3}"
        done &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process"; done
    rm "$queue" "$queue.lock"
}

seeds() {
    local runs=runs/seeds run queue=()
    for run in triton-1 triton-2 triton-3 sdpa-1 sdpa_cudnn-1 sdpa_flash-1 sdpa_efficient-1 eager-1; do
        queue+=("$run gpt2-124m 150 train.micro_batch_size=32 attention.backend=${run%-*} run.seed=${run#*-}")
    done
    side_by_side "${queue[@]}"
    python3 scripts/compare_runs.py "$runs"/* --baseline backend=triton --json docs/results/seeds.json --png docs/results/seeds.png --html docs/results/seeds.html
}

documents() {
    local runs=runs/documents of="gpt2-124m-documents 75 train.micro_batch_size=4 attention.backend"
    side_by_side "triton $of=triton" "flex $of=flex" "triton-unmasked $of=triton attention.document_mask=false"
    python3 scripts/compare_runs.py "$runs"/* --json docs/results/documents.json --png docs/results/documents.png
}

hopper() { # the kernel of Hopper GPUs beside PyTorch's, two seeds of each, 65,536 tokens a step
    local runs=runs/hopper run queue=()
    for run in hopper-1 sdpa-1 hopper-2 sdpa-2; do
        queue+=("gpt-1.3b-$run gpt-1.3b 30 train.global_batch_size=32 eval.sequences=64 attention.backend=${run%-*} run.seed=${run#*-}"
            "gpt2-124m-$run gpt2-124m 100 train.micro_batch_size=32 train.global_batch_size=64 attention.backend=${run%-*} run.seed=${run#*-}")
    done
    side_by_side "${queue[@]}"
    python3 scripts/compare_runs.py "$runs"/gpt2-124m-* --baseline backend=sdpa --json docs/results/hopper-124m.json --png docs/results/hopper-124m.png
    python3 scripts/compare_runs.py "$runs"/gpt-1.3b-* --baseline backend=sdpa --json docs/results/hopper-1.3b.json --png docs/results/hopper-1.3b.png
}

precisions() { # of 65,536 tokens a step
    local runs=runs/precisions of="gpt2-124m 75 train.micro_batch_size=32 train.global_batch_size=64"
    side_by_side "fp32 $of train.precision=fp32" "bf16 $of" "fp16 $of train.precision=fp16" "bf16-2 $of run.seed=2" "bf16-3 $of run.seed=3"
    python3 scripts/compare_runs.py "$runs"/* --json docs/results/precisions.json --png docs/results/precisions.png
}

to_loss() { # wall-clock to one validation loss with standard attention, PyTorch's and ours, on one GPU and on all, one run at a time
    local runs=runs/to_loss devices count backend
    for devices in 0 "$(seq -s, 0 $((gpus - 1)))"; do
        count=$(tr -cd , <<< "$devices" | wc -c)
        for backend in eager sdpa auto; do
            train "${backend/auto/ours}-$((count + 1))gpu" gpt2-124m "$devices" "attention.backend=$backend" train.micro_batch_size=32 eval.every=10 eval.sequences=256
        done
        [ "$gpus" -gt 1 ] || break
    done
    python3 scripts/compare_runs.py "$runs"/* --target 3.0 --json docs/results/to_loss.json --png docs/results/to_loss.png
}

modes() { # what the modes cost in speed and memory: 12 steps of 32 sequences each; and the classic recipe
    local runs=runs/modes of="12 train.micro_batch_size=8 train.global_batch_size=32 eval.every=0 eval.sequences=8" model mode queue
    queue=("classic deepspeed-offload $of")
    for mode in "full full" "none none" "selective selective" "deepspeed deepspeed" \
        "offload-both full zero.offload_optimizer=cpu zero.offload_parameters=cpu" "offload-optimizer full zero.offload_optimizer=cpu" \
        "stage-2 full zero.stage=2" "stage-1 full zero.stage=1" "every_2 every_n train.checkpoint_every=2" "matmuls selective train.keep_matmuls=true"; do
        for model in gpt-1.3b gpt2-355m; do
            queue+=("$model-${mode%% *} $model $of train.activation_checkpointing=${mode#* }")
        done
    done
    side_by_side "${queue[@]}"
    python3 scripts/compare_runs.py "$runs"/* --json docs/results/modes.json --png docs/results/modes.png
}

for part in "${@:-data one two large summary seeds documents}"; do
    for name in $part; do "$name"; done
done
