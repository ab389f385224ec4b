# Sourced by the other scripts after launch/install.sh: enters the repository and .venv, and sets what its processes read.
# Sets: gpus, the number of GPUs that torch can use.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source .venv/bin/activate

# Several processes share the cores; torch and BLAS would each take all of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu # DeepSpeed would guess the same, with a warning from every process
fi
