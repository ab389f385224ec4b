# Sourced by the other scripts after launch/install.sh: enters the repository and .venv, and sets what its processes read.
# Sets: gpus, the number of GPUs that torch can use. Exits where there are GPUs and torch can use none, unless CUDA_VISIBLE_DEVICES is set.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source .venv/bin/activate

# Several processes share the cores; torch and BLAS would each take all of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
        echo "environment: nvidia-smi shows a GPU (driver ${driver%%$'\n'*}), but torch sees none:" \
            "$(python -c 'import torch; print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}")')." >&2
        echo "  Update the driver to one for that CUDA version, or take a torch built for the driver you have:" \
            "TORCH_INDEX_URL=<index> bash launch/install.sh. To train on the CPU on purpose: export CUDA_VISIBLE_DEVICES=" >&2
        exit 1
    fi
    export DS_ACCELERATOR=cpu # DeepSpeed would guess the same, with a warning from every process
fi
