"""python -m kernels.attention: which backend can do what, as a Markdown table, and what "auto" chooses on this machine."""

import torch

from kernels.attention.backends import BACKENDS, FEATURES, FLASH_ATTN, FLASH_ATTN_PACKAGES, FLASH_ATTN_VERSION, Capabilities, choose

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def table() -> str:
    """Markdown: a row a feature, a column a backend. The same on every machine, whatever is installed there."""
    columns = {}
    for name, can in BACKENDS.items():
        columns |= {f"flash_attn {n}": able for n, able in FLASH_ATTN.items()} if name == "flash_attn" else {name: can}
    rows = {
        "devices": {name: "CPU, GPU" if "cpu" in can.devices and name != "triton" else "GPU" for name, can in columns.items()},
        "compute capability": {name: _capability(can) for name, can in columns.items()},
        "dtypes": {name: ", ".join(DTYPES[dtype] for dtype in can.dtypes) for name, can in columns.items()},
        "head_dim": {name: _head_dims(can.head_dims) for name, can in columns.items()},
    }
    for feature, (title, _) in FEATURES.items():
        rows[title] = {name: "yes" if feature in can.features else "" for name, can in columns.items()}
    lines = [["", *columns], ["---"] * (len(columns) + 1), *([title, *cells.values()] for title, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _capability(can: Capabilities) -> str:
    least = ".".join(map(str, can.compute_capability))
    return "any" if can.compute_capability == (0, 0) else least + (" and later" if can.newer_gpus else " only")


def _head_dims(numbers: range) -> str:
    if len(numbers) > 1000:
        return "any" if numbers.step == 1 else f"multiples of {numbers.step}"
    if len(numbers) < 4:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}" + (f", multiples of {numbers.step}" if numbers.step > 1 else "")


def main() -> None:
    print(table())
    on_gpu = torch.cuda.is_available()
    here = dict(device_type="cuda" if on_gpu else "cpu", compute_capability=torch.cuda.get_device_capability() if on_gpu else None)
    print(f"\nHere: {torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, flash-attn ", end="")
    print(f"{FLASH_ATTN_VERSION} ({FLASH_ATTN_PACKAGES[FLASH_ATTN_VERSION]})" if FLASH_ATTN_VERSION else "not installed")
    for dtype in (torch.bfloat16, torch.float32):
        for features in ({}, {"window": True}, {"dropout": True}):
            backend, why = choose(**here, dtype=dtype, head_dim=64, **features)
            print(f"auto, {DTYPES[dtype]}, head_dim 64{''.join(f', {name}' for name in features)}: {backend} ({why})")


if __name__ == "__main__":
    main()
