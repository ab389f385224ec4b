"""What a step cost: the row of metrics.jsonl."""

import resource
import time

import torch

from model.gpt import count_parameters, count_recomputed
from training.config import Config
from training.engine import StepResult, checkpointing_of
from training.flops import hardware_flops_per_token, model_flops_per_token, peak_flops
from training.pretrained import count_huggingface


class Meter:
    """Turns step results and clock readings into rows; see ``training.flops`` for MFU and HFU.

    elapsed_seconds: of earlier starts of the run.
    device_name: of the GPUs; None: this machine's.
    recomputed: what the backward pass computes again, as of ``count_recomputed``; None: what train.activation_checkpointing does.
    """

    def __init__(self, config: Config, world: int, *, elapsed_seconds: float = 0.0, device_name: str | None = None,
                 recomputed: dict[str, int] | None = None):
        model = config.model
        self.world = world
        self.tokens_per_step = config.train.global_batch_size * model.sequence_length
        if model.huggingface is not None:
            self.parameters, recomputed = count_huggingface(config, checkpointing_of(config))
        else:
            tile = config.train.mlp_tile
            tiled = tile is not None and tile < config.train.micro_batch_size * model.sequence_length // config.parallel.sequence
            self.parameters = count_parameters(model)
            recomputed = recomputed or count_recomputed(model, checkpointing_of(config), compiled=config.train.compile, tiled=tiled)
        shape = {"matmul_parameters": self.parameters["matmul"], "layers": model.layers, "attention_width": model.heads * model.head_dim,
                 "sequence_length": model.sequence_length, "window": config.attention.window}
        self.flops_per_token = model_flops_per_token(**shape)
        self.causal_flops_per_token = model_flops_per_token(**shape, causal_discount=True)
        self.hardware_flops_per_token = hardware_flops_per_token(
            **shape, recomputed_parameters=recomputed["parameters"], recomputed_layers=recomputed["layers"])
        self.device_name = device_name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
        self.peak_flops = peak_flops(self.device_name, config.train.precision)
        self.started = time.perf_counter() - elapsed_seconds

    def elapsed_seconds(self) -> float:
        """Seconds since the start, and those of earlier starts of the run."""
        return time.perf_counter() - self.started

    def description(self) -> dict:
        """What the rows assume, for run.json."""
        return {"parameters": self.parameters, "flops_per_token": self.flops_per_token, "causal_flops_per_token": self.causal_flops_per_token,
                "hardware_flops_per_token": self.hardware_flops_per_token,
                "device_name": self.device_name, "peak_flops_per_gpu": self.peak_flops, "world_size": self.world}

    def utilisation(self, tokens_per_second_per_gpu: float) -> dict[str, float | None]:
        """MFU, MFU of what the causal mask shows alone, and HFU; null where the peak is not known."""
        flops = {"mfu": self.flops_per_token, "mfu_causal": self.causal_flops_per_token, "hfu": self.hardware_flops_per_token}
        return {name: each * tokens_per_second_per_gpu / self.peak_flops if self.peak_flops else None for name, each in flops.items()}

    def row(self, step: int, result: StepResult, *, step_seconds: float, data_seconds: float) -> dict:
        """One optimizer step but for its loss and norm, ``step`` counted from 1; seconds are of that step, without evaluation, as the GPU took it."""
        tokens_per_second = self.tokens_per_step / step_seconds
        per_gpu = tokens_per_second / self.world
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "flops": step * self.tokens_per_step * self.flops_per_token,
            "elapsed_seconds": self.elapsed_seconds(),
            "lr": result.lr,
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": per_gpu,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            **self.utilisation(per_gpu),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def mark() -> torch.cuda.Event | float:
    """Now, in the GPU's order of things; on a CPU the clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """From one ``mark`` to another, for which the host waits."""
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_memory_bytes() -> int:
    """The most memory this process held so far: allocated on its GPU, or resident when it trains on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
